"""The T5 encoder: sizes, buckets, a float64 reference, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from ivideo import text
from ivideo.data import shapes
from ivideo.text.t5 import T5Encoder, relative_buckets

SIZES = {  # vocab, dim, layers, heads, ff -> parameters of T5 1.1's encoder with its embedding
    "small": ((32128, 512, 8, 6, 1024), 35_332_800),
    "base": ((32128, 768, 12, 12, 2048), 109_628_544),
    "large": ((32128, 1024, 24, 16, 2816), 341_231_104),
    "xl": ((32128, 2048, 24, 32, 5120), 1_223_527_424),
    "xxl": ((32128, 4096, 24, 64, 10240), 4_762_310_656),
}
BYT5 = {  # dim, layers of encoder and decoder, heads, ff -> parameters of the whole in Table 1 of arXiv 2105.13626
    "small": ((1472, 12, 4, 6, 3584), 300e6),
    "base": ((1536, 18, 6, 12, 3968), 582e6),
    "large": ((1536, 36, 12, 16, 3840), 1.23e9),
    "xl": ((2560, 36, 12, 32, 6720), 3.74e9),
    "xxl": ((4672, 36, 12, 64, 12352), 12.9e9),
}


@pytest.mark.parametrize("size", SIZES)
def test_small_encoder_parameter_counts(size):
    (vocab, dim, layers, heads, ff), wanted = SIZES[size]
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = jax.eval_shape(T5Encoder(vocab, dim, layers, heads, ff).init, jax.random.key(0), tokens, tokens)
    assert sum(p.size for p in jax.tree.leaves(params)) == wanted


@pytest.mark.parametrize("size", BYT5)
def test_small_byt5_parameter_counts(size):
    """The encoder, and what a decoder has besides: attention to the text in every layer, and its own output matrix."""
    (dim, layers, decoder_layers, heads, ff), published = BYT5[size]
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = jax.eval_shape(T5Encoder(384, dim, layers, heads, ff).init, jax.random.key(0), tokens, tokens)
    decoder = decoder_layers * (8 * dim * heads * 64 + 3 * dim * ff + 3 * dim) + dim + 32 * heads + 384 * dim
    total = sum(p.size for p in jax.tree.leaves(params)) + decoder
    assert total == pytest.approx(published, rel=5e-3)


def test_small_relative_buckets():
    """Exact below 8, logarithmic to 128, 16 on for keys ahead of the query."""
    buckets = relative_buckets(200)
    distances = np.array([0, 1, 7, 8, 9, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 128, 199])
    behind = np.array([0, 1, 7, 8, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 15])
    np.testing.assert_array_equal(buckets[199, 199 - distances], behind)
    np.testing.assert_array_equal(buckets[0, distances[1:]], behind[1:] + 16)


def reference(p, tokens, mask, heads, head_dim):
    """The encoder in float64 numpy, a sample at a time, a head at a time."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    out = []
    buckets = relative_buckets(tokens.shape[1])
    for row, valid in zip(tokens, mask, strict=True):
        x = p["token_embedder"]["embedding"][row]
        e = p["encoder"]
        for i in range(sum(k.startswith("layers_") for k in e)):
            layer = e[f"layers_{i}"]
            y = norm(x, layer["pre_attention_layer_norm"]["scale"])
            q, k, v = (y @ layer["attention"][n]["kernel"] for n in ("query", "key", "value"))
            joined = []
            for h in range(heads):
                s = slice(h * head_dim, (h + 1) * head_dim)
                logits = q[:, s] @ k[:, s].T + e["relpos_bias"]["rel_embedding"][h][buckets]
                weights = np.exp(logits - logits.max(-1, keepdims=True)) * valid
                joined.append(weights / weights.sum(-1, keepdims=True) @ v[:, s])
            x = x + np.concatenate(joined, -1) @ layer["attention"]["out"]["kernel"]
            y = norm(x, layer["pre_mlp_layer_norm"]["scale"])
            m = layer["mlp"]
            x = x + (gelu(y @ m["wi_0"]["kernel"]) * (y @ m["wi_1"]["kernel"])) @ m["wo"]["kernel"]
        out.append(norm(x, e["encoder_norm"]["scale"]) * valid[:, None])
    return np.stack(out)


def test_small_encoder_against_float64():
    model = T5Encoder(vocab=40, dim=12, layers=2, heads=3, ff=20, head_dim=8)  # joined width 24, not 12, as in T5 small
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 40, (3, 21)).astype(np.int32)
    mask = np.arange(21) < np.array([[21], [9], [1]])
    params = model.init(jax.random.key(0), tokens, mask)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    wanted = reference(jax.tree.map(lambda p: np.asarray(p, np.float64), params), tokens, mask, 3, 8)
    np.testing.assert_allclose(model.apply({"params": params}, tokens, mask), wanted, atol=2e-4)


def test_small_padding_changes_nothing():
    config = base.get_config("small")
    encoder = text.load_encoder(config.text)
    tokens, mask = encoder.tokenize(["a red star moving left on a teal background"])
    short = encoder.encode(tokens[:, :48], mask[:, :48])
    np.testing.assert_allclose(encoder.encode(tokens, mask)[:, :48], short, atol=1e-5)


def test_shipped_encoder_tells_every_caption_apart():
    """The means of two captions' embeddings are never nearly the same."""
    encoder = text.load_encoder(base.get_config("small").text)
    tokens, mask = encoder.tokenize([shapes.caption(a) for a in shapes.all_attributes()])
    mean = np.asarray(encoder.encode(tokens, mask)).sum(1) / mask.sum(1, keepdims=True)
    distance = np.linalg.norm(mean[:, None] - mean[None], axis=-1) + np.eye(len(mean)) * 1e9
    assert distance.min() > 0.02 * np.linalg.norm(mean, axis=-1).mean()


def test_small_wrong_encoder_files_are_named(tmp_path):
    config = base.get_config("small")
    config.text.checkpoint = str(tmp_path / "none.safetensors")
    with pytest.raises(text.UserError, match="no text encoder at .*none.safetensors"):
        text.load_encoder(config.text)
    config.text.checkpoint = ""
    config.text.ff = 128
    with pytest.raises(text.UserError, match="another model's: its ff is 256, and config.text.ff = 128"):
        text.load_encoder(config.text)

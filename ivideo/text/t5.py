"""The encoder of T5 1.1 (arXiv 1910.10683, 2002.05202). Section 2.2: stages see the text only through its output.

B batch · L tokens · D channels · N heads · d channels per head. Parameter names are those of T5X's minimal T5.
On several devices the batch is split, and heads and inner channels are split over `tensor` (`ivideo.devices.sharding`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ivideo.devices.sharding import constrain

BUCKETS = 32
MAX_DISTANCE = 128


class T5Encoder(nn.Module):
    """Token ids [B, L] int32 and mask [B, L] bool to embeddings [B, L, dim], zero where the mask is False.

    With `own_positions` every layer has a table of relative positions, as in scanned T5X; else all layers share one.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    ff: int
    head_dim: int = 64
    own_positions: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens, mask):
        mask = mask.astype(bool)
        x = nn.Embed(
            self.vocab, self.dim, dtype=self.dtype, embedding_init=nn.initializers.normal(1.0), name="token_embedder"
        )(tokens)
        x = _Encoder(
            self.dim, self.layers, self.heads, self.ff, self.head_dim, self.own_positions, self.dtype, name="encoder"
        )(constrain(x, "batch"), mask)
        return x * mask[..., None]


class _Encoder(nn.Module):
    dim: int
    layers: int
    heads: int
    ff: int
    head_dim: int
    own_positions: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        bias = jnp.where(mask[:, None, None, :], 0.0, -1e9)
        if not self.own_positions:
            bias += RelativeBias(self.heads, name="relpos_bias")(x.shape[1])
        for i in range(self.layers):
            layer = _Layer(
                self.dim, self.heads, self.ff, self.head_dim, self.own_positions, self.dtype, name=f"layers_{i}"
            )
            x = constrain(layer(x, bias), "batch")
        return RMSNorm(self.dtype, name="encoder_norm")(x)


class _Layer(nn.Module):
    dim: int
    heads: int
    ff: int
    head_dim: int
    own_positions: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, bias):
        if self.own_positions:
            bias += RelativeBias(self.heads, name="relpos_bias")(x.shape[1])
        y = RMSNorm(self.dtype, name="pre_attention_layer_norm")(x)
        x = x + _Attention(self.dim, self.heads, self.head_dim, self.dtype, name="attention")(y, bias)
        y = RMSNorm(self.dtype, name="pre_mlp_layer_norm")(x)
        return x + _MLP(self.dim, self.ff, self.dtype, name="mlp")(y)


class _Attention(nn.Module):
    dim: int
    heads: int
    head_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, bias):
        inner = self.heads * self.head_dim
        # T5 does not divide the logits by √d; the query's initialisation is smaller by that factor instead
        scales = {"query": (self.dim * self.head_dim) ** -0.5, "key": self.dim**-0.5, "value": self.dim**-0.5}
        q, k, v = (
            constrain(
                _dense(inner, scale, self.dtype, name)(x).reshape(*x.shape[:-1], self.heads, self.head_dim),
                "batch",
                None,
                "heads",
            )
            for name, scale in scales.items()
        )
        logits = jnp.einsum("blnd,bmnd->bnlm", q, k, preferred_element_type=jnp.float32) + bias
        y = jnp.einsum("bnlm,bmnd->blnd", jax.nn.softmax(logits).astype(self.dtype), v)
        return _dense(self.dim, inner**-0.5, self.dtype, "out")(y.reshape(*x.shape[:-1], inner))


class _MLP(nn.Module):
    dim: int
    ff: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        gate = nn.gelu(_dense(self.ff, self.dim**-0.5, self.dtype, "wi_0")(x), approximate=True)
        x = constrain(gate * _dense(self.ff, self.dim**-0.5, self.dtype, "wi_1")(x), "batch", None, "inner")
        return _dense(self.dim, self.ff**-0.5, self.dtype, "wo")(x)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, with the mean in float32. [..., D] -> the same."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class RelativeBias(nn.Module):
    """A learned logit for each head and bucket of distance: length -> [1, N, L, L], float32."""

    heads: int

    @nn.compact
    def __call__(self, length):
        table = self.param("rel_embedding", nn.initializers.normal(1.0), (self.heads, BUCKETS))
        return table.astype(jnp.float32)[:, relative_buckets(length)][None]


def relative_buckets(length: int) -> np.ndarray:
    """Bucket of key position − query position: [L, L] int. Half for each sign; exact to 8, then logarithmic to 128."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    side = BUCKETS // 2
    exact = side // 2
    n = np.abs(distance)
    # float32, as in T5: with another precision a bucket boundary could move
    ratio = np.log(np.maximum(n, 1).astype(np.float32) / exact) / np.float32(np.log(MAX_DISTANCE / exact))
    far = np.minimum(exact + (ratio * (side - exact)).astype(np.int32), side - 1)
    return np.where(distance > 0, side, 0) + np.where(n < exact, n, far)


def _dense(features, scale, dtype, name):
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=nn.initializers.normal(scale), name=name)

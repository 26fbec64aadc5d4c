"""CLIP (arXiv 2103.00020) with a vision transformer, such as ViT-B/32 and ViT-L/14, from a Hugging Face directory.

Its vectors of frames and texts are compared by their cosine, for the CLIP score and R-precision.
B batch · L tokens or patches · D channels · N heads · P channels of the common space
"""

import dataclasses
import functools
import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ivideo.errors import UserError
from ivideo.evaluation.networks import stored
from ivideo.evaluation.networks.clip_tokens import Tokenizer
from ivideo.evaluation.networks.layers import EXACT
from ivideo.files import read_json
from ivideo.text import huggingface
from ivideo.text.arrays import inside

# Of the pixels in [0, 1], per channel
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(nn.gelu, approximate=False),
}
# Sizes of a tower by their keys in config.json, and what the key's absence means
_TOWER = {
    "hidden_size": (512, 768),
    "intermediate_size": (2048, 3072),
    "num_hidden_layers": (12, 12),
    "num_attention_heads": (8, 12),
    "hidden_act": ("quick_gelu", "quick_gelu"),
    "layer_norm_eps": (1e-5, 1e-5),
}
HOW_TO_GET = (
    "give the directory of openai/clip-vit-base-patch32 or openai/clip-vit-large-patch14 from Hugging Face, with "
    "config.json, model.safetensors, vocab.json and merges.txt"
)


class _Layer(nn.Module):
    inner: int
    heads: int
    activation: str
    epsilon: float

    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        y = nn.LayerNorm(self.epsilon, name="layer_norm1")(x)
        q, k, v = (
            _dense(width, name)(y).reshape(*y.shape[:-1], self.heads, width // self.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        logits = jnp.einsum("blnd,bmnd->bnlm", q, k, precision=EXACT) * (width // self.heads) ** -0.5
        shares = jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, -jnp.inf))
        y = jnp.einsum("bnlm,bmnd->blnd", shares, v, precision=EXACT).reshape(x.shape)
        x = x + _dense(width, "out_proj")(y)
        y = nn.LayerNorm(self.epsilon, name="layer_norm2")(x)
        y = _ACTIVATIONS[self.activation](_dense(self.inner, "fc1")(y))
        return x + _dense(width, "fc2")(y)


@dataclasses.dataclass(frozen=True)
class Tower:
    """The sizes of one of CLIP's two transformers."""

    width: int
    inner: int
    layers: int
    heads: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5

    def run(self, x, mask=None):
        for i in range(self.layers):
            x = _Layer(self.inner, self.heads, self.activation, self.epsilon, name=f"layers_{i}")(x, mask)
        return x


class Text(nn.Module):
    """Tokens [B, L] to vectors [B, P]. The vector is that of the end token, which has the highest number."""

    tower: Tower
    vocab: int
    length: int
    dims: int

    @nn.compact
    def __call__(self, tokens):
        width, normal = self.tower.width, nn.initializers.normal(0.02)
        embedding = self.param("token_embedding", normal, (self.vocab, width))
        positions = self.param("position_embedding", normal, (self.length, width))
        x = embedding[tokens] + positions[: tokens.shape[1]]
        x = self.tower.run(x, mask=np.tri(tokens.shape[1], dtype=bool))
        x = nn.LayerNorm(self.tower.epsilon, name="final_layer_norm")(x)
        x = x[jnp.arange(len(x)), tokens.argmax(axis=1)]
        return _dense(self.dims, "projection", bias=False)(x)


class Vision(nn.Module):
    """Frames [B, S, S, 3] that `prepare` made to vectors [B, P]."""

    tower: Tower
    size: int
    patch: int
    dims: int

    @nn.compact
    def __call__(self, frames):
        width, normal, patch = self.tower.width, nn.initializers.normal(0.02), (self.patch, self.patch)
        x = nn.Conv(width, patch, patch, "VALID", use_bias=False, precision=EXACT, name="patch_embedding")(frames)
        x = x.reshape(len(x), -1, width)
        first = self.param("class_embedding", normal, (width,))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, width)), x], axis=1)
        x = x + self.param("position_embedding", normal, ((self.size // self.patch) ** 2 + 1, width))
        x = nn.LayerNorm(self.tower.epsilon, name="pre_layrnorm")(x)
        x = self.tower.run(x)
        x = nn.LayerNorm(self.tower.epsilon, name="post_layernorm")(x[:, 0])
        return _dense(self.dims, "projection", bias=False)(x)


class CLIP(nn.Module):
    """Vectors of tokens [B, L] and of frames [B, S, S, 3], each of length 1: [B, P] and [B, P]."""

    text: Text
    vision: Vision

    def __call__(self, tokens, frames):
        return self.of_tokens(tokens), self.of_frames(frames)

    def of_tokens(self, tokens):
        return _unit(self.text(tokens))

    def of_frames(self, frames):
        return _unit(self.vision(frames))


@dataclasses.dataclass(frozen=True)
class Reader:
    """CLIP's network, weights and tokenizer, read from a directory."""

    module: CLIP
    weights: stored.Weights
    tokenizer: Tokenizer

    def texts(self, texts: list[str]) -> np.ndarray:
        """The vectors [B, P] of texts, each of length 1. A text of too many tokens is cut, with a warning."""
        return np.asarray(_apply(self.module, self.weights.params, "of_tokens", self.tokenizer(texts)))

    def of_frames(self, params, ready: jax.Array) -> jax.Array:
        """The vectors [B, P] of frames that `prepare` made, each of length 1; `params` are those of `weights`."""
        return _apply(self.module, params, "of_frames", ready)

    def frames(self, frames: np.ndarray) -> np.ndarray:
        """The vectors [B, P] of frames uint8 [B, H, W, 3], each of length 1."""
        return np.asarray(self.of_frames(self.weights.params, self.prepare(frames)))

    def prepare(self, frames: np.ndarray) -> np.ndarray:
        """The network's inputs from frames uint8 [B, H, W, 3] (`prepare`)."""
        return prepare(frames, self.module.vision.size)

    def protocol(self) -> dict:
        """What a score belongs to: two of them can be compared only where all of this is equal."""
        size, patch = self.module.vision.size, self.module.vision.patch
        return {
            "network": f"CLIP, patches of {patch}",
            "weights": self.weights.digest,
            "resizing": f"shorter side to {size}, bicubic with antialiasing, {size}x{size} of the centre",
        }


def prepare(frames: np.ndarray, size: int) -> np.ndarray:
    """Frames uint8 [B, H, W, 3] to CLIP's inputs [B, size, size, 3] float32.

    The shorter side is resized to `size` and the centre is cut out, in 8 bits by Pillow, as CLIP was trained.
    ValueError where the frames are not uint8.
    """
    if frames.dtype != np.uint8:
        raise ValueError(f"The frames are {frames.dtype}, expected uint8.")
    height, width = frames.shape[1:3]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    left, top = (width - size) // 2, (height - size) // 2
    ready = np.stack(
        [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]
    )[:, top : top + size, left : left + size]
    return ((ready / 255 - MEAN) / DEVIATION).astype(np.float32)


def read(path: str) -> Reader:
    """Reads CLIP from a Hugging Face directory. UserError where a file is missing, damaged, or of another network."""
    if not os.path.isdir(path):
        raise UserError(f"no CLIP at {path}: {HOW_TO_GET}")
    names = os.listdir(path)
    for name in ("config.json", "vocab.json", "merges.txt"):
        if name not in names:
            raise UserError(f"{path} has no {name}: {HOW_TO_GET}")
    if not any(name.endswith(stored.weights.SUFFIX) for name in names):
        raise UserError(
            f"{path} has no safetensors: save it anew with `CLIPModel.from_pretrained(DIR).save_pretrained(NEW)` of "
            "transformers on a machine where you trust it, and copy vocab.json and merges.txt there"
        )
    module = _module(path, read_json(inside(path, "config.json")))
    arrays = {}
    for shard in huggingface.shards(path, names):
        arrays |= huggingface.read_file(inside(path, shard))
    flat = {}
    for name, array in stored.read_all(path, arrays).items():
        if name != "logit_scale":
            flat |= _renamed(name, array)
    tokens = jax.ShapeDtypeStruct((1, module.text.length), np.int32)
    frame = jax.ShapeDtypeStruct((1, module.vision.size, module.vision.size, 3), np.float32)
    checked = stored.checked(path, flat, module, tokens, frame, of="CLIP of its config.json's sizes")
    return Reader(module, checked, Tokenizer.read(path, length=module.text.length, vocab=module.text.vocab))


def _module(path, config) -> CLIP:
    if config.get("model_type") != "clip":
        raise UserError(
            f"{path}/config.json has model_type = {config.get('model_type')!r}, expected 'clip': {HOW_TO_GET}"
        )
    towers = []
    for number, group in enumerate(("text_config", "vision_config")):
        found = config.get(group) or {}
        sizes = [found.get(key, defaults[number]) for key, defaults in _TOWER.items()]
        if sizes[4] not in _ACTIVATIONS:
            raise UserError(
                f"{path}/config.json has {group}.hidden_act = {sizes[4]!r}, expected {' or '.join(_ACTIVATIONS)}"
            )
        if not all(type(size) is int and size > 0 for size in sizes[:4]) or sizes[0] % sizes[3]:
            raise UserError(
                f"{path}/config.json has a {group} of sizes {sizes[:4]}, expected positive numbers, and "
                "heads that divide the width: copy it again"
            )
        towers.append(Tower(*sizes))
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    dims = config.get("projection_dim", 512)
    return CLIP(
        Text(towers[0], text.get("vocab_size", 49408), text.get("max_position_embeddings", 77), dims),
        Vision(towers[1], vision.get("image_size", 224), vision.get("patch_size", 32), dims),
    )


def _renamed(name, array):
    """A parameter by our name, which follows Hugging Face's, in the layout of Flax."""
    tower, _, rest = name.partition("_model.")
    if name in ("text_projection.weight", "visual_projection.weight"):
        return {f"{'text' if name[0] == 't' else 'vision'}/projection/kernel": array.T}
    rest = re.sub(r"^(embeddings|encoder)\.", "", rest).replace("self_attn.", "").replace("mlp.", "")
    rest = re.sub(r"^layers\.(\d+)\.", r"layers_\1/", rest)
    rest = re.sub(r"(token|position)_embedding\.weight$", r"\1_embedding", rest)
    if rest.endswith("norm.weight") or re.search(r"norm\d\.weight$", rest):
        rest = rest.replace(".weight", ".scale")
    elif rest.endswith(".weight"):
        rest = rest.replace(".weight", ".kernel")
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return {f"{tower}/{rest.replace('.', '/')}": array}


@functools.partial(jax.jit, static_argnames=("module", "method"))
def _apply(module, params, method, inputs):
    return module.apply({"params": params}, inputs, method=method)


def _dense(features, name, *, bias=True):
    return nn.Dense(features, use_bias=bias, precision=EXACT, name=name)


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

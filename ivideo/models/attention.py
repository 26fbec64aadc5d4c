"""Attention over the pixels of a frame, over the frames of a pixel, and over the text. Section 2.3.

B batch · T video frames · F frames (T video frames, then K packed images) · H, W height, width · C channels
N heads · D channels per head · S texts (the video's, then one per packed image) · L text tokens
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ivideo.devices.sharding import VIDEO, constrain, dot_with_gathered_kernel

Dtype = jnp.dtype


def _heads(channels: int, head_dim: int) -> int:
    if channels % head_dim:
        raise ValueError(f"{channels} channels cannot be split into heads of {head_dim}: head_dim must divide them")
    return channels // head_dim


def _softmax(logits, dtype):
    """Softmax in float32, whatever the dtype of the activations: a bfloat16 sum over thousands of keys loses tokens."""
    return jax.nn.softmax(logits.astype(jnp.float32)).astype(dtype)


class SpatialAttention(nn.Module):
    """Residual self-attention within each frame, the identity at initialisation: [B, F, H, W, C] -> the same.

    All pixels of a frame attend to each other, so devices that hold rows of every frame exchange them for whole frames.
    """

    head_dim: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        b, f, h, w, channels = x.shape
        heads = (_heads(channels, self.head_dim), self.head_dim)
        y = FrameNorm(dtype=self.dtype, name="norm")(x)
        y = constrain(y, "batch", "whole_frames", None, None, None).reshape(b, f, h * w, channels)
        q, k, v = (_split_heads(heads, self.dtype, name)(y) for name in "qkv")
        q, k, v = (constrain(a, "batch", "whole_frames", None, "heads", None) for a in (q, k, v))
        weights = _softmax(jnp.einsum("bfpnd,bfqnd->bfnpq", q * self.head_dim**-0.5, k), self.dtype)
        y = constrain(jnp.einsum("bfnpq,bfqnd->bfpnd", weights, v), "batch", "whole_frames", None, "heads", None)
        y = _out(channels, self.dtype)(y).reshape(x.shape)
        y = constrain(y, "batch", "whole_frames", None, None, None)
        return x + constrain(y, *VIDEO)


class TemporalAttention(nn.Module):
    """Residual self-attention of each pixel over the frames, the identity at initialisation: [B, T, H, W, C] -> same.

    Positions are relative, as in VDM (arXiv 2204.03458): every distance between two frames has a learned logit and a
    learned value (Shaw et al., arXiv 1803.02155). The values distinguish the first frame from the last when all frames
    are noise. Logits alone cannot, since a softmax over equal values returns that value.
    """

    head_dim: int
    max_distance: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        frames, channels = x.shape[1], x.shape[-1]
        heads = (_heads(channels, self.head_dim), self.head_dim)
        reach = self.max_distance
        table = (2 * reach + 1, *heads)
        bias = self.param("relative_bias", nn.initializers.zeros, table[:-1]).astype(jnp.float32)
        value = self.param("relative_value", nn.initializers.normal(1.0), table).astype(self.dtype)
        offset = np.arange(frames)[None, :] - np.arange(frames)[:, None]
        index = np.clip(offset, -reach, reach) + reach

        pixels = ("batch", None, "height", "columns")  # devices that hold some frames exchange them for columns
        y = constrain(FrameNorm(dtype=self.dtype, name="norm")(x), *VIDEO)  # before that, so statistics stay local
        y = constrain(y, *pixels, None)
        q, k, v = (constrain(_split_heads(heads, self.dtype, name)(y), *pixels, "heads", None) for name in "qkv")
        logits = jnp.einsum("bthwnd,bshwnd->bhwnts", q * self.head_dim**-0.5, k)
        weights = _softmax(logits + jnp.moveaxis(bias[index], -1, 0), self.dtype)
        y = jnp.einsum("bhwnts,bshwnd->bthwnd", weights, v) + jnp.einsum("bhwnts,tsnd->bthwnd", weights, value[index])
        y = constrain(_out(channels, self.dtype)(constrain(y, *pixels, "heads", None)), *pixels, None)
        return x + constrain(y, *VIDEO)


class CrossAttention(nn.Module):
    """Residual attention of every pixel to its frame's text: [B, F, H, W, C], text [B, S, L, Dt] -> [B, F, H, W, C].

    It is a separate layer, not joined with self-attention. A learned null token precedes the text tokens; where the
    mask is empty, it is the only token.
    """

    head_dim: int
    num_images: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x, text, text_mask):
        channels = x.shape[-1]
        heads = (_heads(channels, self.head_dim), self.head_dim)
        null = self.param("null", nn.initializers.normal(0.02), (1, text.shape[-1])).astype(self.dtype)
        null = jnp.broadcast_to(null, (*text.shape[:2], 1, text.shape[-1]))
        text = jnp.concatenate([null, text.astype(self.dtype)], axis=2)
        mask = jnp.concatenate([jnp.ones_like(text_mask[..., :1]), text_mask], axis=-1)

        y = constrain(FrameNorm(dtype=self.dtype, name="norm")(x), *VIDEO)
        q = _split_heads(heads, self.dtype, "q")(y)
        q = constrain(q, *VIDEO[:4], "heads", None)
        k, v = (_split_heads(heads, self.dtype, name)(constrain(text, "batch")) for name in "kv")
        k, v = (constrain(a, "batch", None, None, "heads", None) for a in (k, v))

        def attend(q, k, v, mask, frame):
            # `frame` is "f" where every frame has its own text, and "" where all frames share one
            logits = jnp.einsum(f"bfhwnd,b{frame}lnd->bfhwnl", q * self.head_dim**-0.5, k)
            mask = mask[:, :, None, None, None] if frame else mask[:, None, None, None, None]
            weights = _softmax(jnp.where(mask, logits, -1e9), self.dtype)
            return jnp.einsum(f"bfhwnl,b{frame}lnd->bfhwnd", weights, v)

        frames = x.shape[1] - self.num_images
        y = attend(q[:, :frames], k[:, 0], v[:, 0], mask[:, 0], "")
        if self.num_images:
            images = attend(q[:, frames:], k[:, 1:], v[:, 1:], mask[:, 1:], "f")
            y = jnp.concatenate([y, images], axis=1)
        y = _out(channels, self.dtype)(constrain(y, *VIDEO[:4], "heads", None))
        return x + constrain(y, *VIDEO)


class TextPooling(nn.Module):
    """One vector per text, by attention of a learned query: [B, S, L, Dt], mask [B, S, L] -> [B, S, features]."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, text, text_mask):
        width = text.shape[-1]
        null = self.param("null", nn.initializers.normal(0.02), (width,)).astype(self.dtype)
        logits = nn.Dense(1, use_bias=False, dtype=self.dtype, name="query")(text)[..., 0]
        weights = _softmax(jnp.where(text_mask, logits, -1e9), self.dtype)
        pooled = jnp.einsum("bsl,bsld->bsd", weights, text)
        pooled = jnp.where(text_mask.any(-1, keepdims=True), pooled, null)
        pooled = nn.swish(vector_dense(self.features, self.dtype, "dense_0")(pooled))
        return vector_dense(self.features, self.dtype, "dense_1")(pooled)


class FrameNorm(nn.Module):
    """GroupNorm with separate statistics for each frame: [B, F, H, W, C] -> the same.

    Statistics over several frames would mix packed images with each other and with the video.
    """

    dtype: Dtype
    max_groups: int = 32

    @nn.compact
    def __call__(self, x):
        groups = max(g for g in range(1, self.max_groups + 1) if x.shape[-1] % g == 0)
        return nn.GroupNorm(groups, reduction_axes=(-3, -2, -1), dtype=self.dtype, name="groups")(x)


def vector_dense(features: int, dtype: Dtype, name: str, **options):
    """A dense layer for inputs without pixels: one vector per sample or frame."""
    return nn.Dense(features, dtype=dtype, dot_general=dot_with_gathered_kernel, name=name, **options)


def _split_heads(heads: tuple[int, int], dtype: Dtype, name: str):
    return nn.DenseGeneral(heads, use_bias=False, dtype=dtype, name=name)


def _out(channels: int, dtype: Dtype):
    return nn.DenseGeneral(
        channels, axis=(-2, -1), use_bias=False, kernel_init=nn.initializers.zeros, dtype=dtype, name="out"
    )

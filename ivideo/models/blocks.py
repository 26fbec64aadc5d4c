"""The block that every level of every stage repeats. Section 2.3.

B batch · T video frames · F frames (T video frames, then K packed images) · H, W height, width · C channels
E width of the embedding · S texts (the video's, then one per packed image) · L text tokens
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ivideo.devices.sharding import VIDEO, constrain, with_halo
from ivideo.models.attention import CrossAttention, Dtype, FrameNorm, SpatialAttention, TemporalAttention, vector_dense

TEMPORAL = ("attention", "convolution", "none")


class Block(nn.Module):
    """A residual block, then the layers of its level: temporal convolution, attention to pixels, text and frames.

    x [B, F, H, W, C] (on the way up, `skip` of the same shape is concatenated first), embedding [B, 1 or F, E],
    text [B, S, L, Dt], text_mask [B, S, L] -> (x, x), both [B, F, H, W, channels], the pair that `nn.scan` expects.
    The last `num_images` frames are independent images, which bypass the temporal layers.
    """

    channels: int
    spatial_attention: bool
    cross_attention: bool
    temporal: str
    head_dim: int
    max_distance: int
    num_images: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x, skip, embedding, text, text_mask):
        if skip is not None:
            x = constrain(jnp.concatenate([x, skip], axis=-1), *VIDEO)
        x = ResBlock(self.channels, self.dtype, name="residual")(x, embedding)
        if self.temporal == "convolution":
            x = self._in_time(TemporalConvolution(self.dtype, name="temporal_convolution"), x)
        if self.spatial_attention:
            x = SpatialAttention(self.head_dim, self.dtype, name="spatial_attention")(x)
        if self.cross_attention:
            x = CrossAttention(self.head_dim, self.num_images, self.dtype, name="cross_attention")(x, text, text_mask)
        if self.temporal == "attention":
            layer = TemporalAttention(self.head_dim, self.max_distance, self.dtype, name="temporal_attention")
            x = self._in_time(layer, x)
        x = constrain(x, *VIDEO)
        return x, x

    def _in_time(self, layer, x):
        """Applies a temporal layer to the video's frames. Packed images bypass it (Section 2.6)."""
        if not self.num_images:
            return layer(x)
        frames = x.shape[1] - self.num_images
        return jnp.concatenate([layer(x[:, :frames]), x[:, frames:]], axis=1)


class ResBlock(nn.Module):
    """Twice GroupNorm, swish, 3×3 convolution; the embedding scales and shifts the second norm. [B, F, H, W, C]."""

    channels: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x, embedding):
        y = nn.swish(FrameNorm(self.dtype, name="norm_0")(x))
        y = convolution(self.channels, self.dtype, "conv_0")(y)
        y = constrain(y, *VIDEO[:4], "inner")
        modulation = vector_dense(2 * self.channels, self.dtype, "modulation")(nn.swish(embedding))
        scale, shift = jnp.split(constrain(modulation, "batch")[:, :, None, None], 2, axis=-1)
        y = nn.swish(FrameNorm(self.dtype, name="norm_1")(y) * (1 + scale) + shift)
        y = convolution(self.channels, self.dtype, "conv_1", kernel_init=nn.initializers.zeros)(y)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, dot_general=_product_of_rows, name="shortcut")(x)
        return x + y


class TemporalConvolution(nn.Module):
    """Residual convolution over three frames, the identity at initialisation: [B, T, H, W, C] -> the same."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        # Zeros at initialisation: the network starts as an image model (Section 2.6 trains it on images as well)
        kernel = self.param("kernel", nn.initializers.zeros, (3, channels, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        y = nn.swish(FrameNorm(self.dtype, name="norm")(x))
        y = convolve_frames(constrain(y, *VIDEO), kernel.astype(self.dtype))
        return x + constrain(y, *VIDEO) + bias.astype(self.dtype)


def convolution(features: int, dtype: Dtype, name: str, *, stride: int = 1, **options):
    """A 3×3 convolution of every frame, [B, F, H, W, C] -> [B, F, H / stride, W / stride, features], zero-padded."""
    return nn.Conv(
        features,
        (3, 3),
        strides=(stride, stride),
        dtype=dtype,
        conv_general_dilated=_convolve_rows,
        name=name,
        **options,
    )


def _convolve_rows(x, kernel, strides, padding, **options):
    """`lax.conv_general_dilated` of x [B·F, H, W, C], whose rows may be split over devices."""
    pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)

    def convolve(x, kernel, rows):
        return lax.conv_general_dilated(x, kernel, strides, [rows, pads[1]], **options)

    return with_halo(convolve, x, kernel, axes={1: "height"}, over=1, halo=pads[0], unit=strides[0])


def _product_of_rows(x, kernel, dimensions, **options):
    """`lax.dot_general` of x [B, F, H, W, C], whose rows may be split over devices."""

    def product(x, kernel, _):
        return lax.dot_general(x, kernel, dimensions, **options)

    return with_halo(product, x, kernel, axes={2: "height"}, over=2, halo=(0, 0))


def convolve_frames(x, kernel):
    """Convolution along the frames, zero-padded: x [B, T, H, W, C], kernel [3, C, C'] -> [B, T, H, W, C'].

    It uses matrix products on the CPU and a convolution on TPU and GPU, whichever is faster there.
    """

    def convolve(x, kernel, padding):
        forms = (functools.partial(form, padding=padding) for form in (frames_as_products, frames_as_convolution))
        return lax.platform_dependent(x, kernel, **dict(zip(("cpu", "default"), forms, strict=True)))

    return with_halo(convolve, x, kernel, axes={1: "frames", 2: "height"}, over=1, halo=(1, 1))


def frames_as_convolution(x, kernel, *, padding=(1, 1)):
    """A convolution along the frames as one 2-D convolution over [T, H·W]."""
    b, t, h, w, c = x.shape
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x.reshape(b, t, h * w, c), kernel[:, None], (1, 1), (padding, (0, 0)), dimension_numbers=numbers
    )
    return y.reshape(b, -1, h, w, kernel.shape[-1])


def frames_as_products(x, kernel, *, padding=(1, 1)):
    """As `frames_as_convolution`, by three matrix products that are shifted by a frame each."""
    frames = x.shape[1] + sum(padding) - 2

    def shifted(y, start):
        """The output's frames of y from frame `start` of the padded clip on."""
        first = start - padding[0]
        y = y[:, max(first, 0) : max(first + frames, 0)]
        before = max(-first, 0)
        return jnp.pad(y, ((0, 0), (before, frames - before - y.shape[1]), (0, 0), (0, 0), (0, 0)))

    return sum(shifted(x @ kernel[i], i) for i in range(3))


def upsample(x, factor: int):
    """Upsamples every frame by nearest neighbour: [B, F, H, W, C] -> [B, F, H·factor, W·factor, C]."""
    b, f, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, :, None, :, None], (b, f, h, factor, w, factor, c))
    return x.reshape(b, f, h * factor, w * factor, c)


def space_to_depth(x, factor: int):
    """[B, F, H, W, C] -> [B, F, H/factor, W/factor, C·factor²]."""
    b, f, h, w, c = x.shape
    x = x.reshape(b, f, h // factor, factor, w // factor, factor, c)
    return jnp.moveaxis(x, 3, 4).reshape(b, f, h // factor, w // factor, c * factor**2)


def depth_to_space(x, factor: int):
    """[B, F, H, W, C·factor²] -> [B, F, H·factor, W·factor, C], the inverse of `space_to_depth`."""
    b, f, h, w, c = x.shape
    x = x.reshape(b, f, h, w, factor, factor, c // factor**2)
    return jnp.moveaxis(x, 4, 3).reshape(b, f, h * factor, w * factor, c // factor**2)


def sinusoid(position, width: int):
    """Sines and cosines of a position [B] at geometric frequencies: [B, width], float32."""
    half = width // 2
    frequency = np.exp(-np.log(1e4) * np.arange(half) / (half - 1)).astype(np.float32)
    angle = position.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class ScalarEmbedding(nn.Module):
    """Embeds one number u per sample, in [0, 1]: [B] -> [B, features]. Sinusoids of 1000·u, then two dense layers."""

    width: int
    features: int
    dtype: Dtype
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init  # of the last layer

    @nn.compact
    def __call__(self, u):
        y = vector_dense(self.features, self.dtype, "dense_0")(sinusoid(1000.0 * u, self.width))
        return vector_dense(self.features, self.dtype, "dense_1", kernel_init=self.kernel_init)(nn.swish(y))


class FrameEmbedding(nn.Module):
    """Embeds a frame's position in its clip: pooled text [B, E] -> [B, frames, E], zero at initialisation.

    The position is the share of the clip that has passed, so it means the same at any number of frames. It is
    multiplied with the text: "moving left" puts the object right of the centre in the first frame and left of it in the
    last, which a sum of position and text cannot express.
    """

    features: int
    dtype: Dtype
    waves: int = 8  # cosines and sines of 0 to 7 half waves over the clip: an object's position is smooth in time

    @nn.compact
    def __call__(self, text, frames: int):
        angle = np.pi * np.arange(self.waves) * (np.arange(frames)[:, None] / frames)
        place = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
        place = nn.Dense(self.features, dtype=self.dtype, name="place")(place)
        text = nn.LayerNorm(dtype=self.dtype, name="norm")(text)
        text = nn.Dense(self.features, dtype=self.dtype, name="text")(text)
        zero = nn.initializers.zeros
        return nn.Dense(self.features, kernel_init=zero, dtype=self.dtype, name="out")(place * text[:, None])


def noise_fraction(logsnr):
    """A log-SNR as the angle atan(σ/α) over π/2: 0 without noise, 1 without signal. [B] -> [B].

    The input form of Progressive Distillation (arXiv 2202.00512): nearly uniform over a cosine schedule's times.
    """
    return jnp.arctan(jnp.exp(-jnp.clip(logsnr.astype(jnp.float32), -20.0, 20.0) / 2)) / (jnp.pi / 2)


def remat_policy(name: str):
    """The policy of `jax.checkpoint` for a name: which values of a block are kept for its backward pass.

    'none', no rematerialisation, is not a policy: `VideoUNet` handles it.
    """
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    if name not in policies:
        raise ValueError(f"remat policy {name!r} is unknown: choose 'none', {', '.join(map(repr, policies))}")
    return policies[name]

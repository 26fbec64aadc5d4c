"""Convolutions over time and space as convolutions of frames, which processors compute several times as fast.

B batch · T frames · H, W height, width · D channels
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def convolve(x: jax.Array, kernel: jax.Array, strides, padding: str, **options) -> jax.Array:
    """`lax.conv_general_dilated` of x [B, T, H, W, D] and a kernel [t, h, w, D, out], for `nn.Conv`.

    The frames that a kernel sees become channels of one frame. With strides of 2, so do the four pixels of each 2×2
    block: the network's first convolution otherwise has few channels and takes most of the time. ValueError for other
    paddings than 'SAME' and for dilated or grouped convolutions.
    """
    if padding != "SAME" or len(set(strides)) > 1 or options.get("feature_group_count", 1) != 1:
        raise ValueError(f"strides {strides} and padding {padding}: expected equal strides and 'SAME', without groups.")
    if any(rate != 1 for name in ("lhs_dilation", "rhs_dilation") for rate in options.get(name) or ()):
        raise ValueError("The convolution is dilated, expected one without dilation.")
    stride, (batch, frames) = strides[0], x.shape[:2]
    times = -(-frames // stride)
    around, *pads = lax.padtype_to_pads(x.shape[1:4], kernel.shape[:3], strides, padding)
    x = jnp.pad(x, ((0, 0), around, (0, 0), (0, 0), (0, 0)))
    if stride == 2 and not any(size % 2 or low % 2 for size, (low, _) in zip(x.shape[2:4], pads, strict=True)):
        x, kernel = _blocks(x), _blocks_of_kernel(kernel)
        pads = [(low // 2, window - 1 - low // 2) for (low, _), window in zip(pads, kernel.shape[1:3], strict=True)]
        spatial = (1, 1)
    else:
        spatial = (stride, stride)
    seen = [x[:, i : i + (times - 1) * stride + 1 : stride] for i in range(len(kernel))]
    images = jnp.concatenate(seen, axis=-1).reshape(batch * times, *x.shape[2:4], -1)
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    y = lax.conv_general_dilated(
        images, kernel, spatial, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=options.get("precision")
    )
    return y.reshape(batch, times, *y.shape[1:])


def max_pool(x: jax.Array, window, strides) -> jax.Array:
    """`nn.max_pool` of x [B, T, H, W, D] with padding 'SAME', along one axis after the other: the same values."""
    for axis, (size, stride) in enumerate(zip(window, strides, strict=True)):
        if size > 1 or stride > 1:
            along = [(1, 1)] * 3
            along[axis] = (size, stride)
            x = nn.max_pool(x, *zip(*along, strict=True), "SAME")
    return x


def _blocks(x):
    """The four pixels of each 2×2 block as channels: [B, T, H, W, D] -> [B, T, H / 2, W / 2, 4 D]."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, frames, height // 2, width // 2, 4 * channels)


def _blocks_of_kernel(kernel):
    """The kernel of a convolution with strides of 2 for `_blocks`, with strides of 1. Odd sizes are filled up."""
    kernel = jnp.pad(kernel, ((0, 0), (0, kernel.shape[1] % 2), (0, kernel.shape[2] % 2), (0, 0), (0, 0)))
    times, height, width, _, out = kernel.shape
    return _blocks(kernel.reshape(1, times, height, width, -1)).reshape(times, height // 2, width // 2, -1, out)

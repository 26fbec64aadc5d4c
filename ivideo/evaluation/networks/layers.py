"""What I3D and Inception-v3 share: convolutions with batch normalisation folded in, and the resizing of frames."""

import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ivideo.evaluation.networks import clip_convolution

EPSILON = 1e-3  # of batch normalisation, in both networks
EXACT = jax.lax.Precision.HIGHEST  # TPUs would otherwise round the inputs of products to bfloat16


class Unit(nn.Module):
    """A convolution with a bias, and ReLU: [..., D] -> [..., features]."""

    features: int
    window: Sequence[int]
    strides: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        strides = (self.strides,) * len(self.window)
        convolve = clip_convolution.convolve if len(self.window) == 3 and self.window[0] > 1 else None
        options = {"precision": EXACT, "conv_general_dilated": convolve, "name": "conv"}
        return nn.relu(nn.Conv(self.features, self.window, strides, self.padding, **options)(x))


def fold(kernel, *, mean, variance, shift, scale=1.0) -> dict[str, np.ndarray]:
    """The kernel and bias, float32, of a convolution with the batch normalisation after it. Computed in float64."""
    kernel, mean, variance, shift, scale = (
        np.asarray(array, np.float64) for array in (kernel, mean, variance, shift, scale)
    )
    factor = scale / np.sqrt(variance + EPSILON)
    folded = {"kernel": kernel * factor, "bias": shift - mean * factor}
    return {name: array.astype(np.float32) for name, array in folded.items()}


def folded(units: Mapping[str, dict], **names: str) -> dict[str, np.ndarray]:
    """The parameters of `Unit`s by name, from the kernel and the batch normalisation of each.

    `names` are those that a file gives to the parts that `fold` takes. ValueError, which names a unit, where it does
    not have exactly these parts.
    """
    flat = {}
    for unit, parts in units.items():
        wanted = {"kernel", *names.values()}
        if parts.keys() != wanted:
            raise ValueError(f"{unit} has {', '.join(sorted(parts))}, expected {', '.join(sorted(wanted))}")
        parts = fold(parts["kernel"], **{ours: parts[theirs] for ours, theirs in names.items()})
        flat |= {f"{unit}/conv/{part}": array for part, array in parts.items()}
    return flat


@functools.partial(jax.jit, static_argnames=("size", "antialias"))
def resize(frames: jax.Array, size: int, *, antialias: bool = False) -> jax.Array:
    """Frames uint8 [..., H, W, 3] to [..., size, size, 3] float32 in [-1, 1].

    Bilinear between centres of pixels, and without keeping the aspect ratio; by default without antialiasing.
    ValueError where the frames are not uint8: clips in [-1, 1] would give wrong numbers silently.
    """
    if frames.dtype != jnp.uint8:
        raise ValueError(f"The frames are {frames.dtype}, expected uint8.")
    shape = (*frames.shape[:-3], size, size, 3)
    scaled = jax.image.resize(frames.astype(jnp.float32), shape, "bilinear", antialias=antialias, precision=EXACT)
    return scaled * (2 / 255) - 1


def resizing(size: int, *, antialias: bool = False) -> str:
    """What `resize` does, in words, for the protocol of a measure."""
    return f"{size}x{size}, bilinear, {'' if antialias else 'no '}antialiasing"

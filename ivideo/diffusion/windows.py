"""Denoising clips that do not fit in memory: evaluates overlapping windows and blends their predictions.

All windows of a step are denoised before the next step begins, so that neighbouring windows agree where they overlap
and the clip has no seams (joint diffusion over windows: arXiv 2302.08113).
B batch · T frames · H, W height, width · C channels
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def window_starts(length: int, window: int, overlap: int) -> np.ndarray:
    """Start positions of windows that cover `length`, each overlapping the next by `overlap` or more.

    Args:
      length: frames or pixels of the clip.
      window: frames or pixels of a window; one of `length` or more covers the clip alone.
      overlap: ValueError unless it is in 0 .. window - 1.

    Returns:
      int32 [number of windows], from 0 to length - window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap={overlap} must be in 0 .. window - 1 = {window - 1}.")
    if window >= length:
        return np.zeros(1, np.int32)
    count = -(-(length - overlap) // (window - overlap))
    return np.round(np.linspace(0, length - window, count)).astype(np.int32)


def _ramp(window: int, overlap: int) -> np.ndarray:
    """Weights of a window's elements: they decrease linearly over the overlap to the window's ends, and are never 0."""
    distance = np.minimum(np.arange(window), np.arange(window)[::-1]) + 1
    return np.minimum(distance / (overlap + 1), 1.0).astype(np.float32)


def windowed(
    denoise: Callable,
    *,
    window: tuple[int, int, int],
    overlap: tuple[int, int, int],
    multiple: tuple[int, int] = (1, 1),
) -> Callable:
    """Turns a denoiser of window-sized clips into a denoiser of larger clips.

    Args:
      denoise: (z [B, t, h, w, C], cond [B, t, h, w, C'], logsnr [B]) -> v [B, t, h, w, C''], at one size.
      window: (frames, height, width) of the clips that `denoise` takes. A length of 0, or above the clip's, stands for
        the clip's length.
      overlap: the least overlap of neighbouring windows, as (frames, height, width).
      multiple: (time, space). Positions and sizes of windows are multiples of it. In time it is the factor by which
        `cond` was upsampled, so that a window starts at a frame of the low-resolution clip; in space it is a common
        multiple of that factor and of the network's strides.

    Returns:
      Function of the same arguments at any size [B, T, H, W, ...]: the weighted mean of the windows' predictions.
      It raises ValueError where the size of a window or of the clip is not such a multiple.
    """

    def denoise_all(z, cond, logsnr):
        lengths, units = z.shape[1:4], (multiple[0], multiple[1], multiple[1])
        sizes = [size if 0 < size < length else length for size, length in zip(window, lengths, strict=True)]
        for size, length, unit in zip(sizes, lengths, units, strict=True):
            if size % unit or length % unit:
                raise ValueError(f"A window of {size} in a clip of {length}: both must be multiples of {unit}.")
        # In units of `multiple`, so that a window starts at a multiple of it
        overlaps = [
            min(-(-lap // unit), size // unit - 1) for lap, size, unit in zip(overlap, sizes, units, strict=True)
        ]
        starts = [
            unit * window_starts(length // unit, size // unit, lap)
            for length, size, lap, unit in zip(lengths, sizes, overlaps, units, strict=True)
        ]
        corners = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 3)
        if len(corners) == 1:
            return denoise(z, cond, logsnr)
        weight = np.ones(1, np.float32)
        for size, lap, unit, several in zip(sizes, overlaps, units, [len(s) > 1 for s in starts], strict=True):
            weight = weight[..., None] * (_ramp(size, lap * unit) if several else np.ones(size, np.float32))
        weight = jnp.asarray(weight[0, ..., None])

        def crop(x, corner):
            return lax.dynamic_slice(x, (0, *corner, 0), (x.shape[0], *sizes, x.shape[-1]))

        def add(totals, corner):
            terms = (denoise(crop(z, corner), crop(cond, corner), logsnr) * weight, weight[None])
            sums = (
                lax.dynamic_update_slice(total, crop(total, corner) + term, (0, *corner, 0))
                for total, term in zip(totals, terms, strict=True)
            )
            return tuple(sums), None

        corners = jnp.asarray(corners, jnp.int32)
        v = jax.eval_shape(lambda: denoise(crop(z, corners[0]), crop(cond, corners[0]), logsnr))
        zeros = (jnp.zeros((*z.shape[:4], v.shape[-1])), jnp.zeros((1, *lengths, 1)))
        (v, weights), _ = lax.scan(add, zeros, corners)
        return v / weights

    return denoise_all

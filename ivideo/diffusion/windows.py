"""A denoiser for clips larger than the memory: evaluated in overlapping windows whose predictions are blended.

All windows of a step are denoised before the next step begins, so that neighbours agree where they overlap and the clip
has no seams (joint diffusion over windows: arXiv 2302.08113).
B batch · T frames · H, W height, width · C channels
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def window_starts(length: int, window: int, overlap: int) -> np.ndarray:
    """Where windows begin that cover `length`, each overlapping the next by `overlap` or more.

    Args:
      length: frames or pixels of the whole.
      window: of a window; at least `length` means one window.
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
    """Weights of a window's elements: they fall off linearly over the overlap, and are nowhere zero."""
    distance = np.minimum(np.arange(window), np.arange(window)[::-1]) + 1
    return np.minimum(distance / (overlap + 1), 1.0).astype(np.float32)


def windowed(
    denoise: Callable,
    *,
    window: tuple[int, int, int],
    overlap: tuple[int, int, int],
    multiple: tuple[int, int] = (1, 1),
) -> Callable:
    """Makes of a denoiser of clips one of larger clips.

    Args:
      denoise: (z [B, t, h, w, C], cond [B, t, h, w, C'], logsnr [B]) -> v [B, t, h, w, C''], at one size.
      window: (frames, height, width) that `denoise` is given; a length of 0 or beyond the clip's stands for the clip's.
      overlap: by which neighbouring windows overlap at least, in each direction.
      multiple: (in time, in space) what windows' positions and sizes are multiples of. In time it is the factor by
        which `cond` was enlarged, so that a window holds whole frames of what was enlarged; in space also the network's
        strides.

    Returns:
      Function of the same arguments at any size [B, T, H, W, ...]: the weighted mean of the windows' predictions.
      ValueError where a window or the whole is no such multiple.
    """

    def denoise_all(z, cond, logsnr):
        lengths, units = z.shape[1:4], (multiple[0], multiple[1], multiple[1])
        sizes = [size if 0 < size < length else length for size, length in zip(window, lengths, strict=True)]
        for size, length, unit in zip(sizes, lengths, units, strict=True):
            if size % unit or length % unit:
                raise ValueError(f"A window of {size} in {length} must be a multiple of {unit}, and so must the whole.")
        # Counted in the unit, so that a window begins at a multiple of it
        laps = [min(-(-lap // unit), size // unit - 1) for lap, size, unit in zip(overlap, sizes, units, strict=True)]
        starts = [
            unit * window_starts(length // unit, size // unit, lap)
            for length, size, lap, unit in zip(lengths, sizes, laps, units, strict=True)
        ]
        corners = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 3)
        if len(corners) == 1:
            return denoise(z, cond, logsnr)
        weight = np.ones(1, np.float32)
        for size, lap, unit, several in zip(sizes, laps, units, [len(s) > 1 for s in starts], strict=True):
            weight = weight[..., None] * (_ramp(size, lap * unit) if several else np.ones(size, np.float32))
        weight = jnp.asarray(weight[0, ..., None])

        def cut(x, corner):
            return lax.dynamic_slice(x, (0, *corner, 0), (x.shape[0], *sizes, x.shape[-1]))

        def add(total, corner):
            new = (denoise(cut(z, corner), cut(cond, corner), logsnr) * weight, weight[None])
            at = (0, *corner, 0)
            sums = (lax.dynamic_update_slice(t, cut(t, corner) + n, at) for t, n in zip(total, new, strict=True))
            return tuple(sums), None

        corners = jnp.asarray(corners, jnp.int32)
        v = jax.eval_shape(lambda: denoise(cut(z, corners[0]), cut(cond, corners[0]), logsnr))
        zeros = (jnp.zeros((*z.shape[:4], v.shape[-1])), jnp.zeros((1, *lengths, 1)))
        (v, weights), _ = lax.scan(add, zeros, corners)
        return v / weights

    return denoise_all

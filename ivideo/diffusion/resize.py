"""Resizing video (Section 2.2): antialiased bilinear in space; skipping, repeating or blank frames in time.

B batch, T frames, H height, W width, C channels.
"""

import jax
import jax.numpy as jnp


def resize_space(video, height: int, width: int) -> jax.Array:
    """Resizes every frame bilinearly, with antialiasing when it downsamples.

    Pixels are areas (half-pixel centres), weights past the border are renormalised, and an axis that keeps its length
    does not change. Antialiasing has no effect on upsampling, which is plain bilinear interpolation. So this one
    function makes the low-resolution training clips and upsamples the conditioning video.

    Args:
      video: [..., H, W, C].
      height: new height in pixels.
      width: new width in pixels; ValueError if either is below 1.

    Returns:
      float32 [..., height, width, C].
    """
    if height < 1 or width < 1:
        raise ValueError(f"height={height} and width={width} must be at least 1.")
    video = jnp.asarray(video, jnp.float32)
    return jax.image.resize(video, (*video.shape[:-3], height, width, video.shape[-1]), "bilinear", antialias=True)


def _check_factor(factor):
    if factor < 1:
        raise ValueError(f"factor={factor} must be at least 1.")


def skip_frames(video, factor: int) -> jax.Array:
    """Keeps the first of every `factor` frames.

    Args:
      video: [B, T, ...].
      factor: ValueError unless it is at least 1 and divides T.

    Returns:
      [B, T / factor, ...].
    """
    _check_factor(factor)
    if video.shape[1] % factor:
        raise ValueError(f"factor={factor} must divide the number of frames, {video.shape[1]}.")
    return video[:, ::factor]


def repeat_frames(video, factor: int) -> jax.Array:
    """Repeats every frame `factor` times in a row.

    Args:
      video: [B, T, ...].
      factor: ValueError below 1.

    Returns:
      [B, T * factor, ...].
    """
    _check_factor(factor)
    batch, frames, *rest = video.shape
    repeated = jnp.broadcast_to(video[:, :, None], (batch, frames, factor, *rest))
    return repeated.reshape(batch, frames * factor, *rest)


def blank_frames(video, factor: int) -> tuple[jax.Array, jax.Array]:
    """Inserts `factor` - 1 blank frames (zeros, mid-grey) after every frame.

    Args:
      video: [B, T, ...].
      factor: ValueError below 1.

    Returns:
      video [B, T * factor, ...], and a float32 mask [B, T * factor] that is 1 on the frames of `video`.
    """
    _check_factor(factor)
    batch, frames, *rest = video.shape
    padded = jnp.pad(video[:, :, None], [(0, 0), (0, 0), (0, factor - 1)] + [(0, 0)] * len(rest))
    mask = jnp.broadcast_to(jnp.arange(frames * factor) % factor == 0, (batch, frames * factor))
    return padded.reshape(batch, frames * factor, *rest), mask.astype(jnp.float32)

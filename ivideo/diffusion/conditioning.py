"""The conditioning of super-resolution stages (Sections 2.2 and 2.5): a clip at the previous stage's resolution.

B batch · T, H, W frames, height, width of the stage's output · t, h, w of its low-resolution clip · C channels
`space` and `time` are the integer factors between the two: H = space h, T = time t.
"""

import jax
import jax.numpy as jnp

from ivideo.diffusion import resize

FILLS = ("repeat", "blank")


def reduce(video, *, space: int, time: int) -> jax.Array:
    """Reduces a clip to the previous stage's resolution: skips frames, then downsamples with antialiasing.

    Args:
      video: [B, T, H, W, C].
      space: ValueError unless it divides H and W.
      time: ValueError unless it divides T.

    Returns:
      float32 [B, T / time, H / space, W / space, C].
    """
    height, width = video.shape[2:4]
    if space < 1 or height % space or width % space:
        raise ValueError(f"space={space} must be at least 1 and divide the frames, {height}×{width}.")
    return resize.resize_space(resize.skip_frames(video, time), height // space, width // space)


def enlarge(low_res, *, space: int, time: int, fill: str = "repeat") -> jax.Array:
    """Upsamples a low-resolution clip to the stage's size: bilinear in space, repeated or blank frames in time.

    Args:
      low_res: [B, t, h, w, C].
      space, time: factors; ValueError below 1.
      fill: 'repeat'; or 'blank' for frames of zeros, and one more channel, a mask that is 1 on the clip's own frames
        and 0 on the blank ones. ValueError for anything else.

    Returns:
      float32 [B, t * time, h * space, w * space, C], C + 1 with 'blank'.
    """
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r} is unknown: choose from {', '.join(FILLS)}.")
    height, width = low_res.shape[2:4]
    video = resize.resize_space(low_res, height * space, width * space)
    if fill == "repeat":
        return resize.repeat_frames(video, time)
    video, mask = resize.blank_frames(video, time)
    mask = jnp.broadcast_to(mask[:, :, None, None, None], (*video.shape[:-1], 1))
    return jnp.concatenate([video, mask], axis=-1)

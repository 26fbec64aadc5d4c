"""What a super-resolution stage is conditioned on (Sections 2.2 and 2.5): a clip at the resolution of the stage before.

B batch · T, H, W frames, height, width of what the stage makes · t, h, w of what it is given · C channels
`space` and `time` are the whole factors between the two: H = space h, T = time t.
"""

import jax
import jax.numpy as jnp

from ivideo.diffusion import resize

FILLS = ("repeat", "blank")


def reduce(video, *, space: int, time: int) -> jax.Array:
    """The clip as the stage before would have made it: frames skipped, then shrunk with antialiasing.

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


def enlarge(low, *, space: int, time: int, fill: str = "repeat") -> jax.Array:
    """The given clip at the size of what the stage makes: bilinear in space, repeated or blank frames in time.

    Args:
      low: [B, t, h, w, C].
      space, time: factors; ValueError below 1.
      fill: 'repeat', or 'blank' for frames of zeros behind a mask channel that is 1 on the frames given; ValueError
        for anything else.

    Returns:
      float32 [B, t * time, h * space, w * space, C], C + 1 with 'blank'.
    """
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r} is unknown: choose from {', '.join(FILLS)}.")
    height, width = low.shape[2:4]
    video = resize.resize_space(low, height * space, width * space)
    if fill == "repeat":
        return resize.repeat_frames(video, time)
    video, mask = resize.blank_frames(video, time)
    mask = jnp.broadcast_to(mask[:, :, None, None, None], (*video.shape[:-1], 1))
    return jnp.concatenate([video, mask], axis=-1)

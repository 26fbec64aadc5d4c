"""Joint training on images and video (Section 2.6): independent images packed behind the frames of a video.

B batch, T frames of the video, K images, H height, W width, C channels, L text tokens, D text width. In a packed
sequence of T + K frames the first T are the video and the last K are images, each with its own text. Temporal layers
act on frames[:, :T] alone, which is equivalent to masking them for the images (arXiv 2204.03458).
"""

import jax
import jax.numpy as jnp
import numpy as np


def pack(video, images) -> jax.Array:
    """Appends images to the frames of a video.

    Args:
      video: [B, T, H, W, C].
      images: [B, K, H, W, C]; ValueError if anything but K differs from the video.

    Returns:
      [B, T + K, H, W, C].
    """
    if video.shape[:1] + video.shape[2:] != images.shape[:1] + images.shape[2:]:
        raise ValueError(f"Images {images.shape} must agree with the video {video.shape} in all but the frame axis.")
    return jnp.concatenate([video, images], axis=1)


def pack_text(text, text_mask, image_text, image_text_mask) -> tuple[jax.Array, jax.Array]:
    """The texts of a packed sequence: the first is that of the video's frames, text k + 1 that of image k.

    Args:
      text: [B, L, D] of the video.
      text_mask: [B, L].
      image_text: [B, K, L, D] of the images; ValueError if anything but K differs from the video's.
      image_text_mask: [B, K, L].

    Returns:
      text [B, 1 + K, L, D], mask [B, 1 + K, L].
    """
    if text.shape != image_text.shape[:1] + image_text.shape[2:]:
        raise ValueError(f"Image text {image_text.shape} must be [B, K, L, D], the video's text being {text.shape}.")
    if text_mask.shape != text.shape[:-1] or image_text_mask.shape != image_text.shape[:-1]:
        raise ValueError(
            f"Masks {text_mask.shape} and {image_text_mask.shape} must have the shapes of their texts "
            f"{text.shape} and {image_text.shape} less the last axis."
        )
    return (
        jnp.concatenate([text[:, None], image_text], axis=1),
        jnp.concatenate([text_mask[:, None], image_text_mask], axis=1),
    )


def frame_weights(num_frames: int, num_images: int, image_weight: float) -> np.ndarray:
    """Loss weights of the frames of a packed sequence: 1 for a video frame, `image_weight` for an image.

    Args:
      num_frames: T.
      num_images: K.
      image_weight: weight of one image relative to one video frame; ValueError below 0.

    Returns:
      float32 [T + K].
    """
    if image_weight < 0:
        raise ValueError(f"image_weight={image_weight} must not be negative.")
    return np.concatenate([np.ones(num_frames, np.float32), np.full(num_images, image_weight, np.float32)])

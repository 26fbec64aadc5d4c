"""Conditioning augmentation (Section 2.5): super-resolution models see their conditioning video through noise.

B batch, T frames, H height, W width, C channels. The noise goes on the low-resolution video, before it is upsampled
(arXiv 2106.15282), and the model is told its level, logsnr [B].
"""

import math

import jax
import jax.numpy as jnp

from ivideo.diffusion.process import add_noise
from ivideo.diffusion.schedules import cosine_logsnr


def random_level(key, batch: int, *, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> jax.Array:
    """Random levels for training: a ~ U(0, 1) through the cosine schedule, one a clip.

    Args:
      key: one key.
      batch: B.
      logsnr_min: log-SNR of a = 1.
      logsnr_max: log-SNR of a = 0.

    Returns:
      logsnr float32 [B].
    """
    return cosine_logsnr(jax.random.uniform(key, (batch,)), logsnr_min=logsnr_min, logsnr_max=logsnr_max)


def sampling_logsnr(snr: float, batch: int) -> jax.Array:
    """The fixed level for sampling, from a linear signal-to-noise ratio such as 3 or 5.

    Args:
      snr: alpha^2 / sigma^2; ValueError unless it is above 0.
      batch: B.

    Returns:
      logsnr float32 [B], log(snr).
    """
    if not snr > 0:
        raise ValueError(f"snr={snr} must be above 0: it is the linear ratio alpha^2 / sigma^2, not its logarithm.")
    return jnp.full((batch,), math.log(snr), jnp.float32)


def augment(key, video, logsnr) -> jax.Array:
    """Noisy conditioning video, alpha video + sigma eps.

    Args:
      key: one typed key for the whole batch, or typed keys [B], one a sample (a sample's noise then does not depend on
        its batch); ValueError for anything else.
      video: [B, T, H, W, C] in [-1, 1], at its own low resolution.
      logsnr: [B].

    Returns:
      float32 [B, T, H, W, C].
    """
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape not in ((), (video.shape[0],)):
        found = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else type(key).__name__
        raise ValueError(f"key must be a typed key (jax.random.key), [] or [{video.shape[0]}], but is {found}.")
    if key.ndim:
        eps = jax.vmap(lambda one: jax.random.normal(one, video.shape[1:], jnp.float32))(key)
    else:
        eps = jax.random.normal(key, video.shape, jnp.float32)
    return add_noise(video, eps, logsnr)


def blur(video, deviation) -> jax.Array:
    """Frames blurred by a Gaussian, the blurring augmentation of arXiv 2106.15282 (Section 4) for small frames.

    At the frame's edges the Gaussian's part inside is normalised, so that a plain frame stays as it is.

    Args:
      video: [B, T, H, W, C].
      deviation: [B], standard deviations in pixels; 0 leaves a clip as it is.

    Returns:
      float32 [B, T, H, W, C].
    """

    def rows(size):
        distance = jnp.arange(size)[:, None] - jnp.arange(size)
        weight = jnp.exp(-0.5 * (distance / jnp.maximum(deviation, 1e-3)[:, None, None]) ** 2)
        return weight / weight.sum(axis=-1, keepdims=True)

    height, width = video.shape[2:4]
    return jnp.einsum("bhy,bwx,btyxc->bthwc", rows(height), rows(width), video, precision="highest")

"""Conditioning augmentation (Section 2.5): noise on the conditioning video of super-resolution models.

B batch, T frames, H height, W width, C channels. The noise is added to the low-resolution video before it is upsampled
(arXiv 2106.15282). Its level, logsnr [B], is an input of the model.
"""

import math

import jax
import jax.numpy as jnp

from ivideo.diffusion.process import add_noise
from ivideo.diffusion.schedules import cosine_logsnr


def random_level(key, batch: int, *, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> jax.Array:
    """Random noise levels for training, one per clip: the cosine schedule's log-SNR at a time a ~ U(0, 1).

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
    """The fixed noise level for sampling, from a linear signal-to-noise ratio such as 3 or 5.

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
    """Adds noise to a conditioning video: alpha video + sigma eps.

    Args:
      key: one typed key for the whole batch, or typed keys [B], one per sample, with which a sample's noise does not
        depend on its batch; ValueError for anything else.
      video: [B, T, H, W, C] in [-1, 1], at its own low resolution.
      logsnr: [B].

    Returns:
      float32 [B, T, H, W, C].
    """
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or key.shape not in ((), (video.shape[0],)):
        actual = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else type(key).__name__
        raise ValueError(
            f"key must be a typed key (jax.random.key) of shape [] or [{video.shape[0]}], but is {actual}."
        )
    if key.ndim:
        eps = jax.vmap(lambda sample_key: jax.random.normal(sample_key, video.shape[1:], jnp.float32))(key)
    else:
        eps = jax.random.normal(key, video.shape, jnp.float32)
    return add_noise(video, eps, logsnr)


def blur(video, deviation) -> jax.Array:
    """Blurs frames with a Gaussian, the blurring augmentation of arXiv 2106.15282 (Section 4) for small frames.

    At the frame's edges the weights inside the frame are normalised, so a frame of one colour does not change.

    Args:
      video: [B, T, H, W, C].
      deviation: [B], standard deviations in pixels; 0 leaves a clip unchanged.

    Returns:
      float32 [B, T, H, W, C].
    """

    def weights(size):
        distance = jnp.arange(size)[:, None] - jnp.arange(size)
        weight = jnp.exp(-0.5 * (distance / jnp.maximum(deviation, 1e-3)[:, None, None]) ** 2)
        return weight / weight.sum(axis=-1, keepdims=True)

    height, width = video.shape[2:4]
    return jnp.einsum("bhy,bwx,btyxc->bthwc", weights(height), weights(width), video, precision="highest")

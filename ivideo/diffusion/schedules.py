"""Noise schedules (Section 2.1): the cosine log-SNR schedule in continuous time, its inverse, and alpha and sigma.

Time t runs from 0 (clean) to 1 (noise). A noise level is the logarithm of the signal-to-noise ratio, logsnr =
log(alpha^2 / sigma^2). The process preserves variance: alpha^2 + sigma^2 = 1.
"""

import math

import jax
import jax.numpy as jnp


def _angles(logsnr_min: float, logsnr_max: float) -> tuple[float, float, float]:
    """Of the angle atan(sigma/alpha) in radians: its slope in t, its value at t=0, and pi/2 minus its value at t=1."""
    if not logsnr_min < logsnr_max:
        raise ValueError(f"logsnr_min={logsnr_min} must be below logsnr_max={logsnr_max}.")
    clean = math.atan(math.exp(-logsnr_max / 2))
    noisy = math.atan(math.exp(logsnr_min / 2))
    return math.pi / 2 - noisy - clean, clean, noisy


def cosine_logsnr(t, *, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> jax.Array:
    """Log-SNR of the cosine schedule at time t.

    -2 log tan(a t + b), with a and b such that t=0 gives `logsnr_max` and t=1 gives `logsnr_min`: the angle
    atan(sigma/alpha) is linear in t. Section 2.1; the form and the range are those of arXiv 2202.00512.

    Args:
      t: times in [0, 1], any shape.
      logsnr_min: log-SNR at t=1.
      logsnr_max: log-SNR at t=0; ValueError unless it is above `logsnr_min`.

    Returns:
      float32 array of t's shape.
    """
    slope, clean, noisy = _angles(logsnr_min, logsnr_max)
    t = jnp.asarray(t, jnp.float32)
    # Near t=1 the angle is almost pi/2, where float32 is too coarse. There it is measured from pi/2, since
    # tan(pi/2 - u) = 1 / tan(u).
    early = t < 0.5
    angle = jnp.where(early, slope * t + clean, slope * (1 - t) + noisy)
    return jnp.where(early, -2.0, 2.0) * jnp.log(jnp.tan(angle))


def cosine_time(logsnr, *, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> jax.Array:
    """Time at which the cosine schedule has the given log-SNR: the inverse of `cosine_logsnr`.

    Args:
      logsnr: log-SNRs between `logsnr_min` and `logsnr_max`, any shape.
      logsnr_min: log-SNR at t=1.
      logsnr_max: log-SNR at t=0; ValueError unless it is above `logsnr_min`.

    Returns:
      float32 array of logsnr's shape.
    """
    slope, clean, noisy = _angles(logsnr_min, logsnr_max)
    logsnr = jnp.asarray(logsnr, jnp.float32)
    angle = jnp.arctan(jnp.exp(-jnp.abs(logsnr) / 2))
    return jnp.where(logsnr > 0, (angle - clean) / slope, 1 - (angle - noisy) / slope)


def alpha_sigma(logsnr) -> tuple[jax.Array, jax.Array]:
    """Scales of signal and noise: alpha = sqrt(sigmoid(logsnr)), sigma = sqrt(sigmoid(-logsnr)). Section 2.1.

    Args:
      logsnr: log-SNRs, any shape.

    Returns:
      alpha, sigma: float32 arrays of logsnr's shape. Both keep full relative precision when they are small.
    """
    logsnr = jnp.asarray(logsnr, jnp.float32)
    return jnp.exp(0.5 * jax.nn.log_sigmoid(logsnr)), jnp.exp(0.5 * jax.nn.log_sigmoid(-logsnr))

"""Samplers (Sections 2.1 and 2.7): DDIM, ancestral, and the stochastic sampler of distilled models.

Each is one `lax.scan` over a uniform grid of times from 1 to 0, and returns the last prediction of the clean video.
B batch. z is [B, ...], usually video [B, T, H, W, C]. Step i, from 0, goes from t = (N - i) / N to s = t - 1 / N.

Randomness: `keys` is a batch [B] of typed keys (`jax.random.key`), one per sample. The noise of step i is drawn for
each sample from `fold_in(key, i)`, so a sample does not depend on its batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ivideo.diffusion import process
from ivideo.diffusion.schedules import alpha_sigma, cosine_logsnr

# Folded into a key for the sampler's initial noise. No step has this number.
_INITIAL = np.uint32(2**32 - 1)


def time_grid(num_steps: int) -> np.ndarray:
    """Times of a sampler: 1, (N - 1) / N, ..., 1 / N, 0.

    Args:
      num_steps: N; ValueError below 1.

    Returns:
      float32 [N + 1].
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1.")
    return (np.arange(num_steps, -1, -1) / num_steps).astype(np.float32)


def _noise(keys, step, shape):
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32))(keys)


def initial_noise(keys, shape) -> jax.Array:
    """The standard normal noise that a sampler starts from, drawn for each sample from its own key.

    The same keys can be passed to the sampler, whose steps draw other numbers from them.

    Args:
      keys: [B] typed keys; ValueError for anything else.
      shape: shape of one sample, such as (T, H, W, C).

    Returns:
      float32 [B, *shape].
    """
    _check_keys(keys)
    return _noise(keys, _INITIAL, tuple(shape))


def _check_keys(keys, batch=None):
    typed = hasattr(keys, "dtype") and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not typed or keys.ndim != 1 or batch not in (None, keys.shape[0]):
        actual = f"{keys.dtype}{list(keys.shape)}" if hasattr(keys, "dtype") else type(keys).__name__
        raise ValueError(
            f"keys must be typed keys of shape [{'B' if batch is None else batch}], one per sample, but is {actual}; "
            "make them with jax.random.split(jax.random.key(seed), batch)."
        )


def _predict(v_fn, z, logsnr, threshold):
    """Predicted x and eps [B, ...] at one noise level (a scalar), consistent with each other and with z."""
    logsnr = jnp.full(z.shape[:1], logsnr)
    v = v_fn(z, logsnr)
    x = process.x_from_v(z, v, logsnr)
    if threshold is None:
        return x, process.eps_from_v(z, v, logsnr)
    x = threshold(x)
    return x, process.eps_from_x(z, x, logsnr)


def _scan(step_fn, z, num_steps, on_step):
    """Runs z = step_fn(z, i) for i = 0 .. num_steps - 1, and calls `on_step` on the host after each step."""

    def body(z, i):
        z = step_fn(z, i)
        if on_step is not None:
            # The callback takes an element of z, so that it cannot run before z is computed.
            jax.debug.callback(lambda done, _: on_step(int(done)), i + 1, z[(0,) * z.ndim])
        return z, None

    return jax.lax.scan(body, jnp.asarray(z, jnp.float32), jnp.arange(num_steps))[0]


def ddim(
    v_fn: process.VFn,
    z,
    *,
    num_steps: int,
    threshold: Callable | None = None,
    logsnr_fn: Callable = cosine_logsnr,
    on_step: Callable[[int], None] | None = None,
) -> jax.Array:
    """Deterministic sampler: z_s = alpha_s x + sigma_s eps, with x and eps predicted. Section 2.1; arXiv 2010.02502.

    Args:
      v_fn: denoiser, (z [B, ...], logsnr [B]) -> v [B, ...].
      z: [B, ...] standard normal noise, see `initial_noise`.
      num_steps: evaluations of `v_fn`; ValueError below 1.
      threshold: None, or a function that maps the predicted x [B, ...] to the x to use, such as
        `guidance.static_threshold`. eps is then recomputed from that x (arXiv 2202.00512).
      logsnr_fn: schedule, time in [0, 1] -> log-SNR.
      on_step: None, or a function called on the host after each step with the number of completed steps.

    Returns:
      float32 [B, ...], the last prediction of x.
    """
    logsnrs = jnp.asarray(logsnr_fn(time_grid(num_steps)), jnp.float32)

    def step(z, i):
        x, eps = _predict(v_fn, z, logsnrs[i], threshold)
        alpha_s, sigma_s = alpha_sigma(logsnrs[i + 1])
        return jnp.where(i == num_steps - 1, x, alpha_s * x + sigma_s * eps)

    return _scan(step, z, num_steps, on_step)


def ancestral(
    v_fn: process.VFn,
    z,
    keys,
    *,
    num_steps: int,
    gamma: float = 0.3,
    threshold: Callable | None = None,
    logsnr_fn: Callable = cosine_logsnr,
    on_step: Callable[[int], None] | None = None,
) -> jax.Array:
    """Ancestral sampler: each step samples the posterior, given the predicted x. Section 2.1; arXiv 2204.03458.

    Args:
      v_fn: denoiser, (z [B, ...], logsnr [B]) -> v [B, ...].
      z: [B, ...] standard normal noise, see `initial_noise`.
      keys: [B] typed keys, one per sample; ValueError for anything else.
      num_steps: evaluations of `v_fn`; ValueError below 1.
      gamma: in [0, 1], between the smallest (0) and the largest (1) variance of a step, see `process.posterior`.
        Video Diffusion Models use 0.3 for text-to-video; Imagen Video does not print its value.
      threshold, logsnr_fn, on_step: as in `ddim`.

    Returns:
      float32 [B, ...], the last prediction of x.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} must be in [0, 1].")
    _check_keys(keys, z.shape[0])
    logsnrs = jnp.asarray(logsnr_fn(time_grid(num_steps)), jnp.float32)

    def step(z, i):
        x, _ = _predict(v_fn, z, logsnrs[i], threshold)
        mean, variance = process.posterior(z, x, logsnrs[i], logsnrs[i + 1], gamma=gamma)
        return jnp.where(i == num_steps - 1, x, mean + jnp.sqrt(variance) * _noise(keys, i, z.shape[1:]))

    return _scan(step, z, num_steps, on_step)


def distilled(
    v_fn: process.VFn,
    z,
    keys,
    *,
    num_steps: int,
    threshold: Callable | None = None,
    logsnr_fn: Callable = cosine_logsnr,
    on_step: Callable[[int], None] | None = None,
) -> jax.Array:
    """Stochastic N-step sampler of distilled models: two steps forward, one step of noise back. Section 2.7.

    Each step is a DDIM step of length 2 / N to k = t - 2 / N, followed by noise from k back to s = t - 1 / N. The last
    step, from t = 1 / N, is a DDIM step to 0 (arXiv 2210.03142).

    Args:
      v_fn: denoiser, (z [B, ...], logsnr [B]) -> v [B, ...].
      z: [B, ...] standard normal noise, see `initial_noise`.
      keys: [B] typed keys, one per sample; ValueError for anything else.
      num_steps: N, evaluations of `v_fn`; ValueError below 1. 8 for every model of the paper's distilled cascade.
      threshold, logsnr_fn, on_step: as in `ddim`.

    Returns:
      float32 [B, ...], the last prediction of x.
    """
    _check_keys(keys, z.shape[0])
    logsnrs = jnp.asarray(logsnr_fn(time_grid(num_steps)), jnp.float32)

    def step(z, i):
        x, eps = _predict(v_fn, z, logsnrs[i], threshold)
        logsnr_s, logsnr_k = logsnrs[i + 1], logsnrs[jnp.minimum(i + 2, num_steps)]
        alpha_s, _ = alpha_sigma(logsnr_s)
        alpha_k, sigma_k = alpha_sigma(logsnr_k)
        z_k = alpha_k * x + sigma_k * eps
        back = jnp.sqrt(process.transition_variance(logsnr_s, logsnr_k))
        z_s = (alpha_s / alpha_k) * z_k + back * _noise(keys, i, z.shape[1:])
        return jnp.where(i == num_steps - 1, x, z_s)

    return _scan(step, z, num_steps, on_step)

"""The diffusion process (Sections 2.1 and 2.4): adding noise, x / eps / v conversions, the posterior, the loss.

B batch, T frames, H height, W width, C channels. Everything is float32. Arrays are [B, ...] with logsnr [B]; the
conversions use only the leading dimension, so they work for video [B, T, H, W, C] and for any other shape.

A denoiser is a function `v_fn(z, logsnr) -> v`, closed over its parameters and its conditioning.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ivideo.diffusion.schedules import alpha_sigma

VFn = Callable[[jax.Array, jax.Array], jax.Array]

# Each loss as a weight on the mean squared error of v. At fixed z, x = alpha z - sigma v and eps = sigma z + alpha v,
# so x-MSE = sigma^2 v-MSE and eps-MSE = alpha^2 v-MSE. Since SNR = alpha^2 / sigma^2, max(SNR, 1) x-MSE is
# max(alpha^2, sigma^2) v-MSE. No weight divides by sigma.
_LOSS_WEIGHTS = {
    "v": lambda alpha, sigma: jnp.ones_like(alpha),
    "eps": lambda alpha, sigma: alpha**2,
    "x": lambda alpha, sigma: sigma**2,
    "truncated_snr": lambda alpha, sigma: jnp.maximum(alpha, sigma) ** 2,
}
LOSS_KINDS = tuple(_LOSS_WEIGHTS)


def _f32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def expand(logsnr, like) -> jax.Array:
    """Appends axes of length 1 to logsnr, so that it broadcasts against `like`.

    Args:
      logsnr: [B], or a shape that like's shape begins with.
      like: [B, ...].

    Returns:
      float32 [B, 1, 1, ...] with as many axes as `like`.
    """
    logsnr = jnp.asarray(logsnr, jnp.float32)
    return logsnr.reshape(logsnr.shape + (1,) * (jnp.ndim(like) - logsnr.ndim))


def _scales(logsnr, like):
    return alpha_sigma(expand(logsnr, like))


def add_noise(x, eps, logsnr) -> jax.Array:
    """Noisy z = alpha x + sigma eps, a sample of q(z_t | x) when eps is standard normal. Section 2.1.

    Args: x, eps: [B, ...]; logsnr: [B]. Returns: float32 [B, ...].
    """
    x, eps = _f32(x, eps)
    alpha, sigma = _scales(logsnr, x)
    return alpha * x + sigma * eps


def v_target(x, eps, logsnr) -> jax.Array:
    """The network's target v = alpha eps - sigma x. Section 2.4.

    Args: x, eps: [B, ...]; logsnr: [B]. Returns: float32 [B, ...].
    """
    x, eps = _f32(x, eps)
    alpha, sigma = _scales(logsnr, x)
    return alpha * eps - sigma * x


def x_from_v(z, v, logsnr) -> jax.Array:
    """Clean x = alpha z - sigma v. Section 2.4.

    Args: z, v: [B, ...]; logsnr: [B]. Returns: float32 [B, ...].
    """
    z, v = _f32(z, v)
    alpha, sigma = _scales(logsnr, z)
    return alpha * z - sigma * v


def eps_from_v(z, v, logsnr) -> jax.Array:
    """Noise eps = sigma z + alpha v. Section 2.4.

    Args: z, v: [B, ...]; logsnr: [B]. Returns: float32 [B, ...].
    """
    z, v = _f32(z, v)
    alpha, sigma = _scales(logsnr, z)
    return sigma * z + alpha * v


def eps_from_x(z, x, logsnr) -> jax.Array:
    """Noise eps = (z - alpha x) / sigma; loses precision as sigma goes to 0. Section 2.1.

    Args: z, x: [B, ...]; logsnr: [B]. Returns: float32 [B, ...].
    """
    z, x = _f32(z, x)
    alpha, sigma = _scales(logsnr, z)
    return (z - alpha * x) / sigma


def transition_variance(logsnr_t, logsnr_s) -> jax.Array:
    """Variance of q(z_t | z_s) for s < t: (1 - exp(logsnr_t - logsnr_s)) sigma_t^2. Section 2.1.

    Args: logsnr_t, logsnr_s: any shape, logsnr_t <= logsnr_s. Returns: float32 array of their shape.
    """
    logsnr_t, logsnr_s = _f32(logsnr_t, logsnr_s)
    return -jnp.expm1(logsnr_t - logsnr_s) * jax.nn.sigmoid(-logsnr_t)


def posterior(z_t, x, logsnr_t, logsnr_s, *, gamma: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the step from t back to s < t, given the clean x. Section 2.1; arXiv 2204.03458, Section 2.

    With r = exp(logsnr_t - logsnr_s) the mean is r (alpha_s / alpha_t) z_t + (1 - r) alpha_s x, and the variance is
    [(1 - r) sigma_s^2]^(1 - gamma) [(1 - r) sigma_t^2]^gamma. gamma = 0 gives q(z_s | z_t, x) itself, the lower bound
    on the variance of the reverse process; gamma = 1 gives the upper bound.

    Args:
      z_t: [B, ...] noisy.
      x: [B, ...] clean.
      logsnr_t: [B] noise level of z_t.
      logsnr_s: [B] noise level after the step, above logsnr_t.
      gamma: interpolates between the two bounds, in [0, 1].

    Returns:
      mean [B, ...], variance [B, 1, ...]; both float32.
    """
    z_t, x = _f32(z_t, x)
    logsnr_t, logsnr_s = expand(logsnr_t, z_t), expand(logsnr_s, z_t)
    alpha_t, _ = alpha_sigma(logsnr_t)
    alpha_s, _ = alpha_sigma(logsnr_s)
    r = jnp.exp(logsnr_t - logsnr_s)
    one_minus_r = -jnp.expm1(logsnr_t - logsnr_s)
    mean = r * (alpha_s / alpha_t) * z_t + one_minus_r * alpha_s * x
    log_sigma2 = (1 - gamma) * jax.nn.log_sigmoid(-logsnr_s) + gamma * jax.nn.log_sigmoid(-logsnr_t)
    return mean, one_minus_r * jnp.exp(log_sigma2)


def loss_weight(logsnr, kind: str) -> jax.Array:
    """The weight of a loss on the mean squared error of v: every loss here is v-MSE, weighted by the noise level.

    'v': 1, the loss (SNR + 1) x-MSE. 'eps': alpha^2, the loss eps-MSE. 'x': sigma^2, the loss x-MSE.
    'truncated_snr': max(alpha^2, sigma^2), the loss max(SNR, 1) x-MSE (arXiv 2202.00512, Section 4).

    Args:
      logsnr: any shape.
      kind: one of LOSS_KINDS; ValueError otherwise.

    Returns:
      float32 array of logsnr's shape.
    """
    if kind not in _LOSS_WEIGHTS:
        raise ValueError(f"Loss kind {kind!r} is unknown; choose one of {', '.join(map(repr, LOSS_KINDS))}.")
    return _LOSS_WEIGHTS[kind](*alpha_sigma(logsnr))


def v_loss(v, target, logsnr, *, kind: str = "v", weights=None) -> jax.Array:
    """Loss of a prediction of v, one number per sample.

    Args:
      v: [B, T, ...] prediction.
      target: [B, T, ...]; ValueError if its shape is not v's.
      logsnr: [B].
      kind: one of LOSS_KINDS, see `loss_weight`.
      weights: None, or frame weights that broadcast to [B, T]. With weights, the mean over frames is the weighted mean,
        and a sample whose weights are all 0 has loss 0.

    Returns:
      float32 [B], the mean over all axes but the batch.
    """
    if jnp.shape(v) != jnp.shape(target):
        raise ValueError(f"The prediction has shape {jnp.shape(v)}, but its target has {jnp.shape(target)}.")
    weight = loss_weight(logsnr, kind)
    v, target = _f32(v, target)
    error = jnp.square(v - target)
    if weights is None:
        return weight * error.mean(axis=tuple(range(1, error.ndim)))
    error = error.mean(axis=tuple(range(2, error.ndim)))
    weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), error.shape)
    total = jnp.maximum(weights.sum(axis=1), jnp.finfo(jnp.float32).tiny)
    return weight * (weights * error).sum(axis=1) / total


def training_loss(v_fn: VFn, x, eps, logsnr, *, kind: str = "v", weights=None) -> jax.Array:
    """Denoising loss of `v_fn` at noise levels `logsnr`. Sections 2.1 and 2.4.

    'v' is the unweighted mean squared error of v; 'eps' is that of eps, as Section 2.1 writes it. The same function
    minimises both; they weight noise levels differently.

    Args:
      v_fn: denoiser, (z [B, T, ...], logsnr [B]) -> v [B, T, ...].
      x: [B, T, ...] clean data.
      eps: [B, T, ...] standard normal noise.
      logsnr: [B] noise levels.
      kind: one of LOSS_KINDS, see `loss_weight`; ValueError otherwise.
      weights: None, or frame weights that broadcast to [B, T], see `v_loss`.

    Returns:
      float32 [B].
    """
    loss_weight(logsnr, kind)  # An unknown kind fails here, before the network is traced.
    v = v_fn(add_noise(x, eps, logsnr), jnp.asarray(logsnr, jnp.float32))
    return v_loss(v, v_target(x, eps, logsnr), logsnr, kind=kind, weights=weights)

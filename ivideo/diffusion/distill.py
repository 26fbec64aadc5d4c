"""Progressive distillation with guidance and stochastic samplers (Section 2.7): the targets and the loss.

Stage one (arXiv 2210.03142): one model, with the guidance weight as an input, learns its teacher's guided prediction.
Stage two (arXiv 2202.00512): a student of N steps learns, in one jump, where two DDIM steps of its teacher lead; then N
halves.

B batch. Arrays are [B, ...] float32; logsnr [B]. Targets carry no gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ivideo.diffusion import process
from ivideo.diffusion.guidance import guide
from ivideo.diffusion.schedules import alpha_sigma, cosine_logsnr


class Target(NamedTuple):
    """What a student should predict from z_t, as x and as v; both float32 [B, ...] without gradient."""

    x: jax.Array
    v: jax.Array


def sample_weight(key, batch: int, *, w_min: float, w_max: float) -> jax.Array:
    """Guidance weights for stage one, w ~ U[w_min, w_max], one a sample.

    Args:
      key: one key.
      batch: B.
      w_min: smallest weight.
      w_max: largest weight; ValueError below w_min.

    Returns:
      float32 [B].
    """
    if w_max < w_min:
        raise ValueError(f"w_max={w_max} must not be below w_min={w_min}.")
    return jax.random.uniform(key, (batch,), jnp.float32, w_min, w_max)


def guided_target(cond_fn: process.VFn, uncond_fn: process.VFn, z, logsnr, weight) -> Target:
    """Target of stage one: the teacher's guided prediction, (1 + w) conditional - w unconditional.

    Args:
      cond_fn: the teacher with the text, (z [B, ...], logsnr [B]) -> v [B, ...].
      uncond_fn: the teacher without it.
      z: [B, ...] noisy data.
      logsnr: [B].
      weight: [B] guidance weights, see `sample_weight`.

    Returns:
      Target of x and v, [B, ...].
    """
    z, logsnr = jnp.asarray(z, jnp.float32), jnp.asarray(logsnr, jnp.float32)
    v = guide(cond_fn(z, logsnr), uncond_fn(z, logsnr), weight)
    return jax.lax.stop_gradient(Target(process.x_from_v(z, v, logsnr), v))


def student_time(i, *, num_steps: int) -> jax.Array:
    """Time t = (i + 1) / N of a student's grid point. arXiv 2202.00512, Algorithm 2.

    Args:
      i: int [B], 0 .. N - 1.
      num_steps: N; ValueError below 1.

    Returns:
      float32 [B].
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1.")
    return (jnp.asarray(i) + 1).astype(jnp.float32) / num_steps


def two_step_target(
    v_fn: process.VFn, z, *, i, num_steps: int, jump: int = 1, logsnr_fn: Callable = cosine_logsnr
) -> Target:
    """Target of stage two: the x that leads, in one DDIM jump, where two steps of the teacher lead.

    The jump goes from t = (i + 1) / N to s = t - jump / N, or to 0 where that is nearer; the teacher makes it in two
    equal steps over m = (t + s) / 2, predicting x_1 at t and x_2 at m. On a schedule whose angle is linear in time,

        x_target = (sigma_s x_1 + sigma_t x_2) / (sigma_s + sigma_t),

    and a jump to 0 has x_target = x_2. (This equals arXiv 2202.00512, Algorithm 2, which divides one small difference
    by another.)

    Args:
      v_fn: the teacher, (z [B, ...], logsnr [B]) -> v [B, ...].
      z: [B, ...] noisy data at the time t, see `student_time`.
      i: int [B], 0 .. N - 1.
      num_steps: N of the student; ValueError below 1.
      jump: length of the student's jump in steps of 1 / N; 1 for a student sampled by `samplers.ddim`, 2 for
        `samplers.distilled`, whose jumps are of 2 / N at all times but t = 1 / N. ValueError below 1.
      logsnr_fn: schedule, time -> log-SNR; it must be a cosine schedule (of any range), where the formula above holds.

    Returns:
      Target of x and v, [B, ...].
    """
    if jump < 1:
        raise ValueError(f"jump={jump} must be at least 1.")
    z, i = jnp.asarray(z, jnp.float32), jnp.asarray(i)
    first = student_time(i, num_steps=num_steps)
    last = jnp.maximum(i + 1 - jump, 0).astype(jnp.float32) / num_steps
    logsnr_t, logsnr_m, logsnr_s = logsnr_fn(first), logsnr_fn((first + last) / 2), logsnr_fn(last)
    alpha_t, sigma_t = alpha_sigma(process.expand(logsnr_t, z))
    alpha_m, sigma_m = alpha_sigma(process.expand(logsnr_m, z))
    _, sigma_s = alpha_sigma(process.expand(logsnr_s, z))
    # The schedule ends a little short of sigma = 0; a jump to time 0 is meant to end at the clean x.
    sigma_s = jnp.where(process.expand(last, z) == 0, 0.0, sigma_s)

    v_1 = jnp.asarray(v_fn(z, logsnr_t), jnp.float32)
    z_m = alpha_m * process.x_from_v(z, v_1, logsnr_t) + sigma_m * process.eps_from_v(z, v_1, logsnr_t)
    v_m = jnp.asarray(v_fn(z_m, logsnr_m), jnp.float32)
    # v_2 is x_2 as a v at t. (alpha_t z - x_2) / sigma_t says the same, but loses its digits where sigma_t is small.
    ratio = sigma_m / sigma_t
    v_2 = (alpha_m - alpha_t * ratio) * (alpha_m * v_1 - sigma_m * z) + ratio * v_m
    v = (sigma_s * v_1 + sigma_t * v_2) / (sigma_s + sigma_t)
    return jax.lax.stop_gradient(Target(process.x_from_v(z, v, logsnr_t), v))


def distill_loss(v, target, logsnr, *, kind: str = "truncated_snr", weights=None) -> jax.Array:
    """Loss of a student, one number a sample.

    Args:
      v: [B, T, ...] the student's prediction of v.
      target: a Target, or its v [B, T, ...].
      logsnr: [B] noise level of z_t.
      kind: 'truncated_snr', max(SNR, 1) x-MSE, or 'v', (SNR + 1) x-MSE, and the others of `process.loss_weight`.
      weights: None, or weights of the frames that broadcast to [B, T], see `process.v_loss`.

    Returns:
      float32 [B].
    """
    return process.v_loss(v, target.v if isinstance(target, Target) else target, logsnr, kind=kind, weights=weights)


def rounds(first: int, last: int) -> list[int]:
    """Numbers of steps of the students of progressive distillation, each half of the one before.

    Args:
      first: steps of the teacher, such as 256.
      last: steps of the last student, such as 8; ValueError unless halving `first` leads to it.

    Returns:
      [first / 2, ..., last]; empty when the two are equal.
    """
    steps, counts = first, []
    while steps > last > 0 and steps % 2 == 0:
        steps //= 2
        counts.append(steps)
    if steps != last or last < 1:
        raise ValueError(f"Halving {first} steps does not lead to {last}; choose {first} = {last} times a power of 2.")
    return counts

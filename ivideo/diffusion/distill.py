"""Progressive distillation with guidance and stochastic samplers (Section 2.7): what a student should predict.

Stage one (arXiv 2210.03142): one network, with the guidance weight as an input, learns the guided prediction of its
teacher. Stage two (arXiv 2202.00512): a student of N steps learns to reach in one jump what its teacher reaches in two
DDIM steps. Then N is halved.

B batch. Arrays are [B, ...] float32; logsnr [B]. Targets carry no gradient. No target clips x: where the sampler clips
the student's x, it does so at sampling, as for any other network.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ivideo.diffusion import process
from ivideo.diffusion.guidance import guide
from ivideo.diffusion.schedules import alpha_sigma, cosine_logsnr


def random_guidance_weight(keys, *, w_min: float, w_max: float) -> jax.Array:
    """Random guidance weights for training a student, w ~ U[w_min, w_max], one per sample.

    Args:
      keys: [B] typed keys, one per sample.
      w_min: smallest weight.
      w_max: largest weight; ValueError below w_min.

    Returns:
      float32 [B].
    """
    if w_max < w_min:
        raise ValueError(f"w_max={w_max} must not be below w_min={w_min}.")
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, w_min, w_max))(keys)


def guided_target(cond_fn: process.VFn, uncond_fn: process.VFn, z, logsnr, weight) -> jax.Array:
    """The v that a student learns in stage one: its teacher's guided prediction, (1 + w) conditional - w unconditional.

    Args:
      cond_fn: the teacher with the text, (z [B, ...], logsnr [B]) -> v [B, ...].
      uncond_fn: the teacher without the text.
      z: [B, ...] noisy data.
      logsnr: [B].
      weight: [B] guidance weights, see `random_guidance_weight`.

    Returns:
      v, [B, ...].
    """
    z, logsnr = jnp.asarray(z, jnp.float32), jnp.asarray(logsnr, jnp.float32)
    return jax.lax.stop_gradient(guide(cond_fn(z, logsnr), uncond_fn(z, logsnr), weight))


def random_grid_point(time, *, num_steps) -> jax.Array:
    """The grid point i = 0 .. N - 1 of a student of N steps that a random time stands for.

    Args:
      time: [B] in [0, 1). Times that are spread evenly give grid points that are.
      num_steps: N, a number or an array [].

    Returns:
      int32 [B].
    """
    i = jnp.floor(jnp.asarray(time, jnp.float32) * num_steps).astype(jnp.int32)
    return jnp.minimum(i, num_steps - 1)  # a time just below 1 may be rounded up


def student_time(i, *, num_steps) -> jax.Array:
    """Time t = (i + 1) / N of a student's grid point. arXiv 2202.00512, Algorithm 2.

    Args:
      i: int [B], 0 .. N - 1.
      num_steps: N, a number or an array [].

    Returns:
      float32 [B].
    """
    return (jnp.asarray(i) + 1).astype(jnp.float32) / num_steps


def two_step_target(
    v_fn: process.VFn, z, *, i, num_steps, jump: int = 1, logsnr_fn: Callable = cosine_logsnr
) -> jax.Array:
    """The v that leads, in one DDIM jump of the student, where two steps of the teacher lead.

    The jump goes from t = (i + 1) / N to s = t - jump / N. The teacher makes it in two equal steps over m = (t + s) / 2
    and predicts x_1 at t and x_2 at m. On any schedule, as a mean of x_1 and x_2 that never divides by sigma,

        x_target = x_1 + c (x_2 - x_1),   c = expm1((logsnr_m - logsnr_s) / 2) / expm1((logsnr_t - logsnr_s) / 2)

    where logsnr_s is infinite at s = 0, so that c = 1. arXiv 2202.00512 (Algorithm 2) divides one small difference by
    another to get the same. v is linear in x, so the function takes the same mean of v_1 and of x_2 as a v at t.

    A jump of 2 / N from t = 1 / N has no room: the sampler makes one step to 0 there, and so does the teacher (c = 0).

    Args:
      v_fn: the teacher, (z [B, ...], logsnr [B]) -> v [B, ...].
      z: [B, ...] noisy data at the time t, see `student_time`.
      i: int [B], 0 .. N - 1.
      num_steps: N of the student, a number or an array [].
      jump: length of the student's jump in steps of 1 / N: 1 for a student that `samplers.ddim` samples, 2 for one that
        `samplers.distilled` samples. ValueError for anything else.
      logsnr_fn: schedule, time -> log-SNR.

    Returns:
      v, [B, ...].
    """
    if jump not in (1, 2):
        raise ValueError(f"jump={jump} must be 1 or 2.")
    z, i = jnp.asarray(z, jnp.float32), jnp.asarray(i)
    logsnr_t, logsnr_m, logsnr_s = (
        logsnr_fn(jnp.maximum(i + 1 - steps, 0).astype(jnp.float32) / num_steps) for steps in (0, jump / 2, jump)
    )
    # The schedule ends a little short of sigma = 0. A jump to time 0 is meant to end at the clean x.
    logsnr_s = jnp.where(i + 1 <= jump, jnp.inf, logsnr_s)
    c = jnp.expm1((logsnr_m - logsnr_s) / 2) / jnp.expm1((logsnr_t - logsnr_s) / 2)
    c = process.expand(jnp.where(i + 1 < jump, 0.0, c), z)

    alpha_t, sigma_t = alpha_sigma(process.expand(logsnr_t, z))
    alpha_m, sigma_m = alpha_sigma(process.expand(logsnr_m, z))
    v_1 = jnp.asarray(v_fn(z, logsnr_t), jnp.float32)
    z_m = alpha_m * process.x_from_v(z, v_1, logsnr_t) + sigma_m * process.eps_from_v(z, v_1, logsnr_t)
    v_m = jnp.asarray(v_fn(z_m, logsnr_m), jnp.float32)
    # v_2 is x_2 as a v at t. (alpha_t z - x_2) / sigma_t says the same, but loses its digits where sigma_t is small.
    ratio = sigma_m / sigma_t
    v_2 = (alpha_m - alpha_t * ratio) * (alpha_m * v_1 - sigma_m * z) + ratio * v_m
    return jax.lax.stop_gradient(v_1 + c * (v_2 - v_1))


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

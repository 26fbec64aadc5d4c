"""Guidance (Section 2.6): classifier-free guidance, oscillating weights, static and dynamic thresholding.

B batch. Arrays are [B, ...], usually video [B, T, H, W, C]; logsnr is [B]. A denoiser is `v_fn(z, logsnr) -> v`.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp

from ivideo.diffusion.process import VFn, expand
from ivideo.diffusion.schedules import cosine_time

WeightFn = Callable[[jax.Array], jax.Array]


def guide(v_cond, v_uncond, weight) -> jax.Array:
    """Guided prediction (1 + w) v_cond - w v_uncond. Section 2.6.1.

    The paper writes it for x. At fixed z, x, eps and v are affine functions of each other, so the formula holds for all
    three. Here w = 0 is no guidance; in Imagen (arXiv 2205.11487) w = 1 is.

    Args:
      v_cond: [B, ...].
      v_uncond: [B, ...].
      weight: w, scalar or [B].

    Returns:
      float32 [B, ...].
    """
    v_cond, v_uncond = jnp.asarray(v_cond, jnp.float32), jnp.asarray(v_uncond, jnp.float32)
    weight = expand(weight, v_cond)
    return (1 + weight) * v_cond - weight * v_uncond


def classifier_free(cond_fn: VFn, uncond_fn: VFn, weight: float | jax.Array | WeightFn) -> VFn:
    """Denoiser with classifier-free guidance. Section 2.6.1.

    Args:
      cond_fn: denoiser with the text.
      uncond_fn: the same denoiser without the text.
      weight: w, a number, an array [B], or a function logsnr [B] -> w [B] such as `oscillating_weight` makes.
        The Python number 0 returns `cond_fn`, which saves the second evaluation.

    Returns:
      A denoiser, (z [B, ...], logsnr [B]) -> v float32 [B, ...].
    """
    if isinstance(weight, (int, float)) and weight == 0:
        return cond_fn

    def guided(z, logsnr):
        return guide(cond_fn(z, logsnr), uncond_fn(z, logsnr), weight(logsnr) if callable(weight) else weight)

    return guided


def oscillating_weight(
    *, num_steps: int, high: float, low: float, constant_steps: int, every: int = 1, time_fn: Callable = cosine_time
) -> WeightFn:
    """Guidance weight that alternates between high and low from step to step. Section 2.6.2.

    Steps 0 .. constant_steps - 1 have the high weight; then low, high, low, high, ..., each for `every` steps. The step
    is read off the noise level, t = (N - i) / N on the sampler's grid, so that a denoiser remains a function of z and
    logsnr alone.

    Args:
      num_steps: N of the sampler this weight is used with; ValueError below 1.
      high: w of the first steps, and of every other step after them; 15 in the paper.
      low: w of the steps between; 1 in the paper.
      constant_steps: number of first steps with the high weight, 0 .. num_steps; ValueError outside. The paper does
        not print it.
      time_fn: inverse of the sampler's schedule, log-SNR -> time.

    Returns:
      Function logsnr [B] -> w float32 [B].
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1.")
    if not 0 <= constant_steps <= num_steps:
        raise ValueError(f"constant_steps={constant_steps} must be in 0 .. num_steps={num_steps}.")
    if every < 1:
        raise ValueError(f"every={every} must be at least 1.")

    def weight(logsnr):
        step = jnp.round(num_steps * (1 - time_fn(logsnr))).astype(jnp.int32)
        alternating_low = (step - constant_steps) // every % 2 == 0
        return jnp.where((step >= constant_steps) & alternating_low, jnp.float32(low), jnp.float32(high))

    return weight


def static_threshold(x) -> jax.Array:
    """Clips the predicted x to [-1, 1], the range of the data. Section 2.6.1.

    Args: x: [B, ...]. Returns: float32 [B, ...].
    """
    return jnp.clip(jnp.asarray(x, jnp.float32), -1, 1)


def magnitude_percentile(x, *, percentile: float) -> jax.Array:
    """Percentile of |x| over each sample: the smallest value that `percentile` % of its elements do not exceed.

    It is an element of |x| (nearest rank, no interpolation), found exactly and without sorting. The bit patterns of
    non-negative floats are ordered as the floats are, so each of 31 counting passes determines one of its 31 bits. A
    clip of 128 x 768 x 1280 has 3.8e8 elements: too many to sort, and too many to count in float32.

    Args:
      x: [B, ...].
      percentile: in (0, 100]; ValueError outside, and for samples of 2^31 elements or more.

    Returns:
      float32 [B].
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile} must be in (0, 100].")
    size = math.prod(x.shape[1:])
    if not 1 <= size < 2**31:
        raise ValueError(f"A sample has {size} elements (shape {tuple(x.shape[1:])}), expected 1 to 2^31 - 1.")
    # Exact arithmetic: in floating point, 99.9 % of 1000 elements would round up to rank 1000.
    rank = math.ceil(Fraction(str(percentile)) * size / 100)
    x = jnp.asarray(x, jnp.float32)
    axes = tuple(range(1, x.ndim))

    def determine_bit(n, prefix):
        candidate = prefix | (jnp.int32(1) << (30 - n))
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7FFFFFFF)
        below = jnp.sum(bits < candidate.reshape(-1, *(1,) * len(axes)), axis=axes, dtype=jnp.int32)
        return jnp.where(below < rank, candidate, prefix)

    bits = jax.lax.fori_loop(0, 31, determine_bit, jnp.zeros(x.shape[:1], jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def dynamic_threshold(x, *, percentile: float = 99.5) -> jax.Array:
    """Clips the predicted x to [-s, s] and divides by s = max(1, percentile of |x|). Section 2.6.1; arXiv 2205.11487.

    There is one s for each sample, over its whole clip. One per frame would flicker; one per batch would mix samples.

    Args:
      x: [B, ...].
      percentile: in (0, 100], see `magnitude_percentile`; 99.5 is Imagen's.

    Returns:
      float32 [B, ...] in [-1, 1].
    """
    x = jnp.asarray(x, jnp.float32)
    s = expand(jnp.maximum(magnitude_percentile(x, percentile=percentile), 1), x)
    return jnp.clip(x, -s, s) / s

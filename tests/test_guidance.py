import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.diffusion import guidance, samplers
from ivideo.diffusion.schedules import alpha_sigma, cosine_logsnr

COND, UNCOND, VARIANCE = np.array([0.5, -0.1]), np.array([0.1, 0.2]), np.array([0.09, 0.25])


def gaussian_v(mean, variance):
    def v_fn(z, logsnr):
        alpha, sigma = alpha_sigma(logsnr[:, None])
        scaled = (z - alpha * mean) / (alpha**2 * variance + sigma**2)
        return alpha * sigma * scaled - sigma * (mean + alpha * variance * scaled)

    return v_fn


def test_small_guide_is_affine_in_each_sample():
    cond, uncond = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 2, 1))
    for weight in (0.0, 6.0, np.array([0.0, 1.0, 15.0])):
        w = np.broadcast_to(weight, 3).reshape(3, 1, 1, 1, 1)
        np.testing.assert_allclose(guidance.guide(cond, uncond, weight), (1 + w) * cond - w * uncond, atol=2e-5)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_small_guided_gaussians_of_one_variance_are_a_shifted_gaussian(weight):
    """Scores of equal variance combine to that of the mean c + w (c - u): as v at every level, and as samples."""
    guided = guidance.classifier_free(gaussian_v(COND, VARIANCE), gaussian_v(UNCOND, VARIANCE), weight)
    shifted = gaussian_v(COND + weight * (COND - UNCOND), VARIANCE)
    z = jax.random.normal(jax.random.key(0), (41, 2))
    logsnr = jnp.linspace(-20, 20, 41)
    np.testing.assert_allclose(guided(z, logsnr), shifted(z, logsnr), atol=2e-5)
    noise = np.random.default_rng(1).standard_normal((4096, 2)).astype(np.float32)
    samples = jax.jit(lambda z: samplers.ddim(guided, z, num_steps=128))(noise)
    np.testing.assert_allclose(np.mean(samples, axis=0), COND + weight * (COND - UNCOND), atol=0.03)
    np.testing.assert_allclose(np.var(samples, axis=0), VARIANCE, rtol=0.08)


def test_small_guided_gaussians_of_two_variances_combine_precisions():
    """score = -(precision)(z - centre): the guided precision is (1 + w) / var_c - w / var_u, at every level."""
    weight, other = 1.5, np.array([0.3, 0.6])
    logsnr = np.array([-4.0, 0.0, 5.0])
    z = np.random.default_rng(2).standard_normal((3, 2))
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnr)))[:, None], np.sqrt(1 / (1 + np.exp(logsnr)))[:, None]
    p_c, p_u = 1 / (alpha**2 * VARIANCE + sigma**2), 1 / (alpha**2 * other + sigma**2)
    eps = sigma * ((1 + weight) * p_c * (z - alpha * COND) - weight * p_u * (z - alpha * UNCOND))
    guided = guidance.classifier_free(gaussian_v(COND, VARIANCE), gaussian_v(UNCOND, other), weight)
    ours = guided(jnp.asarray(z, jnp.float32), jnp.asarray(logsnr, jnp.float32))
    np.testing.assert_allclose(ours, (eps - sigma * z) / alpha, rtol=2e-5, atol=2e-5)


def test_small_weight_zero_skips_the_second_evaluation():
    def refuse(z, logsnr):
        raise AssertionError("evaluated")

    cond = gaussian_v(COND, VARIANCE)
    assert guidance.classifier_free(cond, refuse, 0) is cond
    assert guidance.classifier_free(cond, refuse, 0.0) is cond
    with pytest.raises(AssertionError, match="evaluated"):
        guidance.classifier_free(cond, refuse, jnp.zeros(3))(jnp.zeros((3, 2)), jnp.zeros(3))


@pytest.mark.parametrize("num_steps", [8, 9, 13, 50, 64, 100, 127, 128, 255, 256, 333, 500, 777, 1000, 1023, 1024])
def test_small_oscillating_weight_knows_every_step(num_steps):
    """High for the first steps, then low, high, ...: read off the levels of the sampler's own grid, without a miss."""
    # All grids are padded to one length, so that JAX compiles the operations once.
    logsnr = cosine_logsnr(np.pad(samplers.time_grid(num_steps), (0, 1024 - num_steps)))
    for constant_steps in (0, 1, num_steps // 10, num_steps // 2, num_steps - 1, num_steps):
        weight_fn = guidance.oscillating_weight(num_steps=num_steps, high=15.0, low=1.0, constant_steps=constant_steps)
        expected = [15.0 if i < constant_steps or (i - constant_steps) % 2 == 1 else 1.0 for i in range(num_steps)]
        np.testing.assert_array_equal(weight_fn(logsnr)[:num_steps], expected)


def test_small_oscillating_weight_of_eight_steps():
    """What a distilled stage is asked for: how many steps begin, and how many each weight lasts, is free."""
    logsnr = cosine_logsnr(samplers.time_grid(8)[:-1])
    for constant_steps, every, expected in (
        (1, 1, [15, 1, 15, 1, 15, 1, 15, 1]),
        (0, 2, [1, 1, 15, 15, 1, 1, 15, 15]),
        (2, 3, [15, 15, 1, 1, 1, 15, 15, 15]),
    ):
        weight_fn = guidance.oscillating_weight(
            num_steps=8, high=15.0, low=1.0, constant_steps=constant_steps, every=every
        )
        np.testing.assert_array_equal(weight_fn(logsnr), expected)


def test_small_oscillating_weight_of_the_last_steps_of_256():
    weight_fn = guidance.oscillating_weight(num_steps=256, high=15.0, low=1.0, constant_steps=26)
    t = np.array([1.0, 231 / 256, 230 / 256, 229 / 256, 2 / 256, 1 / 256])
    np.testing.assert_array_equal(weight_fn(cosine_logsnr(t)), [15, 15, 1, 15, 1, 15])


def test_small_oscillating_weight_inside_a_sampler():
    """DDIM with v = 1 + w: a rotation by known v, in float64."""
    num_steps, constant_steps = 12, 3
    weight_fn = guidance.oscillating_weight(num_steps=num_steps, high=4.0, low=0.5, constant_steps=constant_steps)
    v_fn = guidance.classifier_free(lambda z, l: jnp.ones_like(z), lambda z, l: jnp.zeros_like(z), weight_fn)
    z = np.linspace(-1, 1, 4).reshape(2, 2)
    ours = samplers.ddim(v_fn, z.astype(np.float32), num_steps=num_steps)
    edge = np.arctan(np.exp(-10.0))
    angles = (np.pi / 2 - 2 * edge) * np.linspace(1, 0, num_steps + 1) + edge
    angles[-1] = 0
    for i in range(num_steps):
        v = 5.0 if i < 3 or i % 2 == 0 else 1.5
        turn = angles[i] - angles[i + 1]
        z = np.cos(turn) * z - np.sin(turn) * v
    np.testing.assert_allclose(ours, z, atol=5e-6)


def test_small_oscillating_weight_refuses_impossible_steps():
    with pytest.raises(ValueError, match=r"constant_steps=9.*8"):
        guidance.oscillating_weight(num_steps=8, high=15.0, low=1.0, constant_steps=9)
    with pytest.raises(ValueError, match="num_steps=0"):
        guidance.oscillating_weight(num_steps=0, high=15.0, low=1.0, constant_steps=0)
    with pytest.raises(ValueError, match="every=0"):
        guidance.oscillating_weight(num_steps=8, high=15.0, low=1.0, constant_steps=0, every=0)


def test_small_static_threshold():
    np.testing.assert_array_equal(guidance.static_threshold(np.array([-3.0, -0.5, 1.0, 7.0])), [-1, -0.5, 1, 1])


def order_statistic(x, percentile):
    magnitudes = np.sort(np.abs(x.reshape(x.shape[0], -1)), axis=1)
    return magnitudes[:, math.ceil(Fraction(str(percentile)) * magnitudes.shape[1] / 100) - 1]


@pytest.mark.parametrize("percentile", [0.01, 50, 99.5, 100])
@pytest.mark.parametrize("shape", [(3, 2, 5, 5, 4), (2, 1000), (1, 1)])
def test_small_percentile_is_the_order_statistic(percentile, shape):
    x = (np.random.default_rng(0).standard_normal(shape) * 2).astype(np.float32)
    ours = guidance.magnitude_percentile(x, percentile=percentile)
    np.testing.assert_array_equal(ours, order_statistic(x, percentile))


def test_small_percentile_agrees_with_numpy():
    x = np.random.default_rng(1).standard_normal((4, 3, 11, 13)).astype(np.float32)
    numpy = np.percentile(np.abs(x).reshape(4, -1), 99.5, axis=1, method="inverted_cdf")
    np.testing.assert_array_equal(guidance.magnitude_percentile(x, percentile=99.5), numpy)


def test_small_percentile_of_awkward_values():
    """Ties, zeros of both signs, subnormal and infinite values."""
    x = np.array([[-0.0, 0.0, 1e-42, -1e-42, 2.0, 2.0, -2.0, 3.0, -np.inf, 1e30]], np.float32)
    for percentile in range(10, 101, 10):
        ours = np.asarray(guidance.magnitude_percentile(x, percentile=percentile))
        np.testing.assert_array_equal(ours, order_statistic(x, percentile))


def test_percentile_counts_past_what_float32_can():
    """2^24 + 2^20 elements, two of each value: the rank asked for is above 2^24, where float32 skips odd counts."""
    size = 2**24 + 2**20
    x = (np.arange(size) // 2).astype(np.float32)[None]
    rank = math.ceil(Fraction("99.5") * size / 100)
    assert rank > 2**24
    assert guidance.magnitude_percentile(x, percentile=99.5)[0] == (rank - 1) // 2


def test_small_dynamic_threshold_is_one_a_sample():
    rng = np.random.default_rng(3)
    scale = np.array([0.2, 1.0, 5.0]).reshape(3, 1, 1, 1, 1)
    x = (scale * rng.standard_normal((3, 4, 6, 6, 3))).astype(np.float32)
    ours = np.asarray(guidance.dynamic_threshold(x))
    s = np.maximum(order_statistic(x, 99.5), 1).reshape(3, 1, 1, 1, 1)
    np.testing.assert_allclose(ours, np.clip(x, -s, s) / s, atol=1e-6)
    np.testing.assert_array_equal(ours[0], x[0])  # Its percentile is below 1: nothing to do.
    assert s[2] > 10
    assert np.abs(ours).max() == 1
    # Another neighbour changes nothing, bit for bit.
    changed = x.copy()
    changed[0] *= 1000
    np.testing.assert_array_equal(guidance.dynamic_threshold(changed)[1:], ours[1:])
    np.testing.assert_array_equal(guidance.dynamic_threshold(x[2:])[0], ours[2])


def test_small_dynamic_threshold_keeps_the_ratio_of_frames():
    """One threshold for the clip: a bright frame dims its dark neighbours by the same factor."""
    x = np.ones((1, 2, 4, 4, 1), np.float32) * np.array([0.5, 2.0], np.float32).reshape(1, 2, 1, 1, 1)
    ours = guidance.dynamic_threshold(x)
    np.testing.assert_allclose([ours[0, 0, 0, 0, 0], ours[0, 1, 0, 0, 0]], [0.25, 1.0], rtol=1e-6)


def test_small_percentile_refuses_nonsense():
    for percentile in (0, -1, 100.5):
        with pytest.raises(ValueError, match=f"percentile={percentile}"):
            guidance.magnitude_percentile(np.ones((1, 3)), percentile=percentile)
    with pytest.raises(ValueError, match="0 elements"):
        guidance.magnitude_percentile(np.ones((1, 0)), percentile=50)
    huge = jax.ShapeDtypeStruct((1, 2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="2147483648 elements"):
        jax.eval_shape(lambda x: guidance.magnitude_percentile(x, percentile=50), huge)

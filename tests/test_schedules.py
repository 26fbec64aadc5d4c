import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.diffusion import schedules


def cosine_logsnr_f64(t, low=-20.0, high=20.0):
    """The published formula, in float64, with the distance from pi/2 kept apart."""
    b = np.arctan(np.exp(-high / 2))
    a = np.arctan(np.exp(-low / 2)) - b
    return -2 * np.log(np.tan(a * np.asarray(t, np.float64) + b))


@pytest.mark.parametrize(("low", "high"), [(-20.0, 20.0), (-10.0, 12.0)])
def test_small_cosine_schedule_matches_the_formula_in_float64(low, high):
    t = np.linspace(0, 1, 2049).astype(np.float32)
    ours = schedules.cosine_logsnr(t, logsnr_min=low, logsnr_max=high)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, cosine_logsnr_f64(t, low, high), rtol=0, atol=5e-6)


def test_small_cosine_schedule_ends_and_middle():
    np.testing.assert_allclose(schedules.cosine_logsnr([0.0, 0.5, 1.0]), [20, 0, -20], rtol=0, atol=4e-6)
    # A quarter of the way the angle is pi/8, up to the 4.5e-5 the schedule is short of at its ends.
    np.testing.assert_allclose(schedules.cosine_logsnr(0.25), -2 * np.log(np.tan(np.pi / 8)), atol=2e-4)


def test_small_cosine_schedule_is_strictly_decreasing():
    assert np.all(np.diff(np.asarray(schedules.cosine_logsnr(np.linspace(0, 1, 8193)))) < 0)


@pytest.mark.parametrize(("low", "high"), [(-20.0, 20.0), (-10.0, 12.0)])
def test_small_cosine_time_inverts_the_schedule(low, high):
    t = np.linspace(0, 1, 1025).astype(np.float32)
    logsnr = schedules.cosine_logsnr(t, logsnr_min=low, logsnr_max=high)
    np.testing.assert_allclose(schedules.cosine_time(logsnr, logsnr_min=low, logsnr_max=high), t, rtol=0, atol=3e-7)


def test_small_cosine_time_of_snr_three_is_a_third():
    np.testing.assert_allclose(schedules.cosine_time(np.log(3.0)), 1 / 3, atol=2e-5)


def test_small_alpha_sigma_preserve_variance_and_match_float64():
    logsnr = np.linspace(-20, 20, 401)
    alpha, sigma = schedules.alpha_sigma(logsnr)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)
    np.testing.assert_allclose(alpha, np.sqrt(1 / (1 + np.exp(-logsnr))), rtol=2e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1 / (1 + np.exp(logsnr))), rtol=2e-6)
    np.testing.assert_allclose(2 * np.log(alpha / sigma), logsnr, atol=1e-5)


def test_small_alpha_sigma_of_snr_three():
    alpha, sigma = schedules.alpha_sigma(np.log(3.0))
    np.testing.assert_allclose([alpha, sigma], [np.sqrt(0.75), 0.5], rtol=1e-6)


def test_small_reversed_range_is_refused():
    with pytest.raises(ValueError, match=r"logsnr_min=5.*logsnr_max=-5"):
        schedules.cosine_logsnr(0.5, logsnr_min=5.0, logsnr_max=-5.0)

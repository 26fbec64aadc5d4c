import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.diffusion import augment
from ivideo.diffusion.schedules import alpha_sigma, cosine_time


def test_small_training_level_is_uniform_in_time():
    level = augment.random_level(jax.random.key(0), 20000)
    assert level.shape == (20000,)
    assert -20 <= level.min() < -8
    assert 8 < level.max() <= 20
    shares = [0.1, 0.25, 0.5, 0.75, 0.9]
    np.testing.assert_allclose(np.quantile(cosine_time(level), shares), shares, atol=0.015)


def test_small_sampling_level_of_snr_three():
    level = augment.sampling_logsnr(3.0, 2)
    np.testing.assert_allclose(level, [np.log(3), np.log(3)], rtol=1e-6)
    alpha, sigma = alpha_sigma(level)
    np.testing.assert_allclose([alpha[0], sigma[0]], [np.sqrt(3) / 2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(cosine_time(level), 1 / 3, atol=2e-5)


@pytest.mark.parametrize("snr", [0.0, -3.0])
def test_small_sampling_level_refuses_a_ratio_that_is_none(snr):
    with pytest.raises(ValueError, match=f"snr={snr}"):
        augment.sampling_logsnr(snr, 2)


def test_small_augment_has_the_signal_to_noise_ratio_asked_for():
    """Residual against alpha x: mean 0, standard deviation sigma, of each sample's own level."""
    video = np.random.default_rng(0).uniform(-1, 1, (4, 8, 16, 16, 3)).astype(np.float32)
    level = np.log(np.array([1.0, 3.0, 5.0, 20.0]))
    noisy = np.asarray(augment.augment(jax.random.key(1), video, level))
    alpha, sigma = np.sqrt([0.5, 0.75, 5 / 6, 20 / 21]), np.sqrt([0.5, 0.25, 1 / 6, 1 / 21])
    residual = (noisy - alpha.reshape(4, 1, 1, 1, 1) * video) / sigma.reshape(4, 1, 1, 1, 1)
    np.testing.assert_allclose(residual.mean((1, 2, 3, 4)), 0, atol=0.04)
    np.testing.assert_allclose(residual.std((1, 2, 3, 4)), 1, atol=0.03)
    # Independent from sample to sample and from frame to frame.
    assert abs(np.mean(residual[0] * residual[1])) < 0.04
    assert abs(np.mean(residual[:, 0] * residual[:, 1])) < 0.05


def test_small_augment_at_the_ends_is_the_video_and_pure_noise():
    video = np.random.default_rng(0).uniform(-1, 1, (2, 2, 4, 4, 3)).astype(np.float32)
    noisy = augment.augment(jax.random.key(0), video, np.array([20.0, -20.0]))
    np.testing.assert_allclose(noisy[0], video[0], atol=3e-4)
    noise = jax.random.normal(jax.random.key(0), video.shape)
    np.testing.assert_allclose(noisy[1], noise[1], atol=1e-4)


def test_small_augment_with_keys_draws_each_sample_from_its_own():
    video = np.random.default_rng(0).uniform(-1, 1, (3, 2, 4, 4, 3)).astype(np.float32)
    keys, level = jax.random.split(jax.random.key(2), 3), np.array([0.0, 1.0, 2.0])
    together = augment.augment(keys, video, level)
    for b in range(3):
        eps = jax.random.normal(keys[b], video.shape[1:])
        alpha, sigma = np.sqrt(1 / (1 + np.exp(-level[b]))), np.sqrt(1 / (1 + np.exp(level[b])))
        np.testing.assert_allclose(together[b], alpha * video[b] + sigma * np.asarray(eps), atol=1e-6)


def test_small_augment_refuses_other_keys():
    video = jnp.zeros((3, 2, 4, 4, 3))
    with pytest.raises(ValueError, match=r"\[\] or \[3\].*\[2\]"):
        augment.augment(jax.random.split(jax.random.key(0), 2), video, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"typed key.*uint32"):
        augment.augment(jax.random.PRNGKey(0), video, jnp.zeros(3))


def test_small_blur_spreads_a_point_by_its_deviation():
    """Variances of the spread point are those of the Gaussian, one a clip; a plain frame stays plain to its edges."""
    video = np.zeros((2, 1, 21, 31, 1), np.float32)
    video[:, 0, 10, 15] = 1
    deviation = np.array([0.0, 2.0], np.float32)
    blurred = np.asarray(augment.blur(video, deviation), np.float64)[:, 0, :, :, 0]
    np.testing.assert_allclose(blurred[0], video[0, 0, :, :, 0], atol=1e-6)
    np.testing.assert_allclose(blurred[1].sum(), 1, atol=1e-3)
    rows, columns = blurred[1].sum(axis=1), blurred[1].sum(axis=0)
    np.testing.assert_allclose((rows * (np.arange(21) - 10) ** 2).sum(), 4, rtol=0.01)
    np.testing.assert_allclose((columns * (np.arange(31) - 15) ** 2).sum(), 4, rtol=0.01)
    np.testing.assert_allclose(augment.blur(np.full((2, 1, 8, 8, 3), 0.3, np.float32), deviation), 0.3, rtol=1e-5)

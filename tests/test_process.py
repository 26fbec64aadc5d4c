import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.diffusion import process

LOGSNR = np.array([-8.0, -1.5, 0.0, 2.0, 8.0])


def scales_f64(logsnr):
    logsnr = np.asarray(logsnr, np.float64).reshape(-1, 1, 1, 1, 1)
    return np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (5, 3, 2, 2, 3))
    return x, rng.standard_normal(x.shape)


def test_small_expand_adds_axes():
    assert process.expand(LOGSNR, np.zeros((5, 3, 2, 2, 3))).shape == (5, 1, 1, 1, 1)
    np.testing.assert_array_equal(process.expand(LOGSNR, np.zeros((5, 2)))[:, 0], LOGSNR.astype(np.float32))


def test_small_noise_and_target_match_float64(data):
    x, eps = data
    alpha, sigma = scales_f64(LOGSNR)
    np.testing.assert_allclose(process.add_noise(x, eps, LOGSNR), alpha * x + sigma * eps, atol=1e-6)
    np.testing.assert_allclose(process.v_target(x, eps, LOGSNR), alpha * eps - sigma * x, atol=1e-6)


def test_small_conversions_recover_what_z_was_made_of(data):
    x, eps = data
    z, v = process.add_noise(x, eps, LOGSNR), process.v_target(x, eps, LOGSNR)
    np.testing.assert_allclose(process.x_from_v(z, v, LOGSNR), x, atol=1e-6)
    np.testing.assert_allclose(process.eps_from_v(z, v, LOGSNR), eps, atol=1e-6)
    # This one divides by sigma, 0.018 at one end of LOGSNR.
    np.testing.assert_allclose(process.eps_from_x(z, x, LOGSNR), eps, atol=4e-5)


def test_small_everything_is_float32_for_bfloat16_inputs(data):
    x, eps = (jnp.asarray(a, jnp.bfloat16) for a in data)
    assert process.add_noise(x, eps, LOGSNR).dtype == jnp.float32
    assert process.x_from_v(x, eps, LOGSNR).dtype == jnp.float32
    assert process.training_loss(lambda z, _: z.astype(jnp.bfloat16), x, eps, LOGSNR).dtype == jnp.float32


@pytest.mark.parametrize(("logsnr_t", "logsnr_s"), [(-20.0, -19.0), (-3.0, 1.0), (0.0, 0.01), (9.0, 20.0)])
def test_small_posterior_is_bayes_rule(data, logsnr_t, logsnr_s):
    """q(z_s | z_t, x) from the precisions of q(z_s | x) and q(z_t | z_s), in float64."""
    x, z_t = data
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales_f64(logsnr_t), scales_f64(logsnr_s)
    ratio = alpha_t / alpha_s
    between = sigma_t**2 - ratio**2 * sigma_s**2
    precision = 1 / sigma_s**2 + ratio**2 / between
    mean = (alpha_s * x / sigma_s**2 + ratio * z_t / between) / precision
    ours_mean, ours_var = process.posterior(z_t, x, np.full(5, logsnr_t), np.full(5, logsnr_s))
    assert ours_var.shape == (5, 1, 1, 1, 1)
    np.testing.assert_allclose(ours_mean, mean, atol=3e-6)
    np.testing.assert_allclose(ours_var, np.broadcast_to(1 / precision, ours_var.shape), rtol=1e-5)
    np.testing.assert_allclose(process.transition_variance(logsnr_t, logsnr_s), between.item(), rtol=1e-5)


def test_small_posterior_variance_interpolates_in_the_logarithm(data):
    x, z = data
    variance = {
        g: np.asarray(process.posterior(z, x, np.full(5, -1.0), np.full(5, 2.0), gamma=g)[1], np.float64)
        for g in (0.0, 0.3, 1.0)
    }
    np.testing.assert_allclose(variance[0.3], variance[0.0] ** 0.7 * variance[1.0] ** 0.3, rtol=1e-5)
    np.testing.assert_allclose(variance[1.0], np.full((5, 1, 1, 1, 1), (1 - np.exp(-3)) / (1 + np.exp(-1))), rtol=1e-5)


def some_v(z, logsnr):
    return jnp.tanh(z) + 0.1 * process.expand(logsnr, z)


def test_small_losses_match_their_definitions(data):
    """Each kind written out in float64 for what it names: v, eps, x, and x weighted by max(SNR, 1)."""
    x, eps = data
    alpha, sigma = scales_f64(LOGSNR)
    z = alpha * x + sigma * eps
    v = np.tanh(z) + 0.1 * LOGSNR.reshape(-1, 1, 1, 1, 1)

    def mse(a, b):
        return np.square(a - b).mean(axis=(1, 2, 3, 4))

    x_mse = mse(alpha * z - sigma * v, x)
    expected = {
        "v": mse(v, alpha * eps - sigma * x),
        "eps": mse(sigma * z + alpha * v, eps),
        "x": x_mse,
        "truncated_snr": np.maximum(np.exp(LOGSNR), 1) * x_mse,
    }
    assert set(expected) == set(process.LOSS_KINDS)
    for kind, value in expected.items():
        np.testing.assert_allclose(process.training_loss(some_v, x, eps, LOGSNR, kind=kind), value, rtol=2e-5)
    np.testing.assert_array_equal(
        process.training_loss(some_v, x, eps, LOGSNR), process.training_loss(some_v, x, eps, LOGSNR, kind="v")
    )


def test_small_loss_identities(data):
    x, eps = data
    loss = {kind: process.training_loss(some_v, x, eps, LOGSNR, kind=kind) for kind in process.LOSS_KINDS}
    snr = np.exp(LOGSNR)
    np.testing.assert_allclose(loss["eps"], snr / (1 + snr) * loss["v"], rtol=1e-5)
    np.testing.assert_allclose(loss["x"], loss["v"] / (1 + snr), rtol=1e-5)
    np.testing.assert_allclose(loss["v"], (1 + snr) * loss["x"], rtol=1e-5)


def test_small_loss_is_zero_at_the_truth(data):
    x, eps = data
    loss = process.training_loss(lambda z, l: process.v_target(x, eps, l), x, eps, LOGSNR)
    np.testing.assert_array_equal(loss, np.zeros(5))


def test_small_frame_weights(data):
    x, eps = data
    frames = np.stack(
        [process.training_loss(some_v, x[:, f : f + 1], eps[:, f : f + 1], LOGSNR) for f in range(3)], axis=1
    )
    for weights in (np.array([1.0, 1.0, 0.25]), np.random.default_rng(1).uniform(0, 1, (5, 3))):
        loss = process.training_loss(some_v, x, eps, LOGSNR, weights=weights)
        np.testing.assert_allclose(loss, (weights * frames).sum(1) / np.broadcast_to(weights, (5, 3)).sum(1), rtol=1e-5)
    np.testing.assert_allclose(
        process.training_loss(some_v, x, eps, LOGSNR, weights=np.ones(3)),
        process.training_loss(some_v, x, eps, LOGSNR),
        rtol=1e-6,
    )


def test_small_sample_without_weight_has_no_loss_and_no_gradient(data):
    x, eps = data
    weights = np.ones((5, 3))
    weights[2] = 0

    def total(scale):
        return process.training_loss(lambda z, l: scale * some_v(z, l), x, eps, LOGSNR, weights=weights)

    assert total(1.0)[2] == 0
    gradient = jax.jacobian(total)(1.0)
    assert gradient[2] == 0
    assert np.all(np.isfinite(gradient))


def test_small_wrong_loss_arguments_are_refused(data):
    x, eps = data
    with pytest.raises(ValueError, match=r"'epsilon'.*'v', 'eps'"):
        process.training_loss(some_v, x, eps, LOGSNR, kind="epsilon")
    with pytest.raises(ValueError, match=r"\(5, 3, 2, 2, 6\).*\(5, 3, 2, 2, 3\)"):
        process.training_loss(lambda z, l: jnp.concatenate([z, z], -1), x, eps, LOGSNR)

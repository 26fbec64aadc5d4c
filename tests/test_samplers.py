"""Samplers on data whose best denoiser is a formula: a Gaussian with a full covariance, and a mixture of two.

B samples, D dimensions.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.diffusion import process, samplers
from ivideo.diffusion.schedules import alpha_sigma, cosine_logsnr, cosine_time

MEAN = np.array([0.4, -0.2, 0.1])
COV = np.array([[0.5, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.05]])


def v_of_x(z, x, logsnr):
    """The v of a denoiser that predicts x from z [B, ...]."""
    alpha, sigma = alpha_sigma(process.expand(logsnr, z))
    return (alpha * z - x) / sigma


def cosine_angle(t, bound=20.0):
    """atan(sigma / alpha) of the cosine schedule in float64."""
    b = np.arctan(np.exp(-bound / 2))
    return (np.pi / 2 - 2 * b) * np.asarray(t, np.float64) + b


def gaussian_x_eps(mean, cov, z, logsnr):
    """E[x | z] and E[eps | z] for x ~ N(mean, cov)."""
    variances, basis = np.linalg.eigh(cov)
    alpha, sigma = alpha_sigma(logsnr[:, None])
    alpha_mean = alpha * jnp.asarray(mean, jnp.float32)
    whitened = ((z - alpha_mean) @ basis) / (alpha**2 * variances + sigma**2)
    return mean + alpha * (whitened * variances) @ basis.T, sigma * whitened @ basis.T


def gaussian_v(mean, cov):
    def v_fn(z, logsnr):
        x, eps = gaussian_x_eps(mean, cov, z, logsnr)
        alpha, sigma = alpha_sigma(logsnr[:, None])
        return alpha * eps - sigma * x

    return v_fn


MIX_WEIGHTS = np.array([0.3, 0.7])
MIX_MEANS = np.array([[-0.8, 0.3], [0.5, -0.2]])
MIX_STDS = np.array([[0.1, 0.2], [0.15, 0.3]])


def mixture_v(z, logsnr):
    """The best v for a mixture of two Gaussians with diagonal covariances."""
    alpha, sigma = alpha_sigma(logsnr[:, None])
    logits, xs, epss = [], [], []
    for weight, mean, std in zip(MIX_WEIGHTS, MIX_MEANS, MIX_STDS, strict=True):
        variance = alpha**2 * std**2 + sigma**2
        offset = z - alpha * mean
        logits.append(jnp.log(weight) - 0.5 * (offset**2 / variance + jnp.log(variance)).sum(-1))
        xs.append(mean + alpha * std**2 * offset / variance)
        epss.append(sigma * offset / variance)
    share = jax.nn.softmax(jnp.stack(logits), axis=0)[..., None]
    return alpha * (share * jnp.stack(epss)).sum(0) - sigma * (share * jnp.stack(xs)).sum(0)


def mixture_moments():
    mean = MIX_WEIGHTS @ MIX_MEANS
    second = sum(w * (np.diag(s**2) + np.outer(m, m)) for w, m, s in zip(MIX_WEIGHTS, MIX_MEANS, MIX_STDS, strict=True))
    return mean, second - np.outer(mean, mean)


@functools.cache
def keys_and_noise(batch, dims):
    keys = jax.random.split(jax.random.key(3), batch)
    return keys, samplers.initial_noise(keys, (dims,))


def ddim(v_fn, z, keys, **kwargs):
    return samplers.ddim(v_fn, z, **kwargs)


def jitted(sampler):
    return lambda v_fn, z, keys, **kwargs: jax.jit(functools.partial(sampler, v_fn, **kwargs))(z, keys)


PLAIN = {
    "ddim": ddim,
    "ancestral_0": functools.partial(samplers.ancestral, gamma=0.0),
    "ancestral_0.3": functools.partial(samplers.ancestral, gamma=0.3),
    "ancestral_1": functools.partial(samplers.ancestral, gamma=1.0),
    "distilled": samplers.distilled,
}
SAMPLERS = {name: jitted(sampler) for name, sampler in PLAIN.items()}
# For what does not depend on gamma.
KINDS = ["ddim", "ancestral_0.3", "distilled"]


def linear_moments(name, num_steps, mean, cov):
    """Exact mean and covariance of a sampler's output for Gaussian data, in float64: every step is linear in z."""
    variances, basis = np.linalg.eigh(cov)
    mean = mean @ basis
    centre, spread = np.zeros_like(mean), np.ones_like(mean)
    for i in range(num_steps):
        t, s, k = (max(num_steps - i - n, 0) / num_steps for n in (0, 1, 2))
        (a_t, s_t), (a_s, s_s), (a_k, s_k) = ((np.cos(cosine_angle(u)), np.sin(cosine_angle(u))) for u in (t, s, k))
        total = a_t**2 * variances + s_t**2
        # x = x_z z + x_0 and eps = e_z z + e_0.
        x_z, e_z = a_t * variances / total, s_t / total
        x_0, e_0 = mean * s_t**2 / total, -s_t * a_t * mean / total
        if i == num_steps - 1:
            gain, shift, noise = x_z, x_0, 0.0
        elif name == "ddim":
            gain, shift, noise = a_s * x_z + s_s * e_z, a_s * x_0 + s_s * e_0, 0.0
        elif name == "distilled":
            gain, shift = ((a_s / a_k) * (a_k * c_x + s_k * c_e) for c_x, c_e in ((x_z, e_z), (x_0, e_0)))
            noise = s_s**2 - (a_s / a_k) ** 2 * s_k**2
        else:
            gamma = float(name.split("_")[1])
            r = (a_t * s_s / (s_t * a_s)) ** 2
            gain, shift = r * a_s / a_t + (1 - r) * a_s * x_z, (1 - r) * a_s * x_0
            noise = ((1 - r) * s_s**2) ** (1 - gamma) * ((1 - r) * s_t**2) ** gamma
        centre, spread = gain * centre + shift, gain**2 * spread + noise
    return centre @ basis.T, basis @ np.diag(spread) @ basis.T


def assert_moments(samples, mean, cov, *, rtol, atol):
    """Mean within atol standard deviations, covariance within rtol of what the two variances allow."""
    samples = np.asarray(samples, np.float64)
    std = np.sqrt(np.diag(cov))
    np.testing.assert_allclose((samples.mean(0) - mean) / std, 0, atol=atol)
    np.testing.assert_allclose((np.cov(samples.T) - cov) / np.outer(std, std), 0, atol=rtol)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_small_time_grid(num_steps):
    np.testing.assert_array_equal(samplers.time_grid(num_steps), np.linspace(1, 0, num_steps + 1, dtype=np.float32))


@functools.cache
def gaussian_sampler(name, num_steps):
    return jax.jit(functools.partial(PLAIN[name], gaussian_v(MEAN, COV), num_steps=num_steps))


@pytest.mark.parametrize("name", SAMPLERS)
def test_small_gaussian_moments_of_few_steps(name):
    """Short of convergence the samples have the moments that the linear recursion gives, within the error of 8192."""
    keys, z = keys_and_noise(8192, 3)
    samples = gaussian_sampler(name, 8)(z, keys)
    assert_moments(samples, *linear_moments(name, 8, MEAN, COV), rtol=0.06, atol=0.04)


@pytest.mark.parametrize("name", SAMPLERS)
def test_gaussian_and_mixture_are_reached(name):
    """With many steps the samples have the moments of the data: three dimensions Gaussian, two more a mixture."""

    def v_fn(z, logsnr):
        return jnp.concatenate([gaussian_v(MEAN, COV)(z[:, :3], logsnr), mixture_v(z[:, 3:], logsnr)], axis=1)

    keys, z = keys_and_noise(8192, 5)
    samples = np.asarray(SAMPLERS[name](v_fn, z, keys, num_steps=256))
    assert_moments(samples[:, :3], MEAN, COV, rtol=0.06, atol=0.04)
    assert_moments(samples[:, 3:], *mixture_moments(), rtol=0.06, atol=0.04)
    # The modes are far apart along their first axis, so that a cut between them counts the weights.
    np.testing.assert_allclose((samples[:, 3] < -0.3).mean(), MIX_WEIGHTS[0], atol=0.02)


def test_small_ddim_converges_to_the_exact_flow():
    """For a Gaussian the flow keeps (z - alpha mean) / std constant. First order: twice the steps, half the error."""
    _, z = keys_and_noise(64, 3)
    variances, basis = np.linalg.eigh(COV)

    def standard(t):
        angle = cosine_angle(t)
        return np.cos(angle) * MEAN @ basis, np.sqrt(np.cos(angle) ** 2 * variances + np.sin(angle) ** 2)

    (start_mean, start_std), (end_mean, end_std) = standard(1.0), standard(0.0)
    exact = (end_mean + (np.asarray(z, np.float64) @ basis - start_mean) / start_std * end_std) @ basis.T
    errors = [
        np.sqrt(np.square(SAMPLERS["ddim"](gaussian_v(MEAN, COV), z, None, num_steps=n) - exact).mean())
        for n in (4, 16, 32, 64, 128, 256)
    ]
    assert np.all(np.diff(errors) < 0), errors
    np.testing.assert_allclose(np.divide(errors[3:], errors[2:-1]), 0.5, atol=0.05)
    assert errors[-1] < 4e-3


def test_small_ddim_is_a_rotation():
    """z_s = cos(phi_t - phi_s) z_t - sin(phi_t - phi_s) v, in float64, for a v that is no denoiser of anything."""
    num_steps = 11
    z = np.random.default_rng(0).standard_normal((4, 5))
    ours = samplers.ddim(
        lambda z, logsnr: jnp.tanh(1.5 * z) * jnp.cos(logsnr / 10)[:, None], z.astype(np.float32), num_steps=num_steps
    )
    angles = cosine_angle(samplers.time_grid(num_steps))
    for i in range(num_steps):
        v = np.tanh(1.5 * z) * np.cos(-2 * np.log(np.tan(angles[i])) / 10)
        turn = angles[i] - (angles[i + 1] if i < num_steps - 1 else 0)
        z = np.cos(turn) * z - np.sin(turn) * v
    np.testing.assert_allclose(ours, z, atol=5e-6)


def test_small_distilled_is_exact_in_eight_steps_for_a_perfect_student():
    """A student whose jump of 2 / N is the exact flow has every marginal exact, so 8 steps give the data's moments."""
    num_steps = 8
    std = np.array([0.7, 0.3, 0.05])
    mean = MEAN.astype(np.float32)

    def student(z, logsnr):
        t = cosine_time(logsnr)
        k = jnp.round(num_steps * t - 2) / num_steps
        alpha_t, sigma_t = alpha_sigma(logsnr[:, None])
        alpha_k, sigma_k = alpha_sigma(cosine_logsnr(jnp.maximum(k, 0))[:, None])
        # At time 0 the flow is taken all the way: sigma = 0, not what the schedule stops at.
        alpha_k, sigma_k = jnp.where(k[:, None] <= 0, 1.0, alpha_k), jnp.where(k[:, None] <= 0, 0.0, sigma_k)
        growth = jnp.sqrt((alpha_k**2 * std**2 + sigma_k**2) / (alpha_t**2 * std**2 + sigma_t**2))
        z_k = alpha_k * mean + growth * (z - alpha_t * mean)
        x = (z_k - sigma_k / sigma_t * z) / (alpha_k - sigma_k / sigma_t * alpha_t)
        return v_of_x(z, x, logsnr)

    keys, z = keys_and_noise(16384, 3)
    samples = SAMPLERS["distilled"](student, z, keys, num_steps=num_steps)
    assert_moments(samples, MEAN, np.diag(std**2), rtol=0.035, atol=0.025)
    # The same student under the deterministic sampler jumps half as far as it was made for, and is biased.
    wrong = SAMPLERS["ddim"](student, z, keys, num_steps=num_steps)
    assert np.abs(np.var(np.asarray(wrong), axis=0) / std**2 - 1).max() > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_small_samples_do_not_depend_on_their_batch(name):
    keys, z = keys_and_noise(8192, 3)
    sample = gaussian_sampler(name, 8)
    np.testing.assert_allclose(sample(z[70:71], keys[70:71])[0], sample(z, keys)[70], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(samplers.initial_noise(keys[70:71], (3,))[0], z[70])


def test_small_noise_is_drawn_per_sample_and_step():
    """With x = 0 predicted always, ancestral sampling is a sum of the noises: rebuild the step before last by hand."""
    keys, z = keys_and_noise(3, 4)
    seen = {}

    def v_fn(z, logsnr):
        jax.debug.callback(lambda t, z: seen.__setitem__(round(float(t[0]) * 3), np.array(z)), cosine_time(logsnr), z)
        return v_of_x(z, jnp.zeros_like(z), logsnr)

    samplers.ancestral(v_fn, z, keys, num_steps=3, gamma=0.3).block_until_ready()
    jax.effects_barrier()
    grid = cosine_logsnr(samplers.time_grid(3))
    for step in (0, 1):
        noise = np.stack([jax.random.normal(jax.random.fold_in(key, step), (4,)) for key in keys])
        before, after = seen[3 - step], seen[2 - step]
        mean, variance = process.posterior(
            before, np.zeros_like(before), jnp.full(3, grid[step]), jnp.full(3, grid[step + 1]), gamma=0.3
        )
        np.testing.assert_allclose(after, mean + np.sqrt(variance) * noise, atol=2e-6)


@pytest.mark.parametrize("name", KINDS)
def test_small_denoiser_sees_a_batch_of_levels_and_the_output_is_x(name):
    """logsnr is [B] whatever the sampler, v may come in bfloat16, and the end is the last prediction of x itself."""
    keys, z = keys_and_noise(4, 3)
    x = jnp.array([0.25, -0.5, 1.0])

    def v_fn(z, logsnr):
        assert z.shape == (4, 3)
        assert z.dtype == jnp.float32
        assert logsnr.shape == (4,)
        return v_of_x(z, x, logsnr)

    sample = functools.partial(SAMPLERS[name], z=z, keys=keys, num_steps=5)
    np.testing.assert_allclose(sample(v_fn), np.tile(x, (4, 1)), atol=1e-6)
    half = jax.eval_shape(lambda: sample(lambda z, logsnr: v_fn(z, logsnr).astype(jnp.bfloat16)))
    assert half.dtype == jnp.float32


def test_small_threshold_changes_eps_with_x():
    """DDIM with x squashed, in float64: eps is what z then holds beside the changed x, not the one predicted."""
    num_steps = 9
    z = np.random.default_rng(1).standard_normal((6, 4))
    sample = functools.partial(SAMPLERS["ddim"], lambda z, logsnr: -2.0 * z, z.astype(np.float32), None)
    ours, plain = sample(num_steps=num_steps, threshold=jnp.tanh), sample(num_steps=num_steps)
    for t, s in itertools.pairwise(cosine_angle(samplers.time_grid(num_steps))):
        x = np.tanh(np.cos(t) * z + 2 * np.sin(t) * z)
        z = np.cos(s) * x + np.sin(s) * (z - np.cos(t) * x) / np.sin(t)
    np.testing.assert_allclose(ours, x, atol=1e-5)
    assert np.abs(plain).max() > 2


@pytest.mark.parametrize("name", ["ancestral_0.3", "distilled"])
def test_small_threshold_bounds_the_stochastic_samplers(name):
    keys, z = keys_and_noise(6, 4)
    sample = functools.partial(SAMPLERS[name], lambda z, logsnr: -2.0 * z, z, keys, num_steps=9)
    assert np.abs(sample(threshold=lambda x: jnp.clip(x, -1, 1))).max() == 1
    assert np.abs(sample()).max() > 2


@pytest.mark.parametrize("name", KINDS)
def test_small_progress_is_reported_for_each_step(name):
    keys, z = keys_and_noise(2, 3)
    done = []
    SAMPLERS[name](gaussian_v(MEAN, COV), z, keys, num_steps=5, on_step=done.append).block_until_ready()
    jax.effects_barrier()
    assert done == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", KINDS)
def test_small_one_loop_whatever_the_number_of_steps(name):
    """The program has one scan, and is of the same size for 4 and for 400 steps."""
    keys, z = keys_and_noise(2, 3)

    def program(num_steps):
        return jax.make_jaxpr(functools.partial(PLAIN[name], gaussian_v(MEAN, COV), num_steps=num_steps))(z, keys).eqns

    assert [str(eqn.primitive) for eqn in program(4)].count("scan") == 1
    assert len(program(4)) == len(program(400))


def test_small_other_schedules_are_followed():
    """A schedule of another range reaches the same data."""
    keys, z = keys_and_noise(8192, 3)
    logsnr_fn = functools.partial(cosine_logsnr, logsnr_min=-12.0, logsnr_max=10.0)
    levels = []

    def v_fn(z, logsnr):
        jax.debug.callback(lambda l: levels.append(float(l)), logsnr[0])
        return gaussian_v(MEAN, COV)(z, logsnr)

    samples = SAMPLERS["ancestral_0.3"](v_fn, z, keys, num_steps=200, logsnr_fn=logsnr_fn)
    jax.effects_barrier()
    assert_moments(samples, MEAN, COV, rtol=0.06, atol=0.04)
    np.testing.assert_allclose(max(levels), logsnr_fn(1 / 200), atol=1e-5)
    np.testing.assert_allclose(min(levels), -12, atol=1e-5)


def test_small_initial_noise_is_standard_normal_and_apart_from_the_steps():
    keys, z = keys_and_noise(8192, 3)
    assert_moments(z, np.zeros(3), np.eye(3), rtol=0.05, atol=0.04)
    step = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (3,)))(keys)
    assert np.abs(np.mean(z * step, axis=0)).max() < 0.04


def test_small_wrong_arguments_are_refused():
    keys, z = keys_and_noise(2, 3)
    v_fn = gaussian_v(MEAN, COV)
    for name, sample in PLAIN.items():
        with pytest.raises(ValueError, match="num_steps=0"):
            sample(v_fn, z, keys, num_steps=0)
        if name != "ddim":
            with pytest.raises(ValueError, match=r"shape \[2\].*\[1\]"):
                sample(v_fn, z, keys[:1], num_steps=2)
            with pytest.raises(ValueError, match=r"typed keys.*jax\.random\.split"):
                sample(v_fn, z, jax.random.PRNGKey(0), num_steps=2)
    with pytest.raises(ValueError, match=r"gamma=1\.5"):
        samplers.ancestral(v_fn, z, keys, num_steps=2, gamma=1.5)
    with pytest.raises(ValueError, match="typed keys"):
        samplers.initial_noise(jax.random.key(0), (3,))

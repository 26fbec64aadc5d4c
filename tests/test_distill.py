import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.diffusion import distill, process, samplers
from ivideo.diffusion.schedules import alpha_sigma, cosine_logsnr, cosine_time


def angle_f64(t):
    edge = np.arctan(np.exp(-10.0))
    return (np.pi / 2 - 2 * edge) * np.asarray(t, np.float64) + edge


def teacher(z, logsnr):
    """A smooth v that is no denoiser of anything in particular."""
    logsnr = process.expand(logsnr, z)
    return jnp.tanh(1.3 * z + 0.1) * jnp.cos(logsnr / 10) - 0.2 * jnp.sin(logsnr / 15)


def teacher_f64(z, angle):
    logsnr = -2 * np.log(np.tan(angle))
    return np.tanh(1.3 * z + 0.1) * np.cos(logsnr / 10) - 0.2 * np.sin(logsnr / 15)


def two_step_f64(z, i, num_steps, jump):
    """The target in float64 as arXiv 2202.00512 (Algorithm 2) has it: two DDIM steps, then x by a division."""
    t, s = (i + 1) / num_steps, max(i + 1 - jump, 0) / num_steps
    phi_t, phi_m, phi_s = angle_f64(t), angle_f64((t + s) / 2), angle_f64(s)
    v_1 = teacher_f64(z, phi_t)
    x_1, eps_1 = np.cos(phi_t) * z - np.sin(phi_t) * v_1, np.sin(phi_t) * z + np.cos(phi_t) * v_1
    z_m = np.cos(phi_m) * x_1 + np.sin(phi_m) * eps_1
    v_2 = teacher_f64(z_m, phi_m)
    x_2, eps_2 = np.cos(phi_m) * z_m - np.sin(phi_m) * v_2, np.sin(phi_m) * z_m + np.cos(phi_m) * v_2
    z_s = np.cos(phi_s) * x_2 + np.sin(phi_s) * eps_2
    ratio = np.sin(phi_s) / np.sin(phi_t)
    x = x_2 if s == 0 else (z_s - ratio * z) / (np.cos(phi_s) - ratio * np.cos(phi_t))
    convex = x_2 if s == 0 else (np.sin(phi_s) * x_1 + np.sin(phi_t) * x_2) / (np.sin(phi_s) + np.sin(phi_t))
    return x, convex, (np.cos(phi_t) * z - x) / np.sin(phi_t)


def target_of(z, i, **kwargs):
    return jax.jit(functools.partial(distill.two_step_target, teacher, **kwargs))(z, i=np.asarray(i))


@pytest.mark.parametrize("jump", [1, 2])
@pytest.mark.parametrize("num_steps", [1, 2, 8, 1024, 8192])
def test_small_two_step_target_matches_the_division_in_float64(num_steps, jump):
    """Where the division itself is sound, in float64, we match it in float32: to 1e-5, from 1 to 8192 steps."""
    i = np.unique(np.concatenate([np.arange(min(num_steps, 9)), [num_steps // 2, num_steps - 2, num_steps - 1]]))
    i = i[i >= 0]
    z = np.random.default_rng(0).standard_normal((len(i), 2, 5)).astype(np.float32)
    ours = target_of(z, i, num_steps=num_steps, jump=jump)
    for b, step in enumerate(i):
        x, convex, v = two_step_f64(z[b].astype(np.float64), int(step), num_steps, jump)
        np.testing.assert_allclose(convex, x, atol=1e-8)
        np.testing.assert_allclose(ours.x[b], x, atol=1e-5)
        np.testing.assert_allclose(ours.v[b], v, atol=1e-5)


def test_small_first_grid_point_takes_the_second_prediction():
    """i = 0 jumps to time 0, where only the prediction at the middle counts; so does i = 1 with jumps of two."""
    num_steps = 8
    z = np.random.default_rng(1).standard_normal((1, 6)).astype(np.float32)
    for i, jump in ((0, 1), (0, 2), (1, 2)):
        phi_t, phi_m = angle_f64((i + 1) / num_steps), angle_f64((i + 1) / num_steps / 2)
        v_1 = teacher_f64(z.astype(np.float64), phi_t)
        z_m = np.cos(phi_t - phi_m) * z - np.sin(phi_t - phi_m) * v_1
        x_2 = np.cos(phi_m) * z_m - np.sin(phi_m) * teacher_f64(z_m, phi_m)
        ours = target_of(z, [i], num_steps=num_steps, jump=jump)
        np.testing.assert_allclose(ours.x, x_2, atol=2e-6)


def test_small_x_and_v_of_a_target_agree():
    z = np.random.default_rng(2).standard_normal((8, 4)).astype(np.float32)
    ours = target_of(z, np.arange(8), num_steps=8)
    logsnr = cosine_logsnr(distill.student_time(np.arange(8), num_steps=8))
    alpha, sigma = alpha_sigma(logsnr[:, None])
    np.testing.assert_allclose(ours.v, (alpha * z - ours.x) / sigma, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 4, 16])
def test_small_perfect_student_in_half_the_steps_is_its_teacher(num_steps):
    """DDIM of N steps with the target as the denoiser ends where DDIM of 2 N steps with the teacher does."""

    def student(z, logsnr):
        i = jnp.round(cosine_time(logsnr) * num_steps).astype(jnp.int32) - 1
        return distill.two_step_target(teacher, z, i=i, num_steps=num_steps).v

    z = jax.random.normal(jax.random.key(0), (3, 5))
    ours = jax.jit(lambda z: samplers.ddim(student, z, num_steps=num_steps))(z)
    theirs = jax.jit(lambda z: samplers.ddim(teacher, z, num_steps=2 * num_steps))(z)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_small_jumps_of_two_are_steps_of_a_student_of_half_the_grid():
    """From t = 2 j / N a jump of 2 / N is the plain target of a student of N / 2 steps."""
    z = np.random.default_rng(3).standard_normal((4, 5)).astype(np.float32)
    double = target_of(z, np.arange(1, 8, 2), num_steps=8, jump=2)
    plain = target_of(z, np.arange(4), num_steps=4)
    np.testing.assert_allclose(double.x, plain.x, atol=1e-6)
    np.testing.assert_allclose(double.v, plain.v, atol=1e-6)


def test_small_other_ranges_of_the_schedule():
    """The convex form needs a cosine schedule, of any range: against the division, in float64."""
    logsnr_fn = functools.partial(cosine_logsnr, logsnr_min=-12.0, logsnr_max=10.0)
    z = np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)
    i = np.array([1, 4, 7])
    ours = target_of(z, i, num_steps=8, logsnr_fn=logsnr_fn)
    start, end = np.arctan(np.exp(-5.0)), np.arctan(np.exp(6.0))
    for b, step in enumerate(i):
        phi_t, phi_m, phi_s = (start + (end - start) * (step + n) / 8 for n in (1, 0.5, 0))
        z_m = np.cos(phi_t - phi_m) * z[b] - np.sin(phi_t - phi_m) * teacher_f64(z[b].astype(np.float64), phi_t)
        z_s = np.cos(phi_m - phi_s) * z_m - np.sin(phi_m - phi_s) * teacher_f64(z_m, phi_m)
        ratio = np.sin(phi_s) / np.sin(phi_t)
        x = (z_s - ratio * z[b]) / (np.cos(phi_s) - ratio * np.cos(phi_t))
        np.testing.assert_allclose(ours.x[b], x, atol=1e-5)


def test_small_guided_target_is_the_formula():
    """x = (1 + w) x_c - w x_u, in float64, with a weight for each sample."""
    rng = np.random.default_rng(5)
    z, v_c, v_u = rng.standard_normal((3, 4, 2, 3))
    weight, logsnr = np.array([0.0, 1.0, 6.0, 15.0]), np.array([-5.0, 0.0, 1.0, 5.0])
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))
    alpha, sigma, w = (a.reshape(4, 1, 1) for a in (alpha, sigma, weight))
    x = (1 + w) * (alpha * z - sigma * v_c) - w * (alpha * z - sigma * v_u)
    ours = distill.guided_target(lambda z, l: jnp.asarray(v_c), lambda z, l: jnp.asarray(v_u), z, logsnr, weight)
    np.testing.assert_allclose(ours.x, x, atol=2e-5)
    np.testing.assert_allclose(ours.v, (1 + w) * v_c - w * v_u, atol=2e-5)


def test_small_targets_carry_no_gradient_and_are_float32():
    z = jnp.ones((2, 3))

    def through(scale):
        def v_fn(z, logsnr):
            return (scale * teacher(z, logsnr)).astype(jnp.bfloat16)

        guided = distill.guided_target(v_fn, teacher, z, jnp.zeros(2), jnp.ones(2))
        stepped = distill.two_step_target(v_fn, z, i=jnp.array([0, 3]), num_steps=4)
        for target in (guided, stepped):
            assert target.x.dtype == target.v.dtype == jnp.float32
        return sum(jnp.sum(t.x + t.v) for t in (guided, stepped))

    assert jax.jit(jax.grad(through))(1.0) == 0


def test_small_guidance_weights_are_uniform():
    w = np.asarray(distill.sample_weight(jax.random.key(0), 20000, w_min=1.0, w_max=15.0))
    assert w.min() >= 1
    assert w.max() <= 15
    np.testing.assert_allclose([w.mean(), w.var()], [8, 14**2 / 12], rtol=0.02)
    with pytest.raises(ValueError, match=r"w_max=1.*w_min=2"):
        distill.sample_weight(jax.random.key(0), 2, w_min=2.0, w_max=1.0)


def test_small_loss_weightings():
    """max(SNR, 1) x-MSE and (SNR + 1) x-MSE in float64; the first is nowhere above the second, nor below half of it."""
    rng = np.random.default_rng(6)
    z, v, target = rng.standard_normal((3, 5, 2, 3))
    logsnr = np.array([-18.0, -2.0, 0.0, 2.0, 8.0])
    snr = np.exp(logsnr)
    sigma = np.sqrt(1 / (1 + snr)).reshape(5, 1, 1)
    alpha = np.sqrt(1 - sigma**2)
    x_mse = np.square((alpha * z - sigma * v) - (alpha * z - sigma * target)).mean((1, 2))
    truncated = distill.distill_loss(v, target, logsnr)
    np.testing.assert_allclose(truncated, np.maximum(snr, 1) * x_mse, rtol=1e-5)
    plain = distill.distill_loss(v, distill.Target(None, target), logsnr, kind="v")
    np.testing.assert_allclose(plain, (snr + 1) * x_mse, rtol=1e-5)
    assert np.all(truncated <= plain * (1 + 1e-6))
    assert np.all(truncated >= plain * (0.5 - 1e-6))
    with pytest.raises(ValueError, match="'snr'"):
        distill.distill_loss(v, target, logsnr, kind="snr")


def test_small_training_on_the_target_recovers_it():
    """Gradient descent on the loss, for a student with a free number for every output, ends at the target."""
    z = np.random.default_rng(7).standard_normal((4, 3)).astype(np.float32)
    i = np.arange(4)
    target = target_of(z, i, num_steps=4)
    logsnr = cosine_logsnr(distill.student_time(i, num_steps=4))
    gradient = jax.jit(jax.grad(lambda v: distill.distill_loss(v, target, logsnr).sum()))
    v = jnp.zeros((4, 3))
    for _ in range(60):
        v -= 0.8 * gradient(v)
    np.testing.assert_allclose(v, target.v, atol=1e-5)


def test_small_rounds_halve():
    assert distill.rounds(256, 8) == [128, 64, 32, 16, 8]
    assert distill.rounds(128, 8) == [64, 32, 16, 8]
    assert distill.rounds(6, 3) == [3]
    assert distill.rounds(8, 8) == []
    for first, last in ((100, 8), (8, 16), (8, 0), (0, 0)):
        with pytest.raises(ValueError, match=f"Halving {first} steps does not lead to {last}"):
            distill.rounds(first, last)


def test_small_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_steps=0"):
        distill.two_step_target(teacher, jnp.zeros((1, 2)), i=np.array([0]), num_steps=0)
    with pytest.raises(ValueError, match="jump=0"):
        distill.two_step_target(teacher, jnp.zeros((1, 2)), i=np.array([0]), num_steps=4, jump=0)

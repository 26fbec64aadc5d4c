"""The targets of distillation against their formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.diffusion import distill, process, samplers
from ivideo.diffusion.schedules import cosine_logsnr, cosine_time

SHIFTS = (0.0, 2.0, -2.5)
# Where the division by a difference keeps its digits in float64
STEPS = [4, 8, 64, 1024, 8192]


def schedule(shift):
    return lambda t: cosine_logsnr(t) + shift


def angle_f64(t, shift=0.0):
    """The angle atan(sigma / alpha) of the shifted cosine schedule; 0 at t = 0, where a jump ends at the clean x."""
    edge = np.arctan(np.exp(-10.0))
    angle = (np.pi / 2 - 2 * edge) * np.asarray(t, np.float64) + edge
    return np.arctan(np.tan(angle) * np.exp(-shift / 2))


def teacher(z, logsnr):
    """A smooth v that is no denoiser of anything in particular."""
    logsnr = process.expand(logsnr, z)
    return jnp.tanh(1.3 * z + 0.1) * jnp.cos(logsnr / 10) - 0.2 * jnp.sin(logsnr / 15)


def teacher_f64(z, angle):
    logsnr = -2 * np.log(np.tan(angle))
    return np.tanh(1.3 * z + 0.1) * np.cos(logsnr / 10) - 0.2 * np.sin(logsnr / 15)


def ddim_f64(z, t, s):
    """One DDIM step of the teacher between two angles: (predicted x, z_s)."""
    v = teacher_f64(z, t)
    x, eps = np.cos(t) * z - np.sin(t) * v, np.sin(t) * z + np.cos(t) * v
    return x, np.cos(s) * x + np.sin(s) * eps


def target_f64(z, i, num_steps, *, jump=1, shift=0.0):
    """(x, v) of the target in float64 as arXiv 2202.00512 (Algorithm 2) has it: DDIM steps, then x by a division."""
    t, m, s = (angle_f64(max(i + 1 - steps, 0) / num_steps, shift) for steps in (0, jump / 2, jump))
    if i + 1 < jump:  # no room for two steps of the teacher: one to time 0
        x, _ = ddim_f64(z, t, 0.0)
    else:
        _, z_m = ddim_f64(z, t, m)
        x, z_s = ddim_f64(z_m, m, s)
        if i + 1 > jump:
            ratio = np.sin(s) / np.sin(t)
            x = (z_s - ratio * z) / (np.cos(s) - ratio * np.cos(t))
    return x, (np.cos(t) * z - x) / np.sin(t)


def target_of(z, i, **kwargs):
    return jax.jit(functools.partial(distill.two_step_target, teacher, **kwargs))(z, i=np.asarray(i))


def grid_points(num_steps):
    i = np.concatenate([np.arange(min(num_steps, 9)), [num_steps // 2, num_steps - 2, num_steps - 1]])
    return np.unique(i[i >= 0])


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("jump", [1, 2])
def test_small_two_step_target_matches_the_division_in_float64(jump, shift):
    """In float32, on any schedule, from 4 steps to 8192: x and v to 5e-7 (the largest difference is 2e-7)."""
    target = jax.jit(
        lambda z, i, num_steps: distill.two_step_target(
            teacher, z, i=i, num_steps=num_steps, jump=jump, logsnr_fn=schedule(shift)
        )
    )
    for num_steps in STEPS:
        i = np.resize(grid_points(num_steps), 12)
        z = np.random.default_rng(0).standard_normal((len(i), 10)).astype(np.float32)
        ours = np.asarray(target(z, i, jnp.int32(num_steps)), np.float64)
        for b, point in enumerate(i):
            x, v = target_f64(z[b].astype(np.float64), int(point), num_steps, jump=jump, shift=shift)
            t = angle_f64((point + 1) / num_steps, shift)
            np.testing.assert_allclose(np.cos(t) * z[b] - np.sin(t) * ours[b], x, atol=5e-7)
            np.testing.assert_allclose(ours[b], v, atol=5e-7)


@pytest.mark.parametrize("jump", [1, 2])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_small_targets_of_the_last_students(num_steps, jump):
    for i in range(num_steps):
        z = np.random.default_rng(1).standard_normal((1, 6)).astype(np.float32)
        _, v = target_f64(z.astype(np.float64), i, num_steps, jump=jump, shift=2.0)
        ours = target_of(z, [i], num_steps=num_steps, jump=jump, logsnr_fn=schedule(2.0))
        np.testing.assert_allclose(ours, v, atol=5e-7)


def test_small_jumps_to_time_zero_take_the_teachers_last_prediction():
    """Of i = 0, and of i = 1 with jumps of two steps: the x that the teacher predicts at the middle."""
    num_steps = 8
    z = np.random.default_rng(1).standard_normal((1, 6)).astype(np.float32)
    for i, jump in ((0, 1), (1, 2)):
        t, m = angle_f64((i + 1) / num_steps), angle_f64((i + 1) / num_steps / 2)
        _, z_m = ddim_f64(z.astype(np.float64), t, m)
        x, _ = ddim_f64(z_m, m, 0.0)
        ours = target_of(z, [i], num_steps=num_steps, jump=jump)
        np.testing.assert_allclose(np.cos(t) * z - np.sin(t) * ours, x, atol=5e-7)


def test_small_a_jump_of_two_from_the_last_grid_point_is_one_step_of_the_teacher():
    """`samplers.distilled` makes one plain step from t = 1 / N, so what the teacher predicts there is the target."""
    z = np.random.default_rng(2).standard_normal((1, 6)).astype(np.float32)
    ours = target_of(z, [0], num_steps=8, jump=2)
    np.testing.assert_allclose(ours, teacher_f64(z, angle_f64(1 / 8)), atol=5e-7)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [1, 4, 16])
def test_small_perfect_student_in_half_the_steps_is_its_teacher(num_steps, shift):
    """DDIM of N steps with the target as the denoiser ends where DDIM of 2 N steps with the teacher does."""
    logsnr_fn = schedule(shift)

    def student(z, logsnr):
        i = jnp.round(cosine_time(logsnr - shift) * num_steps).astype(jnp.int32) - 1
        return distill.two_step_target(teacher, z, i=i, num_steps=num_steps, logsnr_fn=logsnr_fn)

    z = jax.random.normal(jax.random.key(0), (3, 5))
    ours = jax.jit(lambda z: samplers.ddim(student, z, num_steps=num_steps, logsnr_fn=logsnr_fn))(z)
    theirs = jax.jit(lambda z: samplers.ddim(teacher, z, num_steps=2 * num_steps, logsnr_fn=logsnr_fn))(z)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("shift", SHIFTS)
def test_small_perfect_student_of_jumps_is_its_teacher_in_the_stochastic_sampler(shift):
    """With the noise of each step the same: two steps of the teacher in place of each jump, one in the last step."""
    num_steps, logsnr_fn = 8, schedule(shift)
    keys = jax.random.split(jax.random.key(3), 4)
    z = samplers.initial_noise(keys, (5,))

    def student(z, logsnr):
        i = jnp.round(cosine_time(logsnr - shift) * num_steps).astype(jnp.int32) - 1
        return distill.two_step_target(teacher, z, i=i, num_steps=num_steps, jump=2, logsnr_fn=logsnr_fn)

    ours = jax.jit(lambda z: samplers.distilled(student, z, keys, num_steps=num_steps, logsnr_fn=logsnr_fn))(z)
    theirs = np.asarray(z, np.float64)
    for step in range(num_steps):
        angles = [angle_f64(max(num_steps - step - n, 0) / num_steps, shift) for n in range(3)]
        x, z_s = ddim_f64(theirs, *angles[:2])
        if step == num_steps - 1:
            theirs = x
            break
        x, z_k = ddim_f64(z_s, *angles[1:])
        noise = np.stack([jax.random.normal(jax.random.fold_in(key, step), (5,)) for key in keys])
        ratio = np.cos(angles[1]) / np.cos(angles[2])
        if step == num_steps - 2:
            z_k = np.cos(angles[2]) * x + np.sin(angles[2]) * (z_s - np.cos(angles[1]) * x) / np.sin(angles[1])
        theirs = ratio * z_k + np.sqrt(np.sin(angles[1]) ** 2 - (ratio * np.sin(angles[2])) ** 2) * noise
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_small_jumps_of_two_are_steps_of_a_student_of_half_the_grid():
    """From t = 2 j / N a jump of 2 / N is the plain target of a student of N / 2 steps."""
    z = np.random.default_rng(3).standard_normal((4, 5)).astype(np.float32)
    double = target_of(z, np.arange(1, 8, 2), num_steps=8, jump=2)
    np.testing.assert_allclose(double, target_of(z, np.arange(4), num_steps=4), atol=1e-6)


def test_small_other_ranges_of_the_schedule():
    """Against the division, in float64, on a schedule with other ends."""
    logsnr_fn = functools.partial(cosine_logsnr, logsnr_min=-12.0, logsnr_max=10.0)
    z = np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)
    i = np.array([1, 4, 7])
    ours = target_of(z, i, num_steps=8, logsnr_fn=logsnr_fn)
    start, end = np.arctan(np.exp(-5.0)), np.arctan(np.exp(6.0))
    for b, step in enumerate(i):
        t, m, s = (start + (end - start) * (step + n) / 8 for n in (1, 0.5, 0))
        _, z_m = ddim_f64(z[b].astype(np.float64), t, m)
        _, z_s = ddim_f64(z_m, m, s)
        ratio = np.sin(s) / np.sin(t)
        x = (z_s - ratio * z[b]) / (np.cos(s) - ratio * np.cos(t))
        np.testing.assert_allclose(np.cos(t) * z[b] - np.sin(t) * ours[b], x, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 8, 8192])
def test_small_grid_points_are_uniform_and_inside_the_grid(num_steps):
    time = np.concatenate([(np.arange(8192) + 0.5) / 8192, [0, 1 - 2**-24]]).astype(np.float32)
    i = np.asarray(jax.jit(distill.random_grid_point)(time, num_steps=jnp.int32(num_steps)))
    np.testing.assert_array_equal(np.bincount(i[:-2], minlength=num_steps), 8192 // num_steps)
    assert list(i[-2:]) == [0, num_steps - 1]
    np.testing.assert_allclose(distill.student_time(i, num_steps=num_steps), (i + 1) / num_steps, rtol=1e-6)


def test_small_guided_target_is_the_formula():
    """v = (1 + w) v_c - w v_u, with a weight for each sample."""
    rng = np.random.default_rng(5)
    z, v_c, v_u = rng.standard_normal((3, 4, 2, 3))
    weight, logsnr = np.array([0.0, 1.0, 6.0, 15.0]), np.array([-5.0, 0.0, 1.0, 5.0])
    w = weight.reshape(4, 1, 1)
    ours = distill.guided_target(lambda z, l: jnp.asarray(v_c), lambda z, l: jnp.asarray(v_u), z, logsnr, weight)
    np.testing.assert_allclose(ours, (1 + w) * v_c - w * v_u, atol=2e-5)


def test_small_targets_carry_no_gradient_and_are_float32():
    z = jnp.ones((2, 3))

    def through(scale):
        def v_fn(z, logsnr):
            return (scale * teacher(z, logsnr)).astype(jnp.bfloat16)

        guided = distill.guided_target(v_fn, teacher, z, jnp.zeros(2), jnp.ones(2))
        stepped = distill.two_step_target(v_fn, z, i=jnp.array([0, 3]), num_steps=4)
        assert guided.dtype == stepped.dtype == jnp.float32
        return jnp.sum(guided + stepped)

    assert jax.jit(jax.grad(through))(1.0) == 0


def test_small_guidance_weights_are_uniform():
    keys = jax.random.split(jax.random.key(0), 20000)
    w = np.asarray(jax.jit(functools.partial(distill.random_guidance_weight, w_min=1.0, w_max=15.0))(keys))
    assert w.min() >= 1
    assert w.max() <= 15
    np.testing.assert_allclose([w.mean(), w.var()], [8, 14**2 / 12], rtol=0.02)
    with pytest.raises(ValueError, match=r"w_max=1.*w_min=2"):
        distill.random_guidance_weight(keys, w_min=2.0, w_max=1.0)


def test_small_rounds_halve():
    assert distill.rounds(256, 8) == [128, 64, 32, 16, 8]
    assert distill.rounds(128, 8) == [64, 32, 16, 8]
    assert distill.rounds(6, 3) == [3]
    assert distill.rounds(8, 8) == []
    for first, last in ((100, 8), (8, 16), (8, 0), (0, 0)):
        with pytest.raises(ValueError, match=f"Halving {first} steps does not lead to {last}"):
            distill.rounds(first, last)


def test_small_other_jumps_are_refused():
    for jump in (0, 3):
        with pytest.raises(ValueError, match=f"jump={jump} must be 1 or 2"):
            distill.two_step_target(teacher, jnp.zeros((1, 2)), i=np.array([0]), num_steps=4, jump=jump)

"""Distillation of an exact teacher: a class-conditional Gaussian mixture in three dimensions.

The real step runs on it. In the network's place is the mixture's own denoiser, to which a student adds a small network
that is told the guidance weight. "Videos" are [B, 1, 1, 1, 3], a text is one token that says the class.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from ivideo import stages
from ivideo.diffusion import distill, samplers
from ivideo.diffusion.process import add_noise
from ivideo.diffusion.schedules import alpha_sigma
from ivideo.training import distill_step, step

MEANS = np.array([[0.9, 0.2, 0.0], [0.4, -0.8, 0.3], [-0.7, 0.5, -0.4], [-0.5, -0.6, 0.6]], np.float32)
DEVIATION = 0.35
CLASSES = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], np.float32)  # shares of the components in a class
WIDTH, BATCH = 64, 256
TIMES = (0.05, 0.25, 0.5, 0.75, 1.0)
DIRECTIONS = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
DIRECTIONS /= np.linalg.norm(DIRECTIONS, axis=0)


class Mixture:
    """In the network's place: the exact denoiser, and of a student a network beside it."""

    def __init__(self, told: bool):
        self.told = told

    def init(self, key, *args, **kwargs):
        if not self.told:
            return {"params": {}}
        sizes = [(15, WIDTH), (WIDTH, WIDTH), (WIDTH, 6)]
        layers = [
            0.0 * jnp.ones(size) if size[1] == 6 else jax.random.normal(k, size) / np.sqrt(size[0])
            for k, size in zip(jax.random.split(key, 3), sizes, strict=True)
        ]
        return {"params": {"guidance_embedding": {str(i): layer for i, layer in enumerate(layers)}}}

    def apply(self, variables, z, logsnr, text, mask, *, num_images=0, guidance_weight=None):
        assert (guidance_weight is not None) == self.told
        kept = mask.any(-1).astype(jnp.float32)
        shares = jnp.where(kept[:, None] > 0, text[:, 0] @ CLASSES, 0.25)
        points = z.reshape(-1, 3)
        v = exact_v(points, logsnr, shares)
        if self.told:
            v += correction(variables["params"]["guidance_embedding"], points, logsnr, guidance_weight, text, kept)
        return v.reshape(z.shape)


def exact_v(z, logsnr, shares):
    """v of the mixture with these shares of its components [B, 4]."""
    alpha, sigma = (a[:, None] for a in alpha_sigma(logsnr))
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    away = (z[:, None] - alpha[..., None] * MEANS) / variance[..., None]
    log_density = -0.5 * variance * jnp.square(away).sum(-1) + jnp.log(jnp.maximum(shares, 1e-30))
    of_components = (alpha * sigma * (1 - DEVIATION**2))[..., None] * away - sigma[..., None] * MEANS
    return (jax.nn.softmax(log_density)[..., None] * of_components).sum(1)


def correction(layers, z, logsnr, weight, text, kept):
    angle = jnp.arctan(jnp.exp(-logsnr / 2))[:, None]
    waves = [f(k * angle) for k in (1, 2, 4, 8) for f in (jnp.sin, jnp.cos)]
    x = jnp.concatenate([z, *waves, weight[:, None] / 4, text[:, 0] * kept[:, None], jnp.ones_like(angle)], axis=-1)
    x = jax.nn.swish(x @ layers["0"])
    x = jax.nn.swish(x @ layers["1"]) @ layers["2"]
    return x[:, :3] + weight[:, None] * x[:, 3:]


@pytest.fixture(autouse=True)
def mixture(monkeypatch):
    monkeypatch.setattr(stages, "build_model", lambda config: Mixture(config.model.guidance_input))


def small(**changes):
    config = base.get_config("small")
    config.diffusion.logsnr_max, config.diffusion.logsnr_shift = 20.0, 1.0
    config.distill.teacher_steps, config.distill.end_steps = 64, 4
    config.distill.guidance_updates, config.distill.round_updates = 1200, 300
    config.distill.learning_rate = 4e-3
    config.update_from_flattened_dict(changes)
    return config


def draw(key, count=BATCH):
    """A batch of points of random classes."""
    key_class, key_component, key_noise = jax.random.split(key, 3)
    label = jax.random.bernoulli(key_class, shape=(count,)).astype(jnp.int32)
    component = 2 * label + jax.random.bernoulli(key_component, shape=(count,))
    x = jnp.asarray(MEANS)[component] + DEVIATION * jax.random.normal(key_noise, (count, 3))
    text = jax.nn.one_hot(label, 2)[:, None]
    return {"video": x[:, None, None, None], "text": text, "token_mask": jnp.ones((count, 1), bool)}


def runner(config, kind, count):
    """All updates of a phase as one program, for any number of steps of the student."""
    do = distill_step.make_distill_step(config, kind=kind)

    @jax.jit
    def run(state, teacher, num_steps):
        keys = jax.random.split(jax.random.key(7), count)
        return jax.lax.scan(lambda state, key: do(state, teacher, draw(key), num_steps), state, keys)

    return run


@pytest.fixture(scope="module")
def students():
    """A config, and by the phase's name the parameters of its student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "build_model", lambda config: Mixture(config.model.guidance_input))
        config, found, params = small(), {}, {}
        recipe = config.distill
        runs = {
            "guidance": runner(config, "guidance", recipe.guidance_updates),
            "deterministic": runner(config, "deterministic", recipe.round_updates),
            "stochastic": runner(config, "stochastic", recipe.round_updates),
        }
        for phase in [*stages.phases(config), "8_stochastic"]:
            kind, num_steps = stages.student(config, phase)
            params = found.get(str(num_steps), params)
            start = distill_step.init_state(config, params)
            state, _ = runs[kind](start, distill_step.teacher_params(config, params), jnp.int32(num_steps))
            found[phase] = params = state.params
        return config, found


def v_fn_of(config, phase, params, text, weight):
    """A student's denoiser, or of phase '' the original's, guided."""
    of = stages.distilled(config, phase) if phase else config
    of.sample.guidance, of.sample.weight = "constant", weight
    return stages.guided_denoiser(of, stages.build_model(of), params, text, jnp.ones(text.shape[:2], bool))


def perfect(config, text, weight, num_steps, jump=1):
    """The student of N steps that has learnt all rounds without error."""
    v_fn = v_fn_of(config, "", {}, text, weight)

    def student(teacher, count, jump):
        def v(z, logsnr):
            i = jnp.round(stages.time_fn(config)(logsnr) * count).astype(jnp.int32) - 1
            return distill.two_step_target(
                teacher, z, i=i, num_steps=count, jump=jump, logsnr_fn=stages.logsnr_fn(config)
            )

        return v

    for count in distill.rounds(config.distill.teacher_steps, num_steps):
        v_fn = student(v_fn, count, 1)
    return student(v_fn, num_steps, 2) if jump == 2 else v_fn


def samples(config, phase, params, weight, seed, count=4096):
    """Points [count, 3] of class 0, from the sampler that the phase's student is for; of phase '' by the teacher.

    Without parameters: those of the perfect student of the phase.
    """
    keys = jax.random.split(jax.random.key(seed), count)
    text = jnp.tile(jnp.asarray([[[1.0, 0.0]]]), (count, 1, 1))
    kind, num_steps = stages.student(config, phase) if phase else ("guidance", config.distill.teacher_steps)

    @jax.jit
    def run(params):
        if phase and params is None:
            v_fn = perfect(config, text, weight, num_steps, distill_step.JUMPS[kind])
        else:
            v_fn = v_fn_of(config, phase, params, text, weight)
        z, options = samplers.initial_noise(keys, (1, 1, 1, 3)), {"num_steps": num_steps}
        options["logsnr_fn"] = stages.logsnr_fn(config)
        return (
            samplers.distilled(v_fn, z, keys, **options) if kind == "stochastic" else samplers.ddim(v_fn, z, **options)
        )

    return np.asarray(run(params)).reshape(count, 3)


def sliced_distance(a, b):
    """The mean Wasserstein-1 distance of two sets of as many points, over fixed directions."""
    return np.abs(np.sort(a @ DIRECTIONS, axis=0) - np.sort(b @ DIRECTIONS, axis=0)).mean()


def root_mean_square(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def test_the_student_of_the_first_phase_predicts_what_guidance_does(students):
    """At every noise level and weight: within a tenth of what guidance changes, and without guidance within 0.05."""
    config, found = students
    batch = draw(jax.random.key(5), 2048)
    eps = jax.random.normal(jax.random.key(6), batch["video"].shape)

    @functools.partial(jax.jit, static_argnums=0)
    def errors(weight, time):
        logsnr = jnp.full(2048, stages.logsnr_fn(config)(time))
        z = add_noise(batch["video"], eps, logsnr)
        student = v_fn_of(config, "guidance", found["guidance"], batch["text"], weight)(z, logsnr)
        guided = v_fn_of(config, "", {}, batch["text"], weight)(z, logsnr)
        return student - guided, guided - v_fn_of(config, "", {}, batch["text"], 0.0)(z, logsnr)

    for weight in (0.0, 1.0, 2.5, 4.0):
        wrong, changed = (np.concatenate(x) for x in zip(*[errors(weight, t) for t in TIMES], strict=True))
        assert root_mean_square(wrong) < 0.05 + 0.1 * root_mean_square(changed)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_deterministic_students_match_their_teachers_samples(students, weight):
    """The distance from the teacher of 64 steps is no more than twice that of two sets of the teacher's own samples."""
    config, found = students
    teacher = samples(config, "", {}, weight, seed=0)
    yardstick = sliced_distance(teacher, samples(config, "", {}, weight, seed=1))
    for phase in ("8", "4"):
        same, other = (samples(config, phase, found[phase], weight, seed=seed) for seed in (0, 2))
        assert sliced_distance(other, teacher) < 2 * yardstick
        assert root_mean_square(same - teacher) < 0.06  # from the same noise, one by one


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_stochastic_students_match_the_perfect_one(students, weight):
    """A guided score is of no process that adds noise: with guidance the sampler itself makes other samples."""
    config, found = students
    teacher = samples(config, "", {}, weight, seed=0)
    yardstick = sliced_distance(teacher, samples(config, "", {}, weight, seed=1))
    made, best = (samples(config, "8_stochastic", params, weight, seed=2) for params in (found["8_stochastic"], None))
    assert sliced_distance(made, best) < 3 * yardstick
    assert root_mean_square(made - best) < 0.08  # from the same noise, one by one


@pytest.mark.parametrize("phase", ["8_stochastic", "4_stochastic"])
def test_stochastic_students_match_their_teachers_samples(students, phase):
    config, found = students
    teacher = samples(config, "", {}, 0.0, seed=0)
    yardstick = sliced_distance(teacher, samples(config, "", {}, 0.0, seed=1))
    assert sliced_distance(samples(config, phase, found[phase], 0.0, seed=2), teacher) < 3 * yardstick


def test_a_student_for_one_sampler_is_not_one_for_the_other(students):
    """Why the phase is recorded with the weights: jumps of the wrong length miss the teacher's samples."""
    config, found = students
    teacher = samples(config, "", {}, 0.0, seed=0)
    right, wrong = (samples(config, "8_stochastic", found[phase], 0.0, seed=2) for phase in ("8_stochastic", "8"))
    assert sliced_distance(wrong, teacher) > 1.5 * sliced_distance(right, teacher)


def test_small_a_student_begins_as_its_teacher():
    config = small()
    batch = draw(jax.random.key(1))
    params = distill_step.init_state(config, {}).params
    logsnr, z = jnp.zeros(BATCH), batch["video"]
    student = v_fn_of(config, "guidance", params, batch["text"], 3.0)(z, logsnr)
    np.testing.assert_array_equal(student, v_fn_of(config, "", {}, batch["text"], 0.0)(z, logsnr))


def test_a_phase_is_annealed_by_its_own_step():
    """What is applied is the rate that is logged: linear to 0 at the phase's last update, from a fresh optimizer."""
    config = small(**{"distill.round_updates": 4, "distill.late_round_updates": 10, "distill.learning_rate": 0.5})
    config.distill.clip = 1e9
    do = jax.jit(distill_step.make_distill_step(config, kind="deterministic"))
    start = distill_step.init_state(config, {})
    broken = {**draw(jax.random.key(2)), "video": jnp.full((BATCH, 1, 1, 1, 3), jnp.nan)}
    for num_steps, rates in ((8, [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]), (2, [0.5, 0.45, 0.4, 0.35, 0.3, 0.25])):
        state = start
        for number, rate in enumerate(rates):
            teacher = jax.tree.map(lambda p: p + 0.1, start.params)
            new, metrics = do(state, teacher, draw(jax.random.key(2)), jnp.int32(num_steps))
            np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
            # Nothing has been applied yet, so that Adam's first update is the rate itself
            moved = new.params["guidance_embedding"]["2"] - state.params["guidance_embedding"]["2"]
            np.testing.assert_allclose(np.abs(moved).max(), rate, rtol=1e-3, atol=1e-7)
            state, metrics = do(state, teacher, broken, jnp.int32(num_steps))
            assert (int(state.step), int(metrics["skipped"])) == (number + 1, number + 1)
        jax.tree.map(np.testing.assert_array_equal, state.params, start.params)


def test_small_a_dropped_text_has_the_teachers_prediction_without_text():
    """Whatever the weight: the student of the first phase learns that branch too, for an empty prompt."""
    config, batch = small(**{"train.text_dropout": 1.0}), draw(jax.random.key(3))
    drawn = step.draws(jax.random.key(4), BATCH)
    params = distill_step.init_state(config, {}).params
    loss = distill_step.batch_loss(config, "guidance", params, {}, batch, drawn, num_steps=1)
    assert float(loss) < 1e-12
    config.train.text_dropout = 0.0
    assert float(distill_step.batch_loss(config, "guidance", params, {}, batch, drawn, num_steps=1)) > 0.01


@pytest.mark.parametrize("kind", distill_step.KINDS)
def test_small_the_loss_is_of_the_target_at_random_times_and_weights(kind):
    """Against the targets themselves, from the same noise; in parts of the batch as in the whole."""
    config, batch = small(**{"train.text_dropout": 0.0}), draw(jax.random.key(3))
    drawn = step.draws(jax.random.key(4), BATCH)
    teacher = jax.tree.map(lambda p: p + 0.05, distill_step.init_state(config, {}).params)
    params = jax.tree.map(lambda p: p * 0.9 - 0.02, teacher)
    loss = distill_step.batch_loss(
        config, kind, params, {} if kind == "guidance" else teacher, batch, drawn, num_steps=jnp.int32(8)
    )
    eps = np.stack([jax.random.normal(jax.random.split(key, 3)[0], (1, 1, 1, 3)) for key in drawn["key"]])
    w = jnp.stack([jax.random.uniform(jax.random.fold_in(key, 3), minval=0.0, maxval=4.0) for key in drawn["key"]])
    assert 0 < w.min() < 0.1 and 3.9 < w.max() < 4
    i = np.floor(8 * np.asarray(drawn["time"])).astype(int)
    time = drawn["time"] if kind == "guidance" else (i + 1) / 8
    logsnr = stages.logsnr_fn(config)(time)
    z = add_noise(batch["video"], eps, logsnr)
    mask = batch["token_mask"]

    def told(params):
        return lambda z, logsnr: Mixture(True).apply(
            {"params": params}, z, logsnr, batch["text"], mask, guidance_weight=w
        )

    if kind == "guidance":
        plain = [Mixture(False).apply({}, z, logsnr, batch["text"], m) for m in (mask, ~mask)]
        column = w[:, None, None, None, None]
        target = (1 + column) * plain[0] - column * plain[1]
    else:
        jump = {"deterministic": 1, "stochastic": 2}[kind]
        target = distill.two_step_target(
            told(teacher), z, i=i, num_steps=8, jump=jump, logsnr_fn=stages.logsnr_fn(config)
        )
    error = np.square(told(params)(z, logsnr) - target).mean((1, 2, 3, 4))
    truncated = np.maximum(jax.nn.sigmoid(logsnr), jax.nn.sigmoid(-logsnr))
    np.testing.assert_allclose(loss, (truncated * error).mean(), rtol=1e-4)


def test_parts_of_a_batch_have_the_gradient_of_the_whole():
    batch, found = draw(jax.random.key(3)), {}
    teacher = jax.tree.map(lambda p: p + 0.05, distill_step.init_state(small(), {}).params)
    for parts in (1, 4):
        config = small(**{"train.accumulate": parts, "train.text_dropout": 0.3, "distill.clip": 1e9})
        state = distill_step.init_state(config, {})
        new, metrics = jax.jit(distill_step.make_distill_step(config, kind="stochastic"))(
            state, teacher, batch, jnp.int32(8)
        )
        found[parts] = (metrics["loss"], optax.tree_utils.tree_get(new.opt_state, "mu"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found[4], found[1])


def test_small_the_first_state_shares_nothing_with_the_teacher():
    params = distill_step.init_state(small(), {}).params
    leaves = [*jax.tree.leaves(distill_step.init_state(small(), params)), *jax.tree.leaves(params)]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)

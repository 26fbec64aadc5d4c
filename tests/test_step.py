"""Training: the loss and the step against their formulas, one device against eight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, tsr1
from ivideo import stages
from ivideo.devices import sharding
from ivideo.diffusion.process import v_target
from ivideo.text import load_encoder
from ivideo.training.loop import make_data
from ivideo.training.step import (
    TrainState,
    batch_loss,
    batch_shapes,
    draws,
    init_state,
    learning_rate,
    make_optimizer,
    make_train_step,
    prepare,
    state_shapes,
)


def small(**changes):
    config = base.get_config("small")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def parts():
    """A config, a batch with packed images and embedded texts, and a state in which nothing is zero."""
    config = small()
    encoder = load_encoder(config.text)
    batch = jax.tree.map(jnp.asarray, next(make_data(config, encoder)))
    batch = prepare(encoder.module, encoder.params, batch)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: (0.15 * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config))
    return config, batch, state_of(config, params)


def state_of(config, params, step=0):
    return TrainState(jnp.int32(step), params, params, make_optimizer(config).init(params), jnp.int32(0))


def run_step(config, batch, state, **sizes):
    """The state and the metrics after a step on a mesh of these sizes."""
    mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    where = sharding.param_shardings(mesh, state)
    step = jax.jit(make_train_step(config, mesh), out_shardings=(where, sharding.replicated(mesh)))
    inputs = step_inputs(batch)
    return step(jax.device_put(state, where), jax.device_put(inputs, sharding.batch_shardings(mesh, inputs)))


def step_inputs(batch):
    return {name: value for name, value in batch.items() if "tokens" not in name}


@pytest.fixture(scope="module")
def one_device(parts):
    """The state and the metrics after a step on one device."""
    return run_step(*parts, data=1)


MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "frames": 2, "height": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_one_device_and_eight_agree(parts, one_device, sizes, monkeypatch):
    """The same loss and gradient norm to 1e-5 on any mesh: the noise does not depend on it."""
    monkeypatch.setattr(sharding, "MIN_SHARDED", 1)  # else nothing of a network this small is split
    (one, metrics_one), (eight, metrics_eight) = one_device, run_step(*parts, **sizes)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics_eight[name], metrics_one[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.ema, eight.ema)
    split = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(eight.params)]
    assert all(split) == (sizes == {"data": 8})


def test_small_loss_is_the_mean_squared_error_of_v(parts):
    """With the network a constant, the loss is a number that numpy works out from the same noise."""
    config, batch, _ = parts
    drawn = draws(jax.random.key(5), 8)

    class Constant:
        def apply(self, variables, z, logsnr, text, mask, *, num_images):
            assert num_images == 2
            return jnp.full(z.shape, 0.25)

    value = batch_loss(config, Constant(), {}, batch, drawn)
    video = np.concatenate([batch["video"], batch["images"]], axis=1)
    logsnr = np.asarray(stages.logsnr_fn(config)(drawn["time"]))
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr)))[:, None, None, None, None] for s in (-1, 1))
    noise_keys = [jax.random.split(key, 3)[0] for key in drawn["key"]]
    eps = np.stack([jax.random.normal(key, video.shape[1:]) for key in noise_keys]).astype(np.float64)
    np.testing.assert_allclose(value, np.mean((0.25 - (alpha * eps - sigma * video)) ** 2), rtol=1e-5)
    np.testing.assert_allclose(v_target(video, eps, jnp.asarray(logsnr)), alpha * eps - sigma * video, atol=1e-4)


def test_small_times_are_spread_evenly_over_the_batch():
    """One in every 64th part of [0, 1), and so are those of every part of a split batch in its own 16ths."""
    drawn = draws(jax.random.key(2), 64)
    time = np.asarray(drawn["time"])
    np.testing.assert_array_equal(np.sort(np.floor(64 * time)), np.arange(64))
    for part in range(4):
        np.testing.assert_array_equal(np.sort(np.floor(16 * time[part::4])), np.arange(16))
    assert len(np.unique(jax.random.key_data(drawn["key"]), axis=0)) == 64


def test_small_loss_of_x_is_in_units_of_the_spread_of_the_data(parts):
    """Else its gradients shrink with the square of `data_std`, to below Adam's epsilon, and little is learned."""
    _, batch, _ = parts

    class Constant:
        def apply(self, variables, z, logsnr, text, mask, *, num_images):
            return jnp.full(z.shape, 0.25)

    def loss(kind, data_std):
        changed = small(**{"diffusion.loss": kind, "model.data_std": data_std})
        return batch_loss(changed, Constant(), {}, batch, draws(jax.random.key(5), 8))

    np.testing.assert_allclose(loss("x", 0.1), 100 * loss("x", 1.0), rtol=1e-5)
    np.testing.assert_allclose(loss("v", 0.1), loss("v", 1.0), rtol=1e-5)


def test_small_text_dropout_takes_the_share_it_is_told_of_each_text(parts):
    """The video's text and those of the images packed behind it are drawn independently."""
    config, batch, _ = parts

    @jax.jit
    def mask_of(key):
        seen = []

        class Recorder:
            def apply(self, variables, z, logsnr, text, mask, *, num_images):
                seen.append(mask)
                return jnp.zeros(z.shape)

        batch_loss(config, Recorder(), {}, batch, draws(key, 8))
        return seen[0]

    masks = np.concatenate([mask_of(jax.random.key(i)) for i in range(60)])
    dropped = ~masks.any(-1)
    assert dropped.shape == (480, 3)
    for share in dropped.mean(0):
        assert 0.045 < share < 0.155  # 480 draws at 10%: four standard deviations are 5.5%
    both = (dropped[:, 0] & dropped[:, 1]).mean()
    assert both < 0.03  # 1% of independent draws, 10% of one draw for both


class Linear:
    """In the network's place, where any will do that shows every input: a sum of them, each times a number."""

    names = ("z", "logsnr", "mask", "cond", "aug_logsnr")

    def apply(self, variables, z, logsnr, text, mask, *, num_images, cond=0.0, aug_logsnr=0.0):
        def of_samples(x):
            return jnp.asarray(x).reshape(-1, 1, 1, 1, 1)

        kept = mask.any(-1).astype(jnp.float32)  # [B, 1 + K], or [B] without images
        kept = kept if kept.ndim == 1 else kept @ jnp.arange(1.0, kept.shape[1] + 1)
        inputs = (z, of_samples(logsnr), of_samples(kept), cond, of_samples(aug_logsnr))
        return sum(variables["params"][name] * x for name, x in zip(self.names, inputs, strict=True))


@pytest.fixture
def linear(monkeypatch):
    """(config, batch) of a stage with every input, whose network is `Linear`."""
    monkeypatch.setattr(stages, "build_model", lambda _: Linear())
    config = tsr1.get_config("small")
    config.train.warmup, config.train.decay, config.train.steps = 4, "cosine", 12
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape).astype(s.dtype)), batch_shapes(config))
    return config, batch


def linear_params():
    return {name: jnp.float32(0.1 * i) for i, name in enumerate(Linear.names, 1)}


def test_parts_of_a_batch_have_the_gradient_of_the_whole(linear):
    """Levels, noise, dropped texts and augmentation of a sample do not depend on `accumulate`."""
    config, batch = linear
    config.train.text_dropout, config.train.clip = 0.4, 1e9
    found = {}
    for parts in (1, 2, 4):
        config.train.accumulate = parts
        state, metrics = run_step(config, batch, state_of(config, linear_params()), data=1)
        found[parts] = (metrics["loss"], optax.tree_utils.tree_get(state.opt_state, "mu"))
    for parts in (2, 4):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found[parts], found[1])
    assert all(np.abs(moment) > 1e-4 for moment in found[1][1].values())


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_small_applied_learning_rate_is_the_logged_one_after_skipped_updates(linear, optimizer):
    """Of both optimizers a first update is the rate itself. It follows the step, and a cosine reaches its end."""
    config, batch = linear
    config.train.optimizer, config.train.clip = optimizer, 1e9
    broken = {**batch, "video": batch["video"].at[0].set(jnp.nan)}
    step, rate = jax.jit(make_train_step(config)), learning_rate(config)

    def moved(state):
        new, metrics = step(state, batch)
        return abs(float(new.params["z"] - state.params["z"])), float(metrics["learning_rate"])

    state = init_state(config, linear_params())
    for number in range(12):
        applied, logged = moved(state)
        np.testing.assert_allclose(logged, rate(number), rtol=1e-6)
        np.testing.assert_allclose(applied, logged, rtol=1e-3, atol=1e-7)
        state, _ = step(state, broken)
    assert (int(state.step), int(state.skipped)) == (12, 12)
    assert moved(state)[0] < 1e-8
    if optimizer == "adam":  # the moments' bias correction counts what was applied
        assert int(state.opt_state[1][0].count) == 0


def test_small_first_state_can_be_donated():
    """Each leaf is an array of its own, also where the state was made without jit."""
    state = init_state(small(), linear_params())
    leaves = jax.tree.leaves(state)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    jax.block_until_ready(jax.jit(lambda state: state.replace(step=state.step + 1), donate_argnums=0)(state))


def test_small_ema_and_step_in_closed_form(linear):
    config, batch = linear
    state = state_of(config, linear_params())
    new, _ = run_step(config, batch, state, data=1)
    assert int(new.step) == 1
    decay = 1 / 10  # (1 + 0) / (10 + 0), below the config's
    jax.tree.map(
        lambda e, old, p: np.testing.assert_allclose(e, decay * old + (1 - decay) * p, atol=1e-6),
        new.ema, state.ema, new.params,
    )  # fmt: skip


def test_small_learning_rates():
    constant = learning_rate(small(**{"train.decay": "constant", "train.warmup": 4, "train.learning_rate": 0.1}))
    np.testing.assert_allclose([constant(i) for i in (0, 2, 4, 11)], [0, 0.05, 0.1, 0.1], rtol=1e-6)
    cosine = learning_rate(
        small(**{"train.decay": "cosine", "train.warmup": 4, "train.steps": 12, "train.learning_rate": 0.1})
    )
    np.testing.assert_allclose([cosine(i) for i in (0, 2, 4, 8, 12)], [0, 0.05, 0.1, 0.05, 0], atol=1e-8)


def test_small_gradients_are_clipped_by_their_global_norm():
    """What Adam's first moment holds after one update is a tenth of the clipped gradient."""
    config = small(**{"train.clip": 0.5})
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    optimizer = make_optimizer(config)
    _, state = optimizer.update({"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(moment["a"], [0.1 * 0.5 * 3 / 5, 0], rtol=1e-5)
    np.testing.assert_allclose(moment["b"], [0.1 * 0.5 * 4 / 5], rtol=1e-5)


def test_small_adafactor_holds_no_full_second_moment():
    config = small(**{"train.optimizer": "adafactor"})
    params = {"w": jnp.zeros((256, 512))}
    state = make_optimizer(config).init(params)
    assert max(x.size for x in jax.tree.leaves(state)) <= 512


def test_adafactor_of_the_paper_sized_base_factors_attention():
    """All moments of its 5.5B parameters are 0.13 GB: 22 if they were whole, 7.1 if attention's were."""
    state = state_shapes(base.get_config())
    size = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(state.opt_state))
    assert size / 1e9 == pytest.approx(0.127, rel=0.01)


@pytest.mark.parametrize("name", ["video", "images"])
def test_small_update_that_is_not_finite_is_left_out_and_counted(linear, name):
    config, batch = linear
    state = state_of(config, linear_params())
    broken = {**batch, name: batch[name].at[3].set(jnp.nan)}
    new, metrics = run_step(config, broken, state, data=1)
    assert not np.isfinite(metrics["loss"])
    assert (int(new.step), int(new.skipped), float(metrics["skipped"])) == (1, 1, 1)
    for kind in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, kind), getattr(state, kind))

"""Training: the loss and the step against their formulas, one device against eight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from ivideo import sharding, stages
from ivideo.diffusion import v_target
from ivideo.loop import make_data
from ivideo.text import load_encoder
from ivideo.train import TrainState, batch_loss, embed, learning_rate, make_optimizer, make_train_step


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
    batch |= embed(encoder.module, encoder.params, batch)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: (0.15 * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config))
    return config, batch, state_of(config, params)


def state_of(config, params, step=0):
    return TrainState(jnp.int32(step), params, params, make_optimizer(config).init(params), jnp.int32(0))


def run_step(config, batch, state, **sizes):
    mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    where = sharding.of_params(mesh, state)
    step = jax.jit(make_train_step(config, mesh), out_shardings=(where, sharding.replicated(mesh)))
    names = step_inputs(batch)
    return step(jax.device_put(state, where), jax.device_put(names, sharding.of_batch(mesh, names)))


def step_inputs(batch):
    return {name: value for name, value in batch.items() if "tokens" not in name}


@pytest.fixture(scope="module")
def one_device(parts):
    """What a step on one device returns: state and metrics."""
    return run_step(*parts, data=1)


MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "frames": 2, "height": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_small_one_device_and_eight_agree(parts, one_device, sizes, monkeypatch):
    """The same loss and gradient norm to 1e-5 on any mesh: the noise does not depend on it."""
    monkeypatch.setattr(sharding, "WHOLE", 1)  # else nothing of a network this small is split
    (one, metrics_one), (eight, metrics_eight) = one_device, run_step(*parts, **sizes)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics_eight[name], metrics_one[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.ema, eight.ema)
    split = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(eight.params)]
    assert all(split) == (sizes == {"data": 8})


def test_small_loss_is_the_mean_squared_error_of_v(parts):
    """With the network a constant, the loss is a number that numpy works out from the same noise."""
    config, batch, _ = parts
    key = jax.random.key(5)

    class Constant:
        def apply(self, variables, z, logsnr, text, mask, *, num_images):
            assert num_images == 2
            return jnp.full(z.shape, 0.25)

    value = batch_loss(config, Constant(), {}, batch, key)
    key_time, key_noise, _ = jax.random.split(key, 3)
    video = np.concatenate([batch["video"], batch["images"]], axis=1)
    times = (float(jax.random.uniform(key_time)) + np.arange(8) / 8) % 1.0
    logsnr = np.asarray(stages.logsnr_fn(config)(times))
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr)))[:, None, None, None, None] for s in (-1, 1))
    eps = np.asarray(jax.random.normal(key_noise, video.shape), np.float64)
    np.testing.assert_allclose(value, np.mean((0.25 - (alpha * eps - sigma * video)) ** 2), rtol=1e-5)
    np.testing.assert_allclose(v_target(video, eps, jnp.asarray(logsnr)), alpha * eps - sigma * video, atol=1e-4)


def test_small_loss_of_x_is_in_units_of_the_spread_of_the_data(parts):
    """Else its gradients shrink with the square of `data_std`, to below Adam's epsilon, and little is learned."""
    _, batch, _ = parts

    class Constant:
        def apply(self, variables, z, logsnr, text, mask, *, num_images):
            return jnp.full(z.shape, 0.25)

    def loss(kind, data_std):
        changed = small(**{"diffusion.loss": kind, "model.data_std": data_std})
        return batch_loss(changed, Constant(), {}, batch, jax.random.key(5))

    np.testing.assert_allclose(loss("x", 0.1), 100 * loss("x", 1.0), rtol=1e-5)
    np.testing.assert_allclose(loss("v", 0.1), loss("v", 1.0), rtol=1e-5)


def test_small_text_dropout_takes_the_share_it_is_told(parts):
    config, batch, _ = parts

    @jax.jit
    def mask_of(key):
        seen = []

        class Recorder:
            def apply(self, variables, z, logsnr, text, mask, *, num_images):
                seen.append(mask)
                return jnp.zeros(z.shape)

        batch_loss(config, Recorder(), {}, batch, key)
        return seen[0]

    masks = np.concatenate([mask_of(jax.random.key(i)) for i in range(60)])
    dropped = ~masks.any((1, 2))
    assert 0.05 < dropped.mean() < 0.16  # 480 draws at 10%: four standard deviations are 5.5%
    assert masks[~dropped].any(-1).all()  # a sample keeps all its texts or none


def test_small_accumulation_averages_gradients(parts, monkeypatch):
    """Loss and gradient of a batch in two parts are the means of the parts' own."""
    config, batch, _ = parts
    config = config.copy_and_resolve_references()

    class Scale:
        """In the network's place, where any will do: the noisy video times a number."""

        def apply(self, variables, z, logsnr, text, mask, *, num_images):
            return variables["params"]["scale"] * z

    model, params = Scale(), {"scale": np.float32(0.3)}
    monkeypatch.setattr(stages, "build_model", lambda _: model)
    state = state_of(config, params)
    config.train.accumulate = 2
    config.train.text_dropout = 0.0
    (_, metrics) = run_step(config, batch, state, data=1)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed + 1), 0), 2)
    halves = [jax.tree.map(lambda x, i=i: x[i::2], step_inputs(batch)) for i in range(2)]
    loss = jax.jit(jax.value_and_grad(
        lambda p, half, key: batch_loss(config, model, p, half, key)
    ))  # fmt: skip
    (loss_0, grads_0), (loss_1, grads_1) = (loss(state.params, h, k) for h, k in zip(halves, keys, strict=True))
    np.testing.assert_allclose(metrics["loss"], (loss_0 + loss_1) / 2, rtol=1e-5)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, grads_0, grads_1)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(mean), rtol=1e-4)


def test_small_ema_and_step_in_closed_form(parts, one_device):
    *_, state = parts
    new, _ = one_device
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


@pytest.mark.parametrize("name", ["video", "text"])
def test_small_update_that_is_not_finite_is_left_out_and_counted(parts, name):
    config, batch, state = parts
    broken = {**batch, name: batch[name].at[3].set(jnp.nan)}
    new, metrics = run_step(config, broken, state, data=1)
    assert not np.isfinite(metrics["loss"])
    assert (int(new.step), int(new.skipped), float(metrics["skipped"])) == (1, 1, 1)
    for kind in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, kind), getattr(state, kind))

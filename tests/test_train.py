"""Training: the loss and the step against their formulas, one device against eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from ivideo import sharding, stages
from ivideo.diffusion import v_target
from ivideo.text import load_encoder
from ivideo.train import (
    TrainState,
    batch_loss,
    learning_rate,
    make_data,
    make_optimizer,
    make_train_step,
)


def small(**changes):
    config = base.get_config("small")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def parts():
    """A config, its encoder, a batch with packed images, and a state after the first step, when nothing is zero."""
    config = small()
    encoder = load_encoder(config.text)
    batch = jax.tree.map(jnp.asarray, next(make_data(config, encoder)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: (0.15 * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config))
    state = TrainState(jnp.int32(0), params, params, make_optimizer(config).init(params))
    return config, encoder, batch, state


def run_step(config, encoder, batch, state, devices=1):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    whole, split = sharding.replicated(mesh), sharding.split_batch(mesh)
    step = jax.jit(make_train_step(config, encoder.module), in_shardings=(whole, split, whole), out_shardings=whole)
    return step(*jax.device_put((state, batch, encoder.params), (whole, split, whole)))


@pytest.fixture(scope="module")
def one_device(parts):
    """What a step on one device returns: state and metrics."""
    return run_step(*parts)


def test_small_one_device_and_eight_agree(parts, one_device):
    """The same loss and gradient norm to 1e-5: the noise does not depend on the mesh."""
    (one, metrics_one), (eight, metrics_eight) = one_device, run_step(*parts, devices=8)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics_eight[name], metrics_one[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.ema, eight.ema)


def test_small_loss_is_the_mean_squared_error_of_v(parts):
    """With the network a constant, the loss is a number that numpy works out from the same noise."""
    config, encoder, batch, _ = parts
    key = jax.random.key(5)

    class Constant:
        def apply(self, variables, z, logsnr, text, mask, *, num_images):
            assert num_images == 2
            return jnp.full(z.shape, 0.25)

    value = batch_loss(config, Constant(), encoder.module, {}, encoder.params, batch, key)
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
    _, encoder, batch, _ = parts

    class Constant:
        def apply(self, variables, z, logsnr, text, mask, *, num_images):
            return jnp.full(z.shape, 0.25)

    def loss(kind, data_std):
        changed = small(**{"diffusion.loss": kind, "model.data_std": data_std})
        return batch_loss(changed, Constant(), encoder.module, {}, encoder.params, batch, jax.random.key(5))

    np.testing.assert_allclose(loss("x", 0.1), 100 * loss("x", 1.0), rtol=1e-5)
    np.testing.assert_allclose(loss("v", 0.1), loss("v", 1.0), rtol=1e-5)


def test_small_text_dropout_takes_the_share_it_is_told(parts):
    config, encoder, batch, _ = parts

    @jax.jit
    def mask_of(key):
        seen = []

        class Recorder:
            def apply(self, variables, z, logsnr, text, mask, *, num_images):
                seen.append(mask)
                return jnp.zeros(z.shape)

        batch_loss(config, Recorder(), encoder.module, {}, encoder.params, batch, key)
        return seen[0]

    masks = np.concatenate([mask_of(jax.random.key(i)) for i in range(60)])
    dropped = ~masks.any((1, 2))
    assert 0.05 < dropped.mean() < 0.16  # 480 draws at 10%: four standard deviations are 5.5%
    assert masks[~dropped].any(-1).all()  # a sample keeps all its texts or none


def test_small_accumulation_averages_gradients(parts, monkeypatch):
    """Loss and gradient of a batch in two parts are the means of the parts' own."""
    config, encoder, batch, _ = parts
    config = config.copy_and_resolve_references()

    class Scale:
        """In the network's place, where any will do: the noisy video times a number."""

        def apply(self, variables, z, logsnr, text, mask, *, num_images):
            return variables["params"]["scale"] * z

    model, params = Scale(), {"scale": np.float32(0.3)}
    monkeypatch.setattr(stages, "build_model", lambda _: model)
    state = TrainState(jnp.int32(0), params, params, make_optimizer(config).init(params))
    config.train.accumulate = 2
    config.train.text_dropout = 0.0
    (_, metrics) = run_step(config, encoder, batch, state)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed + 1), 0), 2)
    halves = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch) for i in range(2)]
    loss = jax.jit(jax.value_and_grad(
        lambda p, half, key: batch_loss(config, model, encoder.module, p, encoder.params, half, key)
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

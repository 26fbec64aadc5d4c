"""The training step of a stage: the loss, the gradient, the optimizer and the average. Sections 2.1, 2.4 and 2.6.

B batch · T video frames · K packed images · H, W height, width · L text tokens · D text channels
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivideo import stages
from ivideo.data.video_io import to_float
from ivideo.devices import flops, sharding
from ivideo.diffusion import augment, conditioning, joint, process
from ivideo.errors import UserError
from ivideo.text import encode, from_bits

# The average's decay after n steps is at most (1 + n) / (10 + n): it starts at 0.1 and grows towards config.train.ema
EMA_WARMUP = (1.0, 10.0)
ADAFACTOR_MIN_FACTORED = 128  # Optax's default: Adafactor does not factor smaller dimensions


@flax.struct.dataclass
class TrainState:
    """The state of training or distillation. Random numbers are not part of it: they follow from seed and step."""

    step: jax.Array  # number of steps done, int32 []
    params: dict
    ema: dict  # exponential moving average of the parameters, for sampling; empty in distillation
    opt_state: optax.OptState
    skipped: jax.Array  # number of updates skipped because their gradient was not finite, int32 []


def learning_rate(config) -> optax.Schedule:
    """The schedule, step -> learning rate: linear warm-up, then constant or a cosine decay to zero at the last step."""
    t = config.train
    warmup = min(t.warmup, t.steps - 1)  # the cosine needs at least one step
    if t.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, t.learning_rate, warmup, t.steps)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, t.learning_rate, warmup), optax.constant_schedule(t.learning_rate)], [warmup]
    )


def make_optimizer(config) -> optax.GradientTransformation:
    """Adam or Adafactor, after clipping the gradient's global norm. Call `at_step` on its state before an update."""
    rate = learning_rate(config)
    if config.train.optimizer == "adafactor":
        optimizer = optax.adafactor(
            rate,
            # Updates have the learning rate's scale already
            multiply_by_parameter_scale=False,
            # So that attention's kernels [blocks, C, heads, head_dim] are factored over their two largest dimensions,
            # which Optax's default of 128 would not do
            min_dim_size_to_factor=min(ADAFACTOR_MIN_FACTORED, config.model.head_dim),
        )
    else:
        optimizer = optax.adam(rate)
    return optax.chain(optax.clip_by_global_norm(config.train.clip), optimizer)


def at_step(opt_state, step):
    """The optimizer's state, with the count of its learning rate schedule set to `step`.

    Optax counts applied updates. That is correct for the bias correction of the moments. But the schedule must also
    advance at skipped updates. Otherwise the applied rate would differ from the logged one, and the schedule would
    never reach its end.
    """

    def of_schedule(path, _):
        return path[-1].tuple_name == optax.ScaleByScheduleState.__name__

    return optax.tree_utils.tree_set(opt_state, of_schedule, count=step)


def init_state(config, params=None) -> TrainState:
    """The state before the first step, with the given parameters or with random ones from `config.seed`."""
    if params is None:
        params = stages.init_params(config, jax.random.key(config.seed))
    opt_state = make_optimizer(config).init(params)
    # Every leaf is a separate array, because an array cannot be donated twice
    step, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
    return TrainState(step, params, jax.tree.map(jnp.copy, params), opt_state, skipped)


def prepare(text_module, text_params, batch, mesh=None):
    """A batch as the step takes it (`batch_shapes`), from a batch of the pipeline that is on the devices.

    Video and images, uint8 from the pipeline, become float32 in [-1, 1]: so a quarter of the bytes is moved to the
    devices. Texts become embeddings of the frozen encoder: `text` [B, L, D], and with images `image_text` [B, K, L, D].
    Without an encoder, the batch has embeddings from a cache.

    This is a separate program before the step, because the encoder is larger than most stages and is not trained.
    """
    kept = ("token_mask", "image_token_mask")
    out = {name: batch[name] for name in kept if name in batch}
    with sharding.layout(mesh):
        for name in ("video", "images"):
            if name in batch:
                out[name] = sharding.constrain(to_float(batch[name]), *sharding.VIDEO)
        if text_module is None:
            return out | {name: from_bits(batch[name]) for name in ("text", "image_text") if name in batch}
        out["text"] = encode(text_module, text_params, batch["tokens"], batch["token_mask"])
        if "image_tokens" in batch:
            out["image_text"] = encode(text_module, text_params, batch["image_tokens"], batch["image_token_mask"])
    return out


def check_batch(config, mesh) -> None:
    """UserError if a batch cannot be split over the mesh, or over the processes of its devices."""
    parts, size = sharding.batch_parts(mesh), config.train.batch_size
    if size % (parts * config.train.accumulate):
        raise UserError(
            f"config.train.batch_size = {size} cannot be split over {parts} devices "
            f"in config.train.accumulate = {config.train.accumulate} parts: choose a "
            f"multiple of {parts * config.train.accumulate} (config.train.mesh.data × fsdp × accumulate)"
        )
    sharding.process_parts(mesh)


def batch_shapes(config) -> dict:
    """Shapes of a batch of the training step, over all processes."""
    size, images, text = config.train.batch_size, config.data.num_images, config.text
    frames, *pixels = stages.training_shape(config)

    def arrays(name, *lead):
        mask = "token_mask" if name == "text" else "image_token_mask"
        return {
            name: jax.ShapeDtypeStruct((*lead, text.length, text.dim), jnp.float32),
            mask: jax.ShapeDtypeStruct((*lead, text.length), bool),
        }

    shapes = {"video": jax.ShapeDtypeStruct((size, frames, *pixels), jnp.float32), **arrays("text", size)}
    if images:
        shapes["images"] = jax.ShapeDtypeStruct((size, images, *pixels), jnp.float32)
        shapes |= arrays("image_text", size, images)
    return shapes


def state_shapes(config) -> TrainState:
    """Shapes of the training state. Nothing is allocated."""
    return jax.eval_shape(lambda params: init_state(config, params), stages.param_shapes(config))


def model_flops(config) -> int:
    """The model's FLOPs per training step over all devices, without those of rematerialization."""
    plain = config.copy_and_resolve_references()
    plain.model.remat = "none"
    return flops.count(make_train_step(plain), state_shapes(plain), batch_shapes(plain))


def draws(key, count: int) -> dict:
    """The random numbers of a batch: per sample its `time`, and a `key` for everything else, both [count].

    Each time is t ~ U(0, 1), and the times are spread evenly over the batch (arXiv 2107.00630, Appendix I). They do not
    depend on how the batch is split into parts.
    """
    key_time, key_samples = jax.random.split(key)
    time = (jax.random.uniform(key_time) + jnp.arange(count) / count) % 1.0
    return {"time": time, "key": jax.random.split(key_samples, count)}


class Example(NamedTuple):
    """The inputs of a network in training: a batch of the pipeline with its random numbers, except the times."""

    video: jax.Array  # [B, T + K, H, W, 3], packed with its images
    eps: jax.Array  # noise, the same shape
    text: jax.Array  # [B, (1 + K,) L, D]
    mask: jax.Array  # [B, (1 + K,) L], all False for a dropped text
    given: dict  # the network's other arguments: num_images; for super-resolution cond, aug_logsnr
    weights: np.ndarray | None  # weights of the frames in the loss, [T + K]


def sample_keys(keys):
    """The keys [B] of the samples' noise, dropped texts and conditioning, from the samples' own keys [B]."""
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)


def example(config, batch, keys) -> Example:
    """The network's inputs from a batch with embedded texts (`prepare`). `keys` [B]: one per sample (`draws`).

    Each text is dropped with the same probability. The texts of a video and of its packed images are dropped
    independently (Section 2.6.1).
    """
    key_noise, key_text, key_cond = sample_keys(keys)
    video, text, mask = batch["video"], batch["text"], batch["token_mask"]
    weights = None
    images = batch.get("images")
    num_images = 0 if images is None else images.shape[1]
    if num_images:
        weights = joint.frame_weights(video.shape[1], num_images, config.train.image_weight)
        video = joint.pack(video, images)
        text, mask = joint.pack_text(text, mask, batch["image_text"], batch["image_token_mask"])

    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - config.train.text_dropout, mask.shape[1:-1]))(key_text)
    mask = mask & keep[..., None]
    video = sharding.constrain(video, *sharding.VIDEO)
    eps = jax.vmap(lambda key: jax.random.normal(key, video.shape[1:]))(key_noise)
    eps = sharding.constrain(eps, *sharding.VIDEO)
    given = {"num_images": num_images}
    if config.cond.frames:
        given |= conditioning_inputs(config, batch, key_cond)
    return Example(video, eps, text, mask, given, weights)


def batch_loss(config, model, params, batch, drawn):
    """The mean denoising loss of a batch (see `example`), a float32 number. `drawn`: its random numbers (`draws`)."""
    logsnr = stages.logsnr_fn(config)(drawn["time"])
    video, eps, text, mask, given, weights = example(config, batch, drawn["key"])
    v_fn = stages.denoiser(model, params, text, mask, **given)
    loss = process.training_loss(v_fn, video, eps, logsnr, kind=config.diffusion.loss, weights=weights)
    return mean_loss(config, loss, kind=config.diffusion.loss)


def mean_loss(config, losses, *, kind: str):
    """The mean of losses [B]. The loss of x is divided by the data's variance.

    Otherwise its gradients would shrink with that variance, to below Adam's epsilon.
    """
    loss = losses.mean()
    return loss / config.model.data_std**2 if kind == "x" else loss


def conditioning_inputs(config, batch, keys):
    """The conditioning of a super-resolution stage in training: the batch's own clips, downsampled and with noise.

    Each clip has one random noise level (Section 2.5), and one random blur if the config sets it. A packed image is
    conditioned on itself, with the level and blur of its clip. `keys` [B]: one per sample. Returns the network's `cond`
    [B, T + K, H, W, C] and `aug_logsnr` [B].
    """
    split = jax.vmap(lambda key: jax.random.split(key, 4))(keys)
    key_level, key_video, key_images, key_blur = jnp.moveaxis(split, 1, 0)
    sizes = stages.factors(config)
    level_range = {"logsnr_min": config.train.augmentation_min, "logsnr_max": config.diffusion.logsnr_max}
    level = jax.vmap(lambda key: augment.random_level(key, 1, **level_range)[0])(key_level)
    # Squared, so that sharp clips are common enough for the network to learn to keep them sharp
    deviation = config.train.augmentation_blur * jax.vmap(jax.random.uniform)(key_blur) ** 2

    def downsample(video, time):
        low_res = conditioning.reduce(video, space=sizes["space"], time=time)
        return augment.blur(low_res, deviation) if config.train.augmentation_blur else low_res

    cond = stages.conditioning_video(config, downsample(batch["video"], sizes["time"]), key_video, level)
    if "images" in batch:
        low_res = downsample(batch["images"], 1)
        cond = joint.pack(cond, stages.conditioning_video(config, low_res, key_images, level, time=1))
    return {"cond": cond, "aug_logsnr": level}


def make_train_step(config, mesh=None):
    """The pure step (state, batch) -> (state, metrics), to be jitted with the state donated.

    `mesh`: the mesh for the layouts of activations (`sharding.constrain`). See `updated` for skipped updates.
    """
    model, optimizer, rate = stages.build_model(config), make_optimizer(config), learning_rate(config)

    def train_step(state: TrainState, batch):
        with sharding.layout(mesh):
            drawn = draws(step_key(config, state.step), batch["video"].shape[0])
            found = mean_gradient(
                lambda params, *part: batch_loss(config, model, params, *part),
                state.params,
                (batch, drawn),
                parts=config.train.accumulate,
            )

            def update(grads, state):
                updates, opt_state = optimizer.update(grads, at_step(state.opt_state, state.step), state.params)
                params = optax.apply_updates(state.params, updates)
                # Without a warm-up, the average would consist of the initial parameters for thousands of steps
                first, second = EMA_WARMUP
                decay = jnp.minimum(config.train.ema, (first + state.step) / (second + state.step))
                ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
                return state.replace(params=params, ema=ema, opt_state=opt_state)

            return updated(state, *found, update, rate(state.step))

    return train_step


def step_key(config, step):
    """The random key of a step. It depends only on the seed and the step."""
    return jax.random.fold_in(jax.random.key(config.seed + 1), step)


def updated(state: TrainState, loss, grads, update, rate):
    """The state after a step, and the step's metrics. `update`: (gradients, state) -> state with the update applied.

    An update whose loss or gradient is not finite is skipped, and counted in `skipped`. The step still counts: the next
    step uses other data, and the learning rate `rate` advances.
    """
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    skipped = state.skipped + ~finite
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(grads, state), state)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "skipped": skipped}
    return new.replace(step=state.step + 1, skipped=skipped), metrics


def mean_gradient(loss_fn, params, whole, *, parts: int):
    """The loss of a batch and its gradient, as the mean over `parts` equal parts that are computed one after another.

    `loss_fn`: (params, *part) -> number. `whole`: a tuple of trees of arrays [B, ...].
    """

    def loss_and_grads(part):
        return jax.value_and_grad(lambda params: loss_fn(params, *part))(params)

    if parts == 1:
        return loss_and_grads(whole)
    # Part i has the samples i, i + parts, …: each device keeps its samples, and a part's times are spread evenly too
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), whole)

    def add(total, part):
        return jax.tree.map(jnp.add, total, loss_and_grads(part)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    total, _ = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda x: x / parts, total)

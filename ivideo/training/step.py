"""The training step of one stage, a pure function. Sections 2.1, 2.4 and 2.6.

B batch · T video frames · K packed images · H, W height, width · L text tokens · D text channels
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivideo import stages
from ivideo.devices import flops, sharding
from ivideo.diffusion import augment, conditioning, joint, process
from ivideo.errors import UserError
from ivideo.text import encode, from_bits


@flax.struct.dataclass
class TrainState:
    """All that training changes, or distillation. Randomness is not here: it follows from the seed and the step."""

    step: jax.Array  # updates done, int32 []
    params: dict
    ema: dict  # the parameters' exponential moving average, what sampling uses; empty in distillation
    opt_state: optax.OptState
    skipped: jax.Array  # updates left out since their gradient was not finite, int32 []


def learning_rate(config) -> optax.Schedule:
    """Step -> rate: linear warm-up, then constant or a cosine to zero at the last step."""
    t = config.train
    warmup = min(t.warmup, t.steps - 1)  # a cosine needs a step of its own
    if t.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, t.learning_rate, warmup, t.steps)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, t.learning_rate, warmup), optax.constant_schedule(t.learning_rate)], [warmup]
    )


def make_optimizer(config) -> optax.GradientTransformation:
    """Adam or Adafactor behind a clip of the gradient's global norm. Its schedule needs `at_step` before an update."""
    rate = learning_rate(config)
    if config.train.optimizer == "adafactor":
        optimizer = optax.adafactor(
            rate,
            # Updates here are already of the learning rate's scale: no second scaling by the parameters' size
            multiply_by_parameter_scale=False,
            # Factors a kernel [blocks, C, heads, head_dim] of attention over its two largest dimensions, one matrix a
            # head. Optax's default of 128 would keep its second moments whole.
            min_dim_size_to_factor=min(128, config.model.head_dim),
        )
    else:
        optimizer = optax.adam(rate)
    return optax.chain(optax.clip_by_global_norm(config.train.clip), optimizer)


def at_step(opt_state, step):
    """The optimizer's state with the schedule's count at the training's step.

    Optax counts the updates that were applied. That is right for the moments' bias correction, but a schedule that
    stood still at each update that is left out would apply another rate than is logged, and never reach its end.
    """

    def of_schedule(path, _):
        return path[-1].tuple_name == optax.ScaleByScheduleState.__name__

    return optax.tree_utils.tree_set(opt_state, of_schedule, count=step)


def init_state(config, params=None) -> TrainState:
    """The state before the first step: of the parameters given, or of those that `config.seed` draws."""
    if params is None:
        params = stages.init_params(config, jax.random.key(config.seed))
    opt_state = make_optimizer(config).init(params)
    # Every leaf is an array of its own: an array that is there twice cannot be donated
    step, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
    return TrainState(step, params, jax.tree.map(jnp.copy, params), opt_state, skipped)


def embed(text_module, text_params, batch, mesh=None):
    """What the frozen encoder makes of a batch's tokens: `text` [B, L, D], and `image_text` [B, K, L, D] of images.

    A program of its own, before the step: the encoder is larger than most stages and is not trained with them. Without
    one, the batch has `text` from a cache.
    """
    if text_module is None:
        return {name: from_bits(batch[name]) for name in ("text", "image_text") if name in batch}
    with sharding.layout(mesh):
        texts = {"text": encode(text_module, text_params, batch["tokens"], batch["token_mask"])}
        if "image_tokens" in batch:
            texts["image_text"] = encode(text_module, text_params, batch["image_tokens"], batch["image_token_mask"])
        return texts


def check_batch(config, mesh) -> None:
    """UserError where a batch cannot be split over the mesh, or over the processes that its devices are of."""
    parts, size = sharding.batch_parts(mesh), config.train.batch_size
    if size % (parts * config.train.accumulate):
        raise UserError(
            f"config.train.batch_size = {size} in config.train.accumulate = {config.train.accumulate} parts over "
            f"{parts} devices (config.train.mesh.data × fsdp): choose a multiple of {parts * config.train.accumulate}"
        )
    sharding.process_parts(mesh)


def batch_shapes(config) -> dict:
    """Shapes of a batch as the training step takes it, over all processes."""
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
    """Shapes of the training state; nothing is allocated."""
    return jax.eval_shape(lambda: init_state(config))


def model_flops(config) -> int:
    """The model's FLOPs of a training step over all devices, without those that rematerialisation does again."""
    plain = config.copy_and_resolve_references()
    plain.model.remat = "none"
    return flops.count(make_train_step(plain), state_shapes(plain), batch_shapes(plain))


def draws(key, count: int) -> dict:
    """What is random of each of a batch's samples: its `time` [count] and a `key` [count] for all else.

    Times are t ~ U(0, 1) each, spread evenly over the batch (arXiv 2107.00630, Appendix I). A sample's draws do not
    depend on the parts that a batch is split into.
    """
    key_time, key_samples = jax.random.split(key)
    time = (jax.random.uniform(key_time) + jnp.arange(count) / count) % 1.0
    return {"time": time, "key": jax.random.split(key_samples, count)}


class Example(NamedTuple):
    """What a network is trained on: a batch as the pipeline makes it with all that is random of it, but the times."""

    video: jax.Array  # [B, T + K, H, W, 3], packed with its images
    eps: jax.Array  # noise, the same shape
    text: jax.Array  # [B, (1 + K,) L, D]
    mask: jax.Array  # [B, (1 + K,) L], all False for a text that was left out
    given: dict  # the network's other arguments by name: num_images, and of super-resolution cond, aug_logsnr
    weights: np.ndarray | None  # of the frames in the loss, [T + K]


def example(config, batch, keys) -> Example:
    """A batch with its texts embedded (`embed`), ready for the network. `keys` [B]: one per sample, see `draws`.

    Each text is left out with the same chance, a video's and those of the images packed behind it independently of one
    another (Section 2.6.1).
    """
    key_noise, key_text, key_cond = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
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
    """The mean denoising loss of a batch (see `example`), a float32 number. `drawn`: what is random of it (`draws`)."""
    logsnr = stages.logsnr_fn(config)(drawn["time"])
    video, eps, text, mask, given, weights = example(config, batch, drawn["key"])
    v_fn = stages.denoiser(model, params, text, mask, **given)
    loss = process.training_loss(v_fn, video, eps, logsnr, kind=config.diffusion.loss, weights=weights)
    return mean_loss(config, loss, kind=config.diffusion.loss)


def mean_loss(config, losses, *, kind: str):
    """The mean of losses [B] of one kind, that of x in units of the data's spread.

    Else its gradients shrink with the square of the spread, to below Adam's epsilon.
    """
    loss = losses.mean()
    return loss / config.model.data_std**2 if kind == "x" else loss


def conditioning_inputs(config, batch, keys):
    """What a super-resolution stage is given in training: a batch's own clips, reduced, through noise of random levels.

    One level a clip (Section 2.5), and where the config asks one blur; a packed image is conditioned on itself, with
    its clip's level and blur. `keys` [B]: one a sample. Returns the network's `cond` [B, T + K, H, W, C] and
    `aug_logsnr` [B].
    """
    split = jax.vmap(lambda key: jax.random.split(key, 4))(keys)
    key_level, key_video, key_images, key_blur = jnp.moveaxis(split, 1, 0)
    sizes = stages.factors(config)
    ends = {"logsnr_min": config.train.augmentation_min, "logsnr_max": config.diffusion.logsnr_max}
    level = jax.vmap(lambda key: augment.random_level(key, 1, **ends)[0])(key_level)
    # Squared: sharp clips have to be common enough to learn to keep them sharp
    deviation = config.train.augmentation_blur * jax.vmap(jax.random.uniform)(key_blur) ** 2

    def reduced(video, time):
        low = conditioning.reduce(video, space=sizes["space"], time=time)
        return augment.blur(low, deviation) if config.train.augmentation_blur else low

    cond = stages.conditioning_video(config, reduced(batch["video"], sizes["time"]), key_video, level)
    if "images" in batch:
        low = reduced(batch["images"], 1)
        cond = joint.pack(cond, stages.conditioning_video(config, low, key_images, level, time=1))
    return {"cond": cond, "aug_logsnr": level}


def make_train_step(config, mesh=None):
    """The pure step (state, batch) -> (state, metrics), to be jitted with the state donated.

    `mesh`: where activations are laid out, see `sharding.constrain`. See `updated` for updates that are left out.
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
                # The average of the first steps would be of the initial values alone
                decay = jnp.minimum(config.train.ema, (1.0 + state.step) / (10.0 + state.step))
                ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
                return state.replace(params=params, ema=ema, opt_state=opt_state)

            return updated(state, *found, update, rate(state.step))

    return train_step


def step_key(config, step):
    """The key of all that is random of a step: it follows from the seed and the step alone."""
    return jax.random.fold_in(jax.random.key(config.seed + 1), step)


def updated(state: TrainState, loss, grads, update, rate):
    """The state after a step, and the step's metrics. `update`: (gradients, state) -> state with the update applied.

    An update whose loss or gradient is not finite is left out and counted in `skipped`; the step counts nonetheless, so
    that the next one sees other data, and so does the learning rate `rate`, which follows the step.
    """
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    skipped = state.skipped + ~finite
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(grads, state), state)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "skipped": skipped}
    return new.replace(step=state.step + 1, skipped=skipped), metrics


def mean_gradient(loss_fn, params, whole, *, parts: int):
    """The loss of a batch and its gradient, from `parts` equal parts of it one after the other.

    `loss_fn`: (params, *part) -> number. `whole`: a tuple of trees of arrays [B, ...].
    """

    def loss_and_grads(part):
        return jax.value_and_grad(lambda params: loss_fn(params, *part))(params)

    if parts == 1:
        return loss_and_grads(whole)
    # A part takes every parts-th sample: each device then keeps the samples that it has, and the times of a part
    # are spread evenly too
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), whole)

    def add(total, part):
        return jax.tree.map(jnp.add, total, loss_and_grads(part)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    total, _ = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda x: x / parts, total)

"""Training of one stage. Sections 2.1, 2.4 and 2.6.

B batch · T video frames · K packed images · H, W height, width · L text tokens
"""

import json
import logging
import os
import pathlib
import signal
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tensorboardX import SummaryWriter

from ivideo import augment, conditioning, diffusion, joint, sharding, stages
from ivideo.checkpoint import Checkpoints
from ivideo.data.pipeline import make_iterator
from ivideo.data.sources import Crop, make_source
from ivideo.errors import UserError
from ivideo.export import load_params
from ivideo.text import encode, load_encoder
from ivideo.text.tokenizers import byte_tokens

log = logging.getLogger("ivideo")
PREEMPTED = 75  # exit code of a run that was told to stop and saved: run it again (EX_TEMPFAIL)


@flax.struct.dataclass
class TrainState:
    """All that training changes. Randomness is not here: it follows from the seed and the step."""

    step: jax.Array  # updates done, int32 []
    params: dict
    ema: dict  # the parameters' exponential moving average, what sampling uses
    opt_state: optax.OptState


def learning_rate(config) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine to zero at the last step."""
    t = config.train
    warmup = min(t.warmup, t.steps - 1)  # a cosine needs a step of its own
    if t.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, t.learning_rate, warmup, t.steps)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, t.learning_rate, warmup), optax.constant_schedule(t.learning_rate)], [warmup]
    )


def make_optimizer(config) -> optax.GradientTransformation:
    """Adam or Adafactor behind a clip of the gradient's global norm."""
    rate = learning_rate(config)
    if config.train.optimizer == "adafactor":
        # Updates here are already of the learning rate's scale: no second scaling by the parameters' size
        optimizer = optax.adafactor(rate, multiply_by_parameter_scale=False)
    else:
        optimizer = optax.adam(rate)
    return optax.chain(optax.clip_by_global_norm(config.train.clip), optimizer)


def init_state(config, params=None) -> TrainState:
    """The state before the first step: of the parameters given, or of those that `config.seed` draws."""
    if params is None:
        params = stages.init_params(config, jax.random.key(config.seed))
    opt_state = make_optimizer(config).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), opt_state)


def batch_loss(config, model, text_module, params, text_params, batch, key):
    """The mean denoising loss of a batch as the pipeline makes it: a float32 number.

    Every sample has its own noise level, t ~ U(0, 1), spread evenly over the batch (arXiv 2107.00630, Appendix I). Text
    is left out of whole samples (Section 2.6.1).
    """
    key_time, key_noise, key_text, key_cond = jax.random.split(key, 4)
    video = batch["video"]
    text = encode(text_module, text_params, batch["tokens"], batch["token_mask"])
    mask = batch["token_mask"]
    weights = None
    images = batch.get("images")
    num_images = 0 if images is None else images.shape[1]
    if num_images:
        image_mask = batch["image_token_mask"]
        image_text = encode(text_module, text_params, batch["image_tokens"], image_mask)
        weights = joint.frame_weights(video.shape[1], num_images, config.train.image_weight)
        video = joint.pack(video, images)
        text, mask = joint.pack_text(text, mask, image_text, image_mask)

    keep = jax.random.bernoulli(key_text, 1 - config.train.text_dropout, (video.shape[0],))
    mask = mask & keep.reshape(-1, *[1] * (mask.ndim - 1))
    count = video.shape[0]
    times = (jax.random.uniform(key_time) + jnp.arange(count) / count) % 1.0
    logsnr = stages.logsnr_fn(config)(times)
    eps = jax.random.normal(key_noise, video.shape)

    given = {}
    if config.cond.frames:
        given = conditioning_inputs(config, batch, key_cond)

    def v_fn(z, logsnr):
        return model.apply({"params": params}, z, logsnr, text, mask, num_images=num_images, **given)

    loss = diffusion.training_loss(v_fn, video, eps, logsnr, kind=config.diffusion.loss, weights=weights).mean()
    # That of x in units of the data's spread: else gradients shrink with its square, to below Adam's epsilon
    return loss / config.model.data_std**2 if config.diffusion.loss == "x" else loss


def conditioning_inputs(config, batch, key):
    """What a super-resolution stage is given in training: a batch's own clips, reduced, through noise of random levels.

    One level a clip (Section 2.5), and where the config asks one blur; a packed image is conditioned on itself, with
    its clip's level and blur. Returns the network's `cond` [B, T + K, H, W, C] and `aug_logsnr` [B].
    """
    key_level, key_video, key_images, key_blur = jax.random.split(key, 4)
    sizes = stages.factors(config)
    ends = {"logsnr_min": config.train.augmentation_min, "logsnr_max": config.diffusion.logsnr_max}
    count = batch["video"].shape[0]
    level = augment.random_level(key_level, count, **ends)
    # Squared: sharp clips have to be common enough to learn to keep them sharp
    deviation = config.train.augmentation_blur * jax.random.uniform(key_blur, (count,)) ** 2

    def reduced(video, time):
        low = conditioning.reduce(video, space=sizes["space"], time=time)
        return augment.blur(low, deviation) if config.train.augmentation_blur else low

    cond = stages.conditioning_video(config, reduced(batch["video"], sizes["time"]), key_video, level)
    if "images" in batch:
        low = reduced(batch["images"], 1)
        cond = joint.pack(cond, stages.conditioning_video(config, low, key_images, level, time=1))
    return {"cond": cond, "aug_logsnr": level}


def make_train_step(config, text_module):
    """The pure step (state, batch, text_params) -> (state, metrics), to be jitted with the state donated."""
    model, optimizer, rate = stages.build_model(config), make_optimizer(config), learning_rate(config)
    parts = config.train.accumulate

    def train_step(state: TrainState, batch, text_params):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)

        def loss_and_grads(batch, key):
            def loss(params):
                return batch_loss(config, model, text_module, params, text_params, batch, key)

            return jax.value_and_grad(loss)(state.params)

        if parts == 1:
            loss, grads = loss_and_grads(batch, key)
        else:
            split = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)

            def add(total, part):
                return jax.tree.map(jnp.add, total, loss_and_grads(*part)), None

            zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
            total, _ = jax.lax.scan(add, zeros, (split, jax.random.split(key, parts)))
            loss, grads = jax.tree.map(lambda x: x / parts, total)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The average of the first steps would be of the initial values alone
        decay = jnp.minimum(config.train.ema, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), "learning_rate": rate(state.step)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step


def make_data(config, encoder):
    """The endless iterator over this process's part of the stage's batches."""
    frames, height, width, _ = stages.video_shape(config)
    crop = None
    if stages.training_shape(config) != stages.video_shape(config):
        crop = Crop(*stages.training_shape(config)[:3], **stages.factors(config))
    source = make_source(
        config.data.source, frames=frames, height=height, width=width, num_clips=config.data.num_clips,
        data_dir=config.data.dir, split=config.data.split, seed=config.seed, fps=config.video.fps, crop=crop,
    )  # fmt: skip
    return make_iterator(
        source, batch_size=config.train.batch_size, seed=config.seed, num_images=config.data.num_images,
        tokenize=byte_tokens, text_length=encoder.length, num_workers=config.data.workers,
    )  # fmt: skip


def train(config, workdir: str, *, devices=None) -> TrainState:
    """Trains the stage in `workdir` to `config.train.steps`, going on from its newest checkpoint.

    Without a checkpoint it begins with the weights of the file `config.train.start`, or where that is empty with none;
    UserError where they are of another network.
    `devices`: those to use, all unless given. SIGTERM saves and leaves with exit code 75. FloatingPointError at a loss
    or gradient that is not finite: the checkpoints stay as they were.
    """
    stages.check(config)
    encoder = load_encoder(config.text)
    iterator = make_data(config, encoder)
    mesh = sharding.make_mesh(devices)
    if config.train.batch_size % mesh.size:
        raise UserError(
            f"config.train.batch_size = {config.train.batch_size} over {mesh.size} devices: choose a multiple"
        )
    checkpoints = Checkpoints(workdir, keep=config.train.keep)

    whole, split = sharding.replicated(mesh), sharding.split_batch(mesh)
    shapes = jax.eval_shape(lambda: init_state(config))
    restored = checkpoints.restore(
        jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), shapes), iterator
    )
    if restored is None:
        start = load_params(config.train.start, shapes.params) if config.train.start else None
        state = jax.jit(lambda params: init_state(config, params), out_shardings=whole)(start)
    else:
        state = restored[1]
        log.info("going on from step %d of %s", restored[0], workdir)
    text_params = jax.device_put(encoder.params, whole)
    step_fn = jax.jit(
        make_train_step(config, encoder.module),
        donate_argnums=0,
        in_shardings=(whole, split, whole),
        out_shardings=whole,
    )

    stopping = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    reporter = Reporter(config, workdir, start=int(state.step))
    try:
        step = int(state.step)
        pending = []  # metrics of steps not looked at yet: looking waits for the device
        saving = True  # whether the newest step has been saved
        while step < config.train.steps and not stopping:
            state, metrics = step_fn(state, sharding.to_devices(next(iterator), mesh), text_params)
            step += 1
            pending.append(metrics)
            last = step == config.train.steps
            saving = last or step % config.train.checkpoint_every == 0
            if saving or step % config.train.log_every == 0:
                reporter.report(step, [{k: float(v) for k, v in m.items()} for m in pending])
                pending = []
            if saving:
                checkpoints.save(step, state, iterator)
            if config.train.sample_every and (last or step % config.train.sample_every == 0):
                reporter.samples(step, sample_prompts(config, encoder, state.ema))
        if stopping and not saving:
            reporter.report(step, [{k: float(v) for k, v in m.items()} for m in pending])
            checkpoints.save(step, state, iterator)
    finally:
        signal.signal(signal.SIGTERM, previous)
        checkpoints.close()
        reporter.close()
    if stopping:
        log.warning("told to stop: saved step %d in %s; the same command goes on from there", step, workdir)
        sys.exit(PREEMPTED)
    return state


def sample_prompts(config, encoder, params):
    """Videos of the config's sample prompts, [N, T, H, W, 3], as the training stands."""
    tokens, mask = encoder.tokenize(list(config.train.sample_prompts))
    keys = jax.random.split(jax.random.key(config.seed), len(tokens))
    model, text = stages.build_model(config), encoder.encode(tokens, mask)
    return np.asarray(jax.jit(lambda p: stages.sample(config, model, p, text, jnp.asarray(mask), keys))(params))


class Reporter:
    """The progress line, TensorBoard, and metrics.jsonl: a line of JSON for every step, last one counts."""

    def __init__(self, config, workdir: str, *, start: int):
        self._config, self._start, self._began = config, start, None
        self._board = SummaryWriter(os.path.join(workdir, "tensorboard"))
        self._file = open(pathlib.Path(workdir) / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115

    def report(self, step: int, metrics: list[dict]) -> None:
        """Writes the metrics of the steps that end with `step`; FloatingPointError where one is not finite."""
        if not metrics:
            return
        for at, values in enumerate(metrics, step - len(metrics) + 1):
            self._file.write(json.dumps({"step": at, **values}) + "\n")
            for name, value in values.items():
                if not np.isfinite(value):
                    raise FloatingPointError(
                        f"{name} is {value} at step {at} of stage {self._config.stage}: training stops, and the "
                        "checkpoints are from before; lower config.train.learning_rate or look at the data of that step"
                    )
        if self._began is None:  # the first steps carry the compile
            self._began, self._start = time.perf_counter(), step
            speed, eta = "compiled", ""
        else:
            rate = (step - self._start) / (time.perf_counter() - self._began)
            videos = rate * self._config.train.batch_size
            left = (self._config.train.steps - step) / rate
            speed = f"{rate:.3g} steps/s  {videos:.3g} videos/s"
            eta = f"ETA {int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02}"
            self._board.add_scalar("speed/steps_per_second", rate, step)
            self._board.add_scalar("speed/videos_per_second", videos, step)
        mean = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        for name, value in mean.items():
            self._board.add_scalar(f"train/{name}", value, step)
        end = "\r" if sys.stderr.isatty() and step < self._config.train.steps else "\n"
        line = f"{self._config.stage} step {step}/{self._config.train.steps}  loss {mean['loss']:.4f}  {speed}  {eta}"
        print(line.ljust(100), end=end, file=sys.stderr, flush=True)

    def samples(self, step: int, videos) -> None:
        """A grid in TensorBoard: a row a video, its frames from left to right."""
        n, t, h, w, c = videos.shape
        grid = videos.transpose(0, 2, 1, 3, 4).reshape(n * h, t * w, c)
        self._board.add_image("samples", ((grid + 1) * 127.5).astype(np.uint8), step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is not on disk yet."""
        self._board.close()
        self._file.close()

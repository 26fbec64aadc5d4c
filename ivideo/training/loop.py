"""The loop of training and of distillation: data, steps, checkpoints, and what happens when things go wrong.

In the working folder: checkpoints/, digests/ and damaged/ (`ivideo.training.checkpoint`), metrics.jsonl (one line per
step; where a step was done twice, its last line counts), events.jsonl (where the time went, `ivideo.training.goodput`),
tensorboard/, profile/.
"""

import collections
import contextlib
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivideo import checks, stages
from ivideo.data import mixtures
from ivideo.data.pipeline import make_iterator
from ivideo.data.sources import Crop, make_image_source, make_source
from ivideo.devices import agreeing, hosts, sharding
from ivideo.errors import UserError
from ivideo.recipe import save_run_config
from ivideo.text import load_encoder
from ivideo.text.cache import TextCache
from ivideo.training import lock, students, trained
from ivideo.training.checkpoint import Checkpoints, check_workdir
from ivideo.training.guards import PREEMPTED, Profiler, StopSignals, Watchdog
from ivideo.training.report import Reporter, learning_rate_key
from ivideo.training.step import (
    TrainState,
    check_batch,
    init_state,
    make_train_step,
    model_flops,
    prepare,
    state_shapes,
)
from ivideo.weights import load_params

log = logging.getLogger("ivideo")

RECENT_REPORTS = 50  # a loss is compared with the median of this many reports before it
MIN_REPORTS = 10  # with fewer reports before it, no loss counts as a spike


# From a step and the averaged parameters to measures by name (config.train.evaluate_every)
Evaluate = Callable[[int, Any], dict[str, float]]


class Training:
    """The task of training a stage.

    A task is all that differs between training and distillation: the state, how it starts, and the step. `run` does the
    rest. Each phase of a distillation is a task with the same attributes and methods. All processes call the methods in
    the same order.
    """

    def __init__(self, config, mesh, encoder, evaluate: Evaluate | None = None):
        self.config, self.mesh, self.encoder, self.evaluate = config, mesh, encoder, evaluate
        self.name = config.stage  # the name in the progress line
        # Steps between calls of `inspect`, 0 for none
        self.inspect_every = math.gcd(config.train.sample_every, config.train.evaluate_every if evaluate else 0)

    def shapes(self) -> TrainState:
        """Returns the shapes of the state. Nothing is allocated."""
        return state_shapes(self.config)

    def initial_state(self, shardings) -> TrainState:
        """Returns the state of step 0, with these shardings."""
        path = self.config.train.start
        start = sharding.from_host(load_params(path, self.shapes().params), shardings.params) if path else None
        return jax.jit(lambda params: init_state(self.config, params), out_shardings=shardings)(start)

    def compile_step(self, shardings):
        """Returns the step, a jitted function (state, batch) -> (state, metrics). It donates the state.

        `shardings`: the state's.
        """
        results = (shardings, sharding.replicated(self.mesh))
        return jax.jit(make_train_step(self.config, self.mesh), donate_argnums=0, out_shardings=results)

    def flops(self) -> int:
        """Returns the model's FLOPs per step over all devices."""
        return model_flops(self.config)

    def already_finished(self) -> None:
        """Called if the newest checkpoint is that of the last step, so that no step is left to do."""
        log.warning("nothing to do: config.train.steps = %d are done; a larger number goes on", self.config.train.steps)

    def inspect(self, step: int, state: TrainState, reporter: Reporter) -> None:
        """Reports the quality of the state, every `inspect_every` steps and after the last one."""
        t = self.config.train
        if t.sample_every and (step == t.steps or step % t.sample_every == 0):
            reporter.samples(step, lambda: sample_prompts(self.config, self.encoder, state.ema))
        if self.evaluate and (step == t.steps or step % t.evaluate_every == 0):
            reporter.measured(step, self.evaluate(step, state.ema), "")


class RunContext(NamedTuple):
    """What a run needs besides its task."""

    mesh: jax.sharding.Mesh
    encoder: object  # the text encoder, or a cache of its embeddings
    prepare_batch: Callable  # makes the step's batch from a batch of the iterator that is on the devices
    iterator: object  # over this process's part of each batch
    stop_signals: StopSignals


def train(
    config,
    workdir: str,
    *,
    devices=None,
    profile_steps: tuple[int, int] | None = None,
    evaluate: Evaluate | None = None,
) -> TrainState:
    """Trains the stage up to step `config.train.steps`, from the newest checkpoint in `workdir`.

    Returns the last state. Without a checkpoint, the parameters are read from the file `config.train.start`, or
    initialised if that is empty.
    `devices`: the devices to use, all by default. `profile_steps`: the first and last step to profile.
    `evaluate`: measures the averaged parameters every `config.train.evaluate_every` steps and after the last one.
    UserError if the file's weights are those of another network, or if the mesh does not fit the devices or the batch.
    See `prepared` for several processes, and `run` for the ways in which a run ends.
    """
    checks.check(config)
    if config.train.warmup >= config.train.steps:
        log.warning(
            "config.train.warmup = %d is not below config.train.steps = %d: the learning rate rises over the first %d",
            config.train.warmup, config.train.steps, config.train.steps - 1,
        )  # fmt: skip
    check_workdir(workdir)
    if students.is_distillation(workdir):
        raise UserError(f"--workdir={workdir} is the folder of a distillation: give another one for a training run")
    mesh = sharding.make_mesh(config.train.mesh, devices)
    check_batch(config, mesh)
    if config.train.start:
        trained.check_start(config)
    with prepared(config, workdir, mesh) as context:
        save_run_config(config, workdir)
        state = run(Training(config, mesh, context.encoder, evaluate), workdir, context, profile_steps=profile_steps)
    exit_if_stopped(config, state, workdir)
    return state


@contextlib.contextmanager
def prepared(config, workdir: str, mesh):
    """Yields the `RunContext` for runs in `workdir`, and locks the folder for the block.

    All processes of `jax.distributed` call this together. An error in one of them ends all of them, see
    `hosts.exiting_together`. UserError, before anything is written, if the texts or the data cannot be read, if they
    differ between processes, or if another run uses the folder.
    """
    with StopSignals() as stop_signals, hosts.exiting_together():
        encoder = load_texts(config, mesh)
        if config.train.sample_every:
            encoder.tokenize(list(config.train.sample_prompts))  # fails if a cache of embeddings lacks a prompt
        agreeing.agree(lambda: _inputs(config, encoder))
        iterator = make_process_data(config, encoder, mesh)
        agreeing.check_shared(workdir)
        with lock.held(workdir, first=jax.process_index() == 0):
            yield RunContext(mesh, encoder, _batch_preparer(encoder, mesh), iterator, stop_signals)


def _batch_preparer(encoder, mesh):
    program = jax.jit(lambda params, batch: prepare(encoder.module, params, batch, mesh))
    return lambda batch: program(encoder.params, batch)


def exit_if_stopped(config, state: TrainState, workdir: str) -> None:
    """Exits with code 75 if the run stopped before its last step."""
    if (step := int(state.step)) < config.train.steps:
        log.warning("stopped at step %d: the same command goes on from the newest checkpoint in %s", step, workdir)
        sys.exit(PREEMPTED)


def run(task, workdir: str, context: RunContext, *, profile_steps: tuple[int, int] | None = None) -> TrainState:
    """Runs a task from the newest checkpoint up to step `config.train.steps`, and returns the last state.

    If the run receives a signal to stop (`StopSignals`) or loses a data worker, it saves the state and returns early.
    If a step hangs, the process exits with code 76. If another process is lost, it exits with code 77.
    FloatingPointError if more than `config.train.max_skipped` updates were skipped, because they were not finite, or if
    the loss spiked more than `config.train.max_rollbacks` times. The finished checkpoints stay.
    """
    config, (mesh, encoder, prepare_batch, iterator, stop_signals) = task.config, context
    checkpoints = Checkpoints(workdir, keep=config.train.keep)
    reporter, step = Reporter(config, workdir, mesh, name=task.name, flops=task.flops), 0
    reporter.event("start", step=0, processes=jax.process_count(), devices=mesh.size)
    try:
        shapes = task.shapes()
        where = sharding.param_shardings(mesh, shapes)
        like = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
        began = time.perf_counter()
        restored = checkpoints.restore(like, iterator)
        agreeing.agree(lambda: {"the newest checkpoint": restored and restored[0]})
        if restored is None:
            state = task.initial_state(where)
        else:
            state = restored[1]
            reporter.event("restored", step=restored[0], seconds=time.perf_counter() - began)
            log.info("going on from step %d of %s", restored[0], workdir)
            if restored[0] >= config.train.steps:
                task.already_finished()

        step_fn = task.compile_step(where)

        step = int(state.step)
        reporter.begin(step)
        recent = collections.deque(maxlen=RECENT_REPORTS)  # the mean losses of the last reports
        rollbacks = 0
        saving = True  # whether the newest step is one that is saved
        pending = []  # metrics that are not read yet, because reading them waits for the device
        with Watchdog(config.train.hang_seconds) as watchdog, Profiler(workdir, profile_steps) as profiler:
            while step < config.train.steps and not stop_signals.should_stop():
                profiler.before(step + 1)
                waiting = time.perf_counter()
                try:
                    batch = sharding.to_devices(next(iterator), mesh)
                except Exception as e:
                    # A terminal and a batch system send the signal to the data workers, too
                    if stop_signals.requested:
                        break
                    if not hosts.is_killed_worker(e):
                        raise
                    log.warning("%s The run saves and stops", e)
                    if jax.process_count() == 1:
                        break
                    # The other processes wait for this one in their step. It goes on with new workers until all stop
                    position = iterator.get_state()
                    iterator = make_process_data(config, encoder, mesh)
                    iterator.set_state(position)
                    stop_signals.request_stop()
                    batch = sharding.to_devices(next(iterator), mesh)
                reporter.waited(time.perf_counter() - waiting)
                state, metrics = step_fn(state, prepare_batch(batch))
                step += 1
                pending.append(metrics)
                # The device computes at most one step while the next one is prepared
                jax.block_until_ready(pending[-2:][0])
                watchdog.beat()
                profiler.after(step, metrics)
                reporter.stepped(step, metrics)
                last = step == config.train.steps
                saving = last or step % config.train.checkpoint_every == 0
                if saving or step % config.train.log_every == 0:
                    checkpoints.check()
                    loss = reporter.report(step, _numbers(pending))
                    pending = []
                    if _spiked(config, loss, recent):
                        rollbacks += 1
                        back = _roll_back(config, checkpoints, like, step, rollbacks)
                        if back is not None:
                            reporter.event("rollback", step=step, to=back[0])
                            checkpoints.keep_position(back[0], iterator)
                            (step, state), saving = back, True
                            reporter.back_at(step)
                            continue
                    if np.isfinite(loss):  # it is not if every update was skipped
                        recent.append(loss)
                if saving:
                    reporter.saved(step, lambda: checkpoints.save(step, state, iterator))  # noqa: B023 - called at once
                    watchdog.beat()
                if task.inspect_every and (last or step % task.inspect_every == 0):
                    began = time.perf_counter()
                    task.inspect(step, state, reporter)
                    reporter.go_on(step, excluded=time.perf_counter() - began)
                    watchdog.beat()
            if not saving:
                reporter.report(step, _numbers(pending))
                reporter.saved(step, lambda: checkpoints.save(step, state, iterator))
            checkpoints.close()
    except BaseException as e:
        reporter.event("end", step=step, reason=f"failed: {type(e).__name__}")
        hosts.close_checkpoints(checkpoints, e)
        raise
    finally:
        reporter.close()
    reporter.event("end", step=step, reason="finished" if step >= config.train.steps else "preempted")
    return state


def _inputs(config, encoder) -> dict:
    """Identities of the inputs, besides the config, that must be the same in all processes."""
    return {
        "the text encoder": encoder.fingerprint,
        "the data set": _digest(config.data.dir),
        "the set of images": _digest(config.data.image_dir),
    }


def _digest(sets: str) -> str:
    """Identifies the files of the sets that `config.data.dir` or `config.data.image_dir` names."""
    return ", ".join(map(agreeing.folder_digest, mixtures.folders(sets))) or "none"


def load_texts(config, mesh):
    """The stage's text encoder, or the cache of its embeddings if there is a `config.data.text_cache`."""
    if config.data.text_cache:
        return TextCache.open(config.data.text_cache, config.text)
    return load_encoder(config.text, mesh=mesh)


def make_process_data(config, encoder, mesh):
    """An endless iterator over this process's part of the stage's batches."""
    reader, readers = sharding.process_parts(mesh)
    return make_data(config, encoder, reader=reader, readers=readers)


def make_data(config, encoder, *, reader: int = 0, readers=((0,),)):
    """An endless iterator over the stage's batches, or over one reader's part of them (`make_iterator`)."""
    return make_iterator(
        data_source(config), batch_size=config.train.batch_size, seed=config.seed, num_images=config.data.num_images,
        images=image_source(config), tokenize=encoder.tokenizer, text_length=encoder.length,
        num_workers=config.data.workers,
        reader=reader, readers=readers, max_unreadable=config.data.max_unreadable,
    )  # fmt: skip


def data_source(config):
    """The source of the stage's training clips (`ivideo.data.sources`)."""
    frames, height, width, _ = stages.video_shape(config)
    crop = _crop(config)
    return make_source(
        config.data.source, frames=frames, height=height, width=width, num_clips=config.data.num_clips,
        data_dir=config.data.dir, split=config.data.split, seed=config.seed, fps=config.video.fps, crop=crop,
    )  # fmt: skip


def image_source(config):
    """The images that are packed behind the videos, if the config names sets of them; otherwise they are frames."""
    _, height, width, _ = stages.video_shape(config)
    return make_image_source(config.data.image_dir, config.data.split, height=height, width=width, crop=_crop(config))


def _crop(config) -> Crop | None:
    if stages.training_shape(config) == stages.video_shape(config):
        return None
    factors = stages.factors(config) if config.cond.frames else {}
    return Crop(*stages.training_shape(config)[:3], **factors)


def sample_prompts(config, encoder, params) -> np.ndarray:
    """Videos of the config's sample prompts, [N,T,H,W,3], sampled with `params`."""
    tokens, mask = encoder.tokenize(list(config.train.sample_prompts))
    model, text = stages.build_model(config), sharding.to_host(encoder.encode(tokens, mask))

    def sample(params):
        keys = jax.random.split(jax.random.key(config.seed), len(tokens))
        return stages.sample(config, model, params, jnp.asarray(text), jnp.asarray(mask), keys)

    mesh = jax.tree.leaves(params)[0].sharding.mesh
    return np.asarray(jax.jit(sample, out_shardings=sharding.replicated(mesh))(params))


def _numbers(metrics: list[dict]) -> list[dict]:
    return [{name: float(value) for name, value in m.items()} for m in metrics]


def _spiked(config, loss: float, recent) -> bool:
    """Whether a mean loss is far above the median of the recent ones."""
    return len(recent) >= MIN_REPORTS and 0 < config.train.spike < loss / statistics.median(recent)


def _roll_back(config, checkpoints, like, step, rollbacks):
    """Returns the newest checkpoint as (step, state), or None. The data is not rewound, to skip the spike's batches.

    FloatingPointError if this is one rollback too many.
    """
    if rollbacks > config.train.max_rollbacks:
        raise FloatingPointError(
            f"the loss of stage {config.stage} spiked again at step {step}, after {config.train.max_rollbacks} "
            "rollbacks (config.train.max_rollbacks): training stops, and the checkpoints are from before; lower "
            f"{learning_rate_key(config)}"
        )
    checkpoints.finish()
    found = checkpoints.restore(like)
    if found is None:
        log.warning("the loss spiked at step %d, and there is no checkpoint to go back to", step)
    else:
        log.warning("the loss spiked at step %d: back to step %d, with other data", step, found[0])
    return found

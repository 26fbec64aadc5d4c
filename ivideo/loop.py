"""The training loop of one stage: data, steps, checkpoints, and what becomes of a run when things go wrong.

In the working folder: checkpoints/, digests/ and damaged/ (`ivideo.checkpoint`), metrics.jsonl (a line a step; of a
step done twice the last one counts), events.jsonl (where the time went, `ivideo.goodput`), tensorboard/, profile/.
"""

import collections
import faulthandler
import json
import logging
import os
import pathlib
import signal
import statistics
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter

from ivideo import chips, hosts, sharding, stages
from ivideo.checkpoint import Checkpoints, check_workdir
from ivideo.data.pipeline import make_iterator
from ivideo.data.sources import Crop, make_source
from ivideo.export import load_params
from ivideo.text import load_encoder
from ivideo.text.cache import TextCache
from ivideo.train import TrainState, check_batch, embed, init_state, make_train_step, model_flops, state_shapes

log = logging.getLogger("ivideo")

# Exit codes of runs that the same command takes up again, with `hosts.LOST`. 75 is EX_TEMPFAIL
PREEMPTED = 75  # told to stop, and saved
HUNG = 76  # a step took longer than config.train.hang_seconds

TEXTS = ("tokens", "token_mask", "text", "image_tokens", "image_token_mask", "image_text")


def train(config, workdir: str, *, devices=None, profile_steps: tuple[int, int] | None = None) -> TrainState:
    """Trains the stage in `workdir` to `config.train.steps`, going on from its newest checkpoint.

    Without a checkpoint it begins with the weights of the file `config.train.start`, or where that is empty with none;
    UserError where they are of another network, and where the mesh does not fit the devices or the batch.
    `devices`: those to use, all unless given. `profile_steps`: first and last step that the profiler records. All
    processes of `jax.distributed` call this together. A notice to stop (SIGTERM) saves and leaves with exit code 75, a
    step that hangs leaves with 76, the loss of another process with 77. FloatingPointError where more updates than
    `config.train.max_skipped` were not finite, or more than `max_rollbacks` spikes of the loss were taken back: the
    checkpoints stay as they were.
    """
    stages.check(config)
    check_workdir(workdir)
    mesh = sharding.make_mesh(config.train.mesh, devices)
    check_batch(config, mesh)
    with Stopping() as stopping, hosts.leaving_together():
        encoder = load_texts(config, mesh)
        if config.train.sample_every:
            encoder.tokenize(list(config.train.sample_prompts))  # a cache may lack them
        hosts.check_shared(workdir)
        state = _run(config, workdir, mesh, encoder, stopping, profile_steps)
    if (step := int(state.step)) < config.train.steps:
        log.warning("told to stop at step %d: the same command goes on from the newest checkpoint in %s", step, workdir)
        sys.exit(PREEMPTED)
    return state


def _run(config, workdir, mesh, encoder, stopping, profile_steps) -> TrainState:
    """The run from where it stands to its last step, or to the one after which it is told to stop: that is saved."""
    reader, readers = sharding.process_parts(mesh)
    iterator = make_data(config, encoder, reader=reader, readers=readers)
    checkpoints = Checkpoints(workdir, keep=config.train.keep)
    reporter, step = Reporter(config, workdir, mesh), 0
    reporter.event("start", step=0, processes=jax.process_count(), devices=mesh.size)
    try:
        shapes = state_shapes(config)
        where = sharding.of_params(mesh, shapes)
        like = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
        began = time.perf_counter()
        restored = checkpoints.restore(like, iterator)
        if restored is None:
            start = load_params(config.train.start, shapes.params) if config.train.start else None
            state = jax.jit(lambda params: init_state(config, params), out_shardings=where)(start)
        else:
            state = restored[1]
            reporter.event("restored", step=restored[0], seconds=time.perf_counter() - began)
            log.info("going on from step %d of %s", restored[0], workdir)

        embed_fn = jax.jit(lambda params, tokens: embed(encoder.module, params, tokens, mesh))
        results = (where, sharding.replicated(mesh))
        step_fn = jax.jit(make_train_step(config, mesh), donate_argnums=0, out_shardings=results)

        step = int(state.step)
        reporter.begin(step)
        recent = collections.deque(maxlen=50)  # mean losses of the last reports
        rollbacks = 0
        saving = True  # whether the newest step has been saved
        pending = []  # metrics of steps not looked at yet: looking waits for the device
        with Watchdog(config.train.hang_seconds) as watchdog, Profile(workdir, profile_steps) as profile:
            while step < config.train.steps and not stopping.at(step):
                profile.before(step + 1)
                waiting = time.perf_counter()
                try:
                    batch = sharding.to_devices(next(iterator), mesh)
                except Exception:
                    if stopping.told:  # so have been the iterator's own processes, where all of a group are
                        break
                    raise
                reporter.waited(time.perf_counter() - waiting)
                texts = embed_fn(encoder.params, {name: batch[name] for name in TEXTS if name in batch})
                state, metrics = step_fn(state, {**batch, **texts})
                step += 1
                pending.append(metrics)
                # One step is on its way while the next one is prepared, never more
                jax.block_until_ready(pending[-2:][0])
                watchdog.beat()
                profile.after(step, metrics)
                reporter.stepped(step, metrics)
                last = step == config.train.steps
                saving = last or step % config.train.checkpoint_every == 0
                if saving or step % config.train.log_every == 0:
                    loss = reporter.report(step, _numbers(pending))
                    pending = []
                    if _spiked(config, loss, recent):
                        rollbacks += 1
                        back = _roll_back(config, checkpoints, like, step, rollbacks)
                        if back is not None:
                            reporter.event("rollback", step=step, to=back[0])
                            (step, state), saving = back, True
                            reporter.back_at(step)
                            continue
                    if np.isfinite(loss):  # not where every update was left out
                        recent.append(loss)
                if saving:
                    reporter.saved(step, lambda: checkpoints.save(step, state, iterator))  # noqa: B023 - called at once
                    watchdog.beat()
                if config.train.sample_every and (last or step % config.train.sample_every == 0):
                    reporter.samples(step, sample_prompts(config, encoder, state.ema))
                    reporter.go_on(step)
                    watchdog.beat()
            if not saving:
                reporter.report(step, _numbers(pending))
                reporter.saved(step, lambda: checkpoints.save(step, state, iterator))
            checkpoints.close()
    except BaseException as e:
        reporter.event("end", step=step, reason=f"failed: {type(e).__name__}")
        if jax.process_count() == 1 or isinstance(e, hosts.EVERYWHERE):
            checkpoints.close()  # else it could wait for a process that is gone
        raise
    finally:
        reporter.close()
    reporter.event("end", step=step, reason="finished" if step >= config.train.steps else "preempted")
    return state


def load_texts(config, mesh):
    """What embeds the stage's captions: its encoder, or the cache of what that made (`config.data.text_cache`)."""
    if config.data.text_cache:
        return TextCache.open(config.data.text_cache, config.text)
    return load_encoder(config.text, mesh=mesh)


def make_data(config, encoder, *, reader: int = 0, readers=((0,),)):
    """The endless iterator over the stage's batches, or over one reader's parts of them (`make_iterator`)."""
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
        tokenize=encoder.tokenizer, text_length=encoder.length, num_workers=config.data.workers,
        reader=reader, readers=readers,
    )  # fmt: skip


def sample_prompts(config, encoder, params) -> np.ndarray:
    """Videos of the config's sample prompts, [N, T, H, W, 3], as the training stands."""
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
    """Whether a mean loss is far above what is usual; never before there are ten to compare with."""
    return 0 < config.train.spike < loss / statistics.median(recent) if len(recent) >= 10 else False


def _roll_back(config, checkpoints, like, step, rollbacks):
    """The newest checkpoint as (step, state), or None. The data goes on from where it is: the spike's is left out."""
    if rollbacks > config.train.max_rollbacks:
        raise FloatingPointError(
            f"the loss of stage {config.stage} spiked again at step {step}, after {config.train.max_rollbacks} "
            "rollbacks (config.train.max_rollbacks): training stops, and the checkpoints are from before; lower "
            "config.train.learning_rate"
        )
    checkpoints.finish()
    found = checkpoints.restore(like)
    if found is None:
        log.warning("the loss spiked at step %d, and there is no checkpoint to go back to", step)
    else:
        log.warning("the loss spiked at step %d: back to step %d, with other data", step, found[0])
    return found


class Stopping:
    """Whether the run has been told to stop, by SIGTERM: to this process, or to any of several, which then agree."""

    def __init__(self):
        self.told = False

    def __enter__(self):
        # Of several processes jax's own preemption service has the signal, and agrees on a step to stop at
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._tell)
        return self

    def _tell(self, *_):
        self.told = True

    def at(self, step: int) -> bool:
        """Whether to stop before the step after this one; every process asks at every step."""
        if jax.process_count() == 1:
            return self.told
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_):
        if hasattr(self, "_previous"):
            signal.signal(signal.SIGTERM, self._previous)


class Watchdog:
    """Ends the process, with every thread's stack on stderr, when no step ends for `seconds`; 0 is never.

    It begins to watch at the first `beat`, after the compile.
    """

    def __init__(self, seconds: float):
        self._seconds, self._last, self._over = seconds, None, threading.Event()

    def __enter__(self):
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def beat(self) -> None:
        self._last = time.monotonic()

    def _watch(self):
        while not self._over.wait(min(self._seconds / 10, 1.0)):
            if self._last is not None and time.monotonic() - self._last > self._seconds:
                faulthandler.dump_traceback(all_threads=True)
                hosts.leave(HUNG, f"no step ended for {self._seconds:g} s (config.train.hang_seconds): ")

    def __exit__(self, *_):
        self._over.set()


class Profile:
    """Records the steps from the first to the last of `steps` in WORKDIR/profile, for xprof; None records nothing."""

    def __init__(self, workdir: str, steps: tuple[int, int] | None):
        self._folder, self._steps = os.path.join(workdir, "profile"), steps
        self._on = self._done = False

    def __enter__(self):
        return self

    def before(self, step: int) -> None:
        if self._steps and self._steps[0] <= step <= self._steps[1] and not self._on:
            jax.profiler.start_trace(self._folder)
            self._on = self._done = True

    def after(self, step: int, metrics) -> None:
        if self._on and step >= self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self):
        jax.profiler.stop_trace()
        self._on = False
        log.info("profile of steps %d to %d in %s; look at it with `xprof %s`", *self._steps, *[self._folder] * 2)

    def __exit__(self, *_):
        if self._on:  # the training ended first
            self._stop()
        elif self._steps and not self._done:
            log.warning("nothing is profiled: no step from %d to %d was done", *self._steps)


class Reporter:
    """The progress line, TensorBoard, metrics.jsonl and events.jsonl. Of several processes the first one writes."""

    def __init__(self, config, workdir: str, mesh):
        self._config, self._mesh, self._writes = config, mesh, jax.process_index() == 0
        self._began = self._compiled = self._mark = self._first = None
        self._input = 0.0
        if self._writes:
            folder = pathlib.Path(workdir)
            folder.mkdir(parents=True, exist_ok=True)
            self._board = SummaryWriter(str(folder / "tensorboard"))
            self._metrics, self._events = (_append(folder / f"{name}.jsonl") for name in ("metrics", "events"))
        chip = chips.of_device(mesh.devices.flat[0])
        self._peak = chip and chip.flops * mesh.size
        self._flops = model_flops(config) if chip else None

    def event(self, event: str, **fields) -> None:
        """Adds a line to events.jsonl: what happened, when, and its numbers."""
        if self._writes and not self._events.closed:
            self._events.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
            if event == "end":
                self._events.close()

    def begin(self, step: int) -> None:
        """The state of `step` is there, and the loop begins."""
        self._began, self._first, self._start = time.perf_counter(), step, step

    def waited(self, seconds: float) -> None:
        """The loop waited for data."""
        self._input += seconds

    def stepped(self, step: int, metrics) -> None:
        """A step is on its way. The first one carries the compile, and is waited for."""
        if self._compiled is None:
            jax.block_until_ready(metrics)
            self._compiled = self._mark = time.perf_counter()
            self.event("compiled", step=step, seconds=self._compiled - self._began)
            self._first, self._start, self._input = step, step, 0.0

    def go_on(self, step: int) -> None:
        """The time since the last report was not that of steps; those after `step` come next."""
        self._first, self._mark, self._input = step, time.perf_counter(), 0.0

    def back_at(self, step: int) -> None:
        """The run is at an earlier step again; its speed is counted from here."""
        self.go_on(step)
        self._start, self._compiled = step, self._mark

    def saved(self, step: int, save) -> None:
        """Calls `save`, and counts the time that the loop is held up by it."""
        began = time.perf_counter()
        save()
        self._mark = time.perf_counter()
        self.event("saved", step=step, seconds=self._mark - began)
        self._keep()

    def report(self, step: int, metrics: list[dict]) -> float:
        """Writes the metrics of the steps that end with `step`, and returns their mean loss.

        FloatingPointError where more updates have been left out than the config allows.
        """
        if not metrics:
            return float("nan")
        for at, values in enumerate(metrics, step - len(metrics) + 1):
            if self._writes:
                self._metrics.write(json.dumps({"step": at, **values}) + "\n")
            self._check_finite(at, values)
        finite = [m for m in metrics if np.isfinite([m["loss"], m["grad_norm"]]).all()] or metrics
        mean = {name: float(np.mean([m[name] for m in finite])) for name in metrics[0]}
        self._progress(step, mean)
        return mean["loss"]

    def _check_finite(self, step, values):
        for name in ("loss", "grad_norm"):
            if np.isfinite(values[name]):
                continue
            self.event("skipped", step=step)
            limit = self._config.train.max_skipped
            if values["skipped"] > limit:
                raise FloatingPointError(
                    f"{name} is {values[name]} at step {step} of stage {self._config.stage}, and "
                    f"{values['skipped']:.0f} updates were left out for that (config.train.max_skipped = {limit}): "
                    "training stops, and the checkpoints are from before; lower config.train.learning_rate or look "
                    "at the data of that step"
                )
            log.warning("%s is %s at step %d: this update is left out", name, values[name], step)
            return

    def _progress(self, step, mean):
        now = time.perf_counter()
        if step > self._first:
            interval = {
                "first": self._first + 1,
                "last": step,
                "seconds": now - self._mark,
                "input_seconds": self._input,
            }
            self.event("steps", **interval)
        self.go_on(step)
        if not self._writes:
            return
        speed, eta = "compiled", ""
        if step > self._start:
            rate = (step - self._start) / (now - self._compiled)
            speeds = {"steps": rate, "videos": rate * self._config.train.batch_size}
            left = (self._config.train.steps - step) / rate
            speed = f"{rate:.3g} steps/s  {speeds['videos']:.3g} videos/s"
            eta = f"ETA {int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02}"
            for name, value in speeds.items():
                self._board.add_scalar(f"speed/{name}_per_second", value, step)
            if self._peak:
                utilisation = rate * self._flops / self._peak
                speed += f"  MFU {utilisation:.1%}"
                self._board.add_scalar("speed/model_flops_utilisation", utilisation, step)
        for name, value in mean.items():
            self._board.add_scalar(f"train/{name}", value, step)
        end = "\r" if sys.stderr.isatty() and step < self._config.train.steps else "\n"
        line = f"{self._config.stage} step {step}/{self._config.train.steps}  loss {mean['loss']:.4f}  {speed}  {eta}"
        print(line.ljust(100), end=end, file=sys.stderr, flush=True)

    def samples(self, step: int, videos) -> None:
        """A grid in TensorBoard: a row a video, its frames from left to right."""
        if self._writes:
            n, t, h, w, c = videos.shape
            grid = videos.transpose(0, 2, 1, 3, 4).reshape(n * h, t * w, c)
            self._board.add_image("samples", ((grid + 1) * 127.5).astype(np.uint8), step, dataformats="HWC")

    def _keep(self):
        """A disk may lose what it was not asked to keep; a mounted bucket has nothing of a file before."""
        if self._writes:
            for file in (self._metrics, self._events):
                if not file.closed:
                    os.fsync(file.fileno())

    def close(self) -> None:
        """Writes what is not on disk yet."""
        if self._writes:
            self._board.close()
            self._keep()
            self._metrics.close()


def _append(path):
    """A file to add lines to. A line that a killed process left unfinished is ended first."""
    torn = False
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as f:
            f.seek(-1, os.SEEK_END)
            torn = f.read() != b"\n"
    file = open(path, "a", buffering=1)  # noqa: SIM115
    if torn:
        file.write("\n")
    return file

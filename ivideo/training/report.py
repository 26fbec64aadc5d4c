"""What a training run reports: the progress line, TensorBoard, metrics.jsonl and events.jsonl."""

import contextlib
import json
import logging
import os
import pathlib
import sys
import time

import jax
import numpy as np

from ivideo.devices import chips
from ivideo.training.board import TensorBoardLog
from ivideo.training.step import model_flops

log = logging.getLogger("ivideo")


class Reporter:
    """The progress line, TensorBoard, metrics.jsonl and events.jsonl. Of several processes the first one writes.

    A report that fails never ends a run: the first failure of each kind is a warning.
    """

    def __init__(self, config, workdir: str, mesh):
        self._config, self._mesh, self._writes = config, mesh, jax.process_index() == 0
        self._began = self._compiled = self._mark = self._first = None
        self._input = 0.0
        self._failed, self._ended = set(), False
        if self._writes:
            folder = pathlib.Path(workdir)
            folder.mkdir(parents=True, exist_ok=True)
            self._board = TensorBoardLog(folder / "tensorboard")
            self._metrics, self._events = (_Lines(folder / f"{name}.jsonl") for name in ("metrics", "events"))
        chip = chips.of_device(mesh.devices.flat[0])
        self._peak = chip and chip.flops * mesh.size
        self._flops = model_flops(config) if chip else None

    @contextlib.contextmanager
    def _reporting(self, what: str):
        """Turns an error of the block into a warning, the first time that `what` fails."""
        try:
            yield
        except Exception as e:
            if what not in self._failed:
                self._failed.add(what)
                log.warning("%s cannot be written (%s: %s): the training goes on without", what, type(e).__name__, e)

    def event(self, event: str, **fields) -> None:
        """Adds a line to events.jsonl: what happened, when, and its numbers. None follows an event `end`."""
        if self._writes and not self._ended:
            self._ended = event == "end"
            with self._reporting(self._events.path):
                self._events.add({"event": event, "time": time.time(), "clock": time.monotonic(), **fields})

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
                with self._reporting(self._metrics.path):
                    self._metrics.add({"step": at, **values})
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
        speed, eta, scalars = "compiled", "", {f"train/{name}": value for name, value in mean.items()}
        if step > self._start:
            rate = (step - self._start) / (now - self._compiled)
            videos = rate * self._config.train.batch_size
            scalars |= {"speed/steps_per_second": rate, "speed/videos_per_second": videos}
            left = (self._config.train.steps - step) / rate
            speed = f"{rate:.3g} steps/s  {videos:.3g} videos/s"
            eta = f"ETA {int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02}"
            if self._peak:
                utilisation = rate * self._flops / self._peak
                speed += f"  MFU {utilisation:.1%}"
                scalars["speed/model_flops_utilisation"] = utilisation
        with self._reporting("TensorBoard's log"):
            self._board.scalars(step, scalars)
        line = f"{self._config.stage} step {step}/{self._config.train.steps}  loss {mean['loss']:.4f}  {speed}  {eta}"
        with self._reporting("the progress line"):
            end = "\r" if sys.stderr.isatty() and step < self._config.train.steps else "\n"
            print(line.ljust(100), end=end, file=sys.stderr, flush=True)

    def samples(self, step: int, make_videos) -> None:
        """A grid in TensorBoard of what `make_videos()` returns: a row a video, its frames from left to right."""
        if jax.process_count() > 1:
            # All processes make the samples together. If one went on alone after an error, the others would wait for it
            videos = make_videos()
        with self._reporting("the grid of samples"):
            if jax.process_count() == 1:
                videos = make_videos()
            if self._writes:
                n, t, h, w, c = videos.shape
                grid = videos.transpose(0, 2, 1, 3, 4).reshape(n * h, t * w, c)
                self._board.image(step, "samples", ((grid + 1) * 127.5).astype(np.uint8))

    def _keep(self):
        """A disk may lose what it was not asked to keep; a mounted bucket has nothing of a file before."""
        if self._writes:
            for file in (self._metrics, self._events):
                with self._reporting(file.path):
                    file.keep()

    def close(self) -> None:
        """Writes what is not on disk yet. Events may follow, and metrics where a run goes on."""
        if self._writes:
            with self._reporting("TensorBoard's log"):
                self._board.close()
            self._keep()


class _Lines:
    """A file that JSON objects are added to, a line each.

    It is opened by its name for each of them: a file that was deleted, or on storage that was away, is there again.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._torn = True  # a killed process may have left a line without an end, and so may a disk that was full

    def add(self, value: dict) -> None:
        """Adds a line, in one write. OSError where that cannot be."""
        line = json.dumps(value) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            if self._torn and _ends_torn(self.path):
                line = "\n" + line
            self._torn = True
            data = line.encode()
            if file.write(data) < len(data):
                raise OSError("the disk took a part of a line")
            self._torn = False

    def keep(self) -> None:
        """Returns once the lines are on the disk. OSError where that cannot be."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())


def _ends_torn(path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"

"""Reports the progress of a training run: the progress line, TensorBoard, metrics.jsonl and events.jsonl."""

import contextlib
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from ivideo.devices import chips
from ivideo.training.board import TensorBoardLog
from ivideo.training.step import model_flops

log = logging.getLogger("ivideo")


def learning_rate_key(config) -> str:
    """The config key of the run's learning rate."""
    return f"config.{'distill' if config.phase else 'train'}.learning_rate"


class Reporter:
    """Writes the progress line, TensorBoard, metrics.jsonl and events.jsonl. Only the first process writes.

    A report that fails does not end the run. The first failure of each kind is logged as a warning.
    """

    def __init__(self, config, workdir: str, mesh, *, name: str = "", flops: Callable[[], int] | None = None):
        """`name`: the run in the progress line. `flops`: returns the FLOPs per step. Both default to training's."""
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
        self._flops = (flops() if flops else model_flops(config)) if chip else None
        self._name, self._note = name or config.stage, ""

    @contextlib.contextmanager
    def _reporting(self, what: str):
        """Turns an error in the block into a warning. Only the first failure of `what` is logged."""
        try:
            yield
        except Exception as e:
            if what not in self._failed:
                self._failed.add(what)
                log.warning(
                    "%s cannot be written (%s: %s): the training continues without it", what, type(e).__name__, e
                )

    def event(self, event: str, **fields) -> None:
        """Adds a line to events.jsonl: the event's name, its time and its numbers. Events after `end` are dropped."""
        if self._writes and not self._ended:
            self._ended = event == "end"
            with self._reporting(self._events.path):
                self._events.add({"event": event, "time": time.time(), "clock": time.monotonic(), **fields})

    def begin(self, step: int) -> None:
        """Reports that the loop begins, with the state of `step`."""
        self._began, self._first, self._start = time.perf_counter(), step, step

    def waited(self, seconds: float) -> None:
        """Reports that the loop waited for data."""
        self._input += seconds

    def stepped(self, step: int, metrics) -> None:
        """Reports that a step was dispatched. Waits for the first one, which includes the compilation."""
        if self._compiled is None:
            jax.block_until_ready(metrics)
            self._compiled = self._mark = time.perf_counter()
            self.event("compiled", step=step, seconds=self._compiled - self._began)
            self._first, self._start, self._input = step, step, 0.0

    def go_on(self, step: int, excluded: float = 0.0) -> None:
        """Starts a new interval of steps after `step`. The time since the last interval is not spent on steps.

        `excluded`: seconds that the speed does not include.
        """
        self._first, self._mark, self._input = step, time.perf_counter(), 0.0
        if excluded:
            self._compiled += excluded

    def back_at(self, step: int) -> None:
        """Reports that the run went back to an earlier step. The speed is measured from here."""
        self.go_on(step)
        self._start, self._compiled = step, self._mark

    def saved(self, step: int, save) -> None:
        """Calls `save` and reports how long it blocked the loop."""
        began = time.perf_counter()
        save()
        self._mark = time.perf_counter()
        self.event("saved", step=step, seconds=self._mark - began)
        self._sync()

    def report(self, step: int, metrics: list[dict]) -> float:
        """Writes the metrics of the steps up to `step`, one dict per step, and returns their mean loss.

        FloatingPointError if more updates were skipped than the config allows.
        """
        if not metrics:
            return float("nan")
        for number, values in enumerate(metrics, step - len(metrics) + 1):
            if self._writes:
                with self._reporting(self._metrics.path):
                    self._metrics.add({"step": number, **values})
            self._check_finite(number, values)
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
                    f"{values['skipped']:.0f} updates were skipped for that reason "
                    f"(config.train.max_skipped = {limit}): training stops, and the checkpoints are from before; lower "
                    f"{learning_rate_key(self._config)} or look at the data of that step"
                )
            log.warning("%s is %s at step %d: this update is skipped", name, values[name], step)
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
        loss = f"{mean['loss']:.4f}" if mean["loss"] >= 0.01 else f"{mean['loss']:.2e}"
        head = f"{self._name} step {step}/{self._config.train.steps}  loss {loss}"
        line = "  ".join(part for part in (head, self._note, speed, eta) if part)
        with self._reporting("the progress line"):
            end = "\r" if sys.stderr.isatty() and step < self._config.train.steps else "\n"
            print(line.ljust(100), end=end, file=sys.stderr, flush=True)

    def measured(self, step: int, scalars: dict[str, float], note: str) -> None:
        """Adds numbers to TensorBoard by name. The progress line contains `note` from now on."""
        self._note = note
        if self._writes:
            with self._reporting("TensorBoard's log"):
                self._board.scalars(step, scalars)

    def samples(self, step: int, make_videos) -> None:
        """Adds the videos of `make_videos()` to TensorBoard as a grid, with one row of frames per video."""
        if jax.process_count() > 1:
            # All processes sample together. A process that continued after an error would wait for the others forever
            videos = make_videos()
        with self._reporting("the grid of samples"):
            if jax.process_count() == 1:
                videos = make_videos()
            if self._writes:
                n, t, h, w, c = videos.shape
                grid = videos.transpose(0, 2, 1, 3, 4).reshape(n * h, t * w, c)
                self._board.image(step, "samples", ((grid + 1) * 127.5).astype(np.uint8))

    def _sync(self):
        """Syncs the logs to disk. A mounted bucket stores a file only then."""
        if self._writes:
            for file in (self._metrics, self._events):
                with self._reporting(file.path):
                    file.sync()

    def close(self) -> None:
        """Writes everything to disk. Events may still follow, and metrics if the run continues."""
        if self._writes:
            with self._reporting("TensorBoard's log"):
                self._board.close()
            self._sync()


class _Lines:
    """A file of JSON objects, one per line.

    It is opened for each new line, so that writing works again after the file was deleted or the storage was away.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._partial = True  # whether the last line may be partial, after a kill or on a full disk

    def add(self, value: dict) -> None:
        """Adds a line with one write. OSError if that fails."""
        line = json.dumps(value) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            if self._partial and _ends_in_partial_line(self.path):
                line = "\n" + line
            self._partial = True
            data = line.encode()
            if file.write(data) < len(data):
                raise OSError("only a part of the line was written")
            self._partial = False

    def sync(self) -> None:
        """Waits until the lines are on disk. OSError if that fails."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())


def _ends_in_partial_line(path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"

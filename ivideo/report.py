"""What a training run reports: the progress line, TensorBoard, metrics.jsonl and events.jsonl."""

import json
import logging
import os
import pathlib
import sys
import time

import jax
import numpy as np
from tensorboardX import SummaryWriter

from ivideo import chips
from ivideo.train import model_flops

log = logging.getLogger("ivideo")


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

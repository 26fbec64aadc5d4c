"""Reports that fail: a training run warns once and continues."""

import json
import os
import resource
import shutil

import jax
import light_network
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from configs import base
from ivideo.training import loop, report
from ivideo.training.board import TensorBoardLog

pytestmark = pytest.mark.usefixtures("shared_programs")


def run_config(**changes):
    config = base.get_config("small")
    config.update_from_flattened_dict(
        {
            **light_network.OPTIONS,
            "data.num_images": 0,
            "train.steps": 6,
            "train.checkpoint_every": 3,
            "train.sample_every": 0,
            **changes,
        }
    )
    return config


def train(config, workdir):
    return int(loop.train(config, str(workdir), devices=jax.devices()[:1]).step)


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """The events in TensorBoard's files, in order."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


def test_tensorboard_has_the_numbers_and_the_grid(tmp_path):
    config = run_config(**{"train.sample_every": 6, "train.sample_prompts": ("a red star", "a blue circle")})
    train(config, tmp_path)
    found = [(event.step, value) for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    assert [step for step, value in found if value.tag == "train/loss"] == [1, 2, 3, 4, 5, 6]
    ((step, value),) = [(step, value) for step, value in found if value.tag == "samples"]
    assert (step, value.image.height, value.image.width) == (6, 2 * 8, 4 * 8)  # two videos of four frames of 8×8


def test_small_deleted_tensorboard_log_is_created_again(tmp_path):
    board = TensorBoardLog(tmp_path / "tensorboard")
    board.scalars(1, {"loss": 1.0})
    shutil.rmtree(tmp_path / "tensorboard")
    board.scalars(2, {"loss": 2.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.unlink()
    board.scalars(3, {"loss": 3.0})
    board.image(3, "samples", np.zeros((4, 6, 3), np.uint8))
    board.close()
    first, numbers, image = events(tmp_path / "tensorboard")
    assert first.file_version == "brain.Event:2"
    assert (numbers.step, numbers.summary.value[0].tag, numbers.summary.value[0].simple_value) == (3, "loss", 3.0)
    png = tmp_path / "grid.png"
    png.write_bytes(image.summary.value[0].image.encoded_image_string)
    assert Image.open(png).size == (6, 4)


def broken(*_, **__):
    raise RuntimeError("out of order")


REPORTS = {
    "TensorBoard's log": lambda patch: patch.setattr(TensorBoardLog, "scalars", broken),
    "the grid of samples": lambda patch: patch.setattr(loop, "sample_prompts", broken),
    "the progress line": lambda patch: patch.setattr(report.sys.stderr, "isatty", broken, raising=False),
    "metrics.jsonl": lambda patch: patch.setattr(report._Lines, "add", broken),
}


def test_small_samples_of_several_processes_fail_in_all_of_them(tmp_path, monkeypatch):
    """A process that continued alone would wait for the others forever."""
    mesh = loop.sharding.make_mesh({"data": 1}, jax.devices()[:1])
    reporter = report.Reporter(run_config(), str(tmp_path), mesh)
    reporter.samples(1, broken)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RuntimeError, match="out of order"):
        reporter.samples(2, broken)


@pytest.mark.parametrize("what", REPORTS)
def test_report_that_fails_warns_once(what, tmp_path, monkeypatch, caplog):
    REPORTS[what](monkeypatch)
    every = 2 if what == "the grid of samples" else 0
    assert train(run_config(**{"train.sample_every": every}), tmp_path) == 6
    warnings = [r.getMessage() for r in caplog.records if f"{what} cannot be written" in r.getMessage()]
    assert len(warnings) == 1 and "(RuntimeError: out of order): the training continues" in warnings[0]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]


def test_logs_deleted_during_a_run_are_created_again(tmp_path, monkeypatch):
    numbers = loop._numbers

    def deleted(metrics):
        if (tmp_path / "metrics.jsonl").exists() and steps(tmp_path)[-1] == 3:
            shutil.rmtree(tmp_path / "tensorboard")
            (tmp_path / "metrics.jsonl").unlink()
        return numbers(metrics)

    monkeypatch.setattr(loop, "_numbers", deleted)
    train(run_config(), tmp_path)
    assert steps(tmp_path) == [4, 5, 6]
    logged = [e.step for e in events(tmp_path / "tensorboard") if any(v.tag == "train/loss" for v in e.summary.value)]
    assert logged == [4, 5, 6]


def test_small_line_cut_by_a_full_disk_is_ended_before_the_next(tmp_path):
    lines = report._Lines(tmp_path / "metrics.jsonl")
    lines.add({"step": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
    try:
        with pytest.raises(OSError):
            lines.add({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.path.getsize(lines.path) == 20
    lines.add({"step": 3})
    assert lines.path.read_text().splitlines() == ['{"step": 1}', '{"step":', '{"step": 3}']

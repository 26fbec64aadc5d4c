"""Training runs as a whole: what they leave, and what becomes of them when they are stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import flax.traverse_util
import jax
import numpy as np
import pytest

from configs import base
from ivideo.checkpoint import Checkpoints
from ivideo.errors import UserError
from ivideo.train import PREEMPTED, init_state, train

ROOT = pathlib.Path(__file__).parent.parent


def small(**changes):
    config = base.get_config("small")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of twelve steps by the library's own loop."""
    workdir = tmp_path_factory.mktemp("run")
    config = small(**{"train.sample_every": 12})
    train(config, str(workdir), devices=jax.devices()[:1])
    return config, workdir


def test_small_run_leaves_what_it_should(trained):
    _, workdir = trained
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["12", "8"]  # keep = 2
    assert any((workdir / "tensorboard").iterdir())


def test_small_finished_run_has_nothing_to_do(trained):
    config, workdir = trained
    before = (workdir / "metrics.jsonl").read_text()
    state = train(config, str(workdir), devices=jax.devices()[:1])
    assert int(state.step) == 12
    assert (workdir / "metrics.jsonl").read_text() == before


def test_small_another_model_in_the_folder_is_refused(trained):
    config, workdir = trained
    config = config.copy_and_resolve_references()
    config.model.channels = (8, 24)
    with pytest.raises(
        UserError, match=r"checkpoints/12 is of another model: down_1/.* is .* there and .* in this config"
    ):
        train(config, str(workdir), devices=jax.devices()[:1])


def test_small_loss_that_is_not_finite_stops_the_run(tmp_path):
    """The checkpoint from before stays the newest, and whole."""
    config = small(**{"train.checkpoint_every": 2, "train.steps": 4})
    train(config, str(tmp_path), devices=jax.devices()[:1])
    broken = config.copy_and_resolve_references()
    broken.train.steps = 8
    broken.train.image_weight = float("nan")
    with pytest.raises(FloatingPointError, match="is nan at step 5 of stage base"):
        train(broken, str(tmp_path), devices=jax.devices()[:1])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    state, _ = outcome(tmp_path, 4)  # whole, and from before
    assert int(state[("step",)]) == 4
    assert all(np.isfinite(value).all() for value in state.values())


def command(workdir, steps):
    return [
        sys.executable, "-m", "ivideo.main", "--config=configs/base.py:small", f"--workdir={workdir}",
        f"--config.train.steps={steps}", "--config.train.checkpoint_every=5", "--config.train.warmup=4",
    ]  # fmt: skip


def start(workdir, steps):
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    return subprocess.Popen(command(workdir, steps), cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def interrupt(process, workdir, after, sign):
    """Sends the signal once the run has written `after` lines of metrics."""
    metrics = workdir / "metrics.jsonl"
    deadline = time.time() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < after:
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(sign)
    return process.wait(300)


def outcome(workdir, steps):
    """The last state on disk, and the losses by step: of a step done twice, those of the second time."""
    config = small(**{"train.steps": steps, "train.warmup": 4})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_state(config))
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    _, state = Checkpoints(workdir, keep=2).restore(like)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(state)), {
        line["step"]: line for line in lines
    }


def test_small_killed_and_terminated_runs_end_as_if_nothing_had_happened(tmp_path):
    """kill -9, then SIGTERM, then to the end: params, EMA, optimizer and every loss bit for bit those of one run."""
    steps = 60
    whole = start(tmp_path / "whole", steps)
    assert whole.wait(300) == 0, whole.stderr.read()

    broken = tmp_path / "broken"
    assert interrupt(start(broken, steps), broken, 13, signal.SIGKILL) == -signal.SIGKILL
    killed_at = len((broken / "metrics.jsonl").read_text().splitlines())
    assert 13 <= killed_at < steps
    process = start(broken, steps)
    assert interrupt(process, broken, killed_at + 9, signal.SIGTERM) == PREEMPTED
    assert "the same command goes on from there" in process.stderr.read()
    process = start(broken, steps)
    assert process.wait(300) == 0
    assert "going on from step" in process.stderr.read()

    (state, metrics), (wanted, wanted_metrics) = outcome(broken, steps), outcome(tmp_path / "whole", steps)
    assert state.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(state[name], wanted[name], err_msg=str(name))
    assert metrics == wanted_metrics
    assert len(metrics) == steps

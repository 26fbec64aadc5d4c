"""Whole training runs: their files, and continuing after interruptions."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import flax.traverse_util
import jax
import light_network
import numpy as np
import pytest
import shared_programs

from configs import base
from ivideo.errors import UserError
from ivideo.training.checkpoint import Checkpoints
from ivideo.training.guards import PREEMPTED
from ivideo.training.loop import train
from ivideo.training.step import state_shapes
from ivideo.weights import save_params

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 40
OPTIONS = {"train.steps": STEPS, "train.checkpoint_every": 8, "train.learning_rate": 3e-3}


def run_config(options=light_network.OPTIONS):
    config = base.get_config("small")
    config.update_from_flattened_dict({**OPTIONS, **options})
    return config


def metrics_of(workdir):
    """The lines of the run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of forty steps of a light network, without samples."""
    return trained_run(run_config(), tmp_path_factory.mktemp("run"), sample_every=0)


@pytest.fixture(scope="module")
def trained_with_every_layer(tmp_path_factory):
    """A run of forty steps of a network with attention."""
    return trained_run(run_config({}), tmp_path_factory.mktemp("run"), sample_every=STEPS)


def trained_run(config, workdir, sample_every):
    config.train.sample_every = sample_every
    train(config, str(workdir), devices=jax.devices()[:1])
    return config, workdir


def test_small_run_leaves_its_files(trained):
    check_files(trained[1])


def test_run_with_every_layer_leaves_its_files(trained_with_every_layer):
    check_files(trained_with_every_layer[1])


def check_files(workdir):
    assert [line["step"] for line in metrics_of(workdir)] == list(range(1, STEPS + 1))
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["32", "40"]  # keep = 2
    assert any((workdir / "tensorboard").iterdir())


def test_small_loss_falls(trained):
    check_losses(trained[1])


def test_loss_of_a_network_with_every_layer_falls(trained_with_every_layer):
    check_losses(trained_with_every_layer[1])


def check_losses(workdir):
    losses = [line["loss"] for line in metrics_of(workdir)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_small_finished_run_has_nothing_to_do(trained, caplog):
    config, workdir = trained
    before = (workdir / "metrics.jsonl").read_text()
    state = train(config, str(workdir), devices=jax.devices()[:1])
    assert int(state.step) == STEPS
    assert (workdir / "metrics.jsonl").read_text() == before
    assert f"nothing to do: config.train.steps = {STEPS} are done; a larger number goes on" in caplog.text


def test_small_another_model_in_the_folder_is_refused(trained):
    config, workdir = trained
    config = config.copy_and_resolve_references()
    config.model.channels = (16,)
    with pytest.raises(
        UserError, match=r"is of another network: config.model.channels is \[8\] there and \[16\] in this config"
    ):
        train(config, str(workdir), devices=jax.devices()[:1])


def test_small_another_optimizer_in_the_folder_is_refused(trained):
    config, workdir = trained
    config = config.copy_and_resolve_references()
    config.train.optimizer = "adafactor"
    with pytest.raises(
        UserError,
        match=r"checkpoints/40 is of another optimizer \(config.train.optimizer\): opt_state/.* in this config",
    ):
        train(config, str(workdir), devices=jax.devices()[:1])


def test_run_begins_with_the_given_weights(tmp_path):
    """Its average begins with them, too. Weights of another network are refused."""
    config = run_config()
    config.train.start = str(tmp_path / "start.safetensors")
    config.train.steps, config.train.learning_rate = 1, 0.0
    wanted = shared_programs.random_params(config)
    save_params(config.train.start, wanted, metadata={}, dtype=np.float32)
    state = train(config, str(tmp_path / "run"), devices=jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, state.params, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.ema, wanted)
    config.model.channels = (16,)
    with pytest.raises(UserError, match=r"start.safetensors .* down_0/.* is .* there and .* in this config"):
        train(config, str(tmp_path / "other"), devices=jax.devices()[:1])


def test_loss_that_is_not_finite_stops_the_run(trained, tmp_path):
    """The earlier checkpoints stay the newest, and complete."""
    config, workdir = trained
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    broken = config.copy_and_resolve_references()
    broken.train.steps = STEPS + 8
    broken.train.image_weight = 1e39  # infinite in float32
    broken.train.max_skipped = 2
    with pytest.raises(FloatingPointError, match=f"is nan at step {STEPS + 3} of stage base, and 3 updates"):
        train(broken, str(tmp_path), devices=jax.devices()[:1])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["32", "40"]
    state, _ = outcome(config, tmp_path)  # complete, and from before the failure
    assert int(state[("step",)]) == STEPS
    assert all(np.isfinite(value).all() for value in state.values())


def start(workdir):
    """Starts the command that repeats the fixture's run."""
    command = [sys.executable, "-m", "ivideo.main", "--config=configs/base.py:small", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in OPTIONS.items()]
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def interrupt(process, workdir, after, sign):
    """Sends the signal once the run has written `after` lines of metrics."""
    metrics = workdir / "metrics.jsonl"
    deadline = time.time() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < after:
        if process.poll() is not None or time.time() > deadline:
            process.kill()
            raise AssertionError(process.stderr.read())
        time.sleep(0.005)
    process.send_signal(sign)
    return process.wait(300)


def outcome(config, workdir):
    """The last state on disk, and the metrics by step. Of a step that was done twice, the second ones."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = state_shapes(config)
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    _, state = Checkpoints(workdir, keep=2).restore(like)
    losses = {line["step"]: line for line in metrics_of(workdir)}
    return flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(state)), losses


def test_killed_and_terminated_runs_end_as_if_nothing_had_happened(trained_with_every_layer, tmp_path):
    """After kill -9, SIGTERM and continuing to the end, the state and every loss equal those of one run bit for bit."""
    assert interrupt(start(tmp_path), tmp_path, 11, signal.SIGKILL) == -signal.SIGKILL
    killed_at = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 11 <= killed_at < STEPS
    process = start(tmp_path)
    assert interrupt(process, tmp_path, killed_at + 9, signal.SIGTERM) == PREEMPTED
    assert "the same command goes on from the newest checkpoint" in process.stderr.read()
    process = start(tmp_path)
    assert process.wait(300) == 0
    assert "going on from step" in process.stderr.read()

    config, undisturbed = trained_with_every_layer
    (state, metrics), (wanted, wanted_metrics) = outcome(config, tmp_path), outcome(config, undisturbed)
    assert state.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(state[name], wanted[name], err_msg=str(name))
    assert metrics == wanted_metrics
    assert len(metrics) == STEPS

"""The training loop: spikes of the loss, stop signals and other failures, and the reports."""

import collections
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import light_network
import numpy as np
import pytest

from configs import base
from ivideo.devices.chips import CHIPS, Chip, of_device
from ivideo.errors import UserError
from ivideo.training import goodput, guards, loop, report, step

pytestmark = pytest.mark.usefixtures("shared_programs")

ROOT = pathlib.Path(__file__).parent.parent


def run_config(**changes):
    config = base.get_config("small")
    config.update_from_flattened_dict(
        {
            **light_network.OPTIONS,
            "data.num_images": 0,
            "train.learning_rate": 3e-3,
            "train.sample_every": 0,
            **changes,
        }
    )
    return config


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def spiked(tmp_path_factory):
    """A run of twelve steps, profiled. The seventh loss counts as a spike, and the chip's peak is known."""
    workdir = tmp_path_factory.mktemp("run")
    asked = []

    def once(config, loss, recent):
        asked.append(loss)
        return len(asked) == 7

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_spiked", once)
        patch.setattr(report.chips, "of_device", lambda device: Chip(1e9, 1e9, 1e9))
        loop.train(run_config(), str(workdir), devices=jax.devices()[:1], profile_steps=(3, 4))
    return workdir


def test_small_spike_restores_the_checkpoint_and_continues_with_other_data(spiked):
    steps = [line["step"] for line in lines(spiked / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 11, 12]  # a checkpoint every four
    losses = [line["loss"] for line in lines(spiked / "metrics.jsonl")]
    assert len(set(losses)) == len(losses)
    (event,) = [line for line in lines(spiked / "events.jsonl") if line["event"] == "rollback"]
    assert (event["step"], event["to"]) == (7, 4)
    assert sorted(int(p.name) for p in (spiked / "checkpoints").iterdir()) == [8, 12]


def test_run_killed_after_a_rollback_skips_the_spikes_data_too(spiked, tmp_path):
    """It is killed before the next checkpoint. Continued, it ends like the run that was not killed."""
    asked, numbers = [], loop._numbers

    def killed(metrics):
        if len(asked) == 8:
            raise KeyboardInterrupt
        return numbers(metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_spiked", lambda *_: asked.append(1) or len(asked) == 7)
        patch.setattr(loop, "_numbers", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run_config(), str(tmp_path), devices=jax.devices()[:1])
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7, 5]
    loop.train(run_config(), str(tmp_path), devices=jax.devices()[:1])
    assert lines(tmp_path / "metrics.jsonl")[-8:] == lines(spiked / "metrics.jsonl")[-8:]
    assert not (tmp_path / "rollback.json").exists()  # later checkpoints have their own data positions


def test_small_goodput_counts_lost_steps(spiked):
    found = goodput.goodput(lines(spiked / "events.jsonl"))
    assert found["rollbacks"] == 1 and found["steps"] == {"productive": 12, "lost": 3}
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-9)
    assert found["seconds"]["lost"] > 0 and found["seconds"]["compiling"] > 0


def test_small_profile_has_the_training_step(spiked):
    (file,) = (spiked / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    names = {event.name for plane in data.planes for line in plane.lines for event in line.events}
    assert any("train_step" in name for name in names)


def test_small_utilisation_is_model_flops_divided_by_the_peak(tmp_path, capsys, monkeypatch):
    config = run_config()
    monkeypatch.setattr(report.chips, "of_device", lambda device: Chip(1e12, 1e9, 1e9))
    mesh = loop.sharding.make_mesh({"data": 1}, jax.devices()[:1])
    reporter = report.Reporter(config, str(tmp_path), mesh)
    reporter.begin(0)
    clock = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    reporter.stepped(1, {})
    clock[0] += 8.0  # four steps of two seconds
    metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "skipped": 0.0}
    assert reporter.report(5, [metrics] * 5) == 1.0
    reporter.close()
    share = step.model_flops(config) / 2.0 / 1e12
    line = capsys.readouterr().err
    assert f"base step 5/12  loss 1.0000  0.5 steps/s  4 videos/s  MFU {share:.1%}" in line
    (steps,) = [event for event in lines(tmp_path / "events.jsonl") if event["event"] == "steps"]
    assert (steps["first"], steps["last"], steps["seconds"]) == (2, 5, 8.0)


def test_small_chips_are_found_by_the_device_kind():
    device = collections.namedtuple("Device", "device_kind")
    assert of_device(device("TPU v5 lite")) == CHIPS["v5e"]
    assert of_device(device("TPU v5p")) == of_device(device("TPU v5")) == CHIPS["v5p"]
    assert of_device(device("TPU v6 lite")) == CHIPS["v6e"]
    assert of_device(device("TPU7x")) == CHIPS["tpu7x"].device()  # half a chip
    assert of_device(device("cpu")) is None


@pytest.mark.parametrize(
    ("spike", "loss", "count", "wanted"),
    [
        (3.0, 3.1, 10, True),
        (3.0, 2.9, 10, False),
        (3.0, 3.1, 9, False),
        (0.0, 1e9, 50, False),
        (3.0, np.nan, 50, False),
    ],
)
def test_small_spike_is_a_multiple_of_the_median_loss(spike, loss, count, wanted):
    config = run_config(**{"train.spike": spike})
    assert loop._spiked(config, loss, collections.deque([1.0] * (count - 1) + [9.0])) == wanted


def test_small_nan_losses_do_not_count_in_the_median(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "_spiked", lambda config, loss, recent: seen.append((loss, list(recent))))
    monkeypatch.setattr(loop, "_numbers", lambda metrics: [with_nan(m) for m in metrics])

    def with_nan(metrics):
        values = {name: float(value) for name, value in metrics.items()}
        return {**values, "loss": np.nan} if len(seen) in (1, 2) else values

    loop.train(run_config(), str(tmp_path), devices=jax.devices()[:1])
    assert [np.isnan(loss) for loss, _ in seen] == [False, True, True] + 9 * [False]
    assert [len(recent) for _, recent in seen] == [0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]


class Interrupted:
    """An iterator over batches. At the third one, the process receives a signal and loses a data worker."""

    def __init__(self, iterator, sign):
        self._iterator, self._sign, self._count = iterator, sign, 0

    def __next__(self):
        self._count += 1
        if self._count == 3:
            if self._sign is not None:
                os.kill(os.getpid(), self._sign)
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")
        return next(self._iterator)

    def __getattr__(self, name):
        return getattr(self._iterator, name)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, None])
def test_small_signal_that_also_ends_the_data_workers_saves(sign, tmp_path, monkeypatch, caplog):
    """So does the loss of a worker without a signal (None), for example for lack of memory."""
    make_data, save = loop.make_data, loop.Checkpoints.save
    monkeypatch.setattr(loop, "make_data", lambda *args, **options: Interrupted(make_data(*args, **options), sign))
    monkeypatch.setattr(loop.Checkpoints, "save", lambda self, step, state, i: save(self, step, state, i._iterator))
    monkeypatch.setattr(loop.Checkpoints, "restore", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        loop.train(run_config(), str(tmp_path), devices=jax.devices()[:1])
    assert left.value.code == guards.PREEMPTED
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert lines(tmp_path / "events.jsonl")[-1]["reason"] == "preempted"
    assert f"stopped at step 2: the same command goes on from the newest checkpoint in {tmp_path}" in caplog.text
    assert ("exit code -9. The run saves and stops" in caplog.text) == (sign is None)


def test_small_signal_before_the_first_step_exits_like_a_later_one(tmp_path, monkeypatch):
    load_texts = loop.load_texts

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return load_texts(*args)

    monkeypatch.setattr(loop, "load_texts", interrupted)
    with pytest.raises(SystemExit) as left:
        loop.train(run_config(), str(tmp_path), devices=jax.devices()[:1])
    assert left.value.code == guards.PREEMPTED
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_small_error_at_the_start_is_logged_as_the_end_of_the_run(tmp_path, monkeypatch):
    def fail(self):
        raise UserError("no state")

    monkeypatch.setattr(loop.Training, "shapes", fail)
    with pytest.raises(UserError, match="no state"):
        loop.train(run_config(), str(tmp_path), devices=jax.devices()[:1])
    start, end = lines(tmp_path / "events.jsonl")
    assert (start["event"], end["reason"]) == ("start", "failed: UserError")


@pytest.mark.parametrize("key", ["train.start", "data.dir"])
def test_small_mistake_found_at_the_start_writes_nothing(key, tmp_path):
    config = run_config(**{"data.source": "tfds", "data.dir": str(tmp_path), key: str(tmp_path / "none.safetensors")})
    with pytest.raises(UserError, match=r"none\.safetensors"):
        loop.train(config, str(tmp_path / "run"), devices=jax.devices()[:1])
    assert list(tmp_path.iterdir()) == []


def test_warning_if_the_run_has_none_of_the_steps_to_profile(tmp_path, caplog):
    config = run_config(**{"train.steps": 2})
    loop.train(config, str(tmp_path), devices=jax.devices()[:1], profile_steps=(3, 4))
    assert "nothing was profiled: the run had no step from 3 to 4" in caplog.text
    assert "config.train.warmup = 4 is not below config.train.steps = 2: the learning rate rises over" in caplog.text


def test_small_too_many_spikes_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_spiked", lambda *_: True)
    config = run_config(**{"train.max_rollbacks": 0})
    with pytest.raises(FloatingPointError, match=r"spiked again at step 1, after 0 rollbacks .*max_rollbacks"):
        loop.train(config, str(tmp_path), devices=jax.devices()[:1])


def test_step_that_hangs_ends_the_process_and_prints_all_stacks():
    program = """
import time
from ivideo.training.guards import Watchdog
with Watchdog(0.5) as watchdog:
    time.sleep(1.5)  # not watched: it starts with the first beat
    print("alive", flush=True)
    watchdog.beat()
    def stuck():
        time.sleep(60)
    stuck()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == guards.HUNG == 76
    assert done.stdout == "alive\n"
    assert "no step ended for 0.5 s (config.train.hang_seconds)" in done.stderr
    assert "in stuck" in done.stderr


def test_small_batch_must_divide_by_the_devices(tmp_path):
    config = run_config(**{"train.batch_size": 12})
    with pytest.raises(UserError, match=r"size = 12 cannot be split over 8 devices .* 1 parts: choose a multiple of 8"):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_small_torn_last_line_is_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    report._Lines(path).add({"step": 2})
    assert path.read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 2}']

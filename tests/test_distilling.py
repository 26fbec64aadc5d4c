"""Distillation of the small stages as users run it: kill -9 in each phase, two processes, eight devices."""

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
from distillations import STAGES, assert_same_end, rows, save_teacher, tiny_config
from test_hosts import ROOT, logs, losses, start, until_step, wait

from ivideo import stages
from ivideo.devices import sharding
from ivideo.evaluation.distillation import quality
from ivideo.training import phases


def light(stage: str):
    """The `:small` stage with the layers that `start` asks for."""
    config = STAGES[stage].get_config("small")
    config.update_from_flattened_dict(light_network.OPTIONS)
    return config


def arguments(stage: str, teacher: str) -> list[str]:
    """The command's flags, over those of `start`: four devices, in one process or two."""
    return [
        f"--config=configs/{stage}.py:small", "--mode=distill", f"--teacher={teacher}",
        "--config.train.checkpoint_every=2",
    ]  # fmt: skip


def folder(path) -> pathlib.Path:
    """The folder of a distillation, its own folder around it for the logs."""
    path.mkdir()
    return path / "out"


def phase_losses(workdir, config) -> dict[str, dict[int, float]]:
    """The loss of every step by phase."""
    return {phase: losses(workdir / phase) for phase in stages.phases(config)}


def assert_losses_agree(one, other, config, rtol=1e-5):
    """Losses of 1e-5 are mean squares of small differences, so float32 leaves them fewer digits."""
    one, other = phase_losses(one, config), phase_losses(other, config)
    for phase, wanted in one.items():
        assert sorted(other[phase]) == sorted(wanted)
        assert min(wanted.values()) > 1e-6
        found = [other[phase][step] for step in wanted]
        np.testing.assert_allclose(found, list(wanted.values()), rtol=rtol, atol=1e-8, err_msg=phase)


@pytest.fixture(scope="module", params=["base", "ssr2"])
def undisturbed(request, tmp_path_factory):
    """A stage's config, its teacher, and the folder of its distillation through guidance, 8, 4 and 2 steps."""
    config, path = light(request.param), tmp_path_factory.mktemp(request.param)
    teacher, workdir = save_teacher(config, str(path / "teacher.safetensors")), folder(path / "one")
    assert wait(start(workdir, 1, *arguments(request.param, teacher)), 600) == [0], logs(workdir, 1)
    assert [row["phase"] for row in rows(workdir)] == ["guidance", "8", "4", "2", "2_stochastic"]
    return config, teacher, workdir


def test_killed_in_each_phase_it_ends_with_the_same_bits(undisturbed, tmp_path):
    config, teacher, wanted = undisturbed
    workdir = folder(tmp_path / "killed")
    for phase in stages.phases(config):
        processes = start(workdir, 1, *arguments(config.stage, teacher))
        until_step(workdir / phase, 3, processes, 600)
        os.kill(processes[0].pid, signal.SIGKILL)
        assert wait(processes) == [-signal.SIGKILL]
    assert wait(start(workdir, 1, *arguments(config.stage, teacher)), 600) == [0], logs(workdir, 1)
    assert_same_end(wanted, workdir, config)
    assert f"the distillation of {config.stage} is finished" in logs(workdir, 1)[0]


def evaluated(config, workdir, out, variant: str = "small"):
    """What mode evaluate writes of two clips."""
    command = [
        sys.executable, "-m", "ivideo.main", f"--config=configs/{config.stage}.py:{variant}", "--mode=evaluate",
        *light_network.ARGUMENTS, f"--workdir={workdir}", "--clips=2", f"--out={out}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_every_phase_is_evaluated(undisturbed, tmp_path):
    config, _, workdir = undisturbed
    told, found = evaluated(config, workdir, tmp_path / "phases.json")
    assert [(row["phase"], row["steps"]) for row in found] == [
        ("teacher", 4), ("guidance", 16), ("8", 8), ("4", 4), ("2", 2), ("2_stochastic", 2),
    ]  # fmt: skip
    assert [row["agreement"] for row in found[1:]] == [row["agreement"] for row in rows(workdir)]
    assert all(np.isfinite(list(quality(row).values())).all() and row["seconds_per_sample"] > 0 for row in found)
    assert len([line for line in told.splitlines() if line.startswith("| ")]) == 7  # the phases and their heading
    alone = evaluated(config, workdir, tmp_path / "alone.json", variant="small_distilled_4")[1]
    assert alone["table"] == found[3]["table"]


@pytest.mark.parametrize("undisturbed", ["ssr2"], indirect=True)  # which has all that the base has, and a clip
def test_two_processes_learn_as_one(undisturbed, tmp_path):
    """And both are stopped by a notice to one of them, in the second phase."""
    config, teacher, wanted = undisturbed
    workdir = folder(tmp_path / "two")
    processes = start(workdir, 2, *arguments(config.stage, teacher))
    until_step(workdir / "8", 2, processes, 600)
    processes[1].terminate()
    codes = wait(processes, 600)
    if codes != [0, 0]:  # the notice came in time
        assert codes == [75, 75], logs(workdir, 2)
        assert wait(start(workdir, 2, *arguments(config.stage, teacher)), 600) == [0, 0], logs(workdir, 2)
    assert_losses_agree(wanted, workdir, config)
    assert json.loads((workdir / "2_stochastic" / "finished.json").read_text())["row"]["agreement"] > 5


def test_eight_devices_learn_as_one(tmp_path, monkeypatch):
    """With the parameters of the student and of its teacher in eight parts."""
    monkeypatch.setattr(sharding, "MIN_SHARDED", 1)  # else nothing of a network this small is split
    config = tiny_config("ssr2", **{"train.mesh.data": 1, "train.mesh.fsdp": -1, "distill.agreement_every": 0})
    teacher = save_teacher(config, str(tmp_path / "teacher.safetensors"))
    for count in (1, 8):
        phases.distill(config, teacher, str(tmp_path / str(count)), devices=jax.devices()[:count])
    # Sums over eight devices have another order, and each phase's student is the next phase's teacher
    assert_losses_agree(tmp_path / "1", tmp_path / "8", config, rtol=5e-5)

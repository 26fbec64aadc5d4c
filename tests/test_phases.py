"""Distillation as a whole: its phases, what they leave, and what becomes of one that is stopped or damaged."""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from distillations import assert_same_end, distill, rows, save_teacher, tiny_config

from ivideo import stages
from ivideo.errors import UserError
from ivideo.training import guards, lock, loop, phases, students
from ivideo.weights import load_metadata, load_params

PHASES = ["guidance", "4", "2", "2_stochastic"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file of the original network's weights."""
    return save_teacher(tiny_config(), str(tmp_path_factory.mktemp("teacher") / "base.safetensors"))


@pytest.fixture(scope="module")
def done(teacher, tmp_path_factory):
    """A distillation that nothing disturbed: its folder, the steps that it compiled by their kind, its `Agreement`."""
    workdir, compiled, agreements = tmp_path_factory.mktemp("distillation"), {}, []
    make, agreement = phases.Distillation._jit_step, phases.Agreement

    def compiling(self, kind):
        assert kind not in compiled
        compiled[kind] = make(self, kind)
        return compiled[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases.Distillation, "_jit_step", compiling)
        patch.setattr(phases, "Agreement", lambda *args: agreements.append(agreement(*args)) or agreements[-1])
        distill(tiny_config(), teacher, workdir, profile_steps=(2, 3))
    (only,) = agreements
    return workdir, compiled, only


def test_every_phase_leaves_weights_for_its_sampler(done):
    workdir = done[0]
    assert sorted(p.name for p in workdir.iterdir() if p.is_dir()) == sorted([*PHASES, "teacher"])
    for phase, steps, sampler in zip(PHASES, (8, 4, 2, 2), ("ddim", "ddim", "ddim", "distilled"), strict=True):
        config = json.loads(load_metadata(students.weights_path(str(workdir), phase))["config"])
        assert (config["phase"], config["model"]["guidance_input"]) == (phase, True)
        assert (config["sample"]["steps"], config["sample"]["sampler"]) == (steps, sampler)
        assert len((workdir / phase / "metrics.jsonl").read_text().splitlines()) == 4
        assert any((workdir / phase / "tensorboard").iterdir())


def test_every_phase_has_a_row(done):
    found = rows(done[0])
    assert [(row["phase"], row["steps"], row["updates"]) for row in found] == [
        ("guidance", 8, 4), ("4", 4, 4), ("2", 2, 4), ("2_stochastic", 2, 4),
    ]  # fmt: skip
    assert all(0 < row["loss"] < 10 and 5 < row["agreement"] < 126 for row in found)
    assert all(row["seconds_per_sample"] > 0 for row in found)


def test_the_phase_that_runs_first_is_profiled(done):
    assert [path.parent.name for path in done[0].glob("*/profile")] == ["guidance"]
    assert len(list((done[0] / "guidance" / "profile").rglob("*.xplane.pb"))) == 1


def test_one_program_serves_all_rounds(done):
    compiled = done[1]
    assert {kind: step._cache_size() for kind, step in compiled.items()} == {
        "guidance": 1, "deterministic": 1, "stochastic": 1,
    }  # fmt: skip


def test_a_student_begins_as_its_teacher(done, teacher, monkeypatch):
    """The first as the original network's averaged weights, each later one as the student before, not its average."""
    workdir, begun = done[0], {}
    config = tiny_config()

    def run(task, folder, context, **_):
        state = task.initial_state(
            jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), task.shapes())
        )
        begun[pathlib.Path(folder).name] = jax.tree.map(np.asarray, state)
        raise SystemExit

    monkeypatch.setattr(loop, "run", run)
    for phase, before in zip(PHASES[:2], ("teacher", "guidance"), strict=True):
        problems = {name: None if name == phase else "" for name in ("teacher", *PHASES)}
        monkeypatch.setattr(students, "find_problems", lambda *_, problems=problems: problems)
        with pytest.raises(SystemExit):
            distill(config, teacher, workdir)
        state = begun[phase]
        wanted = load_params(students.weights_path(str(workdir), before))
        fresh = state.params.pop("guidance_embedding") if phase == "guidance" else None
        jax.tree.map(np.testing.assert_array_equal, state.params, wanted)
        if fresh is not None:
            assert not np.any(fresh["dense_1"]["kernel"])
        assert not state.ema and int(state.step) == 0


def test_a_finished_distillation_says_so_and_does_nothing(done, teacher, monkeypatch, caplog):
    before = {p: p.stat().st_mtime_ns for p in done[0].rglob("*")}
    monkeypatch.setattr(loop, "prepared", lambda *_: pytest.fail("a run began"))
    caplog.set_level("INFO", "ivideo")
    path = distill(tiny_config(), teacher, done[0])
    assert path == str(done[0] / "2_stochastic" / "weights.safetensors")
    assert f"the distillation of base is finished: {path} is for the sampler 'distilled' in 2 steps" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in done[0].rglob("*")} == before


@pytest.fixture
def quick(done, monkeypatch):
    """Makes a distillation of the same config take what the first one compiled."""
    _, compiled, agreement = done
    monkeypatch.setattr(phases.Distillation, "_jit_step", lambda self, kind: compiled[kind])
    monkeypatch.setattr(phases, "Agreement", lambda *_: agreement)


class Killed(BaseException):
    """As kill -9: the program does not catch it."""


def kill(patch, place, phase):
    """Raises `Killed` at a place of a phase."""
    run, numbers, save, finish = loop.run, loop._numbers, students.save_params, students.finish

    def reporting(metrics):
        reports.append(1)
        if len(reports) == 3:  # the newest checkpoint is of the step before
            raise Killed
        return numbers(metrics)

    def running(task, folder, context, **options):
        if pathlib.Path(folder).name == phase:
            patch.setattr(loop, "_numbers", reporting)
        return run(task, folder, context, **options)

    def saving(path, params, **options):
        save(path, params, **options)
        if pathlib.Path(path).parent.name == phase:
            raise Killed

    def finishing(workdir, name, *args, **options):
        finish(workdir, name, *args, **options)
        if name == phase:
            raise Killed

    reports = []
    if place == "in a step":
        patch.setattr(loop, "run", running)
    elif place == "after its weights":
        patch.setattr(students, "save_params", saving)
    else:
        patch.setattr(students, "finish", finishing)


def test_killed_in_every_phase_it_ends_with_the_same_bits(done, teacher, quick, tmp_path):
    kills = [("after its weights", "teacher")]
    kills += [(place, p) for p in PHASES for place in ("in a step", "after its weights", "after its record")]
    for place, phase in kills:
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, place, phase)
            with pytest.raises(Killed):
                distill(tiny_config(), teacher, tmp_path)
    distill(tiny_config(), teacher, tmp_path)
    assert_same_end(done[0], tmp_path, tiny_config())


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the distillation that nothing disturbed."""
    return pathlib.Path(shutil.copytree(done[0], tmp_path / "copy"))


@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
@pytest.mark.parametrize("phase", ["teacher", "4", "2_stochastic"])
def test_damaged_weights_are_named_and_made_again(how, phase, done, teacher, quick, copied, caplog):
    """From the phase's last checkpoint, or the teacher's file; the phases after it stay finished."""
    path = copied / phase / "weights.safetensors"
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] + (bytes([whole[-1] ^ 1]) if how == "changed" else b""))
    distill(tiny_config(), teacher, copied)
    assert f"{phase}/weights.safetensors is damaged" in caplog.text
    assert (copied / phase / "damaged").exists() == (how != "missing")
    assert_same_end(done[0], copied, tiny_config())


def test_a_phase_whose_teacher_was_made_again_otherwise_is_refused(teacher, quick, copied):
    """The weights are damaged, and so are the checkpoints: the phase begins anew, with another learning rate."""
    (copied / "4" / "finished.json").unlink()
    shutil.rmtree(copied / "4" / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(students, "finish", changed(students.finish))
        with pytest.raises(UserError, match=r"the teacher of .*/2 was not the student that is in .*/4 now: move"):
            distill(tiny_config(), teacher, copied)


def test_a_phase_that_began_with_another_teacher_is_refused(teacher, quick, copied):
    """Phase 2 was stopped half-way, and then phase 4 was done again and ended otherwise."""
    (copied / "2" / "finished.json").unlink()
    shutil.rmtree(copied / "2_stochastic")
    (copied / "4" / "finished.json").unlink()
    before = sorted(p for p in (copied / "2").rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(students, "finish", changed(students.finish))
        with pytest.raises(
            UserError, match=r"/2 began with another teacher than the weights that are in .*/4 now: move"
        ):
            distill(tiny_config(), teacher, copied)
    assert sorted(p for p in (copied / "2").rglob("*")) == before


def changed(finish):
    """`students.finish`, of parameters that are not quite those."""
    return lambda workdir, phase, params, **options: finish(
        workdir, phase, jax.tree.map(lambda p: p + 1, params), **options
    )


def test_a_lower_end_goes_on_from_the_phases_that_are_there(teacher, quick, copied, monkeypatch):
    """8, 4, 2 steps, then 1: nothing is done twice, and the student for 2 steps by the other sampler stays."""
    config, begun = tiny_config(**{"distill.end_steps": 1}), []
    run = loop.run
    monkeypatch.setattr(
        loop, "run", lambda task, folder, *args, **options: begun.append(folder) or run(task, folder, *args, **options)
    )
    distill(config, teacher, copied)
    assert begun == [str(copied / "1"), str(copied / "1_stochastic")]
    assert (copied / "2_stochastic" / "finished.json").exists()
    assert [row["phase"] for row in rows(copied)] == ["guidance", "4", "2", "1", "1_stochastic"]


def original(tmp_path, **changes):
    """A file of another original network's weights."""
    return save_teacher(tiny_config(**changes), str(tmp_path / "other.safetensors"), seed=1)


def student(tmp_path):
    """A file of a student's weights."""
    config = stages.distilled(tiny_config())
    return save_teacher(config, str(tmp_path / "student.safetensors"))


def training_run(folder):
    """A folder that a training run has been in."""
    (folder / "checkpoints" / "4").mkdir(parents=True)


MISTAKES = {
    "another network": ({}, lambda tmp: original(tmp, **{"model.channels": (8,), "model.head_dim": 8}), None,
        r"other.safetensors is of another network: config.model.channels is \[8\] there and \[4\] in this config"),
    "no teacher there": ({}, lambda tmp: str(tmp / "none.safetensors"), None, "no weights at .*none.safetensors"),
    "no checkpoints": ({}, lambda tmp: str(tmp), None, "--teacher=.* has no checkpoints: give the folder"),
    "a student": ({}, student, None, "student.safetensors is itself a student of distillation, of phase 2_stoch"),
    "7 steps": ({"distill.teacher_steps": 256, "distill.end_steps": 7}, None, None, "end_steps = 7, .*_steps = 256"),
    "end above start": ({"distill.end_steps": 16}, None, None, "config.distill.end_steps = 16, .*teacher_steps = 8"),
    "weights": ({"distill.w_min": 5.0}, None, None, "config.distill.w_min = 5.0, config.distill.w_max = 4.0: expected"),
    "a training run's folder": ({}, None, training_run, "/new has checkpoints of another run: give a new folder"),
    "a batch that does not divide": ({"train.accumulate": 3}, None, None, "batch_size = 8 cannot be split"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_small_a_mistake_is_one_line_and_writes_nothing(mistake, teacher, tmp_path, monkeypatch):
    changes, make_teacher, make_folder, words = MISTAKES[mistake]
    folder = tmp_path / "new"
    if make_folder:
        make_folder(folder)
    given = make_teacher(tmp_path) if make_teacher else teacher
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(loop, "prepared", lambda *_: pytest.fail("a run began"))
    with pytest.raises(UserError, match=words) as told:
        distill(tiny_config(**changes), given, folder)
    assert "\n" not in str(told.value)
    assert sorted(tmp_path.rglob("*")) == before


AGAIN = {
    "another teacher": ({}, original, r"started with the teacher .*base.safetensors \(\w+\), and --teacher=.*other"),
    "other steps": (
        {"distill.teacher_steps": 16},
        None,
        r"config.distill.teacher_steps = 8, and it is 16 now",
    ),
    "another schedule": ({"diffusion.logsnr_shift": 1.0}, None, "config.diffusion.logsnr_shift = -2.5, and it is 1.0"),
    "another network": (
        {"model.data_std": 1.0},
        None,
        "is of another network: config.model.data_std is 0.1",
    ),
    "its own student": (
        {},
        lambda tmp: str(tmp / "copy" / "4"),
        "--teacher=.*/4 is a distillation: give the training run",
    ),
}


@pytest.mark.parametrize("mistake", AGAIN)
def test_a_distillation_does_not_change_what_it_is(mistake, teacher, copied, tmp_path, monkeypatch):
    changes, make_teacher, words = AGAIN[mistake]
    config = tiny_config(**changes)
    given = make_teacher(tmp_path) if make_teacher else teacher
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    with pytest.raises(UserError, match=words):
        distill(config, given, copied)
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before


def test_a_teacher_whose_run_went_on_or_is_gone_was_copied(done, copied, tmp_path, quick, caplog):
    """The distillation goes on with the weights that it began with."""
    record = json.loads((copied / "teacher" / "finished.json").read_text())
    record["teacher"] = {"source": str(tmp_path / "run"), "identity": "step 4"}
    (copied / "teacher" / "finished.json").write_text(json.dumps(record))
    shutil.rmtree(copied / "2_stochastic")
    distill(tiny_config(), tmp_path / "run", copied)
    assert_same_end(done[0], copied, tiny_config())


def test_small_another_run_has_the_folder(teacher, tmp_path):
    with lock.held(str(tmp_path)), pytest.raises(UserError, match="is in use by process"):
        distill(tiny_config(), teacher, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_training_in_the_folder_of_a_distillation_is_refused(copied):
    with pytest.raises(UserError, match="--workdir=.* is the folder of a distillation: give another one"):
        loop.train(tiny_config(), str(copied))


def test_told_to_stop_it_leaves_as_training_does(teacher, quick, tmp_path, monkeypatch, caplog):
    begin = phases.Phase.initial_state

    def told(self, where):
        if self.name.startswith("base 4 "):
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(self, where)

    monkeypatch.setattr(phases.Phase, "initial_state", told)
    with pytest.raises(SystemExit) as left:
        distill(tiny_config(), teacher, tmp_path)
    assert left.value.code == guards.PREEMPTED
    assert f"stopped at step 0: the same command goes on from the newest checkpoint in {tmp_path / '4'}" in caplog.text
    assert [row["phase"] for row in rows(tmp_path)] == ["guidance"]

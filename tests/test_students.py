"""The students of a distillation in use: which weights a config finds, what is refused, and their evaluation."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from distillations import random_params, tiny_config

from configs import cascade as cascade_config
from ivideo import checks, files, stages
from ivideo.errors import UserError
from ivideo.evaluation import distillation, evaluate
from ivideo.sampling import cascade
from ivideo.training import report, students, trained
from ivideo.weights import load_metadata

PHASES = ("guidance", "4", "2", "2_stochastic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A distillation whose students have random weights; the last phase is not finished."""
    path, config = str(tmp_path_factory.mktemp("distillation")), tiny_config()
    students.finish(path, students.TEACHER, random_params(config), config=config, teacher={"source": "run"})
    for number, phase in enumerate(PHASES[:-1]):
        student = stages.distilled(config, phase)
        row = {
            "phase": phase, "steps": student.sample.steps, "agreement": 30.0 - number, "seconds_per_sample": 0.5,
            "teacher_seconds_per_sample": 1.5,
        }  # fmt: skip
        students.finish(path, phase, random_params(student, number), config=student, teacher="digest", row=row)
    return path


def test_small_a_variant_finds_its_student_in_the_folder(folder):
    for number, phase in enumerate(PHASES[:-1]):
        config = stages.distilled(tiny_config(), phase)
        for source in (folder, f"{folder}/{phase}", f"{folder}/{phase}/weights.safetensors"):
            assert trained.check(config, source) == trained.check(config, folder)
            jax.tree.map(np.testing.assert_array_equal, trained.load(config, source), random_params(config, number))


@pytest.fixture
def read(folder, tmp_path, monkeypatch):
    """A copy of the distillation and a function that returns its problems and the phases whose weights were read."""
    copy, phases, digest = pathlib.Path(shutil.copytree(folder, tmp_path / "copy")), [], files.digest
    monkeypatch.setattr(files, "digest", lambda path: phases.append(pathlib.Path(path).parent.name) or digest(path))

    def find():
        phases.clear()
        return students.find_problems(str(copy), tiny_config()), sorted(phases)

    return copy, find


def damage(path, *, unnoticed):
    """Changes the last byte of a file. `unnoticed`: also sets back its time of change, as a fault of the disk does."""
    kept, whole = path.stat(), path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    if unnoticed:
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))


def test_small_weights_are_read_whole_where_they_teach_next(read):
    copy, find = read
    whole = {"teacher": "", "guidance": "", "4": "", "2": "", "2_stochastic": None}
    assert find() == (whole, ["2"])
    os.utime(copy / "guidance" / "weights.safetensors")  # such as by a copy of the folder
    assert find() == (whole, ["2", "guidance"])
    damage(copy / "2" / "weights.safetensors", unnoticed=True)
    damage(copy / "4" / "weights.safetensors", unnoticed=True)
    changed = "the file has changed since it was written"
    assert find() == ({**whole, "2": changed, "4": changed}, ["2", "4", "guidance"])


def test_small_damaged_weights_that_taught_before_are_noticed(read):
    copy, find = read
    damage(copy / "teacher" / "weights.safetensors", unnoticed=False)
    (copy / "4" / "weights.safetensors").unlink()
    problems, phases = find()
    assert problems["teacher"] == "the file has changed since it was written"
    assert problems["4"] == "the file is missing"
    assert phases == ["2", "guidance", "teacher"]


def test_small_of_a_finished_distillation_the_last_student_is_read_whole(read):
    copy, find = read
    shutil.copytree(copy / "2", copy / "2_stochastic")
    problems, phases = find()
    assert set(problems.values()) == {""} and phases == ["2_stochastic"]


def test_small_mismatches_say_which_variant_to_choose(folder):
    original, student = tiny_config(), stages.distilled(tiny_config(), "4")
    with pytest.raises(UserError, match=r"2/weights.safetensors is of phase 2 .*the variant .*:small_distilled_2"):
        trained.check(original, folder)
    with pytest.raises(UserError, match=r"is of an original network, .* choose the variant --config=FILE:small, or"):
        trained.check(student, f"{folder}/teacher/weights.safetensors")
    with pytest.raises(UserError, match=r"is of phase guidance of distillation, .*:small_distilled_guidance, or"):
        trained.check(student, f"{folder}/guidance")
    with pytest.raises(UserError, match=r"no finished phase 2_stochastic .*\(finished: guidance, 4, 2\): go on"):
        trained.check(stages.distilled(original), folder)
    with pytest.raises(UserError, match="expected the original's; choose the variant without _distilled"):
        checks.check_original(student)


def test_small_a_student_is_asked_for_what_it_was_distilled_for(folder):
    config = stages.distilled(tiny_config(**{"distill.w_max": 8.0, "sample.weight": 6.0}), "4")
    with pytest.raises(UserError, match=r"config.sample.weight = 6.0: .* guidance weights from 0.0 to 4.0; choose one"):
        trained.check(config, folder)
    config = stages.distilled(tiny_config(**{"diffusion.logsnr_shift": 0.0}), "4")
    with pytest.raises(UserError, match=r"was distilled with config.diffusion.logsnr_shift = -2.5, and it is 0.0 in"):
        trained.check(config, folder)


def test_small_an_exported_student_says_what_it_is_for(folder, tmp_path):
    config, out = stages.distilled(tiny_config(), "4"), str(tmp_path / "base.safetensors")
    trained.export(config, folder, out)
    kept = json.loads(load_metadata(out)["config"])
    assert (kept["phase"], kept["sample"]["sampler"], kept["sample"]["steps"]) == ("4", "ddim", 4)
    trained.check(config, out)
    with pytest.raises(UserError, match=":small_distilled_4"):
        trained.check(tiny_config(), out)


def test_a_cascade_takes_distilled_and_original_stages(folder, tmp_path):
    """Each stage's weights are compared with its own config, so a folder of files can mix them."""
    config = stages.distilled(cascade_config.get_config("small"), only=["ssr2"])
    checks.check(config)
    assert [stage.phase for stage in cascade.select(config)] == ["", "", "", "2_stochastic", "", "", ""]
    for stage in cascade.select(config, "base", "ssr2"):
        students.save_params(
            str(tmp_path / f"{stage.stage}.safetensors"), random_params(stage), metadata=students.config_metadata(stage)
        )
    sources = trained.find(cascade.select(config, "base", "ssr2"), weights=str(tmp_path))
    for stage in cascade.select(config, "base", "ssr2"):
        trained.check(stage, sources[stage.stage])
    with pytest.raises(UserError, match=r"ssr2.safetensors is of phase 2_stochastic .*:small_distilled_2_stochastic"):
        trained.check(cascade_config.get_config("small").stages.ssr2, sources["ssr2"])


def quality(share):
    row = {"clips": 1, **dict.fromkeys(("background", "colour", "motion", "shape", "coarse", "all"), share)}
    return {"table": {"seen": row, "held_out": row, "largest_drift": 1.0}, "clips": []}


def test_small_a_row_per_phase_and_a_plot(folder, tmp_path, monkeypatch, capsys):
    used = []

    def following(configs, *, sources, **_):
        used.append((configs[0].phase, configs[0].sample.steps, sources["base"]))
        return quality(1 / len(used))

    monkeypatch.setattr(evaluate, "prompt_following", following)
    drawn = []
    monkeypatch.setattr(distillation, "draw", lambda rows, path: drawn.append(path))
    out = tmp_path / "phases.json"
    distillation.evaluate_phases(tiny_config(), folder, clips=2, seed=0, out=str(out))
    files = [f"{folder}/{phase}/weights.safetensors" for phase in ("teacher", *PHASES[:-1])]
    steps = (tiny_config().sample.steps, 8, 4, 2)
    assert used == list(zip(("", *PHASES[:-1]), steps, files, strict=True))
    assert capsys.readouterr().out.splitlines() == [
        "| phase | steps | agreement (dB) | seconds per sample | seen captions (%) | held-out captions (%) |",
        "|---|--:|--:|--:|--:|--:|",
        "| teacher | 4 | – | 0.75 | 100.0 | 100.0 |",  # 1.5 s were of 8 steps
        "| guidance | 8 | 30.0 | 0.5 | 50.0 | 50.0 |",
        "| 4 | 4 | 29.0 | 0.5 | 33.3 | 33.3 |",
        "| 2 | 2 | 28.0 | 0.5 | 25.0 | 25.0 |",
    ]
    assert [row["phase"] for row in json.loads(out.read_text())] == ["teacher", *PHASES[:-1]]
    assert drawn == [str(tmp_path / "phases.png")]
    with pytest.raises(UserError, match="phases.json exists"):
        distillation.evaluate_phases(tiny_config(), folder, clips=2, seed=0, out=str(out))


def test_small_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"phase": "8", "steps": 8, "agreement": 30.0, "seconds_per_sample": 0.5, "table": quality(0.5)["table"]},
        {
            "phase": "4",
            "steps": 4,
            "agreement": 28.0,
            "seconds_per_sample": 0.2,
            "table": {"stage": 30.0, "trivial": 1.0},
        },
    ]
    for row in rows:
        distillation.draw([row], str(tmp_path / "plot.png"))
        assert pathlib.Path(tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_small_errors_name_the_learning_rate_of_the_task():
    assert report.learning_rate_key(tiny_config()) == "config.train.learning_rate"
    assert report.learning_rate_key(stages.distilled(tiny_config())) == "config.distill.learning_rate"

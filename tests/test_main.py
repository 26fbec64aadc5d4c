"""The command line: every mistake gives one readable line and exit code 2, and leaves no files behind."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from ivideo import main, options
from ivideo.modes import COMMON, MODES, read_by

ROOT = pathlib.Path(__file__).parent.parent
SMALL = "--config=configs/base.py:small"
DEMO = "--config=configs/base.py:demo"
SAMPLE = ["--mode=sample", "--prompt=a red star", "--out={tmp}/new.mp4"]

# name: (arguments, what the line must say)
MISTAKES = {
    "no_config": ([], ["--config is missing", "configs/base.py"]),
    "missing_config": (["--config=configs/none.py"], ["configs/none.py", "--config=configs/base.py"]),
    "unknown_variant": (["--config=configs/base.py:huge"], ["'huge'", "paper, demo, colab, small"]),
    "unknown_key": ([SMALL, "--config.train.batchsize=3"], ["train.batchsize", "train.batch_size"]),
    "key_below_a_value": ([SMALL, "--config.sample.guidance.weight=3"], ["sample.guidance.weight", "sample.weight"]),
    "wrong_type": ([SMALL, "--config.train.steps=many"], ["many"]),
    "wrong_choice": ([SMALL, "--config.sample.sampler=euler", "--workdir={tmp}/w"], ["'euler'", "ddim, ancestral"]),
    "unknown_flag": ([SMALL, "--workdirr=x"], ["workdirr", "--workdir"]),
    "unknown_mode": ([SMALL, "--mode=sampel"], ["sampel", "sample"]),
    "stray_word": ([SMALL, "train"], ["'train'", "--name=value"]),
    "no_workdir": ([SMALL], ["--workdir is missing"]),
    "bucket": ([SMALL, "--workdir=gs://bucket/run"], ["gs://bucket/run", "gcsfuse"]),
    "size": ([SMALL, "--config.video.height=9", "--workdir={tmp}/w"], ["9×8", "strides (2,)", "multiples of 2"]),
    "accumulate": ([SMALL, "--config.train.accumulate=3", "--workdir={tmp}/w"], ["8", "3", "choose a multiple"]),
    "mesh": ([SMALL, "--config.train.mesh.fsdp=3", "--workdir={tmp}/w"], ["fsdp = 3", "on 1 devices", "must be 1"]),
    "topology": ([SMALL, "--mode=compile", "--topology=v9:4x4"], ["'v9:4x4'", "v5e:4x4"]),
    "no_topology": ([SMALL, "--mode=compile"], ["--topology is missing"]),
    "processes": ([SMALL, "--coordinator=here:1", "--workdir={tmp}/w"], ["--num_processes", "--process_id"]),
    "port": (
        [SMALL, "--coordinator=here:70000", "--num_processes=2", "--process_id=0", "--workdir={tmp}/w"],
        ["--coordinator=here:70000", "from 1 to 65535"],
    ),
    "served_by_several": (
        [DEMO, "--mode=serve", "--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=0"],
        ["mode serve runs as one process", "leave out --distributed"],
    ),
    "no_coordinator": ([SMALL, "--num_processes=2", "--process_id=0", "--workdir={tmp}/w"], ["--coordinator missing"]),
    "samples": (
        ["--config=configs/ssr1.py:small", "--config.train.sample_every=5", "--workdir={tmp}/w"],
        ["sample_every = 5", "expected 0"],
    ),
    "text_batch": ([SMALL, "--config.text.batch=0", "--workdir={tmp}/w"], ["config.text.batch = 0"]),
    "profile": ([SMALL, "--profile_steps=5", "--workdir={tmp}/w"], ["--profile_steps=5", "10,15"]),
    "unread_flag": (
        [SMALL, "--mode=distill", "--teacher={tmp}/t", "--workdir={tmp}/w", "--weights={tmp}/x"],
        ["mode distill does not read --weights", "--teacher, --workdir, --profile_steps"],
    ),
    "students_start": (
        [SMALL, "--mode=distill", "--teacher={tmp}/t", "--workdir={tmp}/w", "--config.train.start=x.safetensors"],
        ["config.train.start = x.safetensors", "--teacher={tmp}/t"],
    ),
    "no_run": ([SMALL, "--mode=goodput", "--workdir={tmp}/none"], ["{tmp}/none"]),
    "no_prompt": ([SMALL, "--mode=sample", "--out={tmp}/new.mp4"], ["--prompt", "--prompts_file"]),
    "no_out": ([SMALL, "--mode=sample", "--prompt=x"], ["--out is missing"]),
    "no_prompts_file": ([SMALL, "--mode=sample", "--prompts_file={tmp}/p", "--out={tmp}/o"], ["{tmp}/p", "UTF-8"]),
    "no_weights": ([SMALL, *SAMPLE], ["--workdir is missing", "demo variant"]),
    "no_checkpoints": ([SMALL, *SAMPLE, "--workdir={tmp}/none"], ["{tmp}/none has no checkpoints"]),
    "output_exists": ([DEMO, *SAMPLE[:2], "--out={tmp}/old.mp4"], ["old.mp4 exists", "--overwrite"]),
    "output_kind": ([DEMO, *SAMPLE[:2], "--out={tmp}/new.avi"], [".avi", ".mp4, .mov, .webm or .gif"]),
    "no_data": (["--config=configs/base.py:small", "--config.data.source=tfds", "--workdir={tmp}/w"], ["data"]),
    "no_encoder": (["--config=configs/base.py", "--workdir={tmp}/w"], ["config.text.checkpoint", "T5"]),
}  # fmt: skip


def ivideo(*arguments, **options):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "ivideo.main", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize("name", [name for name in MISTAKES if name != "mesh"])  # that one is of a single device
def test_small_mistakes_are_one_line(name, tmp_path, command_line, monkeypatch, capsys, caplog):
    def in_this_process(*arguments):
        code, said = main.main(["ivideo", *arguments]), capsys.readouterr()
        logged = [record.getMessage() for record in caplog.records]
        return code, "\n".join([*logged, said.err])

    monkeypatch.chdir(ROOT)
    check_mistake(name, tmp_path, in_this_process)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_of_a_process(name, tmp_path):
    def in_its_own(*arguments):
        done = ivideo(*arguments)
        return done.returncode, done.stderr

    check_mistake(name, tmp_path, in_its_own)


def check_mistake(name, tmp_path, run):
    arguments, wanted = MISTAKES[name]
    (tmp_path / "old.mp4").write_bytes(b"kept")
    code, said = run(*(a.format(tmp=tmp_path) for a in arguments))
    assert code == 2, said
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    for part in wanted:
        assert part.format(tmp=tmp_path) in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["old.mp4"]  # nothing was written
    assert (tmp_path / "old.mp4").read_bytes() == b"kept"


def test_small_help_shows_modes_and_an_example():
    done = ivideo("-h")
    text = done.stdout
    assert done.returncode == 0
    for part in ("--mode=sample", "--prompt", "--workdir", "configs/base.py:demo", "--help --mode=NAME"):
        assert part in text
    assert [line.split()[0] for line in text.partition("The modes:\n\n")[2].split("\n\n")[0].splitlines()] == list(
        MODES
    )
    assert not done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_small_help_of_a_mode_lists_its_flags(mode, command_line, capsys):
    with pytest.raises(SystemExit) as e:
        main.main(["ivideo", "--help", f"--mode={mode}"])
    assert e.value.code == 0
    listed = re.findall(r"^  --(?:\[no\])?(\w+):", capsys.readouterr().out, re.M)
    assert sorted(listed) == sorted({*read_by(mode)} - {"mode"})


def test_small_every_flag_is_read_by_a_mode():
    own = {flag.name for flag in options.own()}
    assert own == {*COMMON, "config", *(name for mode in MODES.values() for name in mode.flags)}


def test_small_help_of_an_unknown_mode(command_line, capsys):
    assert main.main(["ivideo", "--mode", "sampel", "-h"]) == 2
    assert "--mode=sampel is unknown: expected one of train, " in capsys.readouterr().err


def test_config_from_another_folder():
    """A config given by its whole path finds its neighbours wherever the command is run."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "ivideo.main",
        f"--config={ROOT}/configs/base.py:small",
        "--mode=describe",
        "--json",
    ]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert '"variant": "small"' in done.stdout


def test_streams_that_the_shell_closed_are_nowhere(tmp_path):
    """No file gets their numbers, and a mistake still has its exit code; so has one where nobody reads stderr."""
    program = "import os, sys; from ivideo.main import _open_streams, main; _open_streams()\n"
    program += "number = os.open('/dev/null', 0); sys.exit(99 if number < 3 else main(['ivideo', '--config=none']))"
    for closed in ("2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2> >(exit 0)"):
        command = ["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program]
        assert subprocess.run(command, cwd=ROOT, timeout=100, capture_output=True).returncode == 2, closed

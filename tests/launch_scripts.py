"""Runs the launch scripts, with other programs in place of gcloud, ssh and kubectl."""

import os
import pathlib
import shlex
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
RUN = ["--", "--config=configs/ssr2.py", "--workdir=/mnt/runs/a b"]
PORTS = ("x", "0", "010", "-1", "65536", "70000", "99999999999999999999", "8476.0", "")
XPK = ["--cluster=c", "--zone=z", "--type=v6e-64"]
MANIFEST = ["--image=eu/ivideo:1", "--accelerator=tpu-v6e-slice", "--topology=8x8", "--hosts=16"]


def launch(script, *arguments, env=None):
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
    )


def printed(*arguments) -> list[list[str]]:
    """The commands of a dry run, as the words that a shell makes of them."""
    done = launch(*arguments, "--dry_run") if "--" not in arguments else launch(
        *arguments[: arguments.index("--")], "--dry_run", *arguments[arguments.index("--") :]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def fake(folder, name, script):
    """A program of this name that writes its arguments to NAME.log and then does as the script says."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(
        f'#!/usr/bin/env bash\necho "$@" >> "{folder}/{name}.log"\nruns=$(wc -l < "{folder}/{name}.log")\n{script}\n'
    )
    path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PAUSE": "0"}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def runs(folder, name) -> int:
    log = folder / f"{name}.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def refusal(script, arguments, capsys) -> str:
    """What a Python script's `main` says of wrong arguments: one line that begins with its name, and exit code 2."""
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"{script.__name__}.py: ") and error.count("\n") == 1
    return error

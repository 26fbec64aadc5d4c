"""The scripts that start runs elsewhere: what they would run, when they run it again, and their mistakes."""

import contextlib
import os
import pathlib
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
RUN = ["--", "--config=configs/ssr2.py", "--workdir=/mnt/runs/a b"]
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


def runs(folder, name) -> int:
    log = folder / f"{name}.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_small_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "-x", "-P", str(LAUNCH), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["tpu_vm.sh", "hosts.sh", "gke.sh"])
def test_small_help_is_the_head_of_the_file(script):
    done = launch(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script}" in done.stdout and "--config=configs/ssr2.py" in done.stdout
    assert "set -e" not in done.stdout


def test_small_create_a_slice():
    wanted = (
        "gcloud compute tpus queued-resources create pod --node-id=pod --zone=us-east5-a --accelerator-type=v5p-128 "
        "--runtime-version=v2-alpha-tpuv5"
    )
    assert printed("tpu_vm.sh", "create", "pod", "--zone=us-east5-a", "--type=v5p-128") == [wanted.split()]
    spot = printed("tpu_vm.sh", "create", "pod", "--zone=us-east5-a", "--type=v6e-64", "--spot")
    assert spot == [[*wanted.replace("v5p-128", "v6e-64").replace("tpuv5", "tpuv6e").split(), "--spot"]]


def test_small_install_and_run_on_every_host():
    (pack, copy, install) = printed("tpu_vm.sh", "install", "pod", "--zone=z")
    assert pack[0] == "tar" and {"--exclude=.git", "--exclude=.venv", "--exclude=*.egg-info"} < set(pack)
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"] and copy[-2:] == ["--worker=all", "--zone=z"]
    assert any('uv pip install --quiet --python .venv ".[tpu]"' in word for word in install)
    ((*start, command, zone),) = printed("tpu_vm.sh", "run", "pod", "--zone=z", *RUN)
    assert start == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--worker=all"] and zone == "--zone=z"
    # what the host's shell makes of it
    words = shlex.split(command.removeprefix("--command="), comments=False)
    assert "--workdir=/mnt/runs/a b" in words and "--distributed" in words


def test_small_what_installing_does_here_and_on_a_host(tmp_path):
    """Build outputs do not travel; the environment gets a Python that setup.py takes, also the second time."""
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    for name in ("launch", "ivideo/__pycache__", ".git", "runs", ".venv", "venv", "build", "ivideo.egg-info"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "file").touch()
    for script in SCRIPTS:
        shutil.copy(script, checkout / "launch")
    # gcloud's ssh runs the command here, as a host with this home would
    line = 'for word; do [[ $word != --command=* ]] || bash -c "${word#--command=}"; done'
    env = {**fake(tmp_path / "bin", "gcloud", line), "HOME": str(home)}
    fake(tmp_path / "bin", "python3", "")
    fake(home / ".local" / "bin", "uv", "")
    # and the archive is the test's own
    fake(tmp_path / "bin", "tar", f'exec {shutil.which("tar")} "${{@//\\/tmp\\/ivideo.tar.gz/{tmp_path}/archive}}"')
    for _ in range(2):
        done = subprocess.run(
            [str(checkout / "launch" / "tpu_vm.sh"), "install", "pod", "--zone=z"],
            env={**os.environ, **env}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (home / "ivideo").iterdir()} == {"launch", "ivideo"}
    assert not list((home / "ivideo" / "ivideo").iterdir())
    assert (tmp_path / "bin" / "python3.log").read_text() == 2 * "-m pip install --user --quiet uv\n"
    assert (home / ".local" / "bin" / "uv.log").read_text() == 2 * (
        "venv --quiet --clear --python 3.12 .venv\npip install --quiet --python .venv .[tpu]\n"
    )


def test_small_help_says_that_a_slice_taken_back_stays_away():
    text = " ".join(launch("tpu_vm.sh", "--help").stdout.split())
    assert "nothing here makes another" in text
    assert "`delete` what is left of its request, then `create`, `install` and `run`" in text


@pytest.mark.parametrize(
    ("codes", "count", "wanted"), [("75 76 134 0", 4, 0), ("77 1", 2, 1), ("75 75 75 75 75", 4, 75)]
)
def test_small_a_run_that_can_go_on_does(tmp_path, codes, count, wanted):
    env = fake(tmp_path, "gcloud", f'codes=({codes}); exit "${{codes[runs - 1]}}"')
    done = launch("tpu_vm.sh", "run", "pod", "--zone=z", *RUN, env={**env, "RESTARTS": "3"})
    assert (done.returncode, runs(tmp_path, "gcloud")) == (wanted, count)
    assert done.stderr.count("again in 0 s") == count - 1


@pytest.mark.parametrize(("long", "count", "wanted"), [("0", 6, 0), ("3600", 3, 75)])
def test_small_restarts_count_in_a_row(tmp_path, long, count, wanted):
    """With LONG=0 every run is one that went well for long."""
    env = fake(tmp_path, "gcloud", "((runs <= 5)) && exit 75; exit 0")
    done = launch("tpu_vm.sh", "run", "pod", "--zone=z", *RUN, env={**env, "RESTARTS": "2", "LONG": long})
    assert (done.returncode, runs(tmp_path, "gcloud")) == (wanted, count)
    assert ("after 2 restarts in a row: giving up" in done.stderr) == (wanted != 0)


def test_small_one_process_a_host():
    found = printed("hosts.sh", "a,b", *RUN)
    assert [command[:5] for command in found] == [["ssh", "-tt", "-o", "BatchMode=yes", host] for host in "ab"]
    for i, command in enumerate(found):
        words = shlex.split(command[5])
        assert words[:2] == ["cd", "ivideo"]
        assert words[3:9] == [
            ".venv/bin/python", "-m", "ivideo.main", "--coordinator=a:8476", "--num_processes=2", f"--process_id={i}"
        ]  # fmt: skip
        assert words[-3:] == ["--workdir=/mnt/runs/a b;", "exit", "$?"]


@pytest.mark.parametrize(("first", "later", "count", "wanted"), [(77, 0, 4, 0), (1, 0, 2, 1)])
def test_small_hosts_start_again_together(tmp_path, first, later, count, wanted):
    env = fake(tmp_path, "ssh", f"echo hello; ((runs <= 2)) && exit {first}; exit {later}")
    done = launch("hosts.sh", "a,b", *RUN, env=env)
    assert (done.returncode, runs(tmp_path, "ssh")) == (wanted, count)
    assert {line for line in done.stdout.splitlines() if "hello" in line} == {"a: hello", "b: hello"}


def test_small_a_process_that_jax_aborts_is_started_again(tmp_path):
    """As ssh, which leaves with 255 where a signal ended what it ran."""
    program = "import subprocess as s, sys; n = s.call(['bash', '-c', sys.argv[-1]]); sys.exit(n if n >= 0 else 255)"
    env = fake(tmp_path, "ssh", f'exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} "$@"')
    there = tmp_path / "check out" / ".venv" / "bin"
    fake(there, "python", "ulimit -c 0; ((runs > 1)) || kill -ABRT $$")
    done = launch("hosts.sh", "a", f"--folder={there.parents[1]}", *RUN, env=env)
    assert (done.returncode, runs(there, "python")) == (0, 2), done.stdout + done.stderr
    assert "left with 134: again in 0 s" in done.stderr
    assert (there / "python.log").read_text().splitlines()[0].endswith("--workdir=/mnt/runs/a b")

# What is started in the background may ignore SIGINT, which a shell script cannot change
HEEDING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", ["run", "pause"])
def test_small_hosts_end_with_their_script(tmp_path, what, number):
    # whatever the script starts holds the pipe open until it ends
    ours, theirs = os.pipe()
    env = {**fake(tmp_path, "ssh", "exec sleep 60" if what == "run" else "exit 75"), "PAUSE": "60"}
    script = subprocess.Popen(
        [sys.executable, "-c", HEEDING, str(LAUNCH / "hosts.sh"), "a,b", *RUN],
        env={**os.environ, **env}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=[theirs],
    )  # fmt: skip
    os.close(theirs)
    try:
        until = time.monotonic() + 30
        if what == "pause":
            assert "again in 60 s" in script.stderr.readline()
        while runs(tmp_path, "ssh") < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        script.send_signal(number)
        _, errors = script.communicate(timeout=15)
        assert (script.returncode, errors) == (143, "")
        assert select.select([ours], [], [], 15)[0] and os.read(ours, 1) == b""
    finally:
        os.close(ours)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)


def test_small_manifest_of_a_jobset():
    yaml = pytest.importorskip("yaml")
    done = launch("gke.sh", "render", "ssr2", *MANIFEST, *RUN, 'a "quoted" word')
    found = yaml.safe_load(done.stdout)
    assert (found["kind"], found["metadata"]["name"]) == ("JobSet", "ssr2")
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 50
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch("[A-Za-z][A-Za-z0-9_,:]*", rule["name"])  # what JobSet takes
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 16
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "ivideo", "operator": "In", "values": [1, 2]}}
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    (container,) = pod["containers"]
    assert container["name"] == "ivideo"
    assert container["args"] == ["-m", "ivideo.main", "--distributed", *RUN[1:], 'a "quoted" word']
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_small_apply_hands_the_manifest_to_kubectl(tmp_path):
    env = fake(tmp_path, "kubectl", f'cat > "{tmp_path}/manifest"')
    assert launch("gke.sh", "apply", "ssr2", *MANIFEST, *RUN, env=env).returncode == 0
    assert (tmp_path / "kubectl.log").read_text() == "apply -f -\n"
    assert (tmp_path / "manifest").read_text() == launch("gke.sh", "render", "ssr2", *MANIFEST, *RUN).stdout


def test_small_xpk():
    (command,) = printed("gke.sh", "xpk", "ssr2", "--image=i", "--cluster=c", "--zone=z", "--type=v6e-64", *RUN)
    assert command[:4] == ["xpk", "workload", "create", "--workload=ssr2"]
    assert {"--cluster=c", "--zone=z", "--tpu-type=v6e-64", "--docker-image=i", "--max-restarts=50"} < set(command)
    assert shlex.split(command[-1])[-1] == "--workdir=/mnt/runs/a b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpu_vm.sh"], "no action: expected create, install"),
        (["tpu_vm.sh", "start", "pod"], "action 'start' is unknown: expected create"),
        (["tpu_vm.sh", "run"], "no name"),
        (["tpu_vm.sh", "run", "pod", *RUN], "--zone is missing"),
        (["tpu_vm.sh", "run", "pod", "--zone=z"], "no arguments of ivideo.main"),
        (["tpu_vm.sh", "create", "pod", "--zone=z"], "--type is missing"),
        (["tpu_vm.sh", "create", "pod", "--zone=z", "--type=v99-8"], "--type=v99-8: expected a slice such as"),
        (["tpu_vm.sh", "run", "pod", "--zon=z", *RUN], "'--zon=z' is unknown"),
        (["hosts.sh"], "no hosts"),
        (["hosts.sh", "a,b", "--port=x", *RUN], "--port=x: expected a number"),
        (["gke.sh", "render", "ssr2", "--image=i", *RUN], "--accelerator is missing: render needs"),
        (["gke.sh", "render", "SSR_2", *MANIFEST, *RUN], "NAME='SSR_2'"),
        (["gke.sh", "render", "ssr2", *MANIFEST[:3], "--hosts=many", *RUN], "--hosts=many: expected a number"),
    ],
)
def test_small_mistakes_are_one_line_and_run_nothing(tmp_path, arguments, message):
    env = {}
    for name in ("gcloud", "ssh", "kubectl", "xpk"):
        env = fake(tmp_path / "bin", name, "")
    done = launch(*arguments, env=env)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "bin").glob("*.log"))


def test_small_deleting_asks_unless_told(tmp_path):
    (command,) = printed("tpu_vm.sh", "delete", "pod", "--zone=z")
    assert "--quiet" not in command
    (command,) = printed("tpu_vm.sh", "delete", "pod", "--zone=z", "--yes")
    assert command[-1] == "--quiet"

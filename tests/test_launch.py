"""The launch scripts: the commands that they run, when they restart, and their error messages."""

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from launch_scripts import LAUNCH, MANIFEST, PORTS, RUN, SCRIPTS, XPK, fake, launch, names, printed, runs


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
    assert "does not create another slice" in text
    assert "`delete` the rest of its request, then `create`, `install` and `run`" in text


@pytest.mark.parametrize(
    ("codes", "count", "wanted"), [("75 76 134 0", 4, 0), ("77 1", 2, 1), ("75 75 75 75 75", 4, 75)]
)
def test_small_a_run_that_can_go_on_does(tmp_path, codes, count, wanted):
    env = fake(tmp_path, "gcloud", f'codes=({codes}); exit "${{codes[runs - 1]}}"')
    done = launch("tpu_vm.sh", "run", "pod", "--zone=z", *RUN, env={**env, "RESTARTS": "3"})
    assert (done.returncode, runs(tmp_path, "gcloud")) == (wanted, count)
    assert done.stderr.count("restarting in 0 s") == count - 1


@pytest.mark.parametrize(("long", "count", "wanted"), [("0", 6, 0), ("3600", 3, 75)])
def test_small_restarts_count_in_a_row(tmp_path, long, count, wanted):
    """With LONG=0 every run is one that went well for long."""
    env = fake(tmp_path, "gcloud", "((runs <= 5)) && exit 75; exit 0")
    done = launch("tpu_vm.sh", "run", "pod", "--zone=z", *RUN, env={**env, "RESTARTS": "2", "LONG": long})
    assert (done.returncode, runs(tmp_path, "gcloud")) == (wanted, count)
    assert ("after 2 restarts in a row: giving up" in done.stderr) == (wanted != 0)


def test_small_one_process_a_host():
    found = printed("hosts.sh", "a,b", "--port=8476", *RUN)
    assert [command[:2] for command in found] == [["ssh", "-tt"]] * 2
    assert [command[-2] for command in found] == ["a", "b"]
    for i, command in enumerate(found):
        words = shlex.split(command[-1])
        assert words[:2] == ["cd", "ivideo"]
        assert words[3:9] == [
            ".venv/bin/python", "-m", "ivideo.main", "--coordinator=a:8476", "--num_processes=2", f"--process_id={i}"
        ]  # fmt: skip
        assert words[-3:] == ["--workdir=/mnt/runs/a b;", "exit", "$?"]


def test_small_users_are_for_ssh_alone():
    found = printed("hosts.sh", "me@h1,you@h2.example.org", *RUN)
    assert [command[-2] for command in found] == ["me@h1", "you@h2.example.org"]
    assert all("--coordinator=h1:" in command[-1] for command in found)


def test_small_a_run_has_a_port_of_its_own_and_keeps_it():
    """Two runs on the same hosts would else meet; one that starts again has to find the port that it had."""

    def port(*arguments):
        ((*_, command),) = printed("hosts.sh", "h1", "--", *arguments)
        return int(re.search(r"--coordinator=h1:(\d+) ", command)[1])

    first = port("--config=a.py", "--workdir=/mnt/runs/a")
    assert 20000 <= first < 30000
    assert port("--workdir=/mnt/runs/a", "--config=a.py", "--config.seed=1") == first
    assert port("--workdir", "/mnt/runs/a") == first
    assert port("--config=a.py", "--workdir=/mnt/runs/b") != first
    assert "--coordinator=h1:65535 " in printed("hosts.sh", "h1", "--port=65535", *RUN)[0][-1]


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize(("folder", "there"), [("~/x y", "home/x y"), ("~", "home"), ("it's", "it's")])
def test_small_what_a_host_gets_is_what_was_given(tmp_path, shell, folder, there):
    """~ is the home folder there; quotes, line breaks, blanks and signs of the shell arrive as they are."""
    there = tmp_path / there
    python = there / ".venv" / "bin"
    python.mkdir(parents=True)
    program = "import json, os, sys\nprint(json.dumps([os.getcwd(), sys.argv]))"
    (python / "python").write_text(f"#!{sys.executable}\n{program}")
    (python / "python").chmod(0o755)
    env = {**fake(tmp_path / "bin", "ssh", f'exec {shell} -c "${{@: -1}}"'), "HOME": str(tmp_path / "home")}
    arguments = ["--workdir=~/a", "it's", "two \nlines ", "é*$HOME `ls` \\n \t;", ""]
    done = subprocess.run(
        [str(LAUNCH / "hosts.sh"), "h", f"--folder={folder}", "--", *arguments],
        cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where, words = json.loads(done.stdout.removeprefix("h: "))
    assert where == str(there)
    assert words[-len(arguments) :] == arguments


@pytest.mark.parametrize(("first", "later", "count", "wanted"), [(77, 0, 4, 0), (1, 0, 2, 1)])
def test_small_hosts_start_again_together(tmp_path, first, later, count, wanted):
    env = fake(tmp_path, "ssh", f"echo hello; ((runs <= 2)) && exit {first}; exit {later}")
    done = launch("hosts.sh", "a,b", *RUN, env=env)
    assert (done.returncode, runs(tmp_path, "ssh")) == (wanted, count)
    assert {line for line in done.stdout.splitlines() if "hello" in line} == {"a: hello", "b: hello"}


@pytest.mark.parametrize(
    ("first", "second", "count", "wanted"),
    [
        (137, 77, 4, 0),
        (77, 137, 4, 0),
        (255, 134, 4, 0),
        (2, 134, 2, 2),
        (77, 1, 2, 1),
        (130, 75, 2, 130),
        (0, 75, 4, 0),
    ],
)
def test_small_what_would_fail_again_on_one_host_is_not_started_again(tmp_path, first, second, count, wanted):
    """And what one host can go on from is, whatever a signal did to another."""
    line = f"((runs > 2)) && exit 0; [[ $* == *--process_id=0* ]] && exit {first}; exit {second}"
    done = launch("hosts.sh", "a,b", *RUN, env=fake(tmp_path, "ssh", line))
    assert (done.returncode, runs(tmp_path, "ssh")) == (wanted, count)


def test_small_a_host_that_hangs_does_not_hold_up_the_others(tmp_path):
    """A process that does not end though another one has is ended, and all start again."""
    env = fake(tmp_path, "ssh", "((runs > 2)) && exit 0; [[ $* == *--process_id=0* ]] && exit 77; exec sleep 600")
    done = launch("hosts.sh", "a,b", *RUN, env={**env, "LEAVE": "1"})
    assert (done.returncode, runs(tmp_path, "ssh")) == (0, 4)


def test_small_lines_of_hosts_come_as_they_are_written(tmp_path):
    """Also through a pipe, as to a log file; and the last one without its end."""
    env = fake(tmp_path, "ssh", "echo 'a \\ line'; printf 'no end'; exec sleep 600")
    script = subprocess.Popen(
        [str(LAUNCH / "hosts.sh"), "h1", *RUN],
        env={**os.environ, **env}, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert select.select([script.stdout], [], [], 30)[0]
        assert script.stdout.readline() == "h1: a \\ line\n"
    finally:
        os.killpg(script.pid, signal.SIGTERM)
        script.communicate(timeout=30)
    env = fake(tmp_path, "ssh", "printf 'one\ntwo'")
    assert launch("hosts.sh", "h1", *RUN, env=env).stdout == "h1: one\nh1: two\n"


def test_small_a_process_that_jax_aborts_is_started_again(tmp_path):
    """As ssh, which leaves with 255 where a signal ended what it ran."""
    program = "import subprocess as s, sys; n = s.call(['bash', '-c', sys.argv[-1]]); sys.exit(n if n >= 0 else 255)"
    env = fake(tmp_path, "ssh", f'exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} "$@"')
    there = tmp_path / "check out" / ".venv" / "bin"
    fake(there, "python", "ulimit -c 0; ((runs > 1)) || kill -ABRT $$")
    done = launch("hosts.sh", "a", f"--folder={there.parents[1]}", *RUN, env=env)
    assert (done.returncode, runs(there, "python")) == (0, 2), done.stdout + done.stderr
    assert "exit code 134: restarting in 0 s" in done.stderr
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
            assert "restarting in 60 s" in script.stderr.readline()
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


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["hosts.sh", "h1,h2", *RUN], "ssh"),
        (["tpu_vm.sh", "install", "pod", "--zone=z"], "gcloud"),
        (["tpu_vm.sh", "delete", "pod", "--zone=z"], "gcloud"),
        (["gke.sh", "apply", "a", *MANIFEST, *RUN], "kubectl"),
        (["gke.sh", "delete", "a"], "kubectl"),
        (["gke.sh", "xpk", "a", "--image=i", *XPK, *RUN], "xpk"),
    ],
)
def test_small_a_program_that_is_missing_is_named(tmp_path, arguments, program):
    for name in ("bash", "env", "dirname", "basename", "sed", "cat", "cksum"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = launch(*arguments, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{arguments[0]}: {program} is not installed: ") and len(line) > len(program) + 40
    assert program in launch(*arguments[:2], *arguments[2:], env={"DRY_RUN": "1", "PATH": str(tmp_path)}).stdout


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
        (["tpu_vm.sh", "create", "pod-", "--zone=z", "--type=v5p-8"], "NAME='pod-': expected at most 63"),
        (["tpu_vm.sh", "create", "pod", "--zone=z", "--type=v5p-"], "--type=v5p-: expected a slice such as"),
        (["tpu_vm.sh", "logs", "pod", "--zone=z", "--worker=-1"], "--worker=-1: expected the number of a host"),
        *((["hosts.sh", "a,b", f"--port={p}", *RUN], f"--port={p}: expected a number from 1 to 65535") for p in PORTS),
        (["hosts.sh", "h1,,h2", *RUN], "hosts 'h1,,h2': '' is not a host; expected names with a comma"),
        (["hosts.sh", "h1, h2", *RUN], "hosts 'h1, h2': ' h2' is not a host"),
        (["hosts.sh", ",", *RUN], "hosts ',': '' is not a host"),
        (["hosts.sh", "h1,", *RUN], "hosts 'h1,': '' is not a host"),
        (["hosts.sh", "", *RUN], "hosts '': '' is not a host"),
        (["hosts.sh", "h1,-oProxyCommand=x", *RUN], "'-oProxyCommand=x' is not a host"),
        (["hosts.sh", "h1,a@b@c", *RUN], "'a@b@c' is not a host"),
        (["hosts.sh", "h1,h2;ls", *RUN], "'h2;ls' is not a host"),
        (["hosts.sh", "h1,me@h1", *RUN], "hosts 'h1,me@h1': h1 appears twice"),
        (["hosts.sh", "h1", "--folder=", *RUN], "--folder is empty"),
        (["gke.sh", "render", "ssr2", "--image=i", *RUN], "--accelerator is missing: render needs"),
        (["gke.sh", "render", "SSR_2", *MANIFEST, *RUN], "NAME='SSR_2'"),
        (["gke.sh", "render", "ssr2-", *MANIFEST, *RUN], "NAME='ssr2-': expected at most 38 lowercase letters"),
        (["gke.sh", "delete", "ssr2-"], "NAME='ssr2-': expected at most 38 lowercase letters"),
        *(
            (["gke.sh", "render", "ssr2", *MANIFEST[:3], f"--hosts={n}", *RUN], f"--hosts={n}: expected the slice's")
            for n in ("many", "0", "010", "-1", "1.5", "9999999999999999999999")
        ),
        (["gke.sh", "render", "ssr2", *MANIFEST, "--chips=0", *RUN], "--chips=0: expected the number of chips"),
        (["gke.sh", "render", "ssr2", *MANIFEST, "--restarts=1e3", *RUN], "--restarts=1e3: expected a number"),
        (["gke.sh", "render", "ssr2", *MANIFEST, "--grace=-1", *RUN], "--grace=-1: expected a number"),
        (["gke.sh", "render", "ssr2", *MANIFEST[:3], "--hosts=4", *RUN], "--topology=8x8 has 64 chips, but --hosts=4 "),
        (["gke.sh", "render", "ssr2", *MANIFEST, "--topology=8x8x1", *RUN], "slices of tpu-v6e-slice have 2 dim"),
        (["gke.sh", "render", "ssr2", *MANIFEST, "--accelerator=tpu-v5p-slice", *RUN], "tpu-v5p-slice have 3 dim"),
        (["gke.sh", "render", "ssr2", *MANIFEST, "--topology=8", *RUN], "--topology=8: expected the number of chips"),
        (["gke.sh", "render", "ssr2", *MANIFEST, "--topology=08x8", *RUN], "--topology=08x8: expected the number"),
        (["gke.sh", "render", "ssr2", *MANIFEST, "--accelerator=x: y", *RUN], "--accelerator=x: y: expected a GKE"),
        (["gke.sh", "render", "ssr2", *MANIFEST, "--image=a b", *RUN], "--image=a b: expected an image's name"),
        (["gke.sh", "xpk", "a", "--image=i", *XPK, "--restarts=no", *RUN], "--restarts=no: expected a number"),
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


def test_small_the_demo_is_trained_in_a_folder_of_the_one_who_asks(tmp_path):
    """Paths from where the script is called; every mistake before the first stage."""
    env = fake(tmp_path / "bin", "python", "")

    def run(*arguments):
        return subprocess.run(
            [str(LAUNCH / "train_demo.sh"), *arguments],
            cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    mistakes = (([], "no folder"), (["--fast"], "no folder"), (["a", "ssr9"], "stage 'ssr9' is unknown"))
    for arguments, message in mistakes:
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert run("--help").stdout.startswith("Trains the weights")
    assert names(tmp_path) == ["bin"] and names(tmp_path / "bin") == ["python"]
    assert run("a b", "tsr3").returncode == 0
    text, train, export = (tmp_path / "bin" / "python.log").read_text().splitlines()
    assert f"--mode=train_text --out={tmp_path}/a b/text.safetensors" in text
    assert f"--workdir={tmp_path}/a b/tsr3 --config.train.start={tmp_path}/a b/tsr2.safetensors" in train
    assert f"--out={tmp_path}/a b/tsr3.safetensors" in export


def test_small_deleting_asks_unless_told(tmp_path):
    (command,) = printed("tpu_vm.sh", "delete", "pod", "--zone=z")
    assert "--quiet" not in command
    (command,) = printed("tpu_vm.sh", "delete", "pod", "--zone=z", "--yes")
    assert command[-1] == "--quiet"

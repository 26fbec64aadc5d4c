"""Several processes on this machine as one program: the losses of one process, and what they do when one dies."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from ivideo import hosts

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 20
RUN = [
    "--config=configs/base.py:small",
    f"--config.train.steps={STEPS}",
    "--config.train.checkpoint_every=5",
    "--config.train.learning_rate=3e-3",
    "--config.train.mesh.data=1",
    "--config.train.mesh.fsdp=-1",
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(workdir, count: int, *arguments) -> list[subprocess.Popen]:
    """A training run in `count` processes, of as many devices together as one of four has."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={4 // count}")
    env = {**os.environ, "XLA_FLAGS": flags}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # processes that find a program there do not wait for those that do not
    command = [sys.executable, "-m", "ivideo.main", *RUN, f"--workdir={workdir}", *arguments]
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for i in range(count):
        several = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"] if count > 1 else []
        with open(f"{workdir}.{i}.log", "a") as log:
            processes.append(subprocess.Popen([*command, *several], cwd=ROOT, env=env, stderr=log, stdout=log))
    return processes


def wait(processes, seconds=300) -> list[int]:
    """Exit codes of all; those that are not there in time are killed."""
    deadline = time.time() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.time())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def losses(workdir) -> dict[int, float]:
    """By step; of a step done twice, that of the second time."""
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def logs(workdir, count) -> list[str]:
    return [pathlib.Path(f"{workdir}.{i}.log").read_text() for i in range(count)]


def until_step(workdir, step, processes, seconds=300):
    deadline = time.time() + seconds
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or len(losses(workdir)) < step:
        assert time.time() < deadline and all(p.poll() is None for p in processes), logs(workdir, len(processes))
        time.sleep(0.01)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The losses of one process with four devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert wait(start(workdir, 1)) == [0], logs(workdir, 1)
    found = losses(workdir)
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def assert_same(found, wanted):
    assert sorted(found) == sorted(wanted)
    np.testing.assert_allclose([found[s] for s in wanted], [wanted[s] for s in wanted], rtol=1e-5)


@pytest.mark.parametrize("count", [2])
def test_small_a_process_dies_the_others_leave_and_the_run_goes_on(one, tmp_path, count):
    """Within a minute, with a message that says what to do; started again, the run ends as if nothing had happened."""
    workdir = tmp_path / "run"
    processes = start(workdir, count)
    until_step(workdir, 7, processes)
    processes[-1].kill()
    began = time.time()
    *codes, killed = wait(processes, 60)
    assert time.time() - began < 60
    assert killed == -signal.SIGKILL
    for code, text in zip(codes, logs(workdir, count), strict=False):
        ours = code == 77 and "another process of the run went away" in text and "same command goes on" in text
        # jax may be the first to notice, and ends the process
        assert ours or (code == -signal.SIGABRT and "another task died" in text), (code, text)

    processes = start(workdir, count)
    assert wait(processes) == [0] * count, logs(workdir, count)
    first, *others = logs(workdir, count)
    assert "going on from step 5" in first
    assert f"step {STEPS}/{STEPS}" in first
    assert not any(f"/{STEPS}" in text for text in others)  # the first one reports
    assert_same(losses(workdir), one)


@pytest.mark.parametrize("count", [4])
def test_four_processes(one, tmp_path, count):
    """The same with four, which takes minutes on two cores."""
    test_small_a_process_dies_the_others_leave_and_the_run_goes_on(one, tmp_path, count)


def test_small_a_notice_to_one_process_stops_all_of_them(one, tmp_path):
    """SIGTERM to the second of two: both save the same step and leave with 75; the run goes on in one process."""
    workdir = tmp_path / "two"
    processes = start(workdir, 2)
    until_step(workdir, 6, processes)
    processes[1].terminate()
    assert wait(processes) == [75, 75], logs(workdir, 2)
    assert wait(start(workdir, 1)) == [0], logs(workdir, 1)
    assert_same(losses(workdir), one)


SHUFFLED = """
import sys
import jax
from configs import base
from ivideo import hosts, loop
address, process, workdir, options = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
hosts.join(address, 2, process)
config = base.get_config("small")
config.update_from_flattened_dict({name: eval(value) for name, _, value in (o.partition("=") for o in options)})
loop.train(config, workdir, devices=[jax.devices()[i] for i in (3, 0, 2, 1)])
"""


def start_shuffled(workdirs) -> list[subprocess.Popen]:
    """Two processes of two devices each, in an order as a torus has it: neither has parts of a batch in a row."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    env = {**os.environ, "XLA_FLAGS": flags}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    values = [option.removeprefix("--config.") for option in RUN[1:]]
    address, processes = f"127.0.0.1:{free_port()}", []
    for i, workdir in enumerate(workdirs):
        command = [sys.executable, "-c", SHUFFLED, address, str(i), str(workdir)]
        with open(f"{workdir}.{i}.log", "a") as log:
            processes.append(subprocess.Popen([*command, *values], cwd=ROOT, env=env, stderr=log, stdout=log))
    return processes


def test_small_processes_whose_parts_are_not_in_a_row(one, tmp_path):
    workdir = tmp_path / "run"
    assert wait(start_shuffled([workdir, workdir])) == [0, 0], logs(workdir, 2)
    assert_same(losses(workdir), one)


def test_small_folders_that_are_not_shared_are_refused(tmp_path):
    """Each process with a folder of its own, as machines without shared storage have."""
    workdirs = [tmp_path / "a", tmp_path / "b"]
    assert wait(start_shuffled(workdirs), 100) == [1, 1]
    for i, workdir in enumerate(workdirs):
        said = pathlib.Path(f"{workdir}.{i}.log").read_text()
        assert "is not the same folder for all processes: 1 of 2 do not see" in said
    assert not any(workdir.exists() for workdir in workdirs)


def test_small_a_first_process_that_does_not_come_is_named(monkeypatch, caplog):
    monkeypatch.setattr(hosts, "JOIN_SECONDS", 1)
    port = free_port()
    with pytest.raises(SystemExit) as left:
        hosts.join(f"127.0.0.1:{port}", 2, 1)
    assert left.value.code == hosts.LOST == 77
    assert f"--coordinator=127.0.0.1:{port} did not answer in 1 s" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator=127.0.0.1:1"], "--num_processes and --process_id missing"),
        (["--coordinator=here", "--num_processes=2", "--process_id=1"], "--coordinator=here: expected HOST:PORT"),
        (["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"], "expected 0 to 1"),
    ],
)
def test_small_mistakes_about_processes_are_one_line(arguments, message, tmp_path):
    command = [sys.executable, "-m", "ivideo.main", *RUN, f"--workdir={tmp_path}/run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()

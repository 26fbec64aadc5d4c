"""How processes join a run: missing processes, processes of another run, and a port that is in use."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest
from deadlines import killed_after
from test_hosts import ROOT, free_port

from ivideo.devices import hosts, joining
from ivideo.errors import UserError


def in_threads(*calls) -> list:
    """The result of each call, or its error."""
    found = [None] * len(calls)

    def run(i, call):
        try:
            found[i] = call()
        except (SystemExit, Exception) as e:
            found[i] = e

    threads = [threading.Thread(target=run, args=(i, call), daemon=True) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def gather(port, count, run="a"):
    return lambda: joining._gather(port, count, run)


def connect(port, number, count, run="a", after=0.0):
    def call():
        time.sleep(after)
        return joining._connect("127.0.0.1", port, joining._hello(number, count, run))

    return call


def speak(port, *lines):
    """Sends bytes as a program that is not ivideo, and returns the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for line in lines:
            connection.sendall(line)
        connection.settimeout(10)
        try:
            return connection.recv(1000)
        except ConnectionResetError:
            return b""


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def seconds(monkeypatch):
    monkeypatch.setattr(joining, "JOIN_SECONDS", 2)


def test_small_processes_join_in_any_order(port):
    calls = [connect(port, 2, 3), gather(port, 3), connect(port, 1, 3, after=0.3)]
    assert in_threads(*calls) == [None, None, None]


def test_small_other_programs_are_turned_away(port):
    """Neither they nor a process that joins and dies count as processes of the run."""

    def strangers():
        for lines in ([b"GET / HTTP/1.0\n"], [b"[]\n"], [b'{"process": 1}\n'], [b"\xff\n"]):
            assert speak(port, *lines) == b""
        hello = joining._hello(1, 3, "a")
        with socket.create_connection(("127.0.0.1", port)) as dies:
            dies.sendall(json.dumps(hello).encode() + b"\n")
        time.sleep(0.5)
        return in_threads(connect(port, 1, 3), connect(port, 2, 3))

    def late():
        time.sleep(0.2)
        return strangers()

    assert in_threads(gather(port, 3), late) == [None, [None, None]]


def test_small_missing_processes_are_named(port, seconds, caplog):
    first, second = in_threads(gather(port, 4), connect(port, 2, 4))
    assert first.code == second.code == hosts.LOST == 77
    assert f"process 1, 3 of 4 did not connect to port {port}" in caplog.text


def test_small_missing_first_process_is_named(port, seconds, caplog):
    (left,) = in_threads(connect(port, 1, 2))
    assert left.code == 77
    assert f"--coordinator=127.0.0.1:{port} did not answer in 2 s (Connection refused)" in caplog.text


def test_small_busy_port_is_named_and_waited_for(port, caplog):
    busy = socket.create_server(("127.0.0.1", port))

    def free():
        time.sleep(1)
        busy.close()

    assert in_threads(gather(port, 2), connect(port, 1, 2, after=1.5), free) == [None, None, None]
    assert f"port {port} of {socket.gethostname()} cannot be used (Address already in use): waiting" in caplog.text


def test_small_port_that_stays_busy_exits_with_code_77(port, seconds, caplog):
    with socket.create_server(("127.0.0.1", port)):
        (left,) = in_threads(gather(port, 2))
    assert left.code == 77
    assert "give another port with --coordinator" in caplog.text


def test_small_process_of_another_run_waits_and_does_no_harm(port, seconds, caplog):
    other, *ours = in_threads(connect(port, 1, 2, run="b"), gather(port, 2), connect(port, 1, 2, after=0.8))
    assert ours == [None, None] and other.code == 77
    assert "process 1 of another run (b)" in caplog.text
    assert f"--coordinator=127.0.0.1:{port}: another run (a) uses that port: give each run its own" in caplog.text


def test_small_another_working_folder_in_one_process_is_a_mistake(port, monkeypatch):
    monkeypatch.setattr(joining, "STRANGER_SECONDS", 1)
    message = r"process 1 \(.*\) has --workdir=b, and process 0 \(.*\) --workdir=a: give all processes the same"
    for error in in_threads(gather(port, 3), connect(port, 1, 3, run="b"), connect(port, 2, 3)):
        with pytest.raises(UserError, match=message):
            raise error


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([(1, 3)], r"process 1 \(.*\) has --num_processes=3, and process 0 \(.*\) --num_processes=2"),
        ([(0, 2)], r"two processes have --process_id=0, on .* and on "),
    ],
)
def test_small_flags_of_the_processes_must_agree(port, calls, message):
    for error in in_threads(gather(port, 2), *(connect(port, *call) for call in calls)):
        with pytest.raises(UserError, match=message):
            raise error


def test_small_two_processes_with_the_same_id(port):
    errors = in_threads(gather(port, 3), connect(port, 1, 3), connect(port, 1, 3, after=0.3))
    for error in errors:
        with pytest.raises(UserError, match="two processes have --process_id=1, on .* and on .*: give each its own"):
            raise error


RUNNING = """
import sys, time
from ivideo.devices import joining
joining.join(sys.argv[1], 1, 0, run="a")
print("running", flush=True)
sys.stdin.readline()
import jax.numpy as jnp
print(jnp.ones(3).sum(), flush=True)
"""


def test_run_continues_when_a_process_of_another_run_connects(port, seconds, caplog):
    """By then jax's service has the port. A connection to it would end the run."""
    command = [sys.executable, "-c", RUNNING, f"127.0.0.1:{port}"]
    run = subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, stderr=subprocess.STDOUT, text=True)
    with run, killed_after(120, run):
        while (line := run.stdout.readline()) != "running\n":
            assert run.poll() is None, line
        (left,) = in_threads(connect(port, 0, 1, run="b"))
        assert left.code == 77
        assert "another program answers there, perhaps another run" in caplog.text
        out, _ = run.communicate("\n", timeout=60)
    assert (run.returncode, out.splitlines()[-1]) == (0, "3.0")


def test_port_of_a_run_is_busy_for_another_run(port, seconds, caplog):
    command = [sys.executable, "-c", RUNNING, f"127.0.0.1:{port}"]
    run = subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, stderr=subprocess.STDOUT, text=True)
    with run, killed_after(120, run):
        while run.stdout.readline() != "running\n":
            assert run.poll() is None
        (left,) = in_threads(gather(port, 2))
        assert left.code == 77 and "cannot be used (Address already in use)" in caplog.text
        run.communicate("\n", timeout=60)
    assert run.returncode == 0

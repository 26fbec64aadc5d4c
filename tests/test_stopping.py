"""Signals that tell a run to stop."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from ivideo.training import guards
from ivideo.training.guards import Stopping

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("number", guards.NOTICES)
def test_small_each_notice_tells_and_the_handlers_come_back(number):
    before = {n: signal.getsignal(n) for n in guards.NOTICES}
    with Stopping() as stopping:
        assert not stopping.told
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stopping.told and stopping.should_stop()
    assert {n: signal.getsignal(n) for n in guards.NOTICES} == before
    assert signal.set_wakeup_fd(-1) == -1


def test_small_a_signal_that_is_ignored_stays_ignored():
    """As nohup does with SIGHUP, and a shell with Ctrl-C for what it runs in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopping() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert not stopping.told
    finally:
        signal.signal(signal.SIGHUP, before)


def run(program):
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


# As in a compile, the main thread is not in Python, where handlers are called
BUSY = """
import ctypes, logging
from ivideo.training.guards import Stopping
logging.basicConfig(format="%(message)s")
with Stopping():
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever: it is locked, and signals do not end the call
"""


def test_small_the_second_ctrl_c_ends_the_process_at_once_also_in_a_compile():
    process = run(BUSY)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "SIGINT: the run saves and stops; a second Ctrl-C ends it at once\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = process.stderr.read()
    assert said.startswith("interrupted again: the steps since the newest checkpoint are lost; ")
    assert said.count("\n") == 1


SEVERAL = """
import signal, time
import jax
from ivideo.training.guards import Stopping
jax.process_count = lambda: 2
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))  # in the place of jax's own
with Stopping() as stopping:
    print("ready", flush=True)
    while not told:
        time.sleep(0.01)
print("told")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_small_one_of_several_processes_tells_the_service_of_jax(number):
    """Which has SIGTERM, and makes all processes stop at the same step."""
    process = run(SEVERAL)
    process.send_signal(number)
    assert process.wait(60) == 0 and process.stdout.read() == "told\n"

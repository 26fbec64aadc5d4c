"""Signals that tell a run to stop."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from ivideo.training import guards
from ivideo.training.guards import StopSignals

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("number", guards.STOP_SIGNALS)
def test_small_each_signal_requests_a_stop_and_the_handlers_are_restored(number):
    before = {n: signal.getsignal(n) for n in guards.STOP_SIGNALS}
    with StopSignals() as signals:
        assert not signals.requested
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert signals.requested and signals.should_stop()
    assert {n: signal.getsignal(n) for n in guards.STOP_SIGNALS} == before
    assert signal.set_wakeup_fd(-1) == -1


def test_small_a_signal_that_is_ignored_stays_ignored():
    """nohup ignores SIGHUP, and a shell ignores Ctrl-C for its background jobs."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert not signals.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def run(program):
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


# As in a compilation, the main thread is outside Python, so that Python calls no signal handler
BUSY = """
import ctypes, logging
from ivideo.training.guards import StopSignals
logging.basicConfig(format="%(message)s")
with StopSignals():
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)  # waits forever: the mutex is locked, and signals do not end the call
"""


def test_small_second_ctrl_c_ends_the_process_at_once_also_in_a_compilation():
    process = run(BUSY)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "SIGINT: the run saves and stops; a second Ctrl-C ends it at once\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    message = process.stderr.read()
    assert message.startswith("interrupted again: the steps since the newest checkpoint are lost; ")
    assert message.count("\n") == 1


SEVERAL = """
import signal, time
import jax
from ivideo.training.guards import StopSignals
jax.process_count = lambda: 2
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))  # in place of jax's handler
with StopSignals() as signals:
    print("ready", flush=True)
    while not received:
        time.sleep(0.01)
print("received")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_small_one_of_several_processes_sends_sigterm_to_jax(number):
    """jax handles SIGTERM and makes all processes stop at the same step."""
    process = run(SEVERAL)
    process.send_signal(number)
    assert process.wait(60) == 0 and process.stdout.read() == "received\n"

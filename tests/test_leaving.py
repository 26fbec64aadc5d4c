"""How processes exit together after an error in one of them: exit codes, messages, and where the error came from."""

import json
import subprocess
import sys
import threading

import jax
import pytest
from test_hosts import ROOT

from ivideo.devices import hosts
from ivideo.errors import UserError

LOST = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("wrong"), 2),
        (FloatingPointError("nan"), 2),
        (OSError(28, "No space left on device"), 2),
        (KeyError("bug"), 1),
        (MemoryError(), 1),
        (OUT_OF_MEMORY, 1),
        (KeyboardInterrupt(), 130),
        (LOST, 77),
        (caused_by(RuntimeError("cannot save"), LOST), 77),
        (caused_by(RuntimeError("cannot save"), OUT_OF_MEMORY), 1),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -9."), 77),
    ],
)
def test_small_exit_codes_say_whether_to_start_again(error, code):
    assert hosts.exit_code(error) == code
    assert hosts.is_final(code) == (code != 77)


def test_small_in_one_process_errors_pass():
    with pytest.raises(KeyError), hosts.exiting_together():
        raise KeyError


EXITING = """
import json, logging, sys, threading, time
import jax
from ivideo.devices import hosts

class Store:
    def __init__(self, reasons):
        self.reasons, self.written = reasons, threading.Event()
    def key_value_set(self, key, value):
        if self.reasons:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS: key " + key)
        self.reasons.append(value)
        print(value, flush=True)
        self.written.set()
    def key_value_try_get(self, key):
        return self.reasons[0]
    def blocking_key_value_get(self, key, timeout_in_ms):
        self.written.wait()
        return self.reasons[0]

logging.basicConfig(format="%(message)s")
store = Store(json.loads(sys.argv[1]))
hosts.is_distributed, hosts.store, hosts.process = lambda: True, lambda: store, lambda: (1, 2)
hosts.watch()
with hosts.exiting_together():
    exec(sys.argv[2])
"""
REASON = {"process": 0, "host": "there", "code": 2, "message": "no caption"}
BY_REASON = "process 0 (there) failed, so all processes stop (exit code 2): no caption"


def exit_with(reasons, code):
    command = [sys.executable, "-c", EXITING, json.dumps([json.dumps(r) for r in reasons]), code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    ("reasons", "program", "code", "printed", "shared"),
    [
        ([], "raise hosts.UserError('no file')", 2, "ivideo: no file\n", "no file"),
        ([], "raise KeyError('bug')", 1, "KeyError: 'bug'", "KeyError: 'bug'"),
        ([], "raise jax.errors.JaxRuntimeError('UNKNOWN: Gloo')", 77, "continues", "another process went away"),
        # the error follows from that of another process, which has the reason and the exit code
        ([REASON], "raise jax.errors.JaxRuntimeError('UNKNOWN: Gloo')", 2, BY_REASON, None),
        ([REASON], "raise hosts.UserError('mine')", 2, "ivideo: mine\n", None),
        # the reason arrives while the program is busy
        ([REASON], "store.written.set(); time.sleep(90)", 2, BY_REASON, None),
    ],
)
def test_small_process_exits_with_the_first_reason(reasons, program, code, printed, shared):
    done = exit_with(reasons, program)
    assert done.returncode == code and printed in done.stderr, done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
    if shared:
        reason = json.loads(done.stdout)
        assert (reason["process"], reason["code"]) == (1, code) and reason["message"].startswith(shared)
    else:
        assert done.stdout == ""


def test_small_run_of_months_is_watched_to_its_end(monkeypatch):
    """A wait for the reason ends after 24 days, and the next one begins."""
    reason = {"process": 1, "host": "h", "code": 2, "message": "wrong"}

    class Store:
        waits = 0

        def blocking_key_value_get(self, key, milliseconds):
            self.waits += 1
            if self.waits < 3:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return json.dumps(reason)

    store, left = Store(), []
    monkeypatch.setattr(hosts, "store", lambda: store)
    monkeypatch.setattr(hosts, "process", lambda: (0, 2))
    monkeypatch.setattr(hosts, "_exiting", threading.Lock())
    monkeypatch.setattr(hosts, "_exit_for_reason", left.append)
    hosts._watch()
    assert (store.waits, left) == (3, [reason])

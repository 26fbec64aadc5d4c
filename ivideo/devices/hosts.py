"""Several processes as one program: when one of them fails, all of them exit, with the same reason and exit code.

The process that fails writes the reason to the key-value store that jax keeps in process 0. A thread in every process
waits for it, so that no process hangs in a collective operation or at jax's barrier before the exit.
`ivideo.devices.joining` connects the processes; `ivideo.devices.agreeing` compares their code, config and data.
"""

import atexit
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed  # the key-value store has no public name

from ivideo.errors import UserError

log = logging.getLogger("ivideo")

MISTAKE, BUG, INTERRUPTED = 2, 1, 130  # exit codes after which launchers must not repeat the command
LOST = 77  # exit code where another process is missing, or a helper process was killed: repeating the command resumes
MISTAKES = (UserError, FloatingPointError, OSError)  # errors that are printed in one line, without a traceback
# XLA's status codes that are about the program, not about another process
PROGRAM_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION", "OUT_OF_RANGE")

_REASON = "ivideo/reason"  # the key of the reason for the exit: JSON of process, host, code and message
_WAIT_MS = 2**31 - 1  # of one call that waits for the reason: 24 days, the longest that a call allows
_READ_SECONDS = 2.0  # process 0, which holds the store, stays this long for the others to read the reason
_CLOSE_SECONDS = 60.0  # for a checkpoint that is being saved when a process fails
_exiting = threading.Lock()  # held by the thread that ends the process


def is_distributed() -> bool:
    """Whether this program has several processes (`ivideo.devices.joining.join`)."""
    return distributed.global_state.client is not None


def store():
    """The key-value store of all processes: jax's DistributedRuntimeClient."""
    return distributed.global_state.client


def process() -> tuple[int, int]:
    """This process's number, from 0, and the number of processes. Unlike `jax.process_index`, it starts no backend."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def watch() -> None:
    """Starts a thread that ends this process as soon as another one reports a failure."""
    thread = threading.Thread(target=_watch, daemon=True)
    thread.start()

    def at_exit():
        jax.distributed.shutdown()  # waits for the other processes, and ends the thread's call to the store
        thread.join(10)  # a thread that still runs jax's code when Python exits would abort the process

    atexit.register(at_exit)


def _watch():
    reason = None
    while reason is None:
        try:
            reason = json.loads(store().blocking_key_value_get(_REASON, _WAIT_MS))
        except Exception as e:
            if not str(e).startswith("DEADLINE_EXCEEDED"):
                # The store is closed at the end of the program, or process 0 is gone, which jax itself handles
                return
    if reason["process"] != process()[0] and _exiting.acquire(blocking=False):
        _exit_for_reason(reason)


def _exit_for_reason(reason):
    again = "" if is_final(reason["code"]) else "; the same command continues from what was saved"
    log.error(
        "process %d (%s) failed, so all processes stop%s (exit code %d): %s",
        reason["process"], reason["host"], again, reason["code"], reason["message"],
    )  # fmt: skip
    _exit(reason["code"])


def is_final(code: int) -> bool:
    """Whether launchers must not repeat the command after this exit code: it would fail again, or was interrupted."""
    return code in (MISTAKE, BUG, INTERRUPTED)


def is_lost(error: BaseException) -> bool:
    """Whether an error, or its cause, means that another process is gone.

    Such errors come from XLA's collective operations or from jax's store and barriers; Orbax may wrap them.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return not str(error).startswith(PROGRAM_ERRORS)
        error = error.__cause__ or error.__context__
    return False


def exit_code(error: BaseException) -> int:
    """The exit code of all processes after this error in one of them."""
    if isinstance(error, MISTAKES):
        return MISTAKE
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return LOST if is_lost(error) or is_killed_worker(error) else BUG


def is_killed_worker(error):
    """Whether the error is Grain's report that one of its data workers was killed."""
    return isinstance(error, RuntimeError) and "Worker process was terminated" in str(error)


@contextlib.contextmanager
def exiting_together():
    """Ends all processes at once, with the same exit code, after any error in the block.

    The code is 2 after an error that the user can fix, and 1, with a traceback, after a bug; launchers repeat neither.
    It is `LOST` where another process is gone or a data worker was killed. In a program of one process the error is
    raised as usual.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as e:
        if not is_distributed():
            raise
        _fail(e)


def _fail(error):
    if not _exiting.acquire(blocking=False):
        time.sleep(3600)  # the watching thread is ending the process
    code, text = exit_code(error), " ".join(str(error).split()) or type(error).__name__
    message = text if code == MISTAKE else f"{type(error).__name__}: {text[:300]}"
    if is_lost(error):
        message = f"another process went away ({text[:200]})"
    number = process()[0]
    reason = _publish(code, message)
    if is_lost(error) and reason["process"] != number:  # that process failed first, and caused this error
        _exit_for_reason(reason)
    if code == BUG:
        traceback.print_exception(error)
    elif code == MISTAKE:
        log.error("ivideo: %s", text)
    else:
        again = "" if is_final(code) else "; the same command continues from what was saved"
        log.error("%s: all processes stop%s (exit code %d)", message, again, code)
    _exit(code)


def _publish(code, message):
    """Writes the reason to the store. Returns the first reason written, which may be another process's."""
    reason = {"process": process()[0], "host": socket.gethostname(), "code": code, "message": message}
    first = [reason]

    def write():
        try:
            store().key_value_set(_REASON, json.dumps(reason))
        except jax.errors.JaxRuntimeError:  # the store has a reason already, or process 0 is gone
            first.append(json.loads(store().key_value_try_get(_REASON)))

    call_with_timeout(10, write)
    return first[-1]


def call_with_timeout(seconds: float, call) -> None:
    """Calls a function that may wait for a process that is gone, and returns after at most `seconds`."""

    def run():
        try:
            call()
        except Exception as e:
            log.debug("%s", e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def close_checkpoints(checkpoints, error: BaseException) -> None:
    """Waits for a checkpoint that is still being saved when an error ends a run; with several processes, for a minute.

    The other processes do not know of the error yet, and finish saving their parts. If a process is gone, the
    checkpoint cannot be completed, and there is no wait.
    """
    if not is_distributed():
        checkpoints.close()
    elif not is_lost(error):
        call_with_timeout(_CLOSE_SECONDS, checkpoints.close)


def exit_at_once(code: int, message: str):
    """Ends the process without the exit handlers, which could wait forever for another process.

    The other processes get the reason if the code is final (`is_final`). Otherwise each of them detects the loss.
    """
    if is_distributed() and is_final(code):
        _publish(code, message)
    log.error("%sthe same command continues from what was saved (exit code %d)", message, code)
    _exit(code)


def _exit(code):
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # the terminal is closed, or there never was one
            stream.flush()
    if is_distributed() and process()[0] == 0:
        time.sleep(_READ_SECONDS)
    os._exit(code)

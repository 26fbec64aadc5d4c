"""Several processes as one program: when one of them fails, all of them leave, with the same reason and exit code.

The process that fails writes why into the key-value store that jax keeps in the first process. A thread in every
process waits for that, so that none stays behind in a collective operation or at jax's barrier before the exit.
`ivideo.devices.joining` connects the processes, `ivideo.devices.agreeing` compares what they are going to do.
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

MISTAKE, BUG, INTERRUPTED = 2, 1, 130  # exit codes after which the same command would fail again, or is not wanted
LOST = 77  # exit code where another process is missing, or a helper process was killed: the same command goes on
MISTAKES = (UserError, FloatingPointError, OSError)  # errors that are one line, without a traceback
# What XLA says of a program rather than of another process
OF_THE_PROGRAM = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION", "OUT_OF_RANGE")

_REASON = "ivideo/reason"  # key of why the program ends: JSON of process, host, code and message
_WAIT = 2**31 - 1  # milliseconds of one wait for the reason: 24 days, the most that a call takes
_READ_SECONDS = 2.0  # that the first process, which has the store, stays for the others to read the reason
_CLOSE_SECONDS = 60.0  # for a checkpoint that is being saved when a process fails
_leaving = threading.Lock()  # held by the thread that ends the process


def is_distributed() -> bool:
    """Whether this process is one of several (`ivideo.devices.joining.join`)."""
    return distributed.global_state.client is not None


def store():
    """The key-value store of all processes: jax's DistributedRuntimeClient."""
    return distributed.global_state.client


def process() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are. Starts no backend, as `jax.process_index` does."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def watch() -> None:
    """Makes this process leave as soon as another one tells that it failed, wherever its own code is then."""
    thread = threading.Thread(target=_watch, daemon=True)
    thread.start()

    def at_exit():
        jax.distributed.shutdown()  # waits for the other processes, and ends the thread's call
        thread.join(10)  # a thread that is still in jax's code when Python ends aborts the process

    atexit.register(at_exit)


def _watch():
    reason = None
    while reason is None:
        try:
            reason = json.loads(store().blocking_key_value_get(_REASON, _WAIT))
        except Exception as e:
            if not str(e).startswith("DEADLINE_EXCEEDED"):
                # The store is closed, at the end of the program, or the first process is gone: jax acts on that
                return
    if reason["process"] != process()[0] and _leaving.acquire(blocking=False):
        _leave_as_told(reason)


def _leave_as_told(reason):
    again = "" if is_final(reason["code"]) else "; the same command goes on from what was saved"
    log.error(
        "process %d (%s) failed, so all processes stop%s (exit code %d): %s",
        reason["process"], reason["host"], again, reason["code"], reason["message"],
    )  # fmt: skip
    _exit(reason["code"])


def is_final(code: int) -> bool:
    """Whether the same command would fail again after this exit code, or is not wanted: launchers do not repeat it."""
    return code in (MISTAKE, BUG, INTERRUPTED)


def is_lost(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that another process is gone.

    It is XLA's of a collective operation, or jax's of its store and barriers, which Orbax may report as its own.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return not str(error).startswith(OF_THE_PROGRAM)
        error = error.__cause__ or error.__context__
    return False


def exit_code(error: BaseException) -> int:
    """The exit code of all processes after an error in one of several."""
    if isinstance(error, MISTAKES):
        return MISTAKE
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return LOST if is_lost(error) or is_killed_worker(error) else BUG


def is_killed_worker(error):
    """Whether Grain says that one of its data workers was killed."""
    return isinstance(error, RuntimeError) and "Worker process was terminated" in str(error)


@contextlib.contextmanager
def exiting_together():
    """Of several processes, ends this one and all others at once after any error of the block, with the same exit code.

    It is 2 after an error that the user can mend, 1 and a traceback after a bug: launchers repeat neither. It is `LOST`
    where another process is gone or a data worker was killed. In a program of one process errors pass.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as e:
        if not is_distributed():
            raise
        _fail(e)


def _fail(error):
    if not _leaving.acquire(blocking=False):
        time.sleep(3600)  # the thread that watches ends the process
    code, text = exit_code(error), " ".join(str(error).split()) or type(error).__name__
    message = text if code == MISTAKE else f"{type(error).__name__}: {text[:300]}"
    if is_lost(error):
        message = f"another process went away ({text[:200]})"
    number = process()[0]
    reason = _tell(code, message)
    if is_lost(error) and reason["process"] != number:  # that one failed first, and this is what came of it
        _leave_as_told(reason)
    if code == BUG:
        traceback.print_exception(error)
    elif code == MISTAKE:
        log.error("ivideo: %s", text)
    else:
        again = "" if is_final(code) else "; the same command goes on from what was saved"
        log.error("%s: all processes stop%s (exit code %d)", message, again, code)
    _exit(code)


def _tell(code, message):
    """Writes the reason where all processes see it. Returns the first one that was written, by whichever process."""
    reason = {"process": process()[0], "host": socket.gethostname(), "code": code, "message": message}
    first = [reason]

    def write():
        try:
            store().key_value_set(_REASON, json.dumps(reason))
        except jax.errors.JaxRuntimeError:  # there is one already, or the first process is gone
            first.append(json.loads(store().key_value_try_get(_REASON)))

    call_with_timeout(10, write)
    return first[-1]


def call_with_timeout(seconds: float, call) -> None:
    """Calls a function that may wait for a process that is gone, and returns after `seconds` at the latest."""

    def run():
        try:
            call()
        except Exception as e:
            log.debug("%s", e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def close_checkpoints(checkpoints, error: BaseException) -> None:
    """Waits for the checkpoint that is being saved when an error ends a run; of several processes for a minute.

    The other processes do not know of the error yet, and finish their parts of it. Where one is gone, none can.
    """
    if not is_distributed():
        checkpoints.close()
    elif not is_lost(error):
        call_with_timeout(_CLOSE_SECONDS, checkpoints.close)


def exit_at_once(code: int, message: str):
    """Ends the process at once, without the exit handlers, which could wait for what never comes.

    The other processes are told where the code is final; else each of them finds out by itself.
    """
    if is_distributed() and is_final(code):
        _tell(code, message)
    log.error("%sthe same command goes on from what was saved (exit code %d)", message, code)
    _exit(code)


def _exit(code):
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # a terminal that is gone, or that there never was
            stream.flush()
    if is_distributed() and process()[0] == 0:
        time.sleep(_READ_SECONDS)
    os._exit(code)

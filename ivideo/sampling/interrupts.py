"""Signals that end a program which has nothing to save: it says one line and leaves at once."""

import contextlib
import logging
import os
import queue
import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a polite kill, a terminal or ssh that is gone


_listening = threading.Event()  # set where signals raise


class Interrupted(BaseException):
    """A signal told the program to stop. The message says what is finished and how to go on."""

    def __init__(self, number: int, message: str = "interrupted"):
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def raising():
    """Within the block each of SIGNALS raises Interrupted in the main thread. What nohup ignores stays ignored."""

    def tell(number, _):
        raise Interrupted(number)

    heard = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, tell) for s in heard}
    _listening.set()
    try:
        yield
    finally:
        _listening.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_for(function):
    """What `function` returns or raises; where signals raise, computed in a thread of its own.

    The main thread is then free to be interrupted: a signal's handler cannot run while it compiles or waits for a
    device. The thread goes on until the program leaves (`leave`).
    """
    if not _listening.is_set():
        return function()
    results = queue.SimpleQueue()

    def compute():
        try:
            results.put((function(), None))
        except BaseException as e:
            results.put((None, e))

    threading.Thread(target=compute, daemon=True).start()
    value, error = results.get()
    if error is not None:
        raise error
    return value


def leave(interrupted: Interrupted):
    """Ends the program at once with the shell's exit code for the signal: a thread may still wait for a device."""
    print(f"ivideo: {interrupted}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    logging.shutdown()
    os._exit(128 + interrupted.number)

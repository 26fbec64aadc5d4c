"""Handles signals in a program that has nothing to save: it prints one line and exits at once."""

import contextlib
import logging
import os
import queue
import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, `kill`, a closed terminal or ssh connection

_raising = threading.Event()  # set while signals raise Interrupted


class Interrupted(BaseException):
    """A signal told the program to stop. The message says what is finished and how to continue."""

    def __init__(self, number: int, message: str = "interrupted"):
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def raise_on_signal():
    """Inside the block, SIGNALS raise Interrupted in the main thread. Signals that nohup ignores stay ignored."""

    def handle(number, _):
        raise Interrupted(number)

    handled = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, handle) for s in handled}
    _raising.set()
    try:
        yield
    finally:
        _raising.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_interruptibly(function):
    """Calls `function` and returns its result or raises its error; inside `raise_on_signal` in a thread of its own.

    The main thread then stays interruptible: Python runs no signal handler while a thread compiles or waits for a
    device. The other thread keeps running until the program exits (`exit_now`).
    """
    if not _raising.is_set():
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


def exit_now(interrupted: Interrupted):
    """Exits at once with the shell's exit code for the signal: a normal exit would wait for the device thread."""
    print(f"ivideo: {interrupted}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    logging.shutdown()
    os._exit(128 + interrupted.number)

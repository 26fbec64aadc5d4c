"""A limit for what a test waits for: a process that hangs is killed, and the test that reads from it fails."""

import contextlib
import threading


@contextlib.contextmanager
def killed_after(seconds, process):
    """Kills the process after this time, and when the block is left."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()

"""Tasks for tests of worker processes. Nothing else is imported, since every process imports this module."""

import os
import time

from ivideo.data.preparing import pool


def crash_or_hang(task: int) -> int:
    """Ends the process of task 3 at once, and that of task 5 when its time is over."""
    if task == 3:
        os._exit(1)
    with pool.limited(0.2 if task == 5 else 0):
        if task == 5:
            time.sleep(1000)
    return 10 * task


def divide(task: int) -> float:
    """1 / task."""
    return 1 / task

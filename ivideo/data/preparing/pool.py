"""Runs tasks in worker processes, and survives tasks that end their process, as a decoder's crash does."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool

from ivideo.data import workers

_WAITING = 4  # tasks per process that wait


def run(function: Callable, tasks: list, *, processes: int = 0) -> Iterator[tuple]:
    """Yields (task, function(task)) for each task, in any order. `processes`: 0 stands for one per core.

    If a task's process ends, the task is run again, alone; if it ends again, it is yielded with None as its result.
    An error of the function is raised here. The function and the tasks must pickle.
    """
    processes, waiting = processes or os.cpu_count() or 1, list(reversed(tasks))
    suspects = []
    while waiting:
        running = {}
        try:
            with _pool(processes) as pool:
                while waiting or running:
                    while waiting and len(running) < _WAITING * processes:
                        running[pool.submit(function, waiting[-1])] = waiting[-1]
                        waiting.pop()
                    done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        result = future.result()
                        yield running.pop(future), result
        except BrokenProcessPool:
            # Any of them may have ended its process
            suspects.extend(running.values())
    for task in suspects:
        yield task, _alone(function, task)


def _alone(function: Callable, task):
    try:
        with _pool(1) as pool:
            return pool.submit(function, task).result()
    except BrokenProcessPool:
        return None


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    # Not forked, since jax has threads. The workers end with this process
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, mp_context=context, initializer=workers.attend)

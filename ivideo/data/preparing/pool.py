"""Runs tasks in worker processes, and survives tasks that end their process, as a decoder's crash or hang does."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import NamedTuple

from ivideo.data import workers

_WAITING = 4  # tasks per process that wait


class Ended(NamedTuple):
    """The result of a task whose process ended: the exit code, which is -n after signal n."""

    code: int

    @property
    def timed_out(self) -> bool:
        """Whether `limited` ended it."""
        return self.code == -signal.SIGALRM


@contextlib.contextmanager
def limited(seconds: float):
    """Ends this process if the block takes longer, also where it hangs inside a library. 0: no limit."""
    signal.setitimer(signal.ITIMER_REAL, seconds)  # nothing handles its signal, so that it ends the process
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(function: Callable, tasks: list, *, processes: int = 0) -> Iterator[tuple]:
    """Yields (task, function(task)) for each task, in any order. `processes`: 0 stands for one per core.

    If a task's process ends, the task is run again, alone in a process; if that ends too, it is yielded with an `Ended`
    as its result. An error of the function is raised here. The function and the tasks must pickle.
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
    yield from _alone(function, suspects, processes)


def _alone(function: Callable, tasks: list, processes: int) -> Iterator[tuple]:
    """Runs each task in a process of its own."""
    context, waiting, running = multiprocessing.get_context("spawn"), list(reversed(tasks)), {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send, args=(sender, function, waiting[-1]))
                process.start()
                sender.close()  # the process's own is left, so that its end is noticed
                running[receiver] = process, waiting.pop()
            for receiver in connection.wait(list(running)):
                process, task = running.pop(receiver)
                yield task, _received(receiver, process)
    finally:
        for process, _ in running.values():
            process.kill()


def _send(sender, function: Callable, task) -> None:
    workers.attend()
    try:
        sender.send((function(task), None))
    except Exception as error:
        sender.send((None, error))


def _received(receiver, process):
    with receiver:
        try:
            result, error = receiver.recv()
        except EOFError:
            process.join()
            return Ended(process.exitcode)
    process.join()
    if error is not None:
        raise error
    return result


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    # Not forked, since jax has threads. The workers end with this process
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, mp_context=context, initializer=workers.attend)

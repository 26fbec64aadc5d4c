"""What a data worker, a process of its own, does about signals and about the process that it works for."""

import multiprocessing
import os
import signal
import threading

# Ctrl-C, a terminal that closes and Slurm's notices reach all processes of a run; a worker ends when the run closes it
LEFT_TO_THE_RUN = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def attend() -> None:
    """In a worker: leaves those signals to the run, and ends with it, also where it was killed. Elsewhere nothing."""
    parent = multiprocessing.parent_process()
    if parent is None or threading.current_thread() is not threading.main_thread():
        return
    for number in LEFT_TO_THE_RUN:
        signal.signal(number, signal.SIG_IGN)

    def follow():
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

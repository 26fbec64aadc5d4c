"""How data workers, which are separate processes, handle signals and the end of the process they work for."""

import multiprocessing
import os
import signal
import threading

# Ctrl-C, a closing terminal and Slurm's notices reach all processes of a run. The main process handles them, and ends
# its workers
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def attend() -> None:
    """Makes a worker ignore `IGNORED_SIGNALS` and end with the main process, even if that is killed.

    Outside a worker it does nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is None or threading.current_thread() is not threading.main_thread():
        return
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def follow():
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

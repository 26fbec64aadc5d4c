"""What guards a training run: signals to stop, a watchdog for steps that hang, the profiler of chosen steps."""

import faulthandler
import logging
import os
import signal
import socket
import threading
import time

import jax

from ivideo.devices import hosts

log = logging.getLogger("ivideo")

# Exit codes of runs that the same command takes up again, with `hosts.LOST`. 75 is EX_TEMPFAIL
PREEMPTED = 75  # told to stop, and saved
HUNG = 76  # a step took longer than config.train.hang_seconds

NOTICES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Stopping:
    """Whether the run has been told to stop by a signal: to this process, or to any of several, which then agree.

    The signals are SIGTERM, Ctrl-C (SIGINT), a terminal that closes (SIGHUP), and those by which Slurm and its wrappers
    tell of the end of a job (SIGUSR1, SIGUSR2). One that is ignored from the start stays so: nohup ignores SIGHUP. A
    second Ctrl-C ends the process at once, also in the middle of a compile.
    """

    def __init__(self):
        self.told = False
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        self._several = jax.process_count() > 1
        # Of several processes jax's own preemption service has SIGTERM, and agrees on a step to stop at
        for number in NOTICES[1:] if self._several else NOTICES:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._tell)
        # Python calls a handler when the main thread is in Python again: a compile can take minutes
        receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(receiver,), daemon=True).start()
        return self

    def _tell(self, *_):
        if not self._several:
            self.told = True

    def _listen(self, receiver):
        interrupts = 0
        with receiver:
            while numbers := receiver.recv(1):
                number = numbers[0]
                if number not in self._previous:
                    continue
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    hosts.exit_at_once(
                        hosts.INTERRUPTED, "interrupted again: what the run did since its newest checkpoint is lost; "
                    )
                if self._several:
                    self.tell()
                again = "; a second Ctrl-C ends it at once" if number == signal.SIGINT else ""
                log.warning("%s: the run saves and stops%s", signal.Signals(number).name, again)

    def tell(self) -> None:
        """Tells the run to stop, as the signal does that jax's preemption service waits for."""
        os.kill(os.getpid(), signal.SIGTERM)

    def at(self, step: int) -> bool:
        """Whether to stop before the step after this one; every process asks at every step."""
        if jax.process_count() == 1:
            return self.told
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup)
            self._sender.close()


class Watchdog:
    """Ends the process, with every thread's stack on stderr, when no step ends for `seconds`; 0 is never.

    It begins to watch at the first `beat`, after the compile.
    """

    def __init__(self, seconds: float):
        self._seconds, self._last, self._over = seconds, None, threading.Event()

    def __enter__(self):
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def beat(self) -> None:
        self._last = time.monotonic()

    def _watch(self):
        while not self._over.wait(min(self._seconds / 10, 1.0)):
            if self._last is not None and time.monotonic() - self._last > self._seconds:
                faulthandler.dump_traceback(all_threads=True)
                hosts.exit_at_once(HUNG, f"no step ended for {self._seconds:g} s (config.train.hang_seconds): ")

    def __exit__(self, *_):
        self._over.set()


class Profile:
    """Records the steps from the first to the last of `steps` in WORKDIR/profile, for xprof; None records nothing."""

    def __init__(self, workdir: str, steps: tuple[int, int] | None):
        self._folder, self._steps = os.path.join(workdir, "profile"), steps
        self._on = self._done = False

    def __enter__(self):
        return self

    def before(self, step: int) -> None:
        if self._steps and self._steps[0] <= step <= self._steps[1] and not self._on:
            jax.profiler.start_trace(self._folder)
            self._on = self._done = True

    def after(self, step: int, metrics) -> None:
        if self._on and step >= self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self):
        jax.profiler.stop_trace()
        self._on = False
        log.info("profile of steps %d to %d in %s; look at it with `xprof %s`", *self._steps, *[self._folder] * 2)

    def __exit__(self, *_):
        if self._on:  # the training ended first
            self._stop()
        elif self._steps and not self._done:
            log.warning("nothing is profiled: no step from %d to %d was done", *self._steps)

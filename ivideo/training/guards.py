"""What guards a training run: the handling of stop signals, a watchdog for hanging steps, and a profiler."""

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

# Exit codes after which the same command continues the run. `hosts.LOST` is another one. 75 is EX_TEMPFAIL
PREEMPTED = 75  # the run received a stop signal, saved and stopped
HUNG = 76  # a step took longer than config.train.hang_seconds

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Records whether this process was asked to stop. Several processes agree on the step after which they stop.

    The signals are SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal closes), and SIGUSR1 and SIGUSR2, which Slurm and its
    wrappers send before the end of a job. A signal that is ignored at the start stays ignored: nohup ignores SIGHUP.
    A second Ctrl-C ends the process at once, also during a compilation.
    """

    def __init__(self):
        self.requested = False
        self._checks = 0  # calls of `should_stop`
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        self._several = jax.process_count() > 1
        # With several processes jax's preemption service handles SIGTERM, and makes them agree on a step to stop at
        for number in STOP_SIGNALS[1:] if self._several else STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        # Python runs a signal handler only when the main thread is back in Python, and a compilation takes minutes. So
        # Python writes each signal's number to a socket, and a thread reads it there
        receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(receiver,), daemon=True).start()
        return self

    def _handle(self, *_):
        if not self._several:
            self.requested = True

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
                        hosts.INTERRUPTED, "interrupted again: the steps since the newest checkpoint are lost; "
                    )
                if self._several:
                    self.request_stop()
                hint = "; a second Ctrl-C ends it at once" if number == signal.SIGINT else ""
                log.warning("%s: the run saves and stops%s", signal.Signals(number).name, hint)

    def request_stop(self) -> None:
        """Requests a stop, by sending this process the signal that jax's preemption service waits for."""
        os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self) -> bool:
        """Whether to stop before the next step. All processes call this before every step."""
        if jax.process_count() == 1:
            return self.requested
        from jax.experimental import multihost_utils

        # jax expects increasing numbers. Step numbers do not increase: each phase of a distillation starts again at 0
        self._checks += 1
        return multihost_utils.reached_preemption_sync_point(self._checks)

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup)
            self._sender.close()


class Watchdog:
    """Ends the process if no step ends for `seconds`, and prints the stack of every thread. With 0, it does nothing.

    It starts watching at the first `beat`, which comes after the compilation.
    """

    def __init__(self, seconds: float):
        self._seconds, self._last, self._ended = seconds, None, threading.Event()

    def __enter__(self):
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def beat(self) -> None:
        """Reports that a step has ended."""
        self._last = time.monotonic()

    def _watch(self):
        while not self._ended.wait(min(self._seconds / 10, 1.0)):
            if self._last is not None and time.monotonic() - self._last > self._seconds:
                faulthandler.dump_traceback(all_threads=True)
                hosts.exit_at_once(HUNG, f"no step ended for {self._seconds:g} s (config.train.hang_seconds): ")

    def __exit__(self, *_):
        self._ended.set()


class Profiler:
    """Profiles the steps from `steps[0]` to `steps[1]` for xprof, in WORKDIR/profile. With None, it does nothing."""

    def __init__(self, workdir: str, steps: tuple[int, int] | None):
        self._folder, self._steps = os.path.join(workdir, "profile"), steps
        self._running = self._ran = False

    def __enter__(self):
        return self

    def before(self, step: int) -> None:
        """Starts the profile if `step`, which is about to run, is the first one to profile."""
        if self._steps and self._steps[0] <= step <= self._steps[1] and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = self._ran = True

    def after(self, step: int, metrics) -> None:
        """Ends the profile if `step` was the last one to profile. Waits for the step's `metrics`."""
        if self._running and step >= self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self):
        jax.profiler.stop_trace()
        self._running = False
        log.info("the profile of steps %d to %d is in %s; view it with `xprof %s`", *self._steps, *[self._folder] * 2)

    def __exit__(self, *_):
        if self._running:  # the training ended first
            self._stop()
        elif self._steps and not self._ran:
            log.warning("nothing was profiled: the run had no step from %d to %d", *self._steps)

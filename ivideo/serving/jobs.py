"""Work that runs in a thread, reports how far it is, and can be stopped."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

INTERVAL = 0.5  # seconds between two reports


class Stopped(Exception):
    """Nobody waits for the result any more."""


class Job:
    """Calls `work(job)` in a thread of its own. The work calls `report` often, which raises Stopped after `stop`.

    `result`: what the work returned, after `updates` has ended.
    """

    def __init__(self, work: Callable[["Job"], object]):
        self.result, self.error = None, None
        self._work, self._text, self._stop, self._done = work, "", threading.Event(), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def report(self, text: str) -> None:
        """Says in one line how far the work is. Stopped where the work has been stopped."""
        if self._stop.is_set():
            raise Stopped
        self._text = text

    def stop(self) -> None:
        """Makes the next `report` raise Stopped."""
        self._stop.set()

    def updates(self) -> Iterator[str]:
        """Yields the newest report every INTERVAL until the work ends; raises the error that ended it.

        A caller that closes the iterator early, as Gradio does when a browser goes away, stops the work. So there is a
        report even where nothing has changed.
        """
        try:
            while not self._done.wait(INTERVAL):
                yield self._text
        finally:
            self.stop()
        if self.error is not None:
            raise self.error

    def _run(self):
        try:
            self.result = self._work(self)
        except BaseException as e:
            self.error = e
        finally:
            self._done.set()


class Remaining:
    """The time that a sequence of stages still needs.

    `seconds`: per stage what its last run took, None where it has not run yet. `clock`: the time now, in seconds.
    """

    def __init__(self, seconds: Sequence[float | None], clock: Callable[[], float] = time.monotonic):
        self._seconds, self._clock, self._began = list(seconds), clock, clock()

    def before(self, step: int, steps: int) -> str:
        """'about 12 s left' before a step of the stage at the front; '' where a time is not known yet."""
        now, front, todo = self._clock(), self._seconds[0], steps - step + 1
        if step == 1:  # the time before it may include compilation
            self._began = now
        if step > 1:
            front = (now - self._began) / (step - 1) * steps
        if front is None or None in self._seconds[1:]:
            return ""
        return f"about {max(1, round(front * todo / steps + sum(self._seconds[1:])))} s left"

    def end(self) -> None:
        """The stage at the front is finished."""
        self._seconds.pop(0)

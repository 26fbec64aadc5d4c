"""Clips that cannot be read are left out: each is replaced by the next clip that can be read.

The replacement depends on the data alone, so it is the same in every run, worker and process. A batch lists the clips
that were left out; the training process names and counts them.
"""

import logging
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from ivideo.data.video_io import VideoError
from ivideo.errors import UserError

log = logging.getLogger("ivideo")

# A batch's key, int32 [B,N,3]: for each of N reads, its source (0 videos, 1 images), the number of a clip, and how many
# clips from it on were left out
KEY = "unreadable"
ADVICE = "--mode=check_data lists all of them"


def first_readable(read: Callable[[int], Any], index: int, length: int, limit: int) -> tuple[Any, int, int]:
    """Reads the first readable clip i from `index` on. Returns (`read(i)`, i, the number of clips left out).

    UserError where more than `limit` clips in a row cannot be read.
    """
    for count in range(length):
        clip = (index + count) % length
        try:
            return read(clip), clip, count
        except VideoError as e:
            if count >= limit:
                raise UserError(f"{e} ({count + 1} unreadable, config.data.max_unreadable = {limit}; {ADVICE})") from e
    raise UserError(f"none of the {length} clips can be read: {ADVICE}")


class WarnUnreadable(grain.DatasetIterator):
    """Removes `KEY` from batches and warns once of each clip that was left out.

    UserError where more than `limit` clips were left out.
    """

    def __init__(self, parent: grain.DatasetIterator, sources: tuple, limit: int):
        super().__init__(parent)
        self._sources, self._limit, self._left_out = sources, limit, set()

    def __next__(self) -> dict:
        batch = next(self._parent)
        for which, first, count in np.asarray(batch.pop(KEY)).reshape(-1, 3):
            for i in range(count):
                self._report(int(which), int(first + i) % len(self._sources[which]))
        return batch

    def _report(self, which, index):
        if (which, index) in self._left_out:
            return
        self._left_out.add((which, index))
        try:
            self._sources[which].check(index)
            problem = f"clip {index} could not be read"  # but can be now: the storage fails at times
        except VideoError as e:
            problem = str(e)
        count = f"{len(self._left_out)} unreadable, config.data.max_unreadable = {self._limit}"
        if len(self._left_out) > self._limit:
            raise UserError(f"{problem} ({count}; {ADVICE})")
        log.warning("%s Another clip is used in its place (%s)", problem, count)

    def get_state(self) -> dict:
        return self._parent.get_state()

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state)

    def close(self) -> None:
        self._parent.close()

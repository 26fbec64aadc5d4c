"""Clips that cannot be read: each is left out, and the next one that can be read stands in its place.

Which clips can be read is a fact of the data, so the stand-in is the same one in every run, worker and process. A batch
carries which clips were left out, and the process that trains names and counts them.
"""

import logging
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from ivideo.data.video_io import VideoError
from ivideo.errors import UserError

log = logging.getLogger("ivideo")

KEY = "unreadable"  # of a batch, int32 [B,N,2]: for each of N reads a clip, and how many from it on were left out
ADVICE = "--mode=check_data lists all"


def first_readable(read: Callable[[int], Any], index: int, length: int, limit: int) -> tuple[Any, int, int]:
    """(`read(i)`, i, how many clips were left out) for the first clip i from `index` on that can be read.

    UserError where more than `limit` clips in a row cannot.
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
    """An iterator over batches without `KEY`, that warns of each clip that was left out, once.

    UserError where they are more than `limit`.
    """

    def __init__(self, parent: grain.DatasetIterator, source, limit: int):
        super().__init__(parent)
        self._source, self._limit, self._found = source, limit, set()

    def __next__(self) -> dict:
        batch = next(self._parent)
        for first, count in np.asarray(batch.pop(KEY)).reshape(-1, 2):
            for i in range(count):
                self._name(int(first + i) % len(self._source))
        return batch

    def _name(self, index):
        if index in self._found:
            return
        self._found.add(index)
        try:
            self._source[index]
            problem = f"clip {index} could not be read"  # and can be now, on storage that fails at times
        except VideoError as e:
            problem = str(e)
        count = f"{len(self._found)} unreadable, config.data.max_unreadable = {self._limit}"
        if len(self._found) > self._limit:
            raise UserError(f"{problem} ({count}; {ADVICE})")
        log.warning("%s Another clip stands in its place (%s)", problem, count)

    def get_state(self) -> dict:
        return self._parent.get_state()

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state)

    def close(self) -> None:
        self._parent.close()

"""TensorBoard's log of a run, written at once: an error is met where the report is made, not in a thread of its own."""

import os
import pathlib
import socket
import time

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter


class Board:
    """Adds numbers and images to the log in `folder`, which is made when it is needed, and again when it is gone.

    Every method raises OSError where the folder cannot be written; a later call then tries anew.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder, self._writer = folder, None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers by their names."""
        self._add(step, [summary.scalar(name, value) for name, value in values.items()])

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds an image, uint8 [H,W,3]."""
        self._add(step, [summary.image(name, image, dataformats="HWC")])

    def close(self) -> None:
        """Closes the log; what is added later goes to another file of the folder."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _add(self, step, values):
        try:
            writer = self._open()
            for value in values:
                self._write(Event(wall_time=time.time(), step=step, summary=value))
            writer.flush()
        except OSError:
            self._writer = None  # its file may end in a torn event: the next one goes to another file
            raise

    def _open(self):
        if self._writer is None or not os.path.exists(self._writer.path):
            self._folder.mkdir(parents=True, exist_ok=True)
            name = (
                f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"  # TensorBoard reads them in this order
            )
            self._writer = RecordWriter(str(self._folder / name))
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        return self._writer

    def _write(self, event):
        self._writer.write(event.SerializeToString())

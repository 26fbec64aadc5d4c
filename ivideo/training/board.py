"""Writes a run's TensorBoard log in the calling thread, so that errors are raised where the report is made."""

import os
import pathlib
import socket
import time

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter


class TensorBoardLog:
    """Adds numbers and images to the log in `folder`. The folder is created when needed, also after someone deleted it.

    Every method raises OSError if the folder cannot be written. A later call then tries again.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder, self._writer = folder, None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers, by name."""
        self._add(step, [summary.scalar(name, value) for name, value in values.items()])

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds an image, uint8 [H,W,3]."""
        self._add(step, [summary.image(name, image, dataformats="HWC")])

    def close(self) -> None:
        """Closes the log. Later additions go to a new file in the folder."""
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
            self._writer = None  # the file may end in a partial event: continue in a new file
            raise

    def _open(self):
        if self._writer is None or not os.path.exists(self._writer.path):
            self._folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files in the order of their names
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
            self._writer = RecordWriter(str(self._folder / name))
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        return self._writer

    def _write(self, event):
        self._writer.write(event.SerializeToString())

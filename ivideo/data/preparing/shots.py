"""Divides a video at its cuts into clips of one shot each, which are encoded again."""

import io
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from ivideo.data import encoders
from ivideo.data.decoding import Path, decoded, open_video
from ivideo.data.pictures import resized

CRF = 16  # H.264's constant quality, 0 (best) to 51
TICKS = 90_000  # of a second: the time base of the clips, so that frames keep their times


def split(source: Path | bytes, firsts: list[int], *, gop: int = 0) -> Iterator[bytes]:
    """Yields the .mp4 file of each shot. `firsts` are the numbers of the frames that begin them; the first is 0.

    Frames are those that players show and keep their times. There is a key frame every `gop` frames, or about every
    second if that is 0. Odd sizes lose a row or a column. The bytes are the same on every machine. VideoError for what
    cannot be decoded.
    """
    with open_video(source, "a video") as video:
        writer, first, wanted = None, None, set(firsts)
        for number, frame in enumerate(decoded(video)):
            picture = video.picture(frame)
            first = picture if first is None else first
            picture = resized(picture, first.shape)
            if number in wanted:
                if writer is not None:
                    yield writer.finish()
                writer = _Writer(*picture.shape[:2], video.rate or Fraction(24), gop)
                begin = frame.time
            writer.add(picture, frame.time - begin)
        yield writer.finish()


class _Writer:
    """An .mp4 file in memory to which frames are added one by one."""

    def __init__(self, height: int, width: int, rate: Fraction, gop: int):
        self.height, self.width, self.file = height // 2 * 2, width // 2 * 2, io.BytesIO()
        self.container = av.open(self.file, "w", format="mp4")
        options = {"crf": str(CRF), "g": str(gop or max(1, round(rate)))} | encoders.REPEATABLE
        self.stream = self.container.add_stream("libx264", rate=rate, options=options)
        self.stream.height, self.stream.width = self.height, self.width
        encoders.begin(self.stream, Fraction(1, TICKS))

    def add(self, picture: np.ndarray, time: Fraction) -> None:
        """Adds a frame, uint8 [H,W,3], that is shown at `time`, in seconds."""
        pixels = picture[: self.height, : self.width]
        frame = encoders.frame(pixels, round(time * TICKS), Fraction(1, TICKS))
        self.container.mux(self.stream.encode(frame))

    def finish(self) -> bytes:
        """Ends the file and returns its bytes."""
        self.container.mux(self.stream.encode(None))
        self.container.close()
        return self.file.getvalue()

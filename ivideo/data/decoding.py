"""Opening video files, and their frames at the times at which players show them (PyAV). Times are exact, in seconds."""

import contextlib
import dataclasses
import io
import itertools
import logging
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from ivideo.data.pictures import Extras, VideoError, picture

log = logging.getLogger("ivideo")

Path = str | os.PathLike

# Codecs of which each packet is one frame, so that a frame that did not come out is known
_ONE_FRAME_A_PACKET = ("h264", "hevc")


@dataclasses.dataclass
class Video:
    """An open file: its container, its video stream, what messages call it, and what its first frame came with."""

    container: av.container.InputContainer
    stream: av.VideoStream
    name: str
    extras: Extras | None = None

    @property
    def rate(self) -> Fraction:
        """The frames a second that the file states, 0 where it states none."""
        return Fraction(self.stream.average_rate or self.stream.guessed_rate or 0)

    @property
    def usual(self) -> Fraction:
        """Seconds that a frame is shown."""
        return 1 / (self.rate or Fraction(24))

    @property
    def by_dts(self) -> bool:
        """Whether decoding times are used: AVI has no others, and those that FFmpeg makes up ignore B-frames."""
        return self.container.format.name == "avi"

    def picture(self, decoded: "Decoded") -> np.ndarray:
        """What is shown, uint8 [H,W,3]; VideoError where the frame is damaged, or its colour cannot be converted."""
        if decoded.frame is None or decoded.frame.is_corrupt:
            at = float(decoded.time)
            raise VideoError(f"{self.name} is damaged at {at:.3f} seconds: write or download it again, or use another.")
        if self.extras is None:
            self.extras = Extras.of(decoded.frame)
        return picture(decoded.frame, self.stream, self.extras, self.name)


class Decoded(NamedTuple):
    """A frame, None where its packet was there and it did not come out, and when it is shown."""

    time: Fraction
    frame: av.VideoFrame | None


@contextlib.contextmanager
def open_video(source: Path | bytes, expected: str):
    """A `Video`, of a path or of a file's bytes; any failure in the block becomes a VideoError naming the source."""
    name = f"a clip of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise VideoError(f"{name} is no file, expected {expected}: check the path.")
    if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
        raise VideoError(f"{name} is empty, expected {expected}: write or download it again.")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        reason = error.strerror
        raise VideoError(f"{name} cannot be opened ({reason}), expected {expected}: make it readable.") from error
    try:
        # FFmpeg gets an open file, so that it takes no part of a name for a protocol, and opens none that a playlist
        # names.
        with file, av.open(file, options={"protocol_whitelist": "none"}) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                kinds = ", ".join(sorted({s.type for s in container.streams if s not in container.streams.video}))
                raise VideoError(f"{name} has {kinds or 'no'} streams and no video, expected {expected}: use another.")
            yield Video(container, streams[0], name)
    except VideoError:
        raise
    # Corrupt files surface as errors of many types, some of them not FFmpeg's.
    except Exception as error:
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise  # the machine's fault, not the file's
        raise VideoError(
            f"{name} cannot be read ({type(error).__name__}: {error}), expected {expected}: it is corrupt or not a "
            "video, so write or download it again, or use another."
        ) from error


def length(video: Video) -> Fraction:
    """Seconds, as the file states, or read off its packets where it does not, as browsers' recordings do not."""
    container, stream = video.container, video.stream
    if stream.duration:
        return stream.duration * stream.time_base
    if container.duration:
        return Fraction(container.duration, av.time_base)
    packets = [packet for packet in container.demux(stream) if packet.size]
    stamps = [packet.dts if packet.pts is None else packet.pts for packet in packets]
    if None in stamps or not stamps:
        return len(packets) * video.usual
    return (max(stamps) - min(stamps)) * stream.time_base + video.usual


def frames_at(video: Video, targets: list[Fraction], *, seek: bool) -> Iterator[np.ndarray] | None:
    """The picture on show at each target, in seconds after the first frame, until the video ends.

    None where it was asked to seek to the first target and that failed. Pictures are uint8 [H,W,3].
    """
    container, stream, name = video.container, video.stream, video.name
    frames = decoded(video)
    first = next(frames, None)
    if first is None:
        raise VideoError(f"{name} has no frame that can be decoded: write or download it again, or use another.")
    stated = (stream.start_time or 0) * stream.time_base
    if first.time - stated > 2 * video.usual and not video.by_dts:
        log.warning("%s: its first %.2f seconds do not decode and are left out", name, float(first.time - stated))
    targets = [first.time + target for target in targets]
    if seek:
        try:
            container.seek(int(targets[0] / stream.time_base), stream=stream, backward=True)
        except av.FFmpegError:
            return None
        frames = decoded(video, after_seek=True)
        first = next(frames, None)
        if first is None or first.time > targets[0]:
            return None
    return _chosen(video, itertools.chain([first], frames), targets)


def _chosen(video: Video, frames: Iterator[Decoded], targets: list[Fraction]) -> Iterator[np.ndarray]:
    # Containers round timestamps, some of them to milliseconds.
    slack = min(video.stream.time_base, video.usual / 4)
    waiting = iter(targets)
    target = next(waiting)
    shown, last = None, video.usual
    for found in frames:
        image = None
        while shown is not None and found.time > target + slack:
            # One conversion also where a frame is shown at several of the times.
            image = video.picture(shown) if image is None else image
            yield image
            target = next(waiting, None)
            if target is None:
                return
        last = found.time - shown.time if shown is not None else video.usual
        shown = found
    # The last frame stays for as long as the one before it did, where the file does not say.
    stated = shown.frame is not None and shown.frame.duration
    end = shown.time + (stated * video.stream.time_base if stated else last)
    image = None
    while target is not None and target + slack < end:
        image = video.picture(shown) if image is None else image
        yield image
        target = next(waiting, None)


def decoded(video: Video, *, after_seek: bool = False) -> Iterator[Decoded]:
    """The frames from where the container is.

    A frame without a timestamp follows the one before it at the usual rate; nothing is yielded after a seek where the
    first frame has none. What cannot be decoded before the first key frame, as after a cut, is left out; later on it is
    the decoder's error, or a frame that is None.
    """
    container, stream = video.container, video.stream
    base = stream.time_base
    whole = stream.codec_context.name in _ONE_FRAME_A_PACKET and not video.by_dts
    missing: set[int] = set()
    time, shown, keyed = None, None, False
    for packet in container.demux(stream):
        keyed = keyed or packet.is_keyframe
        if whole and packet.size and packet.pts is not None and not packet.is_discard:
            missing.add(packet.pts)
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            if keyed:
                raise
            continue
        for frame in frames:
            if frame.interlaced_frame:
                missing.clear()  # the two fields of a frame can be packets of their own
            stamp = frame.dts if video.by_dts or frame.pts is None else frame.pts
            if stamp is None and time is None and after_seek:
                return
            time = stamp * base if stamp is not None else Fraction(0) if time is None else time + video.usual
            if frame.pts is not None:
                # Frames come out in the order in which they are shown.
                before = {pts for pts in missing if pts < frame.pts}
                missing -= before | {frame.pts}
                yield from (Decoded(pts * base, None) for pts in sorted(before) if shown is not None and shown < pts)
                shown = frame.pts
            yield Decoded(time, frame)
    yield from (Decoded(pts * base, None) for pts in sorted(missing) if shown is not None and shown < pts)

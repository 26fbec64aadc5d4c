"""Opens video files and decodes their frames with the times at which players show them (PyAV).

Times are in seconds, as exact fractions.
"""

import bisect
import contextlib
import dataclasses
import io
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from ivideo.data.pictures import Extras, VideoError, picture

log = logging.getLogger("ivideo")

Path = str | os.PathLike

# Codecs whose packets hold one frame each, so that a packet without a frame means that the frame did not decode
_ONE_FRAME_PER_PACKET = ("h264", "hevc")

# A frame's packet is at most this many packets before or after those of its neighbours: H.264 reorders up to 16 frames
_NEIGHBOURS = 32
_SEEKS = 3  # attempts to find a key frame before a time


@dataclasses.dataclass
class Video:
    """An open file: its container, video stream, name in messages, and what its first frame says.

    `extras` is the side data of the first picture, and `first` the first frame that decodes; None until it is read.
    """

    container: av.container.InputContainer
    stream: av.VideoStream
    name: str
    extras: Extras | None = None
    first: "Decoded | None" = None

    @property
    def rate(self) -> Fraction:
        """The file's own frame rate in frames per second, 0 where it has none."""
        return Fraction(self.stream.average_rate or self.stream.guessed_rate or 0)

    @property
    def time_base(self) -> Fraction:
        """The seconds that a time stamp counts. PyAV 19 has a type of its own, which cannot be divided by `//`."""
        return Fraction(self.stream.time_base)

    @property
    def frame_seconds(self) -> Fraction:
        """Seconds that a frame is normally shown; 1/24 where the file has no rate."""
        return 1 / (self.rate or Fraction(24))

    @property
    def by_dts(self) -> bool:
        """Whether to use decoding times: AVI has no others, and the times that FFmpeg derives ignore B-frames."""
        return self.container.format.name == "avi"

    def stamp(self, of: av.Packet | av.VideoFrame) -> int | None:
        """The time stamp of a packet or frame, in units of the stream's time base."""
        return of.dts if self.by_dts or of.pts is None else of.pts

    def check(self, decoded: "Decoded") -> None:
        """VideoError for a damaged frame."""
        if decoded.frame is None or decoded.frame.is_corrupt:
            seconds = float(decoded.time)
            raise VideoError(
                f"{self.name} is damaged at {seconds:.3f} seconds: write or download it again, or use another."
            )

    def picture(self, decoded: "Decoded") -> np.ndarray:
        """The picture that a player shows, uint8 [H,W,3]. VideoError for a damaged frame or unsupported colours."""
        self.check(decoded)
        if self.extras is None:
            self.extras = Extras.of(decoded.frame)
        return picture(decoded.frame, self.stream, self.extras, self.name)


class Decoded(NamedTuple):
    """The time at which a frame is shown, and the frame, or None where its packet did not decode."""

    time: Fraction
    frame: av.VideoFrame | None


@contextlib.contextmanager
def open_video(source: Path | bytes, expected: str):
    """Opens a path or a file's bytes as a `Video`. Any failure in the block becomes a VideoError naming the source."""
    name = f"a clip of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise VideoError(f"{name} is not a file, expected {expected}: check the path.")
    if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
        raise VideoError(f"{name} is empty, expected {expected}: write or download it again.")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        reason = error.strerror
        raise VideoError(f"{name} cannot be opened ({reason}), expected {expected}: make it readable.") from error
    try:
        # FFmpeg gets an open file, so that it cannot read a file's name as a protocol, and the whitelist keeps it from
        # opening files that a playlist names
        with file, av.open(file, options={"protocol_whitelist": "none"}) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                kinds = ", ".join(sorted({s.type for s in container.streams if s not in container.streams.video}))
                raise VideoError(f"{name} has {kinds or 'no'} streams and no video, expected {expected}: use another.")
            yield Video(container, streams[0], name)
    except VideoError:
        raise
    # Corrupt files cause many types of error, some of them not FFmpeg's
    except Exception as error:
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise  # this machine is out of memory; the file may be fine
        raise VideoError(
            f"{name} cannot be read ({type(error).__name__}: {error}), expected {expected}: it is corrupt or not a "
            "video, so write or download it again, or use another."
        ) from error


def length(video: Video) -> Fraction:
    """The length in seconds that the file states, or else that its packets span, as for recordings by browsers."""
    container, stream = video.container, video.stream
    if stream.duration:
        return stream.duration * video.time_base
    if container.duration:
        return Fraction(container.duration, av.time_base)
    packets = [packet for packet in container.demux(stream) if packet.size]
    stamps = [packet.dts if packet.pts is None else packet.pts for packet in packets]
    if None in stamps or not stamps:
        return len(packets) * video.frame_seconds
    return (max(stamps) - min(stamps)) * video.time_base + video.frame_seconds


def frames_at(video: Video, targets: list[Fraction], *, seek: bool) -> Iterator[np.ndarray] | None:
    """Yields the picture shown at each target, in seconds after the first frame, until the video ends.

    With `seek`, decoding starts at the last key frame before the first target; returns None where there is none that
    can be found. Without, it starts at the beginning. Pictures are uint8 [H,W,3].
    """
    frames = iter(())
    if video.first is None:
        frames = decoded(video)
        video.first = _first(video, frames)
    first = video.first
    targets = [first.time + target for target in targets]
    if seek:
        packets = _from_key_frame(video, targets[0])
        if packets is None:
            return None
        frames = decoded(video, _marked(video, packets, targets), after_seek=True)
        first = next(frames, None)
        if first is None or first.time > targets[0]:
            return None
    return _chosen(video, itertools.chain([first], frames), targets)


def _first(video: Video, frames: Iterator["Decoded"]) -> "Decoded":
    stream, first = video.stream, next(frames, None)
    if first is None:
        raise VideoError(f"{video.name} has no frame that can be decoded: write or download it again, or use another.")
    stated = (stream.start_time or 0) * video.time_base
    if first.time - stated > 2 * video.frame_seconds and not video.by_dts:
        log.warning("%s: its first %.2f seconds do not decode and are skipped", video.name, float(first.time - stated))
    return first


def choose_start(video: Video, seconds: Fraction, choose: Callable[[int], int]) -> Fraction:
    """One of the file's frame times after which its frames go on for `seconds`, in seconds after its first frame.

    `choose`: given n, returns one of 0 .. n-1. Times are multiples of the frame's normal duration. Time 0 is always
    among them, even if the file is too short. Only the first frame is decoded. The packets' times, not the stated
    duration, say when the last frame is shown.
    """
    stamps = []

    def noted():
        for packet in video.container.demux(video.stream):
            if packet.size and not packet.is_discard:
                stamps.append(video.stamp(packet))
            yield packet, True

    packets = noted()
    video.first = _first(video, decoded(video, packets))
    for _ in packets:  # the rest, which is not decoded
        pass
    if None in stamps:
        last = (len(stamps) - 1) * video.frame_seconds
    else:
        last = max(stamps) * video.time_base - video.first.time
    return choose(max(0, int((last - seconds + _slack(video)) // video.frame_seconds)) + 1) * video.frame_seconds


def _from_key_frame(video: Video, time: Fraction) -> Iterator[av.Packet] | None:
    """The packets from a key frame on that is shown at `time` or before, or None if seeking finds none.

    In open groups, the frames that follow a key frame but are shown before it need the group before. So the key frame
    itself must not be shown later than `time`.
    """
    container, stream = video.container, video.stream
    at = int(time / video.time_base)
    for _ in range(_SEEKS):
        try:
            container.seek(at, stream=stream, backward=True)
        except av.FFmpegError:
            return None
        packets = itertools.dropwhile(lambda packet: not packet.is_keyframe, container.demux(stream))
        key = next(packets, None)
        stamp = None if key is None else video.stamp(key)
        if stamp is None:
            return None
        if stamp * video.time_base <= time:
            return itertools.chain([key], packets)
        at = min(at, stamp, stamp if key.dts is None else key.dts) - 1
    return None


def _marked(video: Video, packets: Iterable[av.Packet], targets: list[Fraction]) -> Iterator[tuple[av.Packet, bool]]:
    """Yields each packet, and whether its frame may be shown at a target or is one of the last two of the file."""
    slack, base = _slack(video), video.time_base
    wanted = [int((target + slack) // base) for target in targets]
    packets = iter(packets)
    window = list(itertools.islice(packets, _NEIGHBOURS + 1))
    at = 0
    while at < len(window):
        packet = window[at]
        later = sorted(other.pts for other in window if None not in (other.pts, packet.pts) and other.pts > packet.pts)
        needed = len(later) < 2 or bisect.bisect_left(wanted, packet.pts) < bisect.bisect_left(wanted, later[0])
        yield packet, needed
        window.extend(itertools.islice(packets, 1))
        if at < _NEIGHBOURS:
            at += 1
        else:
            del window[0]


def _slack(video: Video) -> Fraction:
    """Containers round timestamps, some of them to milliseconds: a frame is shown this much before its time."""
    return min(video.time_base, video.frame_seconds / 4)


def _chosen(video: Video, frames: Iterator[Decoded], targets: list[Fraction]) -> Iterator[np.ndarray]:
    slack = _slack(video)
    remaining = iter(targets)
    target = next(remaining)
    shown, seconds_shown = None, video.frame_seconds
    for frame in frames:
        image = None
        while shown is not None and frame.time > target + slack:
            # A frame that is shown at several targets is converted once
            image = video.picture(shown) if image is None else image
            yield image
            target = next(remaining, None)
            if target is None:
                return
        seconds_shown = frame.time - shown.time if shown is not None else video.frame_seconds
        shown = frame
    # Unless the file states its duration, the last frame is shown as long as the one before it
    stated = shown.frame is not None and shown.frame.duration
    end = shown.time + (stated * video.time_base if stated else seconds_shown)
    image = None
    while target is not None and target + slack < end:
        image = video.picture(shown) if image is None else image
        yield image
        target = next(remaining, None)


def decoded(
    video: Video, packets: Iterable[tuple[av.Packet, bool]] | None = None, *, after_seek: bool = False
) -> Iterator[Decoded]:
    """Yields the frames of packets, by default of all from the container's current position on.

    `packets`: pairs (packet, needed). A frame that is not needed is left out if no other frame depends on it.
    A frame without a timestamp follows the previous one after `frame_seconds`. After a seek, nothing is yielded if the
    first frame has no timestamp. Packets before the first key frame that do not decode, as after a cut without
    re-encoding, are skipped. Later ones raise the decoder's error, or are yielded as None.
    """
    stream = video.stream
    base, context = video.time_base, stream.codec_context
    track_missing = context.name in _ONE_FRAME_PER_PACKET and not video.by_dts
    missing: set[int] = set()
    time, shown, keyed = None, None, False
    if packets is None:
        packets = ((packet, True) for packet in video.container.demux(stream))
    for packet, needed in packets:
        keyed = keyed or packet.is_keyframe
        # Only H.264 says of every frame whether any other depends on it, and only of whole frames
        skip = not needed and context.name == "h264" and not video.by_dts and not _interlaced(video)
        context.skip_frame = "NONREF" if skip else "DEFAULT"
        if track_missing and packet.size and packet.pts is not None and not packet.is_discard and not skip:
            missing.add(packet.pts)
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            if keyed:
                raise
            continue
        for frame in frames:
            if frame.interlaced_frame:
                missing.clear()  # the two fields of a frame can be in separate packets
            stamp = video.stamp(frame)
            if stamp is None and time is None and after_seek:
                return
            time = stamp * base if stamp is not None else Fraction(0) if time is None else time + video.frame_seconds
            if frame.pts is not None:
                # Frames are decoded in the order in which they are shown
                before = {pts for pts in missing if pts < frame.pts}
                missing -= before | {frame.pts}
                yield from (Decoded(pts * base, None) for pts in sorted(before) if shown is not None and shown < pts)
                shown = frame.pts
            yield Decoded(time, frame)
    yield from (Decoded(pts * base, None) for pts in sorted(missing) if shown is not None and shown < pts)


def _interlaced(video: Video) -> bool:
    return video.first is None or video.first.frame is None or video.first.frame.interlaced_frame

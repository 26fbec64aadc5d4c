"""Decodes a file once, finds out whether all of it can be read, and measures it.

Differences of frames are means over 32 × 32 gray pixels, in levels of 255.
"""

import hashlib
import io
import math
from fractions import Fraction

import numpy as np
import scipy.fft
from av.video.reformatter import Interpolation

from ivideo import files
from ivideo.data.decoding import Path, Video, decoded, open_video
from ivideo.data.pictures import VideoError, upright
from ivideo.data.preparing.bars import Bars
from ivideo.data.preparing.cadence import distinct_share

SIDE = 32  # pixels of the small gray frames
APART = Fraction(1, 4)  # seconds between the frames whose difference is the motion
LOOK_EVERY = 1  # seconds between the frames that are searched for black bars
HASHED = (0.25, 0.5, 0.75)  # the frames that are hashed, as shares of the length
_KEPT = 512  # small frames kept for hashing; of longer clips every second one, fourth one, …


class Refused(VideoError):
    """A file that decodes but must not be used, with the reason in one word."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def measure_video(source: Path | bytes, *, cut: float = math.inf) -> dict:
    """A video's measures, by the names of `records.features`, of a path or a file's bytes.

    `firsts` are the numbers of the frames that differ by more than `cut` levels from the one before, and 0. `times`
    are those of these frames and of the end, in seconds after the first one.
    VideoError where any of it cannot be read. Refused where it ends before the time or the frame that it states.
    """
    _check_packets(source)
    with open_video(source, "a video") as video:
        measuring, stated, base = _Measuring(video, cut), _stated_seconds(video), video.time_base
        for frame in decoded(video):
            measuring.add(frame)
        if not measuring.times:
            raise VideoError("it has no frame that can be decoded")
    measures = measuring.result(base)
    seconds = measures["seconds"]
    if seconds < 0.9 * stated - 0.25:
        raise Refused("truncated", f"it states {stated:.2f} seconds, and its frames end after {seconds:.2f}")
    return measures | {"sha256": _digest(source)}


def _digest(source: Path | bytes) -> str:
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else files.digest(source)


def _check_packets(source: Path | bytes) -> None:
    """Refused where an .mp4 or .mov has fewer frames than its index lists, as after an interrupted download."""
    with open_video(source, "a video") as video:
        if "mp4" in video.container.format.name:
            count = sum(packet.size > 0 for packet in video.container.demux(video.stream))
            if count < video.stream.frames:
                raise Refused("truncated", f"it states {video.stream.frames} frames, and has {count}")


def _stated_seconds(video: Video) -> float:
    """The length of the video stream that the file states, or 0. Of .mp4 and .mov the packets say more."""
    if "mp4" in video.container.format.name:
        return 0.0
    if video.stream.duration:
        return float(video.stream.duration * video.time_base)
    if tag := video.stream.metadata.get("DURATION"):  # Matroska and WebM
        hours, minutes, seconds = tag.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    alone = len(video.container.streams) == 1  # otherwise the sound may be longer
    return (video.container.duration or 0) / 1e6 if alone else 0.0


class _Measuring:
    """What is known of a video after the frames that were added so far, in bounded memory."""

    def __init__(self, video: Video, cut: float):
        self.video, self.times, self.cut, self.firsts = video, [], cut, [0]
        self.kept, self.stride = [], 1  # (time, small frame)
        self.before = self.compared = None  # the frame before; the last one whose motion was measured, with its time
        self.steps, self.motion, self.compared_count = [], 0.0, 0
        self.bars, self.looked, self.last_shown = None, None, None

    def add(self, frame):
        self.video.check(frame)
        time, number = frame.time, len(self.times)
        if self.looked is None or time - self.looked >= LOOK_EVERY:
            picture = self.video.picture(frame)
            self.bars = self.bars or Bars(*picture.shape[:2])
            self.bars.add(picture)
            self.looked = time
        gray = frame.frame.reformat(width=SIDE, height=SIDE, format="gray", interpolation=Interpolation.AREA)
        small = upright(gray.to_ndarray()[..., None], self.video.extras.matrix)[..., 0].astype(np.int16)
        if self.before is not None:
            step = difference(small, self.before)
            self.steps.append(step)
            if step > self.cut:
                self.firsts.append(number)
        if self.compared is None:
            self.compared = (time, small)
        elif time - self.compared[0] >= APART:
            self.motion += difference(small, self.compared[1])
            self.compared_count += 1
            self.compared = (time, small)
        if number % self.stride == 0:
            self.kept.append((time, small))
            if len(self.kept) > _KEPT:
                self.kept, self.stride = self.kept[::2], 2 * self.stride
        self.before = small
        self.times.append(time)
        self.last_shown = frame.frame.duration  # in units of the time base

    def result(self, base: Fraction) -> dict:
        """The measures; `base` is the time base of the video stream."""
        times, count = self.times, len(self.times)
        span = times[-1] - times[0]
        last = self.last_shown * base if self.last_shown else times[-1] - times[-2] if count > 1 else 0
        middle = [min(self.kept, key=lambda kept: abs(kept[0] - times[0] - share * span))[1] for share in HASHED]
        # A clip shorter than a quarter of a second is compared as a whole
        motion = self.motion / self.compared_count if self.compared_count else difference(self.before, self.kept[0][1])
        fps = float((count - 1) / span) if span > 0 else 0.0
        ends = [*(times[first] - times[0] for first in self.firsts), span + last]
        return {
            "firsts": self.firsts,
            "times": [round(float(end), 6) for end in ends],
            "frames": count,
            "seconds": round(float(span + last), 6),
            "fps": round(fps, 4),
            "distinct_fps": round(fps * distinct_share(np.array(self.steps), fps), 4),
            "height": self.bars.height,
            "width": self.bars.width,
            "box": self.bars.box(),
            "motion": round(motion, 4),
            "jump": round(max(self.steps, default=0.0), 4),
            "hash": "".join(map(perceptual_hash, middle)),
        }


def measure_image(data: bytes) -> dict:
    """An image's measures. VideoError where it cannot be read."""
    from ivideo.data.images import read_image

    image = read_image(data)
    bars = Bars(*image.shape[:2])
    bars.add(image)
    small = _small(image)
    return {
        "height": image.shape[0],
        "width": image.shape[1],
        "box": bars.box(),
        "hash": perceptual_hash(small),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _small(image: np.ndarray) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The mean difference of two small frames, in levels of 255."""
    return float(np.abs(a.astype(np.int16) - b).mean())


def perceptual_hash(small: np.ndarray) -> str:
    """64 bits of a small gray frame, in hexadecimal, that resizing and coding hardly change.

    They are the signs of its 64 lowest frequencies, without the mean, against their median.
    """
    low = scipy.fft.dctn(small.astype(np.float64), norm="ortho")[:8, :8].ravel()
    bits = low[1:] > np.median(low[1:])
    return np.packbits(np.append(False, bits)).tobytes().hex()


def thumbnail(image: np.ndarray, *, height: int) -> bytes:
    """A picture as a small JPEG of this height."""
    from PIL import Image

    file = io.BytesIO()
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    Image.fromarray(image).resize((width, height)).save(file, "JPEG", quality=70)
    return file.getvalue()

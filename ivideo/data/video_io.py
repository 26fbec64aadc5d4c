"""Video files: writing clips with what made them in the metadata, and reading frames by their timestamps (PyAV).

What is read are the pictures that players show (`pictures.picture`): upright, with square pixels, BT.709. What is
written is BT.709 and says so. Dimension letters: T frames, H height, W width. Times are in seconds, exact (`Fraction`)
inside.
"""

import contextlib
import json
import logging
import os
import pathlib
import uuid
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from ivideo.data import encoders
from ivideo.data.decoding import Path, decoded, frames_at, length, open_video
from ivideo.data.pictures import VideoError, resized
from ivideo.errors import UserError

log = logging.getLogger("ivideo")

EXTENSIONS = tuple(encoders.FORMATS)  # of files that are written, in either case

Rate = int | float | Fraction


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Video [T,H,W,3] as uint8: float in [-1, 1] is clipped and rounded to 0..255, uint8 passes through.

    UserError on other shapes, other types and values that are not finite.
    """
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UserError(f"The video has shape {video.shape}, expected [T,H,W,3]: pass one clip of RGB frames.")
    if video.dtype == np.uint8:
        return video
    if not np.issubdtype(video.dtype, np.floating):
        raise UserError(f"The video is {video.dtype}, expected float in [-1, 1] or uint8: convert it first.")
    if not np.isfinite(video).all():
        raise UserError("The video has values that are not finite, expected [-1, 1]: the sampler diverged.")
    return np.round(np.clip((video.astype(np.float32) + 1) * 127.5, 0, 255)).astype(np.uint8)


def to_float(video: np.ndarray) -> np.ndarray:
    """uint8 video as float32 in [-1, 1]."""
    return video.astype(np.float32) / np.float32(127.5) - np.float32(1)


def extension(path: Path) -> str:
    """The extension in `EXTENSIONS` that a path ends in, whatever its case; UserError where it ends in another one."""
    found = pathlib.Path(path).suffix.lower()
    if found not in EXTENSIONS:
        kinds = f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"
        raise UserError(f"{path} ends in {found!r}, expected {kinds}: rename the output, no other kind is written.")
    return found


def write_video(
    path: Path,
    video: np.ndarray,
    *,
    fps: Rate,
    metadata: dict[str, str] | None = None,
    crf: int = 18,
    overwrite: bool = False,
) -> None:
    """Writes a clip as .mp4 or .mov (H.264), .webm (VP9) or .gif, by the extension of `path`, whole or not at all.

    `video` [T,H,W,3] is float in [-1, 1] or uint8; `fps` is in frames a second. `crf` is the constant quality, 0 (best)
    to 51, of H.264; VP9 gets the same part of its own range. `metadata`, e.g. prompt, seed, config and version, is read
    back by `read_metadata`; it is kept as JSON in the file's comment. Where `path` is a link, the file that it points
    to is written. The GIF format counts time in hundredths of a second, so its frames can be up to half of that early
    or late.

    FileExistsError where `path` exists and not `overwrite`; UserError on another extension, odd sizes except for gif
    (colour is at half the resolution), or what `to_uint8` refuses.
    """
    suffix = extension(path)
    if os.path.exists(path) and not overwrite:
        raise FileExistsError(f"{path} exists, expected a new file: choose another name or ask to overwrite.")
    target = pathlib.Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no folder, expected one to write {path} in: create it first.")
    frames, fps = to_uint8(video), _rate(fps)
    encoders.check(suffix, frames, crf)
    comment = "" if metadata is None else json.dumps({str(k): str(v) for k, v in metadata.items()}, ensure_ascii=False)
    # Short, so that a name as long as the file system allows can be written
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        encoders.write(temporary, suffix, frames, fps, comment, crf)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def encode(video: np.ndarray, *, fps: Rate, crf: int = 18) -> bytes:
    """The bytes of an .mp4 file of the clip, the same on every machine; arguments and errors as in `write_video`."""
    frames, fps = to_uint8(video), _rate(fps)
    encoders.check(".mp4", frames, crf)
    return encoders.mp4_bytes(frames, fps, crf)


def _rate(fps: Rate) -> Fraction:
    rate = fps if isinstance(fps, int | Fraction) else Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise UserError(f"fps is {fps}, expected more than 0 frames a second: pass the clip's frame rate.")
    return Fraction(rate)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata that `write_video` put in the file; empty where the comment is none of ours, or there is none.

    VideoError where the file cannot be opened as a video.
    """
    with open_video(path, "a video file") as video:
        comments = [text for key, text in video.container.metadata.items() if key.lower() == "comment"]
        if video.container.format.name == "gif":
            comments = encoders.gif_comments(pathlib.Path(path).read_bytes())
    for comment in comments:
        with contextlib.suppress(ValueError):
            found = json.loads(comment)
            if isinstance(found, dict):
                return found
    return {}


def count_frames(path: Path) -> int:
    """How many frames of a file decode. VideoError where one is an error, or the file cannot be opened as a video."""
    with open_video(path, "a video file") as video:
        return sum(found.frame is not None for found in decoded(video))


def read_rate(source: Path | bytes) -> Fraction:
    """The frames a second that a file states, 0 where it states none. VideoError where it cannot be opened."""
    with open_video(source, "a video") as video:
        return video.rate


def read_video(source: Path | bytes, *, min_frames: int = 2) -> tuple[np.ndarray, Fraction]:
    """All frames, uint8 [T,H,W,3], and the rate in frames a second, of a path or of a file's bytes.

    All of them are in memory; frames of another size than the first one's get its size. A count that is not the one
    that the file states, as after a cut without coding, is a warning. VideoError where the file is missing, empty,
    corrupt, no video, or has fewer than `min_frames` frames.
    """
    with open_video(source, f"a video of {min_frames} frames or more") as video:
        frames: list[np.ndarray] = []
        for found in decoded(video):
            image = video.picture(found)
            frames.append(resized(image, frames[0].shape) if frames else image)
        count, stated = len(frames), video.stream.frames
        if count < min_frames:
            raise VideoError(
                f"{video.name} has {count} frames, expected {min_frames} or more: no clip, so use another."
            )
        if stated and stated != count:
            log.warning("%s: %d frames can be read, and it states %d", video.name, count, stated)
        return np.stack(frames), video.rate


def sample_frames(source: Path | bytes, **how) -> np.ndarray:
    """The frames that `iter_frames` yields, uint8 [frames,H,W,3], all of the first one's size."""
    frames: list[np.ndarray] = []
    for image in iter_frames(source, **how):
        frames.append(resized(image, frames[0].shape) if frames else image)
    return np.stack(frames)


def iter_frames(
    source: Path | bytes,
    *,
    frames: int,
    fps: Rate | None = None,
    duration: Rate | None = None,
    start: Rate = 0,
    pick: int | None = None,
) -> Iterator[np.ndarray]:
    """The frames on show at start, start + 1/fps, ...: uint8 [H,W,3] each, chosen by their timestamps.

    `source` is a path or a file's bytes. Give `fps`, frames a second, or `duration`, seconds, of which the frames are
    equal parts; without either they are equal parts of all that follows `start`, which is in seconds after the first
    frame that decodes. With `pick` only that one of them is read. Frames of the file are skipped or repeated as that
    needs; only those that are yielded are converted, and none is kept, so memory does not grow with the file. Where the
    resolution changes within the file, so does the frames' size.

    UserError on arguments out of range; VideoError as in `read_video`, and where the clip ends too early.
    """
    if fps is not None and duration is not None:
        raise UserError(f"fps is {fps} and duration is {duration}, expected at most one of them: leave one out.")
    if frames < 1 or start < 0 or (duration is not None and duration <= 0):
        raise UserError(
            f"frames is {frames}, start {start} and duration {duration}, expected frames 1 or more, start 0 or more "
            "and duration above 0: correct them."
        )
    start = Fraction(start)
    expected = f"a video of {frames} frames from {float(start):.3f} seconds on"
    with open_video(source, expected) as video:
        name = video.name
        if fps is not None:
            step = 1 / _rate(fps)
        else:
            step = (Fraction(duration) if duration is not None else length(video) - start) / frames
    if step <= 0:
        raise VideoError(f"{name} ends before {float(start):.3f} seconds, expected {expected}: use a longer video.")
    targets = [start + k * step for k in range(frames)]
    if pick is not None:
        targets = [targets[pick]]
    found = 0
    # Far from the beginning a seek saves decoding; where it cannot be used, all from the beginning is decoded.
    for seek in (True, False) if targets[0] > 1 else (False,):
        with open_video(source, expected) as video:
            pictures = frames_at(video, targets, seek=seek)
            if pictures is None:
                continue
            for image in pictures:
                found += 1
                yield image
            break
    if found < len(targets):
        raise VideoError(
            f"{name} ends after {found} of these frames, expected {expected}, the last one at "
            f"{float(targets[-1]):.3f}: use a longer video."
        )

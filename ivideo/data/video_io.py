"""Video files: writes clips with metadata, and reads frames by their timestamps (PyAV).

Frames are read as the pictures that players show (`pictures.picture`): upright, with square pixels, in BT.709. Files
are written in BT.709 and tagged with it. Dimension letters: T frames, H height, W width. Times are in seconds,
internally as exact fractions.
"""

import contextlib
import json
import logging
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

from ivideo.data import encoders
from ivideo.data.decoding import Path, choose_start, decoded, frames_at, length, open_video
from ivideo.data.pictures import VideoError, resized
from ivideo.errors import UserError

log = logging.getLogger("ivideo")

EXTENSIONS = tuple(encoders.FORMATS)  # of the files that can be written, in lower or upper case

Rate = int | float | Fraction

SEEK_AFTER = 1  # seconds: frames before that time are found by decoding from the beginning


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Video [T,H,W,3] as uint8: float in [-1, 1] is clipped and rounded to 0..255, uint8 passes through.

    UserError for other shapes, other dtypes and values that are not finite.
    """
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UserError(f"The video has shape {video.shape}, expected [T,H,W,3]: pass one clip of RGB frames.")
    if video.dtype == np.uint8:
        return video
    if not np.issubdtype(video.dtype, np.floating):
        raise UserError(f"The video is {video.dtype}, expected float in [-1, 1] or uint8: convert it first.")
    if not np.isfinite(video).all():
        raise UserError(
            "The video has values that are not finite, expected [-1, 1]: sampling diverged, so use other weights."
        )
    return np.round(np.clip((video.astype(np.float32) + 1) * 127.5, 0, 255)).astype(np.uint8)


def to_float(video: np.ndarray) -> np.ndarray:
    """uint8 video as float32 in [-1, 1]."""
    return video.astype(np.float32) / np.float32(127.5) - np.float32(1)


def extension(path: Path) -> str:
    """A path's extension in lower case. UserError where it is not in `EXTENSIONS`."""
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in EXTENSIONS:
        kinds = f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"
        raise UserError(f"{path} ends in {suffix!r}, expected {kinds}: no other format can be written.")
    return suffix


def evenly(count: int, most: int) -> np.ndarray:
    """The numbers of `most` of `count` frames, or of all if there are fewer, from the first to the last."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def zoomed(video: np.ndarray, zoom: int) -> np.ndarray:
    """The video [T,H,W,3] with each pixel enlarged to `zoom` × `zoom`."""
    return video.repeat(zoom, axis=1).repeat(zoom, axis=2)


def write_video(
    path: Path,
    video: np.ndarray,
    *,
    fps: Rate,
    metadata: dict | None = None,
    crf: int = 18,
    overwrite: bool = False,
) -> None:
    """Writes a clip atomically as .mp4 or .mov (H.264), .webm (VP9) or .gif, by the extension of `path`.

    `video` [T,H,W,3] is float in [-1, 1] or uint8; `fps` is in frames per second. `crf` is H.264's constant quality, 0
    (best) to 51; for VP9 it is scaled to VP9's range. `metadata`, JSON values by name, is stored in the file's comment,
    where `read_metadata` finds it. If `path` is a link, the file that it points to is written. GIF counts time in
    hundredths of a second, so its frames can be early or late by half of that.

    FileExistsError where `path` exists, unless `overwrite`. UserError for another extension, for odd sizes except in
    gif (the others store colour at half the resolution), and for videos that `to_uint8` refuses.
    """
    suffix = extension(path)
    if os.path.exists(path) and not overwrite:
        raise FileExistsError(f"{path} exists, expected a new file: choose another name, or overwrite it.")
    target = pathlib.Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is not a folder, expected one to write {path} in: create it first.")
    frames, fps = to_uint8(video), _rate(fps)
    encoders.check(suffix, frames, crf)
    comment = "" if metadata is None else json.dumps(metadata, ensure_ascii=False)
    # The temporary name is short, so that `path` can be as long as the file system allows
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        encoders.write(temporary, suffix, frames, fps, comment, crf)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def encode(video: np.ndarray, *, fps: Rate, crf: int = 18) -> bytes:
    """The clip as the bytes of an .mp4 file, the same on every machine. Arguments and errors as in `write_video`."""
    frames, fps = to_uint8(video), _rate(fps)
    encoders.check(".mp4", frames, crf)
    return encoders.mp4_bytes(frames, fps, crf)


def _rate(fps: Rate) -> Fraction:
    rate = fps if isinstance(fps, int | Fraction) else Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise UserError(f"fps is {fps}, expected more than 0 frames per second: pass the clip's frame rate.")
    return Fraction(rate)


def read_metadata(path: Path) -> dict:
    """The metadata that `write_video` put in the file; empty where there is no such comment.

    VideoError where the file cannot be opened as a video.
    """
    with open_video(path, "a video file") as video:
        comments = [text for key, text in video.container.metadata.items() if key.lower() == "comment"]
        if video.container.format.name == "gif":
            comments = encoders.gif_comments(pathlib.Path(path).read_bytes())
    for comment in comments:
        with contextlib.suppress(ValueError):
            metadata = json.loads(comment)
            if isinstance(metadata, dict):
                return metadata
    return {}


def count_frames(source: Path | bytes) -> int:
    """The number of frames. VideoError where one is damaged, or the file cannot be opened as a video."""
    count = 0
    with open_video(source, "a video file") as video:
        for frame in decoded(video):
            video.check(frame)
            count += 1
    return count


def check_frames(source: Path | bytes, *, frames: int, fps: Rate) -> int:
    """As `count_frames`; VideoError also where the file is too short for `frames` frames at `fps`."""
    for _ in iter_frames(source, frames=frames, fps=fps):
        pass
    return count_frames(source)


def read_rate(source: Path | bytes) -> Fraction:
    """A file's frame rate in frames per second, 0 where it states none. VideoError where it cannot be opened."""
    with open_video(source, "a video") as video:
        return video.rate


def read_size(source: Path | bytes) -> tuple[int, int]:
    """Height and width that a file states, without decoding a frame. VideoError where it cannot be opened."""
    with open_video(source, "a video") as video:
        return video.stream.codec_context.height, video.stream.codec_context.width


def read_video(source: Path | bytes, *, min_frames: int = 2) -> tuple[np.ndarray, Fraction]:
    """All frames, uint8 [T,H,W,3], and the rate in frames per second, of a path or of a file's bytes.

    All frames are held in memory; they are resized to the first frame's size. If their number differs from the one that
    the file states, as after a cut without re-encoding, there is a warning. VideoError where the file is missing,
    empty, corrupt, not a video, or has fewer than `min_frames` frames.
    """
    with open_video(source, f"a video of {min_frames} frames or more") as video:
        frames: list[np.ndarray] = []
        for frame in decoded(video):
            image = video.picture(frame)
            frames.append(resized(image, frames[0].shape) if frames else image)
        count, stated = len(frames), video.stream.frames
        if count < min_frames:
            raise VideoError(f"{video.name} has {count} frames, expected {min_frames} or more: use a longer video.")
        if stated and stated != count:
            log.warning("%s: %d frames can be read, but the file states %d", video.name, count, stated)
        return np.stack(frames), video.rate


def sample_frames(source: Path | bytes, **options) -> np.ndarray:
    """The frames that `iter_frames` yields, uint8 [frames,H,W,3], resized to the first frame's size."""
    frames: list[np.ndarray] = []
    for image in iter_frames(source, **options):
        frames.append(resized(image, frames[0].shape) if frames else image)
    return np.stack(frames)


def iter_frames(
    source: Path | bytes,
    *,
    frames: int,
    fps: Rate | None = None,
    duration: Rate | None = None,
    start: Rate = 0,
    choose: Callable[[int], int] | None = None,
) -> Iterator[np.ndarray]:
    """Yields the frames shown at start, start + 1/fps, ..., uint8 [H,W,3] each, chosen by their timestamps.

    `source` is a path or a file's bytes. `start` is in seconds after the first frame that decodes. `fps` is in frames
    per second; alternatively, `duration` in seconds is divided equally among the frames. With neither, everything from
    `start` on is divided equally. Alternatively, `choose` draws the start: given n, it returns one of 0 .. n-1, the
    number of a frame of the file from which on it is long enough (`decoding.choose_start`). The file's frames are
    skipped or repeated as needed. Decoding begins at the key frame before the start and ends after the last frame.
    Only frames that are yielded are converted, and none is kept, so memory does not grow with the file. If the
    resolution changes within the file, so does the size of the frames.

    UserError for arguments out of range; VideoError as in `read_video`, and where the clip ends too early.
    """
    if fps is not None and duration is not None:
        raise UserError(f"fps is {fps} and duration is {duration}, expected at most one of them: leave one out.")
    if frames < 1 or start < 0 or (duration is not None and duration <= 0):
        raise UserError(
            f"frames is {frames}, start {start} and duration {duration}, expected frames 1 or more, start 0 or more "
            "and duration above 0: correct them."
        )
    if choose is not None and (fps is None or start):
        raise UserError(f"choose is given with fps {fps} and start {start}, expected fps alone: leave out the others.")
    start = Fraction(start)
    expected = f"a video of {frames} frames from {float(start):.3f} seconds on"
    if fps is None:
        with open_video(source, expected) as video:
            step = (Fraction(duration) if duration is not None else length(video) - start) / frames
            if step <= 0:
                raise VideoError(
                    f"{video.name} ends before {float(start):.3f} seconds, expected {expected}: use a longer video."
                )
    else:
        step = 1 / _rate(fps)
    count = 0
    # Far from the beginning a seek saves decoding. If it fails, everything from the beginning on is decoded
    seek = choose is not None or start > SEEK_AFTER
    for seeking in (True, False) if seek else (False,):
        with open_video(source, expected) as video:
            if choose is not None:
                start, choose = choose_start(video, (frames - 1) * step, choose), None
            targets = [start + k * step for k in range(frames)]
            pictures = frames_at(video, targets, seek=seeking)
            if pictures is None:
                continue
            for image in pictures:
                count += 1
                yield image
            break
    if count < frames:
        raise VideoError(
            f"{video.name} ends after {count} of these frames, expected {expected}, the last one at "
            f"{float(targets[-1]):.3f}: use a longer video."
        )

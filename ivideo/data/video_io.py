"""Video files: writing clips with what made them in the metadata, and reading frames by their timestamps (PyAV).

Dimension letters: T frames, H height, W width. Times are in seconds, exact (`Fraction`) inside.
"""

import contextlib
import io
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from ivideo.errors import UserError

EXTENSIONS = (".mp4", ".gif")

Path = str | os.PathLike
Rate = int | float | Fraction

# Rec. 709, as players assume for files that do not say; limited range.
_BT709 = 1


class VideoError(UserError):
    """A file that cannot be read as the video asked for: corrupt, empty, too short, or no video at all."""


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


def write_video(
    path: Path,
    video: np.ndarray,
    *,
    fps: Rate,
    metadata: dict[str, str] | None = None,
    crf: int = 18,
    overwrite: bool = False,
) -> None:
    """Writes a clip as .mp4 (H.264, yuv420p) or .gif, by the extension of `path`, whole or not at all.

    `video` [T,H,W,3] is float in [-1, 1] or uint8; `fps` is in frames a second. `crf` is the constant quality of the
    mp4, 0 (best) to 51. `metadata`, e.g. prompt, seed, config and version, is read back by `read_metadata`; it is kept
    as JSON in the file's comment. The GIF format counts time in hundredths of a second, so its frames can be up to
    half of that early or late.

    FileExistsError where `path` exists and not `overwrite`; UserError on another extension, odd sizes for mp4 (its
    colour is at half the resolution), or what `to_uint8` refuses.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in EXTENSIONS:
        raise UserError(f"{path} ends in {path.suffix!r}, expected {' or '.join(EXTENSIONS)}: rename the output.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists, expected a new file: choose another name or ask to overwrite.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder, expected one to write {path.name} in: create it first.")
    frames, fps = to_uint8(video), _rate(fps)
    if suffix == ".mp4":
        _check_mp4(frames, crf)
    comment = "" if metadata is None else json.dumps({str(k): str(v) for k, v in metadata.items()}, ensure_ascii=False)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write = _write_mp4 if suffix == ".mp4" else _write_gif
        write(temporary, frames, fps, comment, crf)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def encode(video: np.ndarray, *, fps: Rate, crf: int = 18) -> bytes:
    """The bytes of an .mp4 file of the clip, the same on every machine; arguments and errors as in `write_video`."""
    frames, fps = to_uint8(video), _rate(fps)
    _check_mp4(frames, crf)
    file = io.BytesIO()
    # The number of threads is otherwise that of the machine's cores, and changes the stream.
    with av.open(file, "w", format="mp4") as container:
        _encode_h264(container, frames, fps, {"crf": str(crf), "threads": "1"})
    return file.getvalue()


def _rate(fps: Rate) -> Fraction:
    rate = fps if isinstance(fps, int | Fraction) else Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise UserError(f"fps is {fps}, expected more than 0 frames a second: pass the clip's frame rate.")
    return Fraction(rate)


def _check_mp4(frames: np.ndarray, crf: int) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(
            f"The frames are {height} x {width} pixels, expected even numbers: mp4 keeps colour at half the "
            "resolution, so crop or pad by a pixel, or write a .gif."
        )
    if not 0 <= crf <= 51:
        raise UserError(f"crf is {crf}, expected 0 (best) to 51: 18 is close to the original.")


def _write_mp4(path: pathlib.Path, frames: np.ndarray, fps: Fraction, comment: str, crf: int) -> None:
    # faststart puts the index first, so that a browser plays while it loads.
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        _encode_h264(container, frames, fps, {"crf": str(crf)})


def _encode_h264(container, frames: np.ndarray, fps: Fraction, options: dict[str, str]) -> None:
    stream = container.add_stream("libx264", rate=fps, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / fps
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = 1
    for pts, rgb in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=1)
        frame.pts, frame.time_base = pts, 1 / fps
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _write_gif(path: pathlib.Path, frames: np.ndarray, fps: Fraction, comment: str, crf: int) -> None:
    del crf
    with av.open(str(path), "w", format="gif") as container:
        stream = container.add_stream("gif", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "pal8"
        for packet in _gif_packets(stream, frames, fps):
            container.mux(packet)
    if comment:
        # FFmpeg's GIF writer drops metadata.
        data = path.read_bytes()
        path.write_bytes(data[:-1] + _gif_comment(comment) + data[-1:])


def _gif_packets(stream, frames: np.ndarray, fps: Fraction) -> Iterator[av.Packet]:
    """Encodes with one palette of the whole clip: the encoder's own has 8 x 8 x 4 colours."""
    height, width = frames.shape[1:3]
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / fps)
    split, palette = graph.add("split"), graph.add("palettegen", "reserve_transparent=0")
    use, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for pts, rgb in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        frame.pts, frame.time_base = pts, 1 / fps
        source.push(frame)
    source.push(None)
    with contextlib.suppress(av.EOFError):
        while True:
            yield from stream.encode(sink.pull())
    yield from stream.encode(None)


def _gif_comment(comment: str) -> bytes:
    data = comment.encode()
    blocks = [data[i : i + 255] for i in range(0, len(data), 255)]
    return b"\x21\xfe" + b"".join(bytes([len(b)]) + b for b in blocks) + b"\x00"


def _gif_comments(data: bytes) -> list[bytes]:
    """The comments of a GIF file, walking its blocks; IndexError where it is cut short."""

    def table(flags: int) -> int:
        return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0

    def sub_blocks(at: int) -> tuple[bytes, int]:
        content = b""
        while data[at]:
            content += data[at + 1 : at + 1 + data[at]]
            at += 1 + data[at]
        return content, at + 1

    comments, at = [], 13 + table(data[10])
    while data[at] != 0x3B:
        if data[at] == 0x21:
            content, after = sub_blocks(at + 2)
            if data[at + 1] == 0xFE:
                comments.append(content)
        elif data[at] == 0x2C:
            _, after = sub_blocks(at + 10 + table(data[at + 9]) + 1)
        else:
            raise IndexError(f"unknown block {data[at]:#x}")
        at = after
    return comments


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata that `write_video` put in the file; empty where the comment is none of ours, or there is none.

    VideoError where the file cannot be opened as a video.
    """
    with _opened(path, "a video file") as (container, _):
        comments = [container.metadata.get("comment", "")]
        if container.format.name == "gif":
            comments = _gif_comments(pathlib.Path(path).read_bytes())
    for comment in comments:
        with contextlib.suppress(ValueError):
            found = json.loads(comment)
            if isinstance(found, dict):
                return found
    return {}


def _name(source: Path | bytes) -> str:
    return f"a clip of {len(source)} bytes" if isinstance(source, bytes) else str(source)


@contextlib.contextmanager
def _opened(source: Path | bytes, expected: str):
    """(container, its first video stream); any failure in the block becomes a VideoError naming the source."""
    name = _name(source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise VideoError(f"{name} is no file, expected {expected}: check the path.")
    if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
        raise VideoError(f"{name} is empty, expected {expected}: write or download it again.")
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)) as container:
            if not container.streams.video:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "no"
                raise VideoError(f"{name} has {kinds} streams and no video, expected {expected}: use another.")
            yield container, container.streams.video[0]
    except VideoError:
        raise
    # Corrupt files surface as errors of many types, some of them not FFmpeg's.
    except Exception as error:
        raise VideoError(
            f"{name} cannot be read ({type(error).__name__}: {error}), expected {expected}: it is corrupt or not a "
            "video, so write or download it again, or use another."
        ) from error


def _check_complete(source: Path | bytes, stream, count: int) -> None:
    # Damage often shows as missing frames without an error.
    if stream.frames and count != stream.frames:
        raise VideoError(
            f"{_name(source)} has {count} readable frames, expected the {stream.frames} that it states: it is corrupt, "
            "so write or download it again."
        )


def read_video(source: Path | bytes, *, min_frames: int = 2) -> tuple[np.ndarray, Fraction]:
    """All frames, uint8 [T,H,W,3], and the rate in frames a second, of a path or of a file's bytes.

    VideoError where the file is missing, empty, corrupt, no video, or has fewer than `min_frames` frames.
    """
    with _opened(source, f"a video of {min_frames} frames or more") as (container, stream):
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        _check_complete(source, stream, len(frames))
        if len(frames) < min_frames:
            raise VideoError(
                f"{_name(source)} has {len(frames)} frames, expected {min_frames} or more: no clip, so use another."
            )
        return np.stack(frames), Fraction(stream.average_rate or stream.guessed_rate or 0)


def sample_frames(
    source: Path | bytes,
    *,
    frames: int,
    fps: Rate | None = None,
    duration: Rate | None = None,
    start: Rate = 0,
) -> np.ndarray:
    """The frames on show at start, start + 1/fps, ...: uint8 [frames,H,W,3], chosen by their timestamps.

    `source` is a path or a file's bytes. Give `fps`, frames a second, or `duration`, seconds, of which the frames are
    equal parts; without either they are equal parts of all that follows `start`, which is in seconds after the first
    frame. Frames of the file are skipped or repeated as that needs. UserError on arguments out of range; VideoError as
    in `read_video`, and where the clip ends too early.
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
    with _opened(source, expected) as (container, stream):
        if fps is not None:
            step = 1 / _rate(fps)
        else:
            step = (Fraction(duration) if duration is not None else _duration(source, stream) - start) / frames
        if step <= 0:
            raise VideoError(f"{_name(source)} ends at its start, expected {expected}: choose an earlier start.")
        targets = [start + k * step for k in range(frames)]
        found = _frames_at(container, stream, targets, seek=True)
        if found is None:
            found = _frames_at(container, stream, targets, seek=False)
        if found is None or len(found) < frames:
            raise VideoError(
                f"{_name(source)} ends after {len(found or ())} of these frames, expected {expected}, the last at "
                f"{float(targets[-1]):.3f}: ask for a shorter clip or an earlier start, or use another."
            )
        return np.stack(found)


def _duration(source: Path | bytes, stream) -> Fraction:
    if not stream.duration:
        raise VideoError(f"{_name(source)} does not state its length, expected it: give fps or a duration.")
    return stream.duration * stream.time_base


def _frames_at(container, stream, targets: list[Fraction], *, seek: bool) -> list[np.ndarray] | None:
    """The frame on show at each target time until the video ends; None where decoding began after the first one."""
    base = stream.time_base
    origin = (stream.start_time or 0) * base
    if targets[0] > 0 or not seek:
        offset = targets[0] + origin if seek else origin
        container.seek(int(offset / base), stream=stream, backward=True)
    usual = 1 / Fraction(stream.average_rate or stream.guessed_rate or 24)
    # Containers round timestamps, some of them to milliseconds.
    slack = min(base, usual / 4)
    found, shown, shown_at, last = [], None, None, usual
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        time = frame.pts * base - origin
        if shown is None and time > targets[0] + slack:
            return None if seek else found
        image = None
        while shown is not None and len(found) < len(targets) and time > targets[len(found)] + slack:
            # One conversion also where a frame is shown at several of the times.
            image = shown.to_ndarray(format="rgb24") if image is None else image
            found.append(image)
        if len(found) == len(targets):
            return found
        last = time - shown_at if shown is not None else usual
        shown, shown_at = frame, time
    if shown is not None:
        # The last frame stays for as long as the one before it did, where the file does not say.
        end = shown_at + (shown.duration * base if shown.duration else last)
        image = shown.to_ndarray(format="rgb24")
        while len(found) < len(targets) and targets[len(found)] + slack < end:
            found.append(image)
    return found

"""Encodes clips, uint8 [T,H,W,3]: H.264 in .mp4 and .mov, VP9 in .webm, and .gif."""

import contextlib
import io
import pathlib
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from ivideo.data import colour
from ivideo.errors import UserError

# The format and the encoder of each extension. faststart puts the index first, so a browser plays while it loads
FORMATS = {
    ".mp4": dict(format="mp4", codec="libx264", options={"movflags": "faststart"}),
    ".mov": dict(format="mov", codec="libx264", options={"movflags": "faststart"}),
    ".webm": dict(format="webm", codec="libvpx-vp9", options={}),
    ".gif": dict(format="gif", codec="gif", options={}),
}

# Options with which libx264 writes the same bytes everywhere. By default there are as many threads as cores, and their
# number changes the bytes; and macroblock trees do, because their AVX-512 code reads memory that nothing has written
REPEATABLE = {"threads": "1", "mbtree": "0"}


def check(suffix: str, frames: np.ndarray, crf: int) -> None:
    """UserError where a file that ends in `suffix` cannot hold frames of this size, or `crf` is out of range."""
    height, width = frames.shape[1:3]
    if suffix != ".gif" and (height % 2 or width % 2):
        raise UserError(
            f"The frames are {height} x {width} pixels, expected even numbers: {suffix[1:]} stores colour at half the "
            "resolution, so crop or pad by a pixel, or write a .gif."
        )
    if not 0 <= crf <= 51:
        raise UserError(f"crf is {crf}, expected 0 (best) to 51: 18 is close to the original.")


def write(path: pathlib.Path, suffix: str, frames: np.ndarray, fps: Fraction, comment: str, crf: int) -> None:
    """Writes a file in the format of `suffix`. `path` is absolute, so that FFmpeg cannot read it as a protocol."""
    how = FORMATS[suffix]
    with av.open(str(path), "w", format=how["format"], options=how["options"]) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream(how["codec"], rate=fps, options=_quality(how["codec"], crf))
        stream.height, stream.width = frames.shape[1:3]
        for packet in _gif_packets(stream, frames, fps) if suffix == ".gif" else _packets(stream, frames, fps):
            container.mux(packet)
    if comment and suffix == ".gif":
        # FFmpeg's GIF writer drops metadata
        data = path.read_bytes()
        path.write_bytes(data[:-1] + _gif_comment(comment) + data[-1:])


def mp4_bytes(frames: np.ndarray, fps: Fraction, crf: int) -> bytes:
    """The bytes of an .mp4 file, the same on every machine."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=_quality("libx264", crf) | REPEATABLE)
        stream.height, stream.width = frames.shape[1:3]
        for packet in _packets(stream, frames, fps):
            container.mux(packet)
    return file.getvalue()


def _quality(codec: str, crf: int) -> dict[str, str]:
    if codec == "libvpx-vp9":
        # VP9's crf goes up to 63, and b=0 makes it the only target
        return {"crf": str(round(crf * 63 / 51)), "b": "0", "row-mt": "1", "cpu-used": "2"}
    return {"crf": str(crf)} if codec == "libx264" else {}


def _packets(stream, frames: np.ndarray, fps: Fraction) -> Iterator[av.Packet]:
    begin(stream, 1 / fps)
    for pts, rgb in enumerate(frames):
        yield from stream.encode(frame(rgb, pts, 1 / fps))
    yield from stream.encode(None)


def begin(stream: av.VideoStream, time_base: Fraction) -> None:
    """Sets a new stream's pixels to 4:2:0 in BT.709, and its unit of time, in seconds."""
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = time_base
    context.colorspace = context.color_primaries = context.color_trc = colour.BT709
    context.color_range = 1  # limited


def frame(rgb: np.ndarray, pts: int, time_base: Fraction) -> av.VideoFrame:
    """A frame for such a stream from RGB, uint8 [H,W,3], that is shown at pts * time_base."""
    made = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    made = made.reformat(format="yuv420p", dst_colorspace=colour.BT709, dst_color_range=1)
    made.pts, made.time_base = pts, time_base
    return made


def _gif_packets(stream, frames: np.ndarray, fps: Fraction) -> Iterator[av.Packet]:
    """Encodes with one palette computed for the whole clip, instead of the encoder's fixed 8 x 8 x 4 colours."""
    stream.pix_fmt = "pal8"
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


def gif_comments(data: bytes) -> list[bytes]:
    """The comments of a GIF file, found by walking its blocks. IndexError where the file is truncated."""

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

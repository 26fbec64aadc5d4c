"""Video files for tests: clips drawn with numpy and encoded with PyAV like files from other sources."""

import io
import re
from fractions import Fraction

import av
import numpy as np

from ivideo.data import sets, shapes, sources, video_io

IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0, 16384)
LEFT = (0, -1, 0, 1, 0, 0, 0, 0, 16384)  # shown turned a quarter to the left
RIGHT = (0, 1, 0, -1, 0, 0, 0, 0, 16384)
UPSIDE_DOWN = (-1, 0, 0, 0, -1, 0, 0, 0, 16384)
MIRRORED = (-1, 0, 0, 0, 1, 0, 0, 0, 16384)


def scene(count=8, height=384, width=640):
    """Red above, blue below, and a white box that moves right: uint8 [T,H,W,3]."""
    video = np.zeros((count, height, width, 3), np.uint8)
    video[:, : height // 2] = (251, 0, 0)
    video[:, height // 2 :] = (0, 0, 251)
    side = height // 6
    for k, frame in enumerate(video):
        left = round((width - side) * k / max(count - 1, 1))
        frame[height // 8 : height // 8 + side, left : left + side] = 255
    return video


def counting(count):
    """A clip whose frame k is gray of level 10 k, to tell frames apart after lossy coding."""
    return np.broadcast_to(10 * np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 16, 16, 3))


def numbers(video):
    """What `counting` numbered each frame."""
    return [round(frame.mean() / 10) for frame in video]


def coded(
    video,
    *,
    form="mp4",
    codec="libx264",
    pix_fmt="yuv420p",
    fps=25,
    times=None,
    matrix=None,
    full_range=False,
    sar=None,
    options=None,
    rgb="rgb24",
    **tags,
) -> bytes:
    """A file of the frames. `matrix` and `full_range` are how it is coded; `tags` (colorspace, …) what it states."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pix_fmt
        if sar:
            stream.codec_context.sample_aspect_ratio = stream.sample_aspect_ratio = Fraction(*sar)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for k, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=rgb)
            how = {} if matrix is None else dict(dst_colorspace=matrix, dst_color_range=2 if full_range else 1)
            frame = frame.reformat(format=pix_fmt, **how)
            frame.pts, frame.time_base = (k if times is None else times[k]), Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def source_of(data, **options):
    """A source of clips for training (`sources.TFDSSource`) whose only clip is the file `data`; the options it has."""
    records = object.__new__(sets.EncodedSet)
    records.__dict__ |= dict(_records=[{"video": data, "caption": "a clip"}], _features=("video", "caption"))
    records.__dict__ |= dict(split="train", data_dir="set")
    source = object.__new__(sources.TFDSSource)
    source.__dict__ |= dict(records=records, **options)
    return source


def packets(data):
    """(stream, packets) of a file's bytes; the container stays open for as long as they live."""
    container = av.open(io.BytesIO(data))
    stream = container.streams.video[0]
    return container, stream, [p for p in container.demux(stream) if p.size]


def remuxed(data, form, *, keep=lambda k, packet: True, options=None, shift=0) -> bytes:
    """The file's packets that `keep` chooses, without coding, in another container, `shift` 25ths of a second later."""
    container, stream, found = packets(data)
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options or {}) as out:
        copy = out.add_stream_from_template(stream)
        for k, packet in enumerate(found):
            if keep(k, packet):
                packet.stream = copy
                packet.pts += int(shift / (25 * packet.time_base))
                packet.dts += int(shift / (25 * packet.time_base))
                out.mux(packet)
    container.close()
    return file.getvalue()


def with_matrix(data, matrix) -> bytes:
    """An mp4's bytes with the track's display matrix replaced; its last entry is in 2.30, the others in 16.16."""
    at = data.index(b"tkhd") + 4 + 40
    values = [int(v * 65536) for v in matrix[:8]] + [matrix[8] * 65536]
    return data[:at] + np.array(values, ">i4").tobytes() + data[at + 36 :]


def with_edit_list(data, *, start) -> bytes:
    """An mp4's bytes whose edit list begins `start` of the media's ticks later."""
    at = data.index(b"elst") + 4
    (count,) = np.frombuffer(data[at + 4 : at + 8], ">i4")
    assert count == 1 and data[at] == 0
    first = int(np.frombuffer(data[at + 12 : at + 16], ">i4")[0]) + start
    return data[: at + 12] + np.array([first], ">i4").tobytes() + data[at + 16 :]


def damaged(data, *, at):
    """The bytes with a part of the media overwritten, from the share `at` of the mdat box on."""
    begin = re.search(b"mdat", data).end()
    place = begin + int(at * (len(data) - begin))
    return data[:place] + b"\xff" * 400 + data[place + 400 :]


def with_cover(data, jpeg):
    """An mp4's bytes, whose index is at the end, with a cover picture that comes before the tracks."""

    def box(kind, *content):
        content = b"".join(content)
        return (len(content) + 8).to_bytes(4, "big") + kind + content

    cover = box(b"covr", box(b"data", b"\0\0\0\x0d", bytes(4), jpeg))
    handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", cover)))
    moov, track = data.index(b"moov") - 4, data.index(b"trak") - 4
    size = int.from_bytes(data[moov : moov + 4], "big") + len(tags)
    return data[:moov] + size.to_bytes(4, "big") + data[moov + 4 : track] + tags + data[track:]


def near(pixel, rgb, off=4):
    """Asserts that a pixel has a colour, to `off` levels."""
    assert np.abs(np.asarray(pixel, int) - rgb).max() <= off, (pixel, rgb)


def read(data, **how):
    """Four frames at 25 fps, or as `how` says."""
    return video_io.sample_frames(data, **(dict(frames=4, fps=25) | how))


def write_clips(folder, count=6, *, seed=0, frames=4):
    """Writes clips of the captioned shapes with their captions, and returns the folder."""
    folder.mkdir(exist_ok=True)
    for n, attributes in enumerate(shapes.TRAIN[:: len(shapes.TRAIN) // count][:count]):
        video = shapes.render(attributes, seed + n, frames=frames, height=16, width=16)
        metadata = {"prompt": shapes.caption(attributes)}
        video_io.write_video(folder / f"{n:03d}.mp4", video, fps=3, metadata=metadata)
    return str(folder)

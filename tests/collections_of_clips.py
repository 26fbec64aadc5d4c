"""Collections of clips for tests of preparing data: of every kind that people have, and broken in many ways."""

import io
import pathlib
import tempfile
from typing import NamedTuple

import av
import numpy as np
import video_files as files

FAST = {"preset": "ultrafast"}
FPS = (8, 12, 15, 24, 25, 30, 48, 60)
NAMES = ("clip {}", "видео {}", "映像{}", "clip_{}", "été, n° {}", "فيديو {}")


def texture(seed, *, count=30, height=48, width=64):
    """A scene of its own for each seed, that moves to the left: reddish above, bluish below. uint8 [T,H,W,3]."""
    coarse = np.random.default_rng(seed).uniform(0.25, 1, (6, 16))
    rows = np.linspace(0, 5, height)
    columns = np.linspace(0, 15, 3 * width)
    across = np.array([np.interp(columns, np.arange(16), line) for line in coarse])
    gray = np.array([np.interp(rows, np.arange(6), line) for line in across.T]).T
    above = np.arange(height) < height // 2
    colour = np.where(above[:, None], (1, 0.15, 0.15), (0.15, 0.15, 1))
    scene = (255 * gray[..., None] * colour[:, None]).astype(np.uint8)
    starts = np.linspace(0, 2 * width - 1, count).astype(int)
    return np.stack([scene[:, start : start + width] for start in starts])


def is_upright(video) -> bool:
    """Whether `texture` is shown as it was drawn."""
    above, below = np.array_split(video.astype(int).mean(axis=(0, 2)), 2)
    return above.mean(axis=0)[0] > 2 * above.mean(axis=0)[2] and below.mean(axis=0)[2] > 2 * below.mean(axis=0)[0]


class Clip(NamedTuple):
    """A file's ending and bytes, and what a player shows of it: frames, height and width."""

    ending: str
    data: bytes
    frames: int
    height: int
    width: int


def h264(video, fps, **options):
    return files.coded(video, fps=fps, matrix=5, options=FAST, **options)


def _plain(ending, **how):
    def make(seed, fps, count):
        video = texture(seed, count=count)
        return Clip(ending, files.coded(video, fps=fps, matrix=5, **how), count, 48, 64)

    return make


def _portrait(seed, fps, count):
    return Clip(".mp4", h264(texture(seed, count=count, height=96, width=54), fps), count, 96, 54)


def _rotated(seed, fps, count):
    """Stored lying on its side, as phones do, and shown upright."""
    lying = np.rot90(texture(seed, count=count, height=96, width=54), axes=(1, 2))
    return Clip(".mov", files.with_matrix(h264(lying, fps), files.RIGHT), count, 96, 54)


def _uneven(seed, fps, count):
    """At two different distances in turn."""
    times = [3 * k + k % 2 for k in range(count)]
    return Clip(".mkv", h264(texture(seed, count=count), 3 * fps, form="matroska", times=times), count, 48, 64)


def _edit_list(seed, fps, count):
    """Its first five frames are hidden."""
    data = h264(texture(seed, count=count), fps)
    with av.open(io.BytesIO(data)) as container:
        start = int(5 / (fps * container.streams.video[0].time_base))
    return Clip(".mp4", files.with_edit_list(data, start=start), count - 5, 48, 64)


def _alpha(seed, fps, count):
    video = texture(seed, count=count)
    rgba = np.concatenate([video, np.full_like(video[..., :1], 255)], axis=-1)
    return Clip(".mov", files.coded(rgba, form="mov", codec="png", pix_fmt="rgba", rgb="rgba", fps=fps), count, 48, 64)


def _odd(seed, fps, count):
    video = texture(seed, count=count, height=47, width=65)
    return Clip(".mp4", files.coded(video, fps=fps, matrix=5, pix_fmt="yuv444p", options=FAST), count, 47, 65)


def with_sound(data, *, alone=False):
    """The file with a second of sound as its first stream; `alone`: with the sound and no video."""
    container, stream, packets = files.packets(data)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        sound = out.add_stream("aac", rate=44100)
        copy = None if alone else out.add_stream_from_template(stream)
        for k in range(44):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.pts, frame.sample_rate = 1024 * k, 44100
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
        for packet in [] if alone else packets:
            packet.stream = copy
            out.mux(packet)
    container.close()
    return file.getvalue()


def _sound_first(seed, fps, count):
    return Clip(".mp4", with_sound(h264(texture(seed, count=count), fps)), count, 48, 64)


KINDS = {
    "h264": _plain(".mp4", options=FAST),
    "h265": _plain(".MP4", codec="libx265", options={"preset": "ultrafast", "x265-params": "log-level=none"}),
    "vp9": _plain(".webm", form="webm", codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"}),
    "av1": _plain(".mkv", form="matroska", codec="libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"}),
    "mpeg4": _plain(".avi", form="avi", codec="mpeg4", options={"qscale": "3"}),
    "ten_bits": _plain(".mp4", pix_fmt="yuv420p10le", options=FAST),
    "portrait": _portrait,
    "rotated": _rotated,
    "sound_first": _sound_first,
    "uneven": _uneven,
    "edit_list": _edit_list,
    "alpha": _alpha,
    "odd": _odd,
}


def good(number, kind=None) -> Clip:
    """The clip of a number, of `kind` or of each kind in turn, at each rate in turn, and of 1.3 seconds or more."""
    fps = FPS[number % len(FPS)]
    make = KINDS[kind] if kind else list(KINDS.values())[number % len(KINDS)]
    return make(number, fps, int(1.3 * fps) + 6 + number % 5)


def _index_first(video):
    """An mp4 whose index is before the frames. FFmpeg reads what it wrote again, so it needs a file."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(file.name, "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=24, options=FAST)
            stream.height, stream.width = video.shape[1:3]
            for image in video:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        return pathlib.Path(file.name).read_bytes()


def _noisy(seed, count=30):
    """So that each frame has many bytes."""
    video = texture(seed, count=count).astype(int) + np.random.default_rng(seed).integers(0, 40, (count, 48, 64, 3))
    return np.clip(video, 0, 255).astype(np.uint8)


def _cut():
    return np.concatenate([texture(300, count=15), 255 - texture(301, count=15)])


# Each way of being unusable: the reason that the quarantine gives, and the bytes of the file (and of its caption)
BROKEN = {
    "empty": ("unreadable", lambda: b""),
    "text": ("unreadable", lambda: b"<!doctype html><title>404</title>" * 40),
    "zeros": ("unreadable", lambda: bytes(4000)),
    "no index": ("unreadable", lambda: h264(_noisy(302), 24)[:9000]),
    "header alone": ("truncated", lambda: _index_first(_noisy(303))[:2000]),
    "half of it": ("truncated", lambda: (lambda data: data[: len(data) // 2])(_index_first(_noisy(304)))),
    "half a webm": (
        "truncated",
        lambda: (lambda data: data[: len(data) // 2])(
            files.coded(_noisy(305, 60), form="webm", codec="libvpx-vp9", fps=24, options={"cpu-used": "8", "b": "3M"})
        ),
    ),
    "overwritten": ("unreadable", lambda: files.damaged(files.coded(_noisy(306), fps=24), at=0.5)),
    "sound alone": ("unreadable", lambda: with_sound(h264(texture(307), 24), alone=True)),
    "log colours": ("unreadable", lambda: h264(texture(308), 24, color_trc=9)),
    "short": ("short", lambda: h264(texture(309, count=12), 24)),
    "one frame": ("short", lambda: h264(texture(310, count=1), 24)),
    "slow": ("rate", lambda: h264(texture(311, count=12), 2)),
    "still": ("still", lambda: h264(np.repeat(texture(312, count=1), 30, axis=0), 24)),
    "cut": ("jump", lambda: h264(_cut(), 24)),
    "tiny": ("small", lambda: files.coded(texture(313, height=6, width=6), fps=24, pix_fmt="yuv444p", options=FAST)),
    "strip": ("aspect", lambda: h264(texture(314, height=16, width=160), 24)),
    "copy": ("duplicate", lambda: files.coded(texture(0, count=16), fps=8, matrix=5, options={"crf": "30"})),
    "no caption": ("caption", lambda: h264(texture(315), 24)),
    "latin1 caption": ("caption", lambda: h264(texture(316), 24)),
}
CAPTIONS = {"no caption": b" \n", "latin1 caption": "été".encode("latin1")}


def write_folder(folder: pathlib.Path, *, count: int, broken=()) -> dict[str, Clip | str]:
    """Writes good clips and broken ones, each with its caption beside it; returns what is expected of each name."""
    expected = {}
    for number in range(count):
        clip = good(number)
        inside = folder / ("" if number % 3 else f"part {number % 2}")
        inside.mkdir(parents=True, exist_ok=True)
        path = inside / (NAMES[number % len(NAMES)].format(number) + clip.ending)
        path.write_bytes(clip.data)
        path.with_suffix(".txt").write_text(f"scene {number}\n", encoding="utf-8")
        expected[path.relative_to(folder).as_posix()] = clip
    for name in broken:
        reason, make = BROKEN[name]
        path = folder / f"bad {name}.mp4"
        path.write_bytes(make())
        path.with_suffix(".txt").write_bytes(CAPTIONS.get(name, f"bad {name}".encode()))
        expected[path.name] = reason
    return expected

"""Video files: a written video is read back, frames are selected by time, and a broken file raises VideoError."""

import gc
import io
import re
from fractions import Fraction

import av
import numpy as np
import pytest
from collections_of_clips import texture
from video_files import UPSIDE_DOWN, coded, counting, numbers, with_matrix

from ivideo.data import encoders, shapes, video_io
from ivideo.data.video_io import VideoError


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def clip(frames=16, height=24, width=40, colour="red"):
    attrs = shapes.Attributes("circle", colour, "teal", "left")
    return shapes.render(attrs, 0, frames=frames, height=height, width=width)


def write_wav(path):
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(("size", "least"), [((12, 20), 24), ((24, 40), 26), ((96, 160), 32)])
@pytest.mark.parametrize("fps", [3, 24, Fraction(24000, 1001)])
def test_small_mp4_round_trip(tmp_path, size, least, fps):
    video = clip(8, *size)
    path = tmp_path / "clip.mp4"
    video_io.write_video(path, video, fps=fps)
    read, rate = video_io.read_video(path)
    assert read.shape == (8, *size, 3) and read.dtype == np.uint8
    assert rate == fps
    # Colour is at half the resolution, so the edges of a saturated shape are what differs.
    assert psnr(read, video_io.to_uint8(video)) > least
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_small_white_on_black_survives_coding(tmp_path):
    attrs = shapes.Attributes("circle", "white", "black", "left")
    video = shapes.render(attrs, 0, frames=8, height=48, width=80)
    video_io.write_video(tmp_path / "clip.mp4", video, fps=12, crf=10)
    assert psnr(video_io.read_video(tmp_path / "clip.mp4")[0], video_io.to_uint8(video)) > 40


def test_small_colours_survive_coding():
    for rgb in (*shapes.COLOURS.values(), *shapes.BACKGROUNDS.values()):
        video = np.broadcast_to(np.array(rgb, np.uint8), (2, 16, 16, 3))
        read, _ = video_io.read_video(video_io.encode(video, fps=3))
        assert np.abs(read.astype(int) - rgb).max() <= 3


@pytest.mark.parametrize("fps", [3, 6, 12, 24])
def test_small_gif_round_trip_is_exact(tmp_path, fps):
    video = clip(8, 13, 21)  # odd sizes are good for GIF
    path = tmp_path / "clip.gif"
    video_io.write_video(path, video, fps=fps, metadata={"prompt": "x" * 600})
    read, rate = video_io.read_video(path)
    np.testing.assert_array_equal(read, video_io.to_uint8(video))
    assert float(rate) == pytest.approx(fps, rel=0.05)
    assert path.read_bytes()[-1:] == b"\x3b"


def test_small_gif_of_a_still_clip_keeps_its_frames(tmp_path):
    video = np.full((6, 12, 20, 3), 77, np.uint8)
    video_io.write_video(tmp_path / "clip.gif", video, fps=6)
    np.testing.assert_array_equal(video_io.read_video(tmp_path / "clip.gif")[0], video)


@pytest.mark.parametrize("extension", ["mp4", "gif"])
def test_small_metadata_is_read_back(tmp_path, extension):
    metadata = {"prompt": 'a "red" stár; 赤い\n' * 50, "seed": "7", "config": "{}", "version": "0.1"}
    path = tmp_path / f"clip.{extension}"
    video_io.write_video(path, clip(), fps=3, metadata=metadata)
    assert video_io.read_metadata(path) == metadata
    video_io.write_video(path, clip(), fps=3, overwrite=True)
    assert video_io.read_metadata(path) == {}
    # The comment is a plain one, which other tools show.
    video_io.write_video(path, clip(), fps=3, metadata={"seed": 5}, overwrite=True)
    assert b'{"seed": 5}' in path.read_bytes()


def test_small_floats_are_rounded_and_clipped():
    video = np.array([-2, -1, 0, 1, 3], np.float32)[:, None, None, None] * np.ones((5, 2, 2, 3), np.float32)
    assert video_io.to_uint8(video)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    np.testing.assert_array_equal(video_io.to_uint8(video_io.to_float(every)), every)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((4, 12, 20), np.uint8), r"shape \(4, 12, 20\), expected \[T,H,W,3\]"),
        (np.zeros((0, 12, 20, 3), np.uint8), r"shape \(0, 12, 20, 3\)"),
        (np.zeros((4, 12, 20, 3), np.int32), "is int32, expected float"),
        (np.full((4, 12, 20, 3), np.nan, np.float32), "not finite"),
        (np.zeros((4, 13, 20, 3), np.uint8), "13 x 20 pixels, expected even"),
    ],
)
def test_small_what_cannot_be_written_is_refused(tmp_path, video, message):
    with pytest.raises(ValueError, match=message):
        video_io.write_video(tmp_path / "clip.mp4", video, fps=3)
    assert list(tmp_path.iterdir()) == []


def test_small_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=re.escape(str(path))):
        video_io.write_video(path, clip(), fps=3)
    assert path.read_bytes() == b"mine"
    video_io.write_video(path, clip(), fps=3, overwrite=True)
    assert len(video_io.read_video(path)[0]) == 16
    for name, fps, crf, message in (
        ("a.avi", 3, 18, "expected .mp4, .mov, .webm or .gif"),
        ("a.mp4", 0, 18, "fps is 0"),
        ("a.mp4", 3, 52, "crf is 52"),
    ):
        with pytest.raises(ValueError, match=message):
            video_io.write_video(tmp_path / name, clip(), fps=fps, crf=crf)
    with pytest.raises(FileNotFoundError, match="none"):
        video_io.write_video(tmp_path / "none" / "a.mp4", clip(), fps=3)


def test_small_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, *_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(encoders, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        video_io.write_video(tmp_path / "clip.mp4", clip(), fps=3)
    assert list(tmp_path.iterdir()) == []


def test_small_encoding_is_the_same_bytes_twice():
    assert video_io.encode(clip(), fps=3) == video_io.encode(clip(), fps=3)


def test_small_encoding_does_not_depend_on_what_memory_held():
    """Blocks of several sizes are freed before each encoding, and the encoder may get any part of them."""
    video, made = texture(2, count=41, height=192, width=320), set()
    for size in range(1, 11):
        np.full(size * 700_000, size, np.uint8)
        made.add(video_io.encode(video, fps=24, crf=16))
    assert len(made) == 1


@pytest.mark.parametrize("extension", ["mp4", "gif"])
def test_small_frames_are_chosen_by_time(tmp_path, extension):
    path = tmp_path / f"clip.{extension}"
    video_io.write_video(path, counting(24), fps=12)

    def sample(**how):
        return numbers(video_io.sample_frames(path, **how))

    assert sample(frames=24, fps=12) == list(range(24))
    assert sample(frames=12, fps=6) == list(range(0, 24, 2))
    assert sample(frames=6, fps=3) == list(range(0, 24, 4))
    assert sample(frames=8, fps=24) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sample(frames=3, fps=12, start=Fraction(20, 12)) == [20, 21, 22]
    assert sample(frames=4, duration=1) == [0, 3, 6, 9]
    assert sample(frames=4, duration=1, start=1) == [12, 15, 18, 21]
    assert sample(frames=4) == [0, 6, 12, 18]
    assert sample(frames=4, start=1) == [12, 15, 18, 21]
    with pytest.raises(VideoError, match=r"clip.* ends after 24 of these frames"):
        sample(frames=25, fps=12)
    with pytest.raises(VideoError, match="ends before 9.000 seconds, .*: use a longer video"):
        sample(frames=2, start=9)


def test_small_frames_of_uneven_timestamps_are_chosen_by_time():
    file = io.BytesIO()
    times = [0, 100, 150, 400, 1000, 1040]  # milliseconds
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pts, image in zip(times, counting(6), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    wanted = [max(k for k, t in enumerate(times) if t <= 1000 * n / 8) for n in range(9)]
    assert wanted == [0, 1, 2, 2, 3, 3, 3, 3, 4]
    assert numbers(video_io.sample_frames(file.getvalue(), frames=9, fps=8)) == wanted


def test_small_seeking_finds_the_frame_in_a_long_group():
    # One key frame in 200, B-frames in between.
    data = video_io.encode(np.concatenate([counting(25)] * 8), fps=24)
    whole, _ = video_io.read_video(data)
    part = video_io.sample_frames(data, frames=5, fps=24, start=Fraction(150, 24))
    np.testing.assert_array_equal(part, whole[150:155])


def test_small_wrong_sampling_arguments_are_named():
    data = video_io.encode(clip(), fps=3)
    with pytest.raises(ValueError, match="fps is 3 and duration is 2"):
        video_io.sample_frames(data, frames=2, fps=3, duration=2)
    for how in (dict(frames=0, fps=3), dict(frames=2, fps=3, start=-1), dict(frames=2, duration=0)):
        with pytest.raises(ValueError, match="frames is"):
            video_io.sample_frames(data, **how)


def test_small_every_broken_file_is_a_video_error(tmp_path):
    good = video_io.encode(clip(32, 96, 160), fps=12)
    files = {
        "cut.mp4": good[: len(good) // 2],
        "empty.mp4": b"",
        "text.mp4": b"no video at all\n" * 100,
        "one.mp4": video_io.encode(clip(1), fps=3),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    write_wav(tmp_path / "sound.wav")
    expected = {
        "cut.mp4": "cannot be read",
        "empty.mp4": "is empty",
        "text.mp4": "cannot be read",
        "one.mp4": "has 1 frames, expected 2 or more",
        "sound.wav": "has audio streams and no video",
        "missing.mp4": "is not a file",
    }
    for name, message in expected.items():
        path = tmp_path / name
        with pytest.raises(VideoError, match=message) as caught:
            video_io.read_video(path)
        assert str(path) in str(caught.value) and "expected" in str(caught.value)
        with pytest.raises(VideoError, match=re.escape(str(path))):
            video_io.sample_frames(path, frames=16, fps=12)
        if name in files and name != "one.mp4":
            with pytest.raises(VideoError):
                video_io.sample_frames(files[name], frames=16, fps=12)
    assert len(video_io.read_video(tmp_path / "one.mp4", min_frames=1)[0]) == 1


def test_small_random_damage_is_read_or_refused_in_one_way():
    good = video_io.encode(clip(16), fps=3)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(80):
        data = bytearray(good)
        for at in rng.integers(len(data), size=8):
            data[at] ^= 1 << rng.integers(8)
        try:
            video, _ = video_io.read_video(bytes(data))
            assert video.ndim == 4 and len(video) >= 2
        except VideoError:
            refused += 1
    assert refused > 20


def test_small_frames_that_were_read_are_let_go_without_the_garbage_collector():
    data = with_matrix(coded(np.concatenate([counting(24)] * 2)), UPSIDE_DOWN)
    gc.collect()
    gc.freeze()  # get_objects() is to list what is made from here on
    gc.disable()
    try:
        alive = [
            sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects())
            for _ in video_io.iter_frames(data, frames=48, fps=25)
        ]
    finally:
        gc.enable()
        gc.unfreeze()
    assert len(alive) == 48 and max(alive) < 24  # those that one packet yields, at the end

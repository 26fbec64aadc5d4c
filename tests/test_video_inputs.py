"""The names of video files, and what `--input` gives a stage of a user's video."""

import logging
import os

import av
import numpy as np
import pytest
import video_files as files
from video_files import near, read

from configs import ssr1
from ivideo.data import decoding, video_io
from ivideo.data.video_io import VideoError
from ivideo.sampling import generate

NAMES = [
    "2024-05-01T10:30:00.mp4",
    "run:1.mp4",
    "http:x.mp4",
    "pipe:0.mp4",
    "clip%03d.mp4",
    "-i.mp4",
    "a b;c|d.mp4",
    "ü.mp4",
]


@pytest.mark.parametrize("name", [*NAMES, b"\xff\xfe.mp4".decode(errors="surrogateescape"), "x" * 251 + ".mp4"])
def test_small_any_name_is_that_of_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    video_io.write_video(name, files.scene(4, 96, 160), fps=25, metadata={"seed": "1"})
    assert os.listdir(".") == [name]
    assert len(video_io.read_video(name)[0]) == 4
    assert read(name).shape == (4, 96, 160, 3)
    assert video_io.read_metadata(name) == {"seed": "1"}
    assert video_io.read_rate(name) == 25


def test_small_names_of_every_length_can_be_written(tmp_path):
    for length in (213, 230, 255):
        path = tmp_path / ("n" * (length - 4) + ".gif")
        video_io.write_video(path, files.counting(2), fps=25)
        assert video_io.read_video(path)[0].shape == (2, 16, 16, 3)


def test_small_extensions_are_read_in_any_case_and_others_are_refused(tmp_path):
    for name in ("a.MP4", "b.Mov", "c.webm", "d.GIF"):
        video_io.write_video(tmp_path / name, files.counting(8), fps=25, metadata={"prompt": "ü"})
        video, rate = video_io.read_video(tmp_path / name)
        assert files.numbers(video) == list(range(8)) and rate == 25
        assert video_io.read_metadata(tmp_path / name) == {"prompt": "ü"}
    with av.open(str(tmp_path / "c.webm")) as container:
        assert (container.format.name, container.streams.video[0].codec_context.name) == ("matroska,webm", "vp9")
    for name in ("a.avi", "a.mkv", "a", "mp4"):
        with pytest.raises(ValueError, match=r"expected \.mp4, \.mov, \.webm or \.gif: no other format can be written"):
            video_io.write_video(tmp_path / name, files.counting(2), fps=25)
    with pytest.raises(ValueError, match="16 x 15 pixels, expected even numbers: webm"):
        video_io.write_video(tmp_path / "odd.webm", files.counting(2)[:, :, :15], fps=25)


def test_small_a_link_is_written_through(tmp_path):
    (tmp_path / "store").mkdir()
    for link, target in (("a.mp4", "store/a.mp4"), ("new.mp4", "store/new.mp4")):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "store/a.mp4").write_bytes(b"old")
    for link in ("a.mp4", "new.mp4"):
        video_io.write_video(tmp_path / link, files.counting(4), fps=25, overwrite=link == "a.mp4")
        assert (tmp_path / link).is_symlink()
        assert len(video_io.read_video(tmp_path / "store" / link)[0]) == 4
    assert sorted(os.listdir(tmp_path / "store")) == ["a.mp4", "new.mp4"]
    with pytest.raises(FileExistsError):
        video_io.write_video(tmp_path / "a.mp4", files.counting(4), fps=25)


def test_small_input_reads_no_more_frames_than_the_stage_takes(tmp_path, monkeypatch, caplog):
    config = ssr1.get_config("small")
    size = config.cond
    path = tmp_path / "long.mp4"
    path.write_bytes(files.coded(np.concatenate([files.scene(25, 96, 160)] * 8), options={"g": "25"}))
    converted, decoded = [], []
    picture, frames = decoding.picture, decoding.decoded
    monkeypatch.setattr(decoding, "picture", lambda *a: converted.append(1) or picture(*a))
    monkeypatch.setattr(decoding, "decoded", lambda *a, **k: (decoded.append(1) or d for d in frames(*a, **k)))
    with caplog.at_level(logging.INFO, "ivideo"):
        clip = generate.read_clip(str(path), config)
    assert clip.shape == (size.frames, size.height, size.width, 3) and np.abs(clip).max() <= 1
    assert len(converted) == size.frames
    assert len(decoded) <= size.frames / size.fps * 25 + 2
    assert f"{path} is 96×160 at 25 fps: its first" in caplog.text


def test_small_input_that_is_too_short_names_no_flag_that_is_not_there(tmp_path):
    config = ssr1.get_config("small")
    path = tmp_path / "short.mp4"
    path.write_bytes(files.coded(files.scene(3, 96, 160)))
    with pytest.raises(VideoError, match=r"short.mp4 ends after \d of these frames.*: use a longer video\.$"):
        generate.read_clip(str(path), config)


def test_small_input_is_upright_and_square(tmp_path):
    config = ssr1.get_config("small")
    path = tmp_path / "portrait.mp4"
    scene = np.concatenate([files.scene(100, 96, 160)])
    path.write_bytes(files.with_matrix(files.coded(np.rot90(scene, -1, (1, 2)), matrix=5), files.LEFT))
    clip = generate.read_clip(str(path), config)
    near(video_io.to_uint8(clip)[0, -2, 2], (0, 0, 251), off=8)
    near(video_io.to_uint8(clip)[0, 1, -2], (251, 0, 0), off=8)


def test_small_input_of_oblong_pixels_is_that_of_square_ones(tmp_path):
    config = ssr1.get_config("small")
    rows, columns = np.mgrid[:384, :640]
    disc = ((rows - 192) ** 2 + (columns - 320) ** 2 < 100**2)[..., None] * np.full(3, 255, np.uint8)
    clips = []
    for name, video, sar in (("square", disc, None), ("oblong", disc[:, ::2], (2, 1))):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(
            files.coded(np.broadcast_to(video, (60, *video.shape)), fps=30, times=range(0, 180, 3), sar=sar)
        )
        clips.append(generate.read_clip(str(path), config))
    assert clips[0].max() > 0.9 and np.abs(clips[0] - clips[1]).max() < 0.03

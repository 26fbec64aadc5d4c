"""launch/draw_gallery.py: clips of all rates and sizes play side by side."""

import os

import draw_gallery
import launch_scripts
import numpy as np
import pytest
from PIL import Image

from ivideo.errors import UserError


def clip(frames, height, width):
    """Every frame is a little brighter than the one before, from black to white."""
    return np.broadcast_to(np.linspace(-1, 1, frames)[:, None, None, None], (frames, height, width, 3))


@pytest.mark.parametrize(("frames", "shown"), [(16, 8), (32, 16), (128, 66)])
def test_small_clips_of_all_rates_play_in_step(frames, shown):
    """Each panel shows the frame of its own clip at a time; 64 times are 16/3 seconds."""
    panels = draw_gallery.panel(clip(frames, 12, 20), "title", np.arange(64) / 64)
    assert panels.shape == (64, draw_gallery.SIZE[1] + draw_gallery.TITLE + 4, draw_gallery.SIZE[0] + 4, 3)
    np.testing.assert_allclose(panels[33, 60, 80], 255 * shown / (frames - 1), atol=0.51)


def test_small_a_grid_is_one_moving_picture(tmp_path):
    draw_gallery.write_grid(tmp_path / "grid.webp", [clip(64, 12, 20)] * 3, ["a", "b", "c"], columns=2)
    with Image.open(tmp_path / "grid.webp") as picture:
        assert picture.size == (2 * draw_gallery.SIZE[0] + 8, 2 * (draw_gallery.SIZE[1] + draw_gallery.TITLE + 4))
        durations = []
        for number in range(picture.n_frames):
            picture.seek(number)
            picture.load()
            durations.append(picture.info["duration"])
        pixels = np.asarray(picture.convert("RGB"))
    assert sum(durations) == 64 * 83  # frames that look alike are stored once
    assert pixels[60, 80].min() > 250 and pixels[-60, -80].min() > 250  # the last frame, and the empty fourth place


def test_small_a_picture_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_gallery, "MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"grid.webp would have [\d,]+ bytes, expected at most 100"):
        draw_gallery.write_grid(tmp_path / "grid.webp", [clip(16, 12, 20)], ["a"], columns=1)
    assert os.listdir(tmp_path) == []


def test_small_titles_are_short():
    assert draw_gallery.title_of("a red star moving right on a teal background") == "red star, right, teal"
    assert draw_gallery.title_of("a white circle standing still on a brown background") == "white circle, still, brown"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}/new", "--only=nonsense"], "'nonsense' is unknown, expected some of prompts, stages, clip"),
        (["{tmp}/new", "--only=clip"], "--only=clip needs --clip=FILE"),
        (["{tmp}/new", "--clip={tmp}/none.mp4"], "none.mp4"),
        (["{tmp}/new", "--clip={tmp}/file"], "file"),
        (["{tmp}/file"], "File exists"),
        (["{tmp}/file/new"], "Not a directory"),
    ],
)
def test_small_mistakes_are_said_before_anything_is_drawn(tmp_path, capsys, arguments, said):
    (tmp_path / "file").write_bytes(b"")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert said in launch_scripts.refusal(draw_gallery, arguments, capsys)
    assert os.listdir(tmp_path) == ["file"]

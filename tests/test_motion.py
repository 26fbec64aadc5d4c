"""Flicker, warping error and drift of clips in which they are known."""

import sys

import numpy as np
import pytest

from ivideo.data import shapes, video_io
from ivideo.evaluation import motion


def clip(frames=8, height=48, width=80):
    attributes = shapes.parse_caption("a red circle moving right on a teal background")
    return video_io.to_uint8(shapes.render(attributes, 3, frames=frames, height=height, width=width))


def test_small_changes_and_drift_of_known_clips():
    video = np.zeros((4, 6, 8, 3), np.uint8)
    video[1] = 10
    video[2:] = 40
    np.testing.assert_allclose(motion.changes(video), [10, 30, 0])
    assert motion.measure(video, flow=False) == {"drift": pytest.approx(40, abs=1e-3)}


def test_small_without_opencv_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert not motion.has_flow()
    assert motion.HOW_TO_GET.endswith("is not installed: run `pip install '.[metrics]'` in the clone")


def test_small_flicker_is_of_what_stands_still_and_warping_error_of_what_moves():
    """A perfect clip has little of both; brightness that alternates by 8 has 8 of both; shuffled frames do not warp."""
    pytest.importorskip("cv2")
    perfect = motion.measure(clip(), flow=True)
    assert perfect["flicker"] == 0 and perfect["warping"] < 0.5
    dark = clip() // 2 + 20
    dark[::2] += 8
    found = motion.measure(dark, flow=True)
    assert found["flicker"] == pytest.approx(8, abs=0.2) and found["warping"] == pytest.approx(8, abs=0.5)
    shuffled = motion.measure(clip()[[0, 5, 2, 7, 1, 6, 3, 4]], flow=True)
    assert shuffled["warping"] > 3 * perfect["warping"]
    still = motion.measure(clip()[[2] * 8], flow=True)
    assert (still["flicker"], still["warping"], still["drift"]) == (0, 0, 0)


def test_small_a_clip_in_which_nothing_stands_still_has_no_flicker():
    pytest.importorskip("cv2")
    texture = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    moving = np.stack([np.roll(texture, 3 * n, axis=1) for n in range(5)])
    found = motion.measure(moving, flow=True)
    assert np.isnan(found["flicker"]) or found["flicker"] > 20  # the edge, where the texture comes in again
    assert found["warping"] < 12

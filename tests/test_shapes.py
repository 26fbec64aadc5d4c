"""The captioned-shapes world against its definition: counts, geometry in closed form, and agreement between sizes."""

import math
import time

import numpy as np
import pytest

from ivideo.data import shapes
from ivideo.data.shapes import Attributes

ENDS = np.array([0.0, 1.0])


def test_small_captions_and_held_out_counts():
    everything = shapes.all_attributes()
    assert len(everything) == len(set(everything)) == 480
    assert len({shapes.caption(a) for a in everything}) == 480
    assert (len(shapes.TRAIN), len(shapes.HELD_OUT)) == (432, 48)
    assert set(shapes.TRAIN) | set(shapes.HELD_OUT) == set(everything)
    counts = {}
    for shape, colour, _, motion in shapes.HELD_OUT:
        counts[shape, colour] = counts.get((shape, colour), 0) + 1
        if shape == "circle":
            assert motion == "still"
        if shape == "square":
            assert motion == "left"
    assert counts == {
        ("star", "red"): 20,
        ("triangle", "blue"): 20,
        ("circle", "white"): 4,
        ("square", "purple"): 4,
    }
    # Every part of a held-out caption is seen in training.
    for position in range(4):
        assert {a[position] for a in shapes.HELD_OUT} <= {a[position] for a in shapes.TRAIN}


def test_small_caption_round_trip():
    for attrs in shapes.all_attributes():
        assert shapes.parse_caption(shapes.caption(attrs)) == attrs
    star = Attributes("star", "red", "teal", "left")
    assert shapes.caption(star) == "a red star moving left on a teal background"
    assert shapes.caption(star._replace(motion="still")) == "a red star standing still on a teal background"
    assert shapes.parse_caption(" A red  star moving left on a teal background. ") == star
    for text in ("", "a red star", "a red star moving still on a teal background", "a pink star moving up on a teal b"):
        assert shapes.parse_caption(text) is None


@pytest.mark.parametrize("size", [(12, 20), (64, 64), (80, 48)])
def test_small_paths_keep_their_promises(size):
    height, width = size
    travels = {m: [] for m in shapes.MOTIONS}
    for attrs in shapes.all_attributes():
        if (attrs.colour, attrs.background) != ("red", "black"):
            continue
        for seed in range(100):
            x, y, radius = shapes.trajectory(attrs, seed, ENDS, height=height, width=width)
            half_width, half_height = (radius * half for half in shapes.half_extent(attrs.shape))
            assert 0.22 <= radius / min(size) <= 0.30
            assert (x - half_width).min() > -1e-9 and (x + half_width).max() < width + 1e-9
            assert (y - half_height).min() > -1e-9 and (y + half_height).max() < height + 1e-9
            dx, dy = (x[1] - x[0]) / width, (y[1] - y[0]) / height
            wanted = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}[attrs.motion]
            assert (np.sign(dx), np.sign(dy)) == wanted
            travels[attrs.motion].append(abs(dx) + abs(dy))
    assert max(travels.pop("still")) == 0
    for travel in travels.values():
        assert 0.35 <= min(travel) < 0.37 and 0.5 < max(travel) <= 0.6 + 1e-9


def test_small_speed_is_constant():
    attrs = Attributes("circle", "red", "black", "left")
    x = shapes.trajectory(attrs, 3, shapes.frame_times(16), height=12, width=20).x
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0], rtol=1e-9)


@pytest.mark.parametrize(
    ("shape", "area", "box"),
    [
        ("circle", math.pi, (2, 2)),
        ("square", math.pi, (math.sqrt(math.pi), math.sqrt(math.pi))),
        ("triangle", math.sqrt(3), (2, math.sqrt(3))),
        # A pentagram of circumscribed radius R has the area 1.12257 R^2 and is R (1 + cos 36°) high.
        ("star", 1.12257 / math.cos(math.pi / 10) ** 2, (2, (1 + math.cos(math.pi / 5)) / math.cos(math.pi / 10))),
    ],
)
def test_small_areas_and_boxes_are_those_of_the_shapes(shape, area, box):
    radius, size = 90.0, 200
    share = shapes.coverage(shape, 100.0, 100.0, radius, height=size, width=size)[0]
    assert share.sum() / radius**2 == pytest.approx(area, rel=1e-3)
    inside = share > 0.02  # the tips of a star are thinner than a pixel
    for axis, wanted in ((0, box[0]), (1, box[1])):
        found = np.flatnonzero(inside.any(axis=axis))
        assert (found[-1] + 1 - found[0]) / radius == pytest.approx(wanted, abs=0.04)
        # The box is centred on the place asked for, at 100.
        assert (found[-1] + 1 + found[0]) / 2 == pytest.approx(100, abs=1.5)


def test_small_triangle_and_star_have_one_axis_and_the_right_way_up():
    for shape in shapes.SHAPES:
        share = shapes.coverage(shape, 50.0, 50.0, 40.0, height=100, width=100)[0]
        np.testing.assert_array_equal(share, share[:, ::-1])
        widths = share.sum(axis=1)
        if shape == "triangle":
            assert widths[20] < widths[50] < widths[80]
        if shape == "star":
            assert widths[15] < 10 and widths[37:42].max() > 75
            assert share[80, 50] == 0 and share[80].sum() > 10  # two legs, and nothing between


def test_small_coverage_is_the_average_of_a_fine_grid():
    rng = np.random.default_rng(0)
    for shape in shapes.SHAPES:
        x, y, radius = rng.uniform(7, 9, 5), rng.uniform(7, 9, 5), rng.uniform(3, 6, 5)
        coarse = shapes.coverage(shape, x, y, radius, height=16, width=16)
        fine = shapes.coverage(shape, 16 * x, 16 * y, 16 * radius, height=256, width=256)
        fine = fine.reshape(5, 16, 16, 16, 16).mean(axis=(2, 4))
        # The 8 x 8 samples of a pixel can miss half a sample's width of a straight edge.
        assert np.abs(coarse - fine).max() < 0.13
        assert np.abs(coarse - fine).mean() < 0.006


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_small_sizes_agree(shape):
    for motion, seed in (("left", 0), ("down", 1), ("still", 2)):
        attrs = Attributes(shape, "white", "black", motion)
        low = shapes.render(attrs, seed, frames=16, height=12, width=20)
        for factor in (2, 8):
            high = shapes.render(attrs, seed, frames=16, height=12 * factor, width=20 * factor)
            mean = high.reshape(16, 12, factor, 20, factor, 3).mean(axis=(2, 4))
            assert np.abs(mean - low).mean() < 0.01
            assert np.abs(mean - low).max() < 0.25


def test_small_fewer_frames_are_every_second_frame():
    attrs = Attributes("star", "blue", "teal", "up")
    long = shapes.render(attrs, 5, frames=32, height=24, width=40)
    np.testing.assert_array_equal(long[::2], shapes.render(attrs, 5, frames=16, height=24, width=40))
    np.testing.assert_array_equal(long[::4], shapes.render(attrs, 5, frames=8, height=24, width=40))


def test_small_colours_levels_and_determinism():
    attrs = Attributes("square", "yellow", "brown", "right")
    video = shapes.render(attrs, 9, frames=8, height=24, width=40)
    assert video.shape == (8, 24, 40, 3) and video.dtype == np.float32
    assert video.min() >= -1 and video.max() <= 1
    levels = np.round((video + 1) * 127.5).astype(int)
    assert (levels[:, 0, -1] == (110, 70, 40)).all()
    x, y, _ = shapes.trajectory(attrs, 9, shapes.frame_times(8), height=24, width=40)
    for k in range(8):
        assert tuple(levels[k, int(y[k]), int(x[k])]) == (240, 210, 40)
    np.testing.assert_array_equal(video, shapes.render(attrs, 9, frames=8, height=24, width=40))
    assert np.abs(video - shapes.render(attrs, 10, frames=8, height=24, width=40)).max() > 0.5
    # The seed decides the path alone: other colours move alike.
    other = shapes.render(attrs._replace(colour="red", background="gray"), 9, frames=8, height=24, width=40)
    np.testing.assert_array_equal((video == video[0, 0, -1]).all(-1), (other == other[0, 0, -1]).all(-1))


def test_small_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"colour is 'pink', expected one of red"):
        shapes.render(("circle", "pink", "black", "left"), 0, frames=2, height=12, width=20)
    with pytest.raises(ValueError, match="frames is 0"):
        shapes.render(shapes.TRAIN[0], 0, frames=0, height=12, width=20)
    with pytest.raises(ValueError, match="2 x 20 pixels"):
        shapes.render(shapes.TRAIN[0], 0, frames=2, height=2, width=20)


def test_small_rendering_is_fast():
    best = math.inf
    for seed in range(40):
        start = time.perf_counter()
        shapes.render(Attributes("star", "red", "black", "left"), seed, frames=16, height=12, width=20)
        best = min(best, time.perf_counter() - start)
    # About 1 ms; the margin is for a machine that is busy.
    assert best < 0.01

"""Sharpness, steadiness and grain of clips with known errors."""

import numpy as np
import pytest
import scipy.ndimage

from ivideo.data import shapes
from ivideo.evaluation.steadiness import MEASURES, measure

ATTRS = shapes.Attributes("star", "red", "teal", "left")


def clip(attrs=ATTRS, seed=0, *, frames=8, of=64, height=96, width=160):
    """The first frames of a perfect clip of `of` frames."""
    return shapes.render_at(attrs, seed, shapes.frame_times(of)[:frames], height=height, width=width)


def drawn(x, y, radius, shape="star", *, height=96, width=160):
    """A red shape on teal at these places in pixels."""
    share = shapes.coverage(shape, x, y, radius, height=height, width=width)[..., None]
    background, colour = shapes.level(shapes.BACKGROUNDS["teal"]), shapes.level(shapes.COLOURS["red"])
    return background + share * (colour - background)


def noise(like, deviation):
    """White noise whose standard deviation is in levels of 255."""
    return deviation / 127.5 * np.random.default_rng(0).normal(size=like.shape).astype(np.float32)


# Per size, the least of any perfect clip and the mean of all: a mask of few pixels depends on where they are
@pytest.mark.parametrize(
    ("height", "of", "ideal", "steady"),
    [
        (24, 16, (0.975, 0.996), (0.97, 0.99)),
        (48, 32, (0.99, 0.998), (0.985, 0.995)),
        (96, 64, (0.997, 0.999), (0.99, 0.997)),
        (192, 128, (0.998, 0.9995), (0.995, 0.998)),
    ],
)
def test_small_perfect_clips(height, of, ideal, steady):
    """Every shape and motion."""
    found = []
    for number, (shape, motion) in enumerate([(s, m) for s in shapes.SHAPES for m in shapes.MOTIONS]):
        colour = list(shapes.COLOURS)[number % 6]
        attrs = shapes.Attributes(shape, colour, list(shapes.BACKGROUNDS)[number % 4], motion)
        video = clip(attrs, number, frames=4, of=of, height=height, width=height * 5 // 3)
        found.append([measure(video, attrs)[name] for name in MEASURES])
    least, mean, most = np.min(found, axis=0), np.mean(found, axis=0), np.max(found, axis=0)
    assert least[0] >= ideal[0] and mean[0] >= ideal[1], (least, mean)
    assert least[1] >= steady[0] and mean[1] >= steady[1], (least, mean)
    assert most[2] < 1e-3


@pytest.mark.parametrize("deviation", [0.5, 2.0, 8.0])
def test_small_grain_is_the_noise_of_the_background(deviation):
    """And moves the overlaps by less than a hundredth up to a deviation of 2."""
    video = clip()
    found, clean = measure(video + noise(video, deviation), ATTRS), measure(video, ATTRS)
    assert found["grain"] == pytest.approx(deviation, rel=0.02)
    if deviation <= 2:
        for name in ("ideal_iou", "steady_iou"):
            assert found[name] == pytest.approx(clean[name], abs=0.01)
    only_inside = np.where(np.abs(video - video[0, 0, 0]).max(-1, keepdims=True) > 0, noise(video, deviation), 0)
    assert measure(video + only_inside, ATTRS)["grain"] < 1e-3


def test_small_another_shape_has_the_overlap_of_the_two():
    """A circle where a star should be: its overlap with the star of the same area and centroid, counted at 960 rows."""
    star = shapes.coverage("star", 800.0, 480.0, 300.0, height=960, width=1600)[0] > 0.5
    rows, columns = np.nonzero(star)
    distance = np.hypot(
        *(axis - pixels.mean() for axis, pixels in zip(np.indices(star.shape), (rows, columns), strict=True))
    )
    circle = distance < np.sqrt(star.sum() / np.pi)
    expected = (star & circle).sum() / (star | circle).sum()
    for scale in (1, 2):
        size = {"height": 96 * scale, "width": 160 * scale}
        video = drawn([80.3 * scale] * 4, [48.0 * scale] * 4, 24.0 * scale, "circle", **size)
        assert measure(video, ATTRS._replace(shape="circle"))["ideal_iou"] > 0.998
        found = measure(video, ATTRS)
        assert found["ideal_iou"] == pytest.approx(expected, abs=0.01)
        assert found["steady_iou"] == pytest.approx(1, abs=1e-6)


def test_small_a_size_that_changes():
    """Radii of 20 and 22 in turn: each frame is ideal, and overlaps the next one by the quotient of the areas."""
    radius = np.where(np.arange(8) % 2 == 0, 20.0, 22.0)
    for shape in shapes.SHAPES:
        found = measure(drawn(np.full(8, 80.0), np.full(8, 48.0), radius, shape), ATTRS._replace(shape=shape))
        assert found["ideal_iou"] > 0.995
        assert found["steady_iou"] == pytest.approx((20 / 22) ** 2, abs=0.015)


def test_small_a_place_that_jitters_is_aligned():
    """The centroid's jumps by whole and broken pixels are a matter of motion, not of the outline."""
    x, y = np.random.default_rng(0).uniform(-3, 3, (2, 8))
    found = measure(drawn(80 + x, 48 + y, 22.0), ATTRS)
    assert found["ideal_iou"] > 0.995 and found["steady_iou"] > 0.985


def test_small_an_edge_that_wobbles():
    """A circle whose radius is r (1 + a sin(5 angle + phase)), with another phase in each frame.

    A frame's outline encloses the same area as the circle's up to a²/2, and leaves 2a/π of it on either side: the
    overlap with the circle is (1 - 2a/π) / (1 + 2a/π) for small a. With the next frame's, in opposite phase, it is
    (1 - 4a/π) / (1 + 4a/π).
    """
    rows, columns = (np.arange(n * 4) / 4 + 1 / 8 for n in (96, 160))
    dy, dx = np.meshgrid(rows - 48.3, columns - 80.4, indexing="ij")
    background, colour = shapes.level(shapes.BACKGROUNDS["teal"]), shapes.level(shapes.COLOURS["red"])
    for a in (0.02, 0.05):
        masks = []
        for phase in (0, np.pi) * 3:
            inside = np.hypot(dx, dy) < 24 * (1 + a * np.sin(5 * np.arctan2(dy, dx) + phase))
            masks.append(inside.reshape(96, 4, 160, 4).mean(axis=(1, 3)))
        video = background + np.stack(masks)[..., None].astype(np.float32) * (colour - background)
        found = measure(video, ATTRS._replace(shape="circle"))
        assert found["ideal_iou"] == pytest.approx((1 - 2 * a / np.pi) / (1 + 2 * a / np.pi), abs=0.005)
        assert found["steady_iou"] == pytest.approx((1 - 4 * a / np.pi) / (1 + 4 * a / np.pi), abs=0.012)


def test_small_a_blurred_clip_is_less_ideal():
    """More so the wider the blur; it stays steady."""
    found = [measure(scipy.ndimage.gaussian_filter(clip(), (0, s, s, 0)), ATTRS) for s in (0.01, 1, 2, 4)]
    overlaps = [f["ideal_iou"] for f in found]
    np.testing.assert_allclose(overlaps, [0.998, 0.93, 0.85, 0.72], atol=0.01)
    assert min(f["steady_iou"] for f in found) > 0.99


def test_small_colours_are_those_of_the_clip():
    """A paler shape on a lighter background is as sharp."""
    paler = 0.8 * clip() + 0.1
    for name in MEASURES:
        assert measure(paler, ATTRS)[name] == pytest.approx(measure(clip(), ATTRS)[name], abs=0.002)


def test_small_a_clip_without_a_shape():
    empty = np.broadcast_to(shapes.level(shapes.BACKGROUNDS["teal"]), (4, 24, 40, 3))
    assert measure(empty, ATTRS) == dict.fromkeys(MEASURES, 0)
    found = measure(empty + noise(empty, 3), ATTRS)
    assert found == {"ideal_iou": 0, "steady_iou": 0, "grain": pytest.approx(3, rel=0.03)}
    full = np.broadcast_to(shapes.level(shapes.COLOURS["red"]), (4, 24, 40, 3))
    assert measure(full, ATTRS) == dict.fromkeys(MEASURES, 0)
    blue = clip(ATTRS._replace(colour="blue"))
    assert measure(blue, ATTRS)["ideal_iou"] == 0


def test_small_a_shape_that_vanishes_counts_as_zero_in_its_frames():
    video, whole = clip(), measure(clip(), ATTRS)
    video[4:] = video[0, 0, 0]
    found = measure(video, ATTRS)
    assert found["ideal_iou"] == pytest.approx(whole["ideal_iou"] / 2, abs=0.002)
    assert found["steady_iou"] == pytest.approx(whole["steady_iou"] * 3 / 7, abs=0.002)  # 3 pairs of 7


def test_small_a_single_frame_is_steady():
    found = measure(clip(frames=1), ATTRS)
    assert found["ideal_iou"] > 0.99 and found["steady_iou"] == 1

"""The scorer on clips with known content: correct on all 480 captions, and wrong for every other clip."""

import functools

import numpy as np
import pytest

from ivideo.data import shapes
from ivideo.data.shapes import Attributes
from ivideo.evaluation import prompt_following
from ivideo.evaluation.prompt_following import measure, score

RIGHT = {"background": True, "colour": True, "motion": True, "shape": True}
ATTRS = Attributes("circle", "red", "teal", "left")


@functools.cache
def clips(height, width, step):
    chosen = shapes.all_attributes()[::step]
    return [(a, shapes.render(a, i, frames=16, height=height, width=width)) for i, a in enumerate(chosen)]


def noisy(video, sigma, seed):
    return video + sigma * np.random.default_rng(seed).normal(size=video.shape).astype(np.float32)


def rates(scores):
    return {name: np.mean([s[name] for s in scores]) for name in prompt_following.ATTRIBUTES}


def clip(attrs=ATTRS, seed=0, **size):
    return shapes.render(attrs, seed, **{"frames": 16, "height": 24, "width": 40, **size})


def background_only():
    return np.broadcast_to(shapes.level(shapes.BACKGROUNDS["teal"]), (16, 24, 40, 3)).copy()


def test_all_captions_are_read_without_error_at_the_base_size():
    for attrs, video in clips(12, 20, 1):
        assert score(video, attrs) == RIGHT, attrs


def test_small_noise_is_borne():
    for sigma, least in ((0.1, 0.98), (0.2, 0.95)):
        scores = [score(noisy(v, sigma, i), a) for i, (a, v) in enumerate(clips(12, 20, 1)[::3])]
        assert min(rates(scores).values()) >= least, (sigma, rates(scores))


@pytest.mark.parametrize(("height", "width", "step"), [(24, 40, 7), (48, 80, 29), (32, 32, 11)])
def test_small_larger_clips_are_read_without_error(height, width, step):
    for i, (attrs, video) in enumerate(clips(height, width, step)):
        assert score(video, attrs) == RIGHT
        assert score(noisy(video, 0.1, i), attrs) == RIGHT


def test_small_other_captions_score_at_chance():
    everything = clips(12, 20, 1)[::2]
    order = np.random.default_rng(0).permutation(len(everything))
    scores = [score(video, everything[j][0]) for (_, video), j in zip(everything, order, strict=True)]
    for name, chance in (("background", 1 / 4), ("colour", 1 / 6), ("motion", 1 / 5), ("shape", 1 / 4)):
        # Three standard deviations of a share of 240.
        assert rates(scores)[name] == pytest.approx(chance, abs=3 * np.sqrt(chance * (1 - chance) / 240))


def test_small_measurements_are_the_drawn_numbers():
    for motion in shapes.MOTIONS:
        attrs = ATTRS._replace(motion=motion)
        measured = measure(clip(attrs, 4, height=48, width=80))
        x, y, _ = shapes.trajectory(attrs, 4, shapes.frame_times(16), height=48, width=80)
        np.testing.assert_allclose(measured.centres, np.stack([x / 80, y / 48], -1), atol=2e-3)
        ends = shapes.trajectory(attrs, 4, np.array([0.0, 1.0]), height=48, width=80)
        assert measured.travel == pytest.approx((np.diff(ends.x)[0] / 80, np.diff(ends.y)[0] / 48), abs=2e-3)
        assert measured.good_frames == 1 and measured.overlap > 0.98


def test_small_fewer_frames_are_enough():
    for frames in (4, 8, 32):
        assert score(clip(frames=frames), ATTRS) == RIGHT


def test_small_shape_is_not_judged_on_tiny_frames():
    video = shapes.render(ATTRS, 0, frames=8, height=8, width=14)
    assert score(video, ATTRS)["shape"] is None
    assert measure(video).shape is None
    assert isinstance(score(video, ATTRS, min_shape_height=8)["shape"], bool)
    assert score(clip(), ATTRS, min_shape_height=25)["shape"] is None


def test_small_an_empty_clip_shows_nothing():
    video = background_only()
    for motion in shapes.MOTIONS:
        right = score(video, ATTRS._replace(motion=motion))
        assert right == {"background": True, "colour": False, "motion": False, "shape": False}
        right = score(noisy(video, 0.1, 0), ATTRS._replace(motion=motion))
        assert right == {"background": True, "colour": False, "motion": False, "shape": False}


def assert_only_background(video):
    measured = measure(video)
    assert (measured.background, measured.colour, measured.motion, measured.shape) == ("teal", None, None, None)
    for attrs in (ATTRS, ATTRS._replace(motion="still")):
        assert score(video, attrs) == {"background": True, "colour": False, "motion": False, "shape": False}


def test_small_an_object_that_vanishes_fails():
    for hidden in (slice(0, 8), slice(8, 16), slice(0, 16, 2), slice(5, 9)):
        video = clip()
        video[hidden] = background_only()[hidden]
        assert_only_background(video)
    video = clip()
    video[7] = background_only()[7]  # a single frame is forgiven
    assert score(video, ATTRS) == RIGHT


@pytest.mark.parametrize("other", [c for c in shapes.COLOURS if c != "red"])
def test_small_two_colours_fail(other):
    red, second = clip(), clip(ATTRS._replace(colour=other))
    half_the_time = np.where((np.arange(16) < 8)[:, None, None, None], red, second)
    assert_only_background(half_the_time)
    flicker = np.where((np.arange(16) % 2 == 0)[:, None, None, None], red, second)
    assert_only_background(flicker)
    x = shapes.trajectory(ATTRS, 0, shapes.frame_times(16), height=24, width=40).x
    left_half = (np.arange(40) < x[:, None])[:, None, :, None]
    assert_only_background(np.where(left_half, red, second))


def test_small_two_objects_fail():
    still = ATTRS._replace(motion="still")
    background = background_only()
    share = shapes.coverage("circle", np.full(16, 10.0), np.full(16, 12.0), 6.0, height=24, width=40)
    second = shapes.coverage("circle", np.full(16, 30.0), np.full(16, 12.0), 5.0, height=24, width=40)
    red = shapes.level(shapes.COLOURS["red"])
    one = background + share[..., None] * (red - background)
    assert score(one, still) == RIGHT
    assert_only_background(one + second[..., None] * (red - background))
    green = shapes.level(shapes.COLOURS["green"])
    assert_only_background(one + second[..., None] * (green - background))


def test_small_pale_large_and_tiny_objects_fail():
    background = background_only()
    assert_only_background(background + 0.4 * (clip() - background))
    red = shapes.level(shapes.COLOURS["red"])
    for radius in (2.0, 11.0):
        share = shapes.coverage("circle", np.full(16, 20.0), np.full(16, 12.0), radius, height=24, width=40)
        assert_only_background(background + share[..., None] * (red - background))


def drawn(x, y, shape="circle", radius=6.0):
    """A red shape on teal at the places [16] given in shares of the frame's width and height."""
    background = background_only()
    share = shapes.coverage(shape, np.asarray(x) * 40, np.asarray(y) * 24, radius, height=24, width=40)
    return background + share[..., None] * (shapes.level(shapes.COLOURS["red"]) - background)


def test_small_motions_of_another_world_are_none():
    times = shapes.frame_times(16)
    middle = np.full(16, 0.5)
    measured = measure(drawn(0.3 + 0.4 * times, 0.3 + 0.4 * times))
    assert (measured.colour, measured.motion) == ("red", None)  # diagonal
    assert measure(drawn(0.5 + 0.3 * np.sin(2 * np.pi * times), middle)).motion is None  # there and back
    assert measure(drawn(np.where(times < 0.5, 0.3, 0.7), middle)).motion is None  # a jump
    # The threshold is 0.15 of the frame's extent.
    for travel, motion in ((0.0, "still"), (0.13, "still"), (-0.13, "still"), (0.17, "right"), (-0.17, "left")):
        assert measure(drawn(0.5 + travel * times, middle)).motion == motion
    for travel, motion in ((0.13, "still"), (0.17, "down"), (-0.17, "up")):
        assert measure(drawn(middle, 0.5 + travel * times)).motion == motion


def test_small_other_shapes_are_none():
    background = background_only()
    video = background.copy()
    video[:, 10:13, 10:30] = shapes.level(shapes.COLOURS["red"])  # a bar, 3 x 20
    measured = measure(video)
    assert (measured.colour, measured.motion, measured.shape) == ("red", "still", None)


def test_small_backgrounds_of_another_world_are_none():
    for level in ((255, 0, 255), (250, 250, 250)):
        video = np.broadcast_to(shapes.level(level), (16, 24, 40, 3))
        assert score(video, ATTRS) == dict.fromkeys(RIGHT, False)
    video = clip()
    video[8:] = clip(ATTRS._replace(background="black"))[8:]
    assert score(video, ATTRS) == dict.fromkeys(RIGHT, False)
    assert score(np.full((16, 24, 40, 3), np.nan), ATTRS) == dict.fromkeys(RIGHT, False)
    with pytest.raises(ValueError, match=r"shape \(24, 40, 3\), expected \[T,H,W,3\]"):
        measure(clip()[0])


def test_small_table_of_shares():
    wrong = {**RIGHT, "motion": False}
    unknown = {**RIGHT, "shape": None}
    seen, held = shapes.TRAIN[0], Attributes("star", "red", "gray", "up")
    shapeless = {**RIGHT, "shape": False}
    rows = [(seen, RIGHT), (seen, wrong), (seen, shapeless), (seen, unknown), (held, unknown)]
    table = prompt_following.summarize(rows)
    # One of four wrong: a standard deviation of 1/2 over √4; one of three: √(1/3) over √3; two of four: √(1/3) over √4
    errors = {
        "background": 0, "colour": 0, "motion": 1 / 4, "shape": 1 / 3, "coarse": 1 / 4, "all": np.sqrt(1 / 12)
    }  # fmt: skip
    assert table["seen"] == {
        "clips": 4, "background": 1.0, "colour": 1.0, "motion": 0.75, "shape": 2 / 3, "coarse": 0.75, "all": 0.5,
        "standard_error": pytest.approx(errors),
    }  # fmt: skip
    assert table["held_out"] == table["red star"] == {
        "clips": 1, "background": 1.0, "colour": 1.0, "motion": 1.0, "shape": None, "coarse": 1.0, "all": 1.0,
        "standard_error": dict.fromkeys(errors),
    }  # fmt: skip
    assert prompt_following.format_table(table).splitlines() == [
        "| captions | clips | background | colour | motion | first three | shape | all four |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        "| seen | 4 | 100.0% ± 0.0 | 100.0% ± 0.0 | 75.0% ± 25.0 | 75.0% ± 25.0 | 66.7% ± 33.3 | 50.0% ± 28.9 |",
        "| held-out | 1 | 100.0% | 100.0% | 100.0% | 100.0% | – | 100.0% |",
        "| white circle standing still | 0 | – | – | – | – | – | – |",
        "| purple square moving left | 0 | – | – | – | – | – | – |",
        "| blue triangle | 0 | – | – | – | – | – | – |",
        "| red star | 1 | 100.0% | 100.0% | 100.0% | 100.0% | – | 100.0% |",
    ]
    assert prompt_following.summarize([])["seen"]["all"] is None


def test_small_every_held_out_caption_is_of_one_kind():
    kinds = [prompt_following.held_out_kind(attrs) for attrs in shapes.all_attributes()]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {
        None: 432, "red star": 20, "blue triangle": 20, "white circle standing still": 4, "purple square moving left": 4
    }  # fmt: skip
    assert {*prompt_following.HELD_OUT_KINDS} == {*counts} - {None}

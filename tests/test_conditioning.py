"""The input of a super-resolution stage, against closed forms and against shapes drawn at the smaller size."""

import jax
import numpy as np
import pytest

from configs import ssr1, tsr1
from ivideo import checks, stages
from ivideo.data import shapes
from ivideo.diffusion import conditioning
from ivideo.errors import UserError
from ivideo.training.step import conditioning_inputs


def ramp(frames=4, height=8, width=12):
    """Video whose value is 100 frame + 10 row + column, at the pixels' centres."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    return (100 * t + 10 * y + x).astype(np.float32)[None, ..., None]


def test_small_reduced_ramp_is_a_ramp():
    """A linear image keeps its value at every point of the interior; every second frame is kept."""
    low = conditioning.reduce(ramp(), space=2, time=2)
    assert low.shape == (1, 2, 4, 6, 1)
    t, y, x = np.meshgrid([0, 2], 2 * np.arange(4) + 1, 2 * np.arange(6) + 1, indexing="ij")
    np.testing.assert_allclose(low[0, :, 1:-1, 1:-1, 0], (100 * t + 10 * y + x)[:, 1:-1, 1:-1], rtol=1e-5)


def test_small_enlarged_ramp_is_the_ramp():
    low = conditioning.reduce(ramp(), space=2, time=2)
    high = conditioning.enlarge(low, space=2, time=2)
    np.testing.assert_allclose(high[0, ::2, 3:-3, 3:-3], ramp()[0, ::2, 3:-3, 3:-3], rtol=1e-5)
    np.testing.assert_array_equal(high[0, 1::2], high[0, ::2])


def test_small_blank_frames_carry_a_mask():
    low = conditioning.reduce(ramp(), space=1, time=4)
    high = conditioning.enlarge(low, space=1, time=4, fill="blank")
    np.testing.assert_array_equal(high[0, 0, ..., :1], ramp()[0, 0])
    np.testing.assert_array_equal(high[0, 1:], 0)
    np.testing.assert_array_equal(high[0, :, 0, 0, 1], [1, 0, 0, 0])


@pytest.mark.parametrize("factors", [{"space": 2, "time": 1}, {"space": 4, "time": 2}])
def test_small_reduced_clip_is_the_clip_drawn_smaller(factors):
    """So that what a stage is trained on is what the stage before it was trained to make."""
    attrs = shapes.Attributes("star", "white", "black", "right")
    large = shapes.render(attrs, 3, frames=8, height=96, width=160)[None]
    low = conditioning.reduce(large, **factors)
    size = {"frames": 8 // factors["time"], "height": 96 // factors["space"], "width": 160 // factors["space"]}
    drawn = shapes.render(attrs, 3, **size)
    # The antialiasing filter of resizing is wider than a pixel, which the renderer averages over: edges differ
    assert np.abs(low[0] - drawn).mean() < 0.01
    assert np.abs(low[0] - drawn).max() < 0.6


def test_small_wrong_factors_are_named():
    with pytest.raises(ValueError, match="space=3 must be at least 1 and divide the frames, 8×12"):
        conditioning.reduce(ramp(), space=3, time=1)
    with pytest.raises(ValueError, match="factor=3 must divide the number of frames, 4"):
        conditioning.reduce(ramp(), space=1, time=3)
    with pytest.raises(ValueError, match="fill='black' is unknown: choose from repeat, blank"):
        conditioning.enlarge(ramp(), space=1, time=1, fill="black")


def keys(count):
    return jax.random.split(jax.random.key(0), count)


def batch_of(config, images=2):
    """Two clips and some images with each, at the size the stage makes."""
    rng = np.random.default_rng(0)
    frames, height, width, _ = stages.video_shape(config)
    draw = {"video": (2, frames, height, width, 3), "images": (2, images, height, width, 3)}
    return {name: rng.uniform(-1, 1, shape).astype(np.float32) for name, shape in draw.items()}


@pytest.mark.parametrize("stage", [tsr1, ssr1])
def test_small_training_gives_a_clip_and_its_images_their_own_reduced_selves(stage):
    """Through next to no noise: frames repeated or enlarged, each packed image made from itself alone."""
    config = stage.get_config("small")
    config.train.augmentation_blur = 0.0
    config.train.augmentation_min, config.diffusion.logsnr_max = 19.0, 20.0
    batch, sizes = batch_of(config), stages.factors(config)
    given = conditioning_inputs(config, batch, keys(2))
    assert ((given["aug_logsnr"] >= 19) & (given["aug_logsnr"] <= 20)).all()
    frames = config.video.frames
    video = conditioning.enlarge(conditioning.reduce(batch["video"], **sizes), **sizes)
    np.testing.assert_allclose(given["cond"][:, :frames], video, atol=1e-3)
    for number in range(2):
        image = batch["images"][:, number : number + 1]
        image = conditioning.enlarge(
            conditioning.reduce(image, space=sizes["space"], time=1), space=sizes["space"], time=1
        )
        np.testing.assert_allclose(given["cond"][:, frames + number : frames + number + 1], image, atol=1e-3)


def test_small_training_noise_has_the_level_it_is_told():
    """Of plain clips: alpha times the clip, and noise of deviation sigma before it is enlarged (repeated here)."""
    config = tsr1.get_config("small")
    config.train.augmentation_min, config.diffusion.logsnr_max = -2.0, 6.0
    batch = {"video": np.full((64, *stages.video_shape(config)), 0.5, np.float32)}
    given = conditioning_inputs(config, batch, keys(64))
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * np.asarray(given["aug_logsnr"], np.float64)))) for s in (-1, 1))
    assert np.ptp(given["aug_logsnr"]) > 4  # one level a clip
    cond = np.asarray(given["cond"], np.float64)
    mean = np.mean(cond, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(mean, 0.5 * alpha, atol=5 * 1 / np.sqrt(4 * 8 * 8 * 3))
    np.testing.assert_allclose(np.std(cond, axis=(1, 2, 3, 4)), sigma, rtol=0.12)
    np.testing.assert_array_equal(cond[:, 1::2], cond[:, ::2])


def test_small_training_blur_is_the_configs():
    """Random clips lose deviation by it, and differently; without it they keep it."""
    config = ssr1.get_config("small")
    config.train.augmentation_min, config.diffusion.logsnr_max = 19.0, 20.0
    spread = {}
    for deviation in (0.0, 3.0):
        config.train.augmentation_blur = deviation
        cond = conditioning_inputs(config, batch_of(config), keys(2))["cond"]
        spread[deviation] = np.std(cond, axis=(1, 2, 3, 4))
    ratio = spread[3.0] / spread[0.0]
    assert (ratio < 1).all() and ratio.min() < 0.9 and abs(ratio[0] - ratio[1]) > 0.01
    config = ssr1.get_config("small")
    config.sample.augmentation_blur = 4.0
    with pytest.raises(
        UserError, match="augmentation_blur = 4.0: expected pixels from 0 to the largest of training, .* = 3.0"
    ):
        checks.check(config)

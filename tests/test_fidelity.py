"""PSNR, colour error and drift of clips with known values."""

import numpy as np
import pytest

from ivideo.evaluation import bootstrap, evaluate, fidelity


def test_small_psnr_of_a_constant_error():
    truth = np.random.default_rng(0).uniform(-1, 0, (4, 6, 8, 3))
    np.testing.assert_allclose(fidelity.psnr(truth + 0.02, truth), 40)  # 20 log10(2 / 0.02)
    assert fidelity.psnr(truth, truth) == np.inf
    with pytest.raises(ValueError, match=r"\(3, 6, 8, 3\)"):
        fidelity.psnr(truth[:3], truth)


def test_small_psnr_and_ssim_are_those_of_scikit_image():
    """structural_similarity(x, y, channel_axis=-1, data_range=2, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False) of scikit-image 0.26, the mean over frames, and peak_signal_noise_ratio."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (3, 20, 28, 3))
    video = np.clip(truth + rng.normal(size=truth.shape) * 0.2, -1, 1)
    assert fidelity.ssim(video, truth) == pytest.approx(0.7411960569194543, rel=1e-9)
    assert fidelity.psnr(video, truth) == pytest.approx(20.491836621376905, rel=1e-9)
    assert fidelity.ssim(truth, truth) == 1
    assert 0 < fidelity.ssim(video[:, :8, :8], truth[:, :8, :8]) < 1
    with pytest.raises(ValueError, match=r"\(2, 20, 28, 3\)"):
        fidelity.ssim(truth[:2], truth)


def test_small_drift_is_the_backgrounds():
    """Ten levels of green over the clip; an object that moves over a third of the frame does not count."""
    video = np.full((5, 6, 9, 3), -0.5)
    video[..., 1] += np.linspace(0, 10 / 127.5, 5)[:, None, None]
    for k in range(5):
        video[k, :, k : k + 3] = 1.0
    np.testing.assert_allclose(fidelity.drift(video), 10)


def test_small_colour_error_is_of_the_worst_frame():
    """One frame's blue is 4 levels off; the object, which is not drawn, does not count."""
    truth = np.full((3, 6, 9, 3), 0.2)
    video = truth.copy()
    truth[:, 2:4, 3:6] = -1.0
    video[1, ..., 2] -= 4 / 127.5
    np.testing.assert_allclose(fidelity.colour_error(video, truth), 4)


def test_small_psnr_intervals_are_those_of_the_clips_that_are_drawn():
    """The PSNR of all clips of a replicate together, which is infinite where none of them has an error."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (5, 2, 4, 4, 3))
    videos = {"stage": truth + 0.1 * rng.normal(size=truth.shape), "trivial": truth + 0.3}
    of_clips = {
        name: [fidelity.psnr(*pair) for pair in zip(found, truth, strict=True)] for name, found in videos.items()
    }
    drawn = [np.repeat(np.arange(5), times) for times in bootstrap.counts(5)]
    replicates = {
        name: np.array([fidelity.psnr(found[rows], truth[rows]) for rows in drawn]) for name, found in videos.items()
    }
    replicates["gain"] = replicates["stage"] - replicates["trivial"]
    found = evaluate._psnr_intervals(of_clips)
    for name, values in replicates.items():
        expected = np.quantile(values, [0.025, 0.975], method="nearest")
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, err_msg=name)
    of_clips["trivial"][:] = [np.inf, np.inf, 20, np.inf, np.inf]
    low, high = evaluate._psnr_intervals(of_clips)["trivial"]
    assert 20 <= low < 27 and high == np.inf

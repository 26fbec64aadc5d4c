"""PSNR, colour error and drift of clips with known values."""

import numpy as np
import pytest

from ivideo.evaluation import fidelity


def test_small_psnr_of_a_constant_error():
    truth = np.random.default_rng(0).uniform(-1, 0, (4, 6, 8, 3))
    np.testing.assert_allclose(fidelity.psnr(truth + 0.02, truth), 40)  # 20 log10(2 / 0.02)
    assert fidelity.psnr(truth, truth) == np.inf
    with pytest.raises(ValueError, match=r"\(3, 6, 8, 3\)"):
        fidelity.psnr(truth[:3], truth)


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

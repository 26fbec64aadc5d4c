"""How close a clip is to the true clip, and how far its background's colour drifts.

T frames · H, W height, width · clips are [T, H, W, 3] in [-1, 1]
"""

import numpy as np
import scipy.ndimage

# The range [-1, 1] of a clip's values
PEAK = 2.0
LEVELS_PER_UNIT = 255 / PEAK
_WINDOW = 5  # pixels from the centre of SSIM's window to its edge


def psnr(video: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(2² / mean squared error), of one clip or of several together.

    Infinite if the clips are equal. ValueError if their shapes differ.
    """
    if np.shape(video) != np.shape(truth):
        raise ValueError(f"The clips have shapes {np.shape(video)} and {np.shape(truth)}, expected the same.")
    error = np.mean((np.asarray(video, np.float64) - np.asarray(truth, np.float64)) ** 2)
    return float(10 * np.log10(PEAK**2 / error)) if error else float("inf")


def ssim(video: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of the frames of a clip, averaged over frames and channels; 1: equal.

    Windows are Gaussians of 1.5 pixels within 11×11, and only windows inside the frame count; in frames that are
    smaller, all do. ValueError if the shapes differ.
    """
    if np.shape(video) != np.shape(truth):
        raise ValueError(f"The clips have shapes {np.shape(video)} and {np.shape(truth)}, expected the same.")
    x, y = np.asarray(video, np.float64), np.asarray(truth, np.float64)
    inside = tuple(slice(_WINDOW, -_WINDOW) if n > 2 * _WINDOW else slice(None) for n in x.shape[1:3])
    return float(np.mean([_similarity(one, other)[inside] for one, other in zip(x, y, strict=True)]))


def _similarity(x, y):
    """The similarity around each pixel of two frames [H,W,3]."""

    def mean(values):
        return scipy.ndimage.gaussian_filter(values, (1.5, 1.5, 0), radius=(_WINDOW, _WINDOW, 0))

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return above / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))


def colour_error(video: np.ndarray, truth: np.ndarray) -> float:
    """The largest error of the background's colour over frames and channels, in levels from 0 to 255."""
    return float(np.abs(_background_colour(video) - _background_colour(truth)).max() * LEVELS_PER_UNIT)


def drift(video: np.ndarray) -> float:
    """The largest change of the background's colour from the first to the last frame, in levels from 0 to 255."""
    first, last = _background_colour(np.asarray(video)[[0, -1]])
    return float(np.abs(last - first).max() * LEVELS_PER_UNIT)


def _background_colour(video):
    """Per frame, the median of each channel [T, 3]: a shape covers less than half of a frame."""
    return np.median(np.asarray(video, np.float64).reshape(len(video), -1, 3), axis=1)

"""How close a clip is to the true one, and to itself from its first frame to its last.

T, H, W frames, height, width; clips are [T, H, W, 3] in [-1, 1].
"""

import numpy as np


def psnr(video: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(2² / mean squared error), of a clip or of several at once.

    ValueError where the shapes differ; infinite where the clips are equal.
    """
    if np.shape(video) != np.shape(truth):
        raise ValueError(f"The clips have shapes {np.shape(video)} and {np.shape(truth)}, expected the same.")
    error = np.mean((np.asarray(video, np.float64) - np.asarray(truth, np.float64)) ** 2)
    return float(10 * np.log10(4 / error)) if error else float("inf")


def colour_error(video: np.ndarray, truth: np.ndarray) -> float:
    """How far the plain background is from the true clip's, in levels of 255: the largest over frames and channels."""
    made, wanted = (np.median(np.asarray(x, np.float64).reshape(len(x), -1, 3), axis=1) for x in (video, truth))
    return float(np.abs(made - wanted).max() * 127.5)


def drift(video: np.ndarray) -> float:
    """How far a clip's plain background moves from the first frame to the last, in levels of 255.

    The largest change, over the three channels, of the frame's median: the object covers less than half of a frame.
    """
    ends = np.median(np.asarray(video, np.float64)[[0, -1]].reshape(2, -1, 3), axis=1)
    return float(np.abs(ends[1] - ends[0]).max() * 127.5)

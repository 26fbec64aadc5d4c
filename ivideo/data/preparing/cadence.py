"""Finds out how many frames of a video repeat the one before, as where 12 frames per second are stored as 24."""

import math

import numpy as np

REPEATED = 0.2  # of the steps around it, the share below which a step is a repeated frame's: coding changes it a little
STILL = 0.05  # levels of 255: in a video without a larger step nothing moves, and no frame counts as repeated
AROUND = 0.25  # seconds
_USUAL = 0.9  # of the distances of new frames: the longer ones, as where a picture stands still, count as the longest


def distinct_share(steps: np.ndarray, fps: float) -> float:
    """The share of frames that are new: 1 if none repeats the one before, a half if every second one does.

    `steps` [T-1]: the difference of each frame from the one before, in levels of 255. A frame is a repeated one if
    there are much larger steps both before it and after it, within `AROUND`. So a still scene has no repeated frames.
    """
    if not len(steps) or steps.max() < STILL:
        return 1.0
    reach = max(1, round(fps * AROUND))
    # The largest of the `reach` steps before each one and itself, and of those after it and itself
    largest = np.lib.stride_tricks.sliding_window_view(np.pad(steps, reach), reach + 1).max(-1)
    around = np.minimum(largest[: len(steps)], largest[reach:])
    (new,) = np.nonzero(steps > REPEATED * around)
    distances = np.sort(np.diff(new, prepend=-1))
    longest = distances[math.ceil(_USUAL * len(distances)) - 1]
    return 1 / float(np.minimum(distances, longest).mean())

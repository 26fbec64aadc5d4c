"""What time does in a clip: flicker of what stands still, warping error, drift, and how much frames change.

T frames · H, W height, width · clips are uint8 [T, H, W, 3]; results are in levels of 255
"""

import functools
import itertools

import numpy as np

from ivideo.data import video_io
from ivideo.evaluation import fidelity

# Pixels that move less than this between two frames stand still
_STILL = 0.25
# Flow forward and back may differ by this share of its length, and this many pixels: beyond, the pixel is covered in
# one of the frames (arXiv 1808.00449)
_SHARE, _PIXELS = 0.1, 0.5
_LEAST = 64  # rows and columns that frames are enlarged to, for flow
MEASURES = {
    "flicker": "mean change of pixels that stand still, between neighbouring frames",
    "warping": "mean difference of a frame and the next one, moved back by optical flow, where both see the same",
    "drift": "largest change of the background's colour from the first to the last frame",
}
HOW_TO_GET = "OpenCV, for optical flow, is not installed: run `pip install '.[metrics]'` in the clone"


def has_flow() -> bool:
    """Whether OpenCV is installed."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return False
    return True


def measure(clip: np.ndarray, *, flow: bool) -> dict[str, float]:
    """The measures of a clip uint8 [T,H,W,3]; flicker and warping error only with `flow`, which needs OpenCV.

    A clip in which nothing stands still, or nothing is seen in two frames, has nan there.
    """
    found = {"drift": fidelity.drift(video_io.to_float(clip))}
    if flow:
        pairs = [_pair(one, other) for one, other in itertools.pairwise(clip)]
        flicker, warping = np.array(pairs).reshape(-1, 2).T
        found |= {"flicker": _mean(flicker), "warping": _mean(warping)}
    return found


def changes(clip: np.ndarray) -> np.ndarray:
    """The mean difference of each frame from the one before: [T - 1]."""
    return np.abs(np.diff(clip.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))


def _pair(one, other):
    """(flicker, warping error) between two frames; nan where no pixel counts."""
    import cv2

    one, other = _enlarged(one), _enlarged(other)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (one, other)]
    forward, back = (_flow().calc(*pair, None) for pair in (gray, gray[::-1]))
    height, width = one.shape[:2]
    places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32) + forward
    warped = [cv2.remap(x, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for x in (other, back)]
    inside = ((places >= 0) & (places <= [width - 1, height - 1])).all(axis=-1)
    gap = np.linalg.norm(forward + warped[1], axis=-1)
    length = np.linalg.norm(forward, axis=-1) + np.linalg.norm(warped[1], axis=-1)
    seen = inside & (gap <= _SHARE * length + _PIXELS)
    # What is near something that moves is not still: flow is smooth over edges
    moving = (np.linalg.norm(forward, axis=-1) > _STILL).astype(np.uint8)
    still = cv2.dilate(moving, np.ones((5, 5), np.uint8)) == 0
    one = one.astype(np.float32)
    return _mean(np.abs(other - one)[still]), _mean(np.abs(warped[0] - one)[seen])


@functools.cache
def _flow():
    import cv2

    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def _enlarged(frame):
    import cv2

    factor = -(-_LEAST // min(frame.shape[:2]))
    return frame if factor <= 1 else cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)


def _mean(values):
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")

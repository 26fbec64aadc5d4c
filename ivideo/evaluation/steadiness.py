"""Measures how sharp and steady the shape of a clip is, and how much grain its background has.

Each pixel's share of the shape's colour is a soft mask of the shape. Background and colour are measured in the clip, so
that a slightly wrong colour is not an error here. `ivideo.evaluation.fidelity.drift` measures how they change.

T frames · H, W height, width · clips are [T, H, W, 3] in [-1, 1]
"""

import math

import numpy as np

from ivideo.data import shapes
from ivideo.data.video_io import evenly
from ivideo.evaluation import silhouette
from ivideo.evaluation.fidelity import LEVELS_PER_UNIT

MEASURES = ("ideal_iou", "steady_iou", "grain")

# Shares of the colour below this count as 0 and those above 1 less this as 1: grain does not change the masks.
_DEAD_ZONE = 0.2
# Standard deviation in pixels of the Gaussian that aligns masks. A narrower one would leave differences between two
# perfect frames, because a moving edge meets the pixels elsewhere in each frame.
_ALIGNING_BLUR = 0.75
_TAPS = np.arange(-3, 3)  # its pixels, counted from the one that a point is in
# Smallest distance of the measured colour from the measured background, in units of that between the named ones.
_MIN_CONTRAST = 0.25
# The background's grain is measured this share of the frame's height away from the shape: two rows of 24.
_MARGIN = 1 / 12
# Pixels with more than this share of the usual colour inside the shape are its core, in which the colour is measured.
_CORE = 0.8
_COLOUR_FRAMES = 16  # frames of a clip in which its colours are measured


def measure(video: np.ndarray, attrs: shapes.Attributes) -> dict[str, float]:
    """Measures a clip [T,H,W,3] in [-1, 1] that should show the shape of `attrs`.

    Returns:
      ideal_iou: overlap (intersection over union) of each frame's shape with the drawn one of the same kind, centroid
        and area, averaged over frames.
      steady_iou: overlap of each frame's shape with the next frame's after alignment of their centroids, averaged. It
        is 1 for a clip of one frame.
      grain: standard deviation of the background's pixels away from the shape, in levels of 255, averaged over frames
        and channels.

    Both overlaps are from 0 to 1. They are 0 in a frame that has nothing of the shape's colour, so they are 0 for a
    clip without a shape. The grain is then that of whole frames.
    """
    video = np.asarray(video, np.float32)
    height, width = video.shape[1:3]
    levels = _levels(video, shapes.check_attributes(attrs))
    if levels is None:
        return {"ideal_iou": 0.0, "steady_iou": 0.0, "grain": _grain(video, np.zeros(video.shape[:3], np.float32))}
    share = _share(video, *levels)
    # Beyond a pixel around the shape there is only grain, which would move the centroid
    near = _grown(share > 0.5, 1)
    area, centres = silhouette.centroids(share * near)
    ideal = silhouette.ideal(attrs.shape, area, centres, height=height, width=width)
    patches = _soft(_aligned(share, centres))
    steady = silhouette.overlap(patches[1:], patches[:-1]) if len(video) > 1 else np.minimum(area, 1)
    return {
        "ideal_iou": float(silhouette.overlap(_soft(share), _soft(ideal)).mean()),
        "steady_iou": float(steady.mean()),
        "grain": _grain(video, share),
    }


def _levels(video, attrs):
    """The clip's (background [3], shape's colour [3]), or None where it shows only one of the two."""
    chosen = video[evenly(len(video), _COLOUR_FRAMES)]
    named = shapes.level(shapes.BACKGROUNDS[attrs.background]), shapes.level(shapes.COLOURS[attrs.colour])
    share = _share(chosen, *named)
    inside = share > 0.5
    if not inside.any() or inside.all():
        return None
    core = inside & (share > _CORE * np.median(share[inside]))  # without most of the mixtures at the edge
    background, colour = np.median(chosen[~inside], axis=0), np.median(chosen[core], axis=0)
    contrast = np.linalg.norm(colour - background) / np.linalg.norm(named[1] - named[0])
    return (background, colour) if contrast >= _MIN_CONTRAST else None


def _share(video, background, colour):
    """The share of the colour [3] in each pixel's mixture with the background [3]: [T,H,W], not clipped to [0, 1]."""
    line = (colour - background) / np.sum((colour - background) ** 2)
    return video @ line - background @ line


def _soft(share):
    """Masks in [0, 1] from shares, without the dead zones."""
    return np.clip((share - 0.5) / (1 - 2 * _DEAD_ZONE) + 0.5, 0, 1)


def _aligned(share, centres):
    """The shares at a grid of points around each frame's centroid [T,h,w], interpolated by a Gaussian.

    The grid covers whatever is more shape than background in any frame. Beyond the frame there is no shape, and frames
    without a centroid are 0.
    """
    there = ~np.isnan(centres[:, 0])
    centres = np.where(there[:, None], centres, 0)
    frames, *pixels = np.nonzero((share > 0.5) & there[:, None, None])
    padded = np.pad(share, ((0, 0), (1, 1), (1, 1)))
    indices, weights = [], []
    for axis in (1, 0):  # rows and y, columns and x
        reach = np.abs(pixels[1 - axis] + 0.5 - centres[frames, axis]).max(initial=0)
        first = np.floor(centres[:, axis]).astype(int)
        points = np.arange(-math.ceil(reach) - 1 + _TAPS[0], math.ceil(reach) + 2 + _TAPS[-1])
        indices.append(np.clip(first[:, None] + points + 1, 0, padded.shape[2 - axis] - 1))
        distance = (first - centres[:, axis])[:, None] + _TAPS + 0.5
        weight = np.exp(-0.5 * (distance / _ALIGNING_BLUR) ** 2)
        weights.append((weight / weight.sum(axis=1, keepdims=True)).astype(np.float32))
    patches = padded[np.arange(len(share))[:, None, None], indices[0][:, :, None], indices[1][:, None, :]]
    for axis, weight in ((1, weights[0]), (2, weights[1])):
        windows = np.lib.stride_tricks.sliding_window_view(patches, len(_TAPS), axis)
        patches = sum(weight[:, k, None, None] * windows[..., k] for k in range(len(_TAPS)))
    return patches * there[:, None, None]


def _grown(mask, pixels):
    """A mask [T,H,W] and everything up to so many pixels away from it, by rows and columns."""
    mask = mask.copy()
    for axis in (1, 2):
        reached = 0
        while reached < pixels:
            step = min(reached + 1, pixels - reached)
            before, after = mask.copy().swapaxes(0, axis), mask.swapaxes(0, axis)
            after[step:] |= before[:-step]
            after[:-step] |= before[step:]
            reached += step
    return mask


def _grain(video, share):
    far = ~_grown(share > 0.5, math.ceil(video.shape[1] * _MARGIN))
    far |= ~far.any(axis=(1, 2), keepdims=True)  # a frame that the shape fills
    deviations = []
    for frame, pixels in zip(video, far, strict=True):
        # About one of its own pixels, because float32 would lose a small variance about 0
        values = (frame - frame[0, 0]).reshape(-1, 3)
        weight = pixels.reshape(-1).astype(np.float32) / np.count_nonzero(pixels)
        deviations.append(np.sqrt(np.maximum(weight @ values**2 - (weight @ values) ** 2, 0)))
    return float(np.mean(deviations) * LEVELS_PER_UNIT)

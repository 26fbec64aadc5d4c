"""The area and place of a shape in soft masks, and the ideal shape of the same area and place.

A soft mask is the share of each pixel that a shape covers. Positions are in pixels, as in `ivideo.data.shapes`.

T frames · H, W height, width
"""

import functools

import numpy as np

from ivideo.data import shapes

_TEMPLATE_SIZE = 400  # pixels


def centroids(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per frame of a mask [T,H,W], the area [T] and the centroid (x, y) [T,2], nan where the area is not above 0."""
    height, width = share.shape[1:]
    area = share.sum(axis=(1, 2))
    known = np.where(area > 0, area, np.nan)
    x = share.sum(axis=1) @ (np.arange(width) + 0.5) / known
    y = share.sum(axis=2) @ (np.arange(height) + 0.5) / known
    return area, np.stack([x, y], axis=-1)


def ideal(shape: str, area: np.ndarray, centres: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Draws `shape` with these areas [T] and centroids (x, y) [T,2]: the share of each pixel that it covers [T,H,W].

    A frame whose centroid is nan stays empty.
    """
    unit_area, x, y = _template(shape)
    there = ~np.isnan(centres[:, 0])
    radius = np.sqrt(np.where(there, area, 0) / unit_area)
    middle = np.where(there[:, None], centres, 0) - np.stack([x * radius, y * radius], axis=-1)
    return shapes.coverage(shape, middle[:, 0], middle[:, 1], radius, height=height, width=width)


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Per frame, the intersection of two soft masks [T,H,W] over their union (IoU) [T]; 0 where both are empty."""
    union = np.maximum(one, other).sum(axis=(1, 2))
    return np.minimum(one, other).sum(axis=(1, 2)) / np.where(union > 0, union, 1)


@functools.cache
def _template(shape: str) -> tuple[float, float, float]:
    """(area in squared radii, centroid (x, y) in radii from the bounding box's centre) of a shape."""
    size = _TEMPLATE_SIZE
    radius = size / 2 - 1
    area, centres = centroids(shapes.coverage(shape, size / 2, size / 2, radius, height=size, width=size))
    x, y = (centres[0] - size / 2) / radius
    return float(area[0]) / radius**2, float(x), float(y)

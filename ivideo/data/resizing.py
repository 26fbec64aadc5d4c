"""Crops and resizes decoded frames to a stage's size, as its own resizing does (`ivideo.diffusion.resize`).

Data workers import this module, so it does not import jax.
"""

import functools
from collections.abc import Iterable

import numpy as np
import scipy.sparse

ALL = slice(None)


def resize_video(
    video: Iterable[np.ndarray], *, height: int, width: int, rows: slice = ALL, columns: slice = ALL
) -> np.ndarray:
    """Crops and resizes frames, uint8 [h,w,3] of any sizes, to uint8 [T,height,width,3].

    Each frame is cropped about its centre to the new aspect ratio, then resized as by `jax.image.resize` with 'linear'
    and antialias, so that stages trained on different sizes of a clip agree. Nothing is distorted. Levels are rounded.
    `rows` and `columns` select a part of the result; only the pixels that it depends on are computed.
    """
    rows, columns = rows.indices(height)[:2], columns.indices(width)[:2]
    return np.stack([_resize_frame(frame, height, width, rows, columns) for frame in video])


def _resize_frame(frame: np.ndarray, height: int, width: int, rows: tuple, columns: tuple) -> np.ndarray:
    old_height, old_width = frame.shape[:2]
    # Whole pixels are cropped, so the aspect ratio can be off by one pixel
    crop_height = min(old_height, max(1, round(old_width * height / width)))
    crop_width = min(old_width, max(1, round(old_height * width / height)))
    top, row_weights = _resize_weights(crop_height, height, *rows)
    left, column_weights = _resize_weights(crop_width, width, *columns)
    (height, used_height), (width, used_width) = row_weights.shape, column_weights.shape
    top, left = top + (old_height - crop_height) // 2, left + (old_width - crop_width) // 2
    used = frame[top : top + used_height, left : left + used_width].astype(np.float32)
    resized_rows = row_weights @ used.reshape(used_height, -1)
    columns_first = resized_rows.reshape(height, used_width, 3).transpose(1, 0, 2).reshape(used_width, -1)
    resized = (column_weights @ columns_first).reshape(width, height, 3).transpose(1, 0, 2)
    return np.rint(resized).clip(0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _resize_weights(old: int, new: int, start: int, stop: int) -> tuple[int, scipy.sparse.csr_array]:
    """The first pixel that the new pixels start .. stop-1 depend on, and their weights from there to the last one.

    The sparse weights [stop - start, used] are a triangle filter's, widened for downsampling. Each row sums to 1.
    """
    scale = old / new
    centres = (np.arange(start, stop) + 0.5) * scale - 0.5
    support = max(scale, 1)
    first, last = max(0, int(centres[0] - support)), min(old, int(centres[-1] + support) + 2)
    weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(first, last)) / support)
    weights /= weights.sum(axis=1, keepdims=True)
    return first, scipy.sparse.csr_array(weights.astype(np.float32))

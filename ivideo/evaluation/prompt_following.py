"""Measures whether a clip of the captioned shapes shows its caption. The measure is exact: no learned judge.

Every pixel of a frame is a mixture of the background and one colour. The clip's attributes come from fitting that
mixture: the background is the median; the colour is the one whose mixtures leave the smallest residual; the motion is
the straight line through the shape's centroids; the shape is the drawn template with the largest overlap. The clip must
show one object of one colour on one background throughout. Otherwise its colour, motion and shape count as wrong,
whatever the caption is.

T frames · H height · W width. Colours are in the video's range of [-1, 1].
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from ivideo.data import shapes
from ivideo.data.video_io import evenly
from ivideo.evaluation import averages, silhouette

ATTRIBUTES = ("background", "colour", "motion", "shape")
# The attributes that are scored in frames too small for shapes.
COARSE = ("background", "colour", "motion")

# Rows from which on every clip of the data set is read without an error, also with noise of 0.1.
MIN_SHAPE_HEIGHT = 12
# Largest distance of a measured colour from the named one: about half the smallest distance between two names, which is
# 0.63 between backgrounds, 0.88 between colours, and 0.65 between a colour and a background.
_BACKGROUND_DISTANCE = 0.31
_COLOUR_DISTANCE = 0.43
# A pixel shows something else if its distance from every mixture of background and colour exceeds both: this distance,
# and this many standard deviations of the background's noise.
_UNEXPLAINED_DISTANCE = 0.4
_UNEXPLAINED_DEVIATIONS = 3.5
# Largest area of unexplained pixels, and of a second object, as shares of the object's area.
_UNEXPLAINED_SHARE = 0.25
_SECOND_SHARE = 0.35
# Smallest and largest area of an object, in units of the frame's shorter side squared: half the smallest star, and 1.5
# times the largest circle.
_AREA = (0.03, 0.42)
# Smallest share of good frames.
_GOOD_FRAMES = 0.9
# Smallest distance that counts as motion, as a share of the frame's extent; the shortest path in the data set is 0.35.
_MOTION_THRESHOLD = 0.15
# Largest RMS distance of the centroids from the straight line, as a share of the frame's extent.
_WOBBLE = 0.06
# Smallest overlap of the best template with the object; below it the object is none of the shapes.
_MIN_OVERLAP = 0.6
_SHAPE_FRAMES = 8  # frames of a clip that are compared with the templates
_GRAIN_FRAMES = 16  # frames of a clip in which the grain is measured
_STD_PER_MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


class Measured(NamedTuple):
    """The attributes of a clip. An attribute is None if it is unclear, or if the data set has no such value.

    `centres` [T,2]: the object's centroid (x, y) as shares of the frame's width and height, nan in frames without
    exactly one object. `travel` (x, y): distance along the fitted line over the clip's 16/3 s, in the same shares.
    `good_frames`: share of frames with exactly one object of the clip's colour on its background.
    `overlap`: overlap of the best template with the object, 0 to 1; nan if the shape was not measured.
    """

    background: str | None
    colour: str | None
    motion: str | None
    shape: str | None
    centres: np.ndarray
    travel: tuple[float, float]
    good_frames: float
    overlap: float


def measure(video: np.ndarray, *, min_shape_height: int = MIN_SHAPE_HEIGHT) -> Measured:
    """Measures background, colour, motion and shape of a clip [T,H,W,3] in [-1, 1].

    The shape is not measured in frames of fewer than `min_shape_height` rows. ValueError for an array of another shape.
    """
    video = np.asarray(video, np.float32)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"The video has shape {video.shape}, expected [T,H,W,3]: pass one clip.")
    frames, height, width = video.shape[:3]
    nothing = Measured(None, None, None, None, np.full((frames, 2), np.nan), (np.nan, np.nan), 0.0, np.nan)
    if not np.isfinite(video).all():
        return nothing

    background, level, steady = _background(video)
    if background is None:
        return nothing
    difference = video - level
    squared = np.einsum("thwc,thwc->thw", difference, difference)
    colour, one_colour = _colour(difference, squared, level)
    share, unexplained = _mixture(difference, squared, shapes.level(shapes.COLOURS[colour]) - level)
    odd = unexplained > max(_UNEXPLAINED_DISTANCE, _UNEXPLAINED_DEVIATIONS * _grain(difference)) ** 2
    objects, single = _objects(share, odd)
    good = steady & one_colour & single
    area, centroids = silhouette.centroids(share * objects)
    centres = np.where(good[:, None], centroids / (width, height), np.nan)
    found = nothing._replace(background=background, centres=centres, good_frames=float(good.mean()))
    if good.mean() < _GOOD_FRAMES or not _has_colour(video, share, objects, colour):
        return found
    motion, travel = _motion(centres)
    found = found._replace(colour=colour, motion=motion, travel=travel)
    if height < min_shape_height:
        return found
    shape, overlap = _shape(share * objects, area, centroids, good)
    return found._replace(shape=shape, overlap=overlap)


def score(
    video: np.ndarray, attrs: shapes.Attributes, *, min_shape_height: int = MIN_SHAPE_HEIGHT
) -> dict[str, bool | None]:
    """Whether each attribute of a clip [T,H,W,3] in [-1, 1] is the one in `attrs`.

    Returns {'background', 'colour', 'motion', 'shape'}. Shape is None in frames of fewer than `min_shape_height` rows,
    because it is not measured there.
    """
    attrs = shapes.check_attributes(attrs)
    measured = measure(video, min_shape_height=min_shape_height)
    right = {name: getattr(measured, name) == getattr(attrs, name) for name in ATTRIBUTES}
    if np.shape(video)[1] < min_shape_height:
        right["shape"] = None
    return right


def _background(video: np.ndarray) -> tuple[str | None, np.ndarray, np.ndarray]:
    """(name of the background or None, its measured colour [3], whether each frame has it [T])."""
    frames = np.median(video.reshape(len(video), -1, 3), axis=1)
    level = np.median(frames, axis=0)
    name, distance = _nearest(level, shapes.BACKGROUNDS)
    steady = np.linalg.norm(frames - level, axis=-1) < _BACKGROUND_DISTANCE
    if distance > _BACKGROUND_DISTANCE or steady.mean() < _GOOD_FRAMES:
        return None, level, steady
    return name, level, steady


def _grain(difference: np.ndarray) -> float:
    """Standard deviation of the background's channels. The median leaves the object out of the estimate."""
    return _STD_PER_MAD * float(np.median(np.abs(difference[evenly(len(difference), _GRAIN_FRAMES)])))


def _nearest(level: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = np.linalg.norm(_levels(tuple(palette.values())) - level, axis=-1)
    return list(palette)[distances.argmin()], float(distances.min())


@functools.cache
def _levels(palette: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    return np.stack([shapes.level(rgb) for rgb in palette])


def _mixture(difference: np.ndarray, squared: np.ndarray, line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per pixel, the share of a colour (not clipped) and the squared distance from the closest mixture, both [T,H,W].

    `difference`: from the background; `squared` [T,H,W]: its length squared; `line`: the colour less the background.
    """
    length = line @ line
    share = difference @ (line / length)
    closest = np.clip(share, 0, 1)
    return share, squared - length * closest * (2 * share - closest)


def _colour(difference: np.ndarray, squared: np.ndarray, background: np.ndarray) -> tuple[str, np.ndarray]:
    """(the colour that fits the clip best, whether it also fits each frame best [T])."""
    cost = []
    for level in _levels(tuple(shapes.COLOURS.values())):
        _, rest = _mixture(difference, squared, level - background)
        # Clipped, so that pixels of other objects count the same for all colours.
        cost.append(np.minimum(rest, (2 * _UNEXPLAINED_DISTANCE) ** 2).sum(axis=(1, 2)))
    cost = np.stack(cost)
    best = cost.sum(axis=1).argmin()
    return list(shapes.COLOURS)[best], cost.argmin(axis=0) == best


def _objects(share: np.ndarray, odd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mask of the largest object with a margin of one pixel [T,H,W], whether the frame shows that object only [T]).

    `odd` [T,H,W]: pixels that are no mixture of background and colour.
    """
    height, width = share.shape[1:]
    masks, single = [], []
    eight = np.ones((3, 3), int)
    for frame, frame_odd in zip(share, odd, strict=True):
        labels, count = scipy.ndimage.label(frame > 0.5, eight)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        if count == 0:
            masks.append(np.zeros((height, width), bool))
            single.append(False)
            continue
        mask = scipy.ndimage.binary_dilation(labels == 1 + sizes.argmax(), eight)
        area = frame[mask].sum()
        second = np.sort(sizes)[-2] if count > 1 else 0
        low, high = (limit * min(height, width) ** 2 for limit in _AREA)
        masks.append(mask)
        alone = second < _SECOND_SHARE * area and np.count_nonzero(frame_odd) < _UNEXPLAINED_SHARE * area
        single.append(low < area < high and alone)
    return np.stack(masks), np.array(single)


def _has_colour(video: np.ndarray, share: np.ndarray, objects: np.ndarray, colour: str) -> bool:
    """Whether the object's core has the colour and not a paler one. The core is the half with most of it."""
    inside = objects & (share > 0.5)
    core = inside & (share >= np.median(share[inside]))
    name, distance = _nearest(np.median(video[core], axis=0), shapes.COLOURS)
    return name == colour and distance < _COLOUR_DISTANCE


def _motion(centres: np.ndarray) -> tuple[str | None, tuple[float, float]]:
    """(motion, or None if the data set has no such motion; distance (x, y) along the line through the centres)."""
    seen = ~np.isnan(centres[:, 0])
    times = shapes.frame_times(len(centres))[seen]
    if len(times) < 3:
        return None, (np.nan, np.nan)
    design = np.stack([times, np.ones_like(times)], axis=-1)
    line, *_ = np.linalg.lstsq(design, centres[seen], rcond=None)
    wobble = np.sqrt(np.mean((design @ line - centres[seen]) ** 2, axis=0)).max()
    travel = (float(line[0, 0]), float(line[0, 1]))
    along, across = sorted(np.abs(travel), reverse=True)
    if wobble > _WOBBLE:
        return None, travel
    if along < _MOTION_THRESHOLD:
        return "still", travel
    if across > along / 2:
        return None, travel
    if abs(travel[0]) == along:
        return "right" if travel[0] > 0 else "left", travel
    return "down" if travel[1] > 0 else "up", travel


def _shape(share: np.ndarray, area: np.ndarray, centroids: np.ndarray, good: np.ndarray) -> tuple[str | None, float]:
    """(the shape whose template overlaps the objects most, or None if no overlap is large enough; its mean overlap)."""
    chosen = np.flatnonzero(good)
    chosen = chosen[evenly(len(chosen), _SHAPE_FRAMES)]
    height, width = share.shape[1:]
    seen = np.clip(share[chosen], 0, 1)
    overlaps = {}
    for shape in shapes.SHAPES:
        drawn = silhouette.ideal(shape, area[chosen], centroids[chosen], height=height, width=width)
        overlaps[shape] = float(silhouette.overlap(seen, drawn).mean())
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= _MIN_OVERLAP else None, overlaps[best]


def held_out_kind(attrs: shapes.Attributes) -> str | None:
    """The name of a held-out caption's kind, such as 'red star' or 'white circle standing still', or None."""
    if not shapes.held_out(attrs):
        return None
    motions = [motion for motion in shapes.MOTIONS if shapes.held_out(attrs._replace(motion=motion))]
    words = shapes.caption(attrs).split()[1:]  # without the article
    return " ".join(words[:2] if len(motions) == len(shapes.MOTIONS) else words[:4])


HELD_OUT_KINDS = tuple(dict.fromkeys(map(held_out_kind, shapes.HELD_OUT)))


def summarize(scored: Iterable[tuple[shapes.Attributes, dict[str, bool | None]]]) -> dict[str, dict]:
    """The share of correct clips per attribute and jointly, for seen and held-out captions and each held-out kind.

    `scored`: per clip (attributes, `score`). Returns {'seen': {'clips', 'background', 'colour', 'motion', 'shape',
    'coarse', 'all', 'standard_error'}, 'held_out': the same keys, and one more such row per name in `HELD_OUT_KINDS`}.
    A clip is correct in 'coarse' if background, colour and motion are all correct; in 'all' its shape must be correct
    too, if it was measured. A share without any measured clip is None. 'standard_error' has that of every share.
    """
    rows = {name: [] for name in ("seen", "held_out", *HELD_OUT_KINDS)}
    for attrs, right in scored:
        kind = held_out_kind(attrs)
        for name in ("held_out", kind) if kind else ("seen",):
            rows[name].append(right)
    return {name: _shares(row) for name, row in rows.items()}


def all_right(right: dict[str, bool | None], names: Sequence[str] = ATTRIBUTES) -> bool:
    """Whether a clip's `score` is right in these attributes, apart from those that were not measured."""
    return all(right[name] is not False for name in names)


def _shares(row: list[dict[str, bool | None]]) -> dict:
    values = {name: [r[name] for r in row if r[name] is not None] for name in ATTRIBUTES}
    values |= {"coarse": [all_right(r, COARSE) for r in row], "all": [all_right(r) for r in row]}
    errors = {name: averages.standard_error(found) for name, found in values.items()}
    return {"clips": len(row), **{n: averages.mean(v) for n, v in values.items()}, "standard_error": errors}


def format_table(table: dict[str, dict]) -> str:
    """The result of `summarize` as a Markdown table of percentages ± standard errors, with '–' for shares of None."""
    columns = {**{a: a for a in COARSE}, "coarse": "first three", "shape": "shape", "all": "all four"}
    lines = [f"| captions | clips | {' | '.join(columns.values())} |", "|---|--:|" + "--:|" * len(columns)]
    for name, row in table.items():
        cells = [averages.text(row[c], row["standard_error"][c], digits=1, percent=True) for c in columns]
        lines.append(f"| {name.replace('_', '-')} | {row['clips']} | {' | '.join(cells)} |")
    return "\n".join(lines)

"""The captioned-shapes world: one anti-aliased shape on a plain background, drawn from (attributes, seed) at any size.

The world is small enough to train a cascade on one machine, and exact enough to score samples without human judgement
(`ivideo.evaluation.prompt_following`). There are 480 captions; 48 of them are held out of all training.

Dimension letters: T frames, H height, W width. Positions are in pixels, with y downwards; pixel (i, j) covers
[i, i+1] x [j, j+1]. Data workers import this module, so it imports numpy alone.
"""

import functools
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 90, 230),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "white": (240, 240, 240),
}
BACKGROUNDS = {
    "black": (15, 15, 15),
    "gray": (110, 110, 110),
    "brown": (110, 70, 40),
    "teal": (20, 110, 110),
}
MOTIONS = ("left", "right", "up", "down", "still")

# Seconds of a clip, as in the paper: 128 frames at 24 frames per second
DURATION = 16 / 3
RADIUS = (0.22, 0.30)  # smallest and largest, in units of the frame's shorter side
TRAVEL = (0.35, 0.60)  # shortest and longest path, in units of the frame's side along the motion
# The (x, y) direction of each motion
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}

_SUPERSAMPLES = 8


class Attributes(NamedTuple):
    """The content of a caption: shape, colour, background and motion, each one of this module's constants."""

    shape: str
    colour: str
    background: str
    motion: str


def check_attributes(attrs: Attributes) -> Attributes:
    """Returns `attrs` as an `Attributes`. ValueError where a value does not exist in this world."""
    attrs = Attributes(*attrs)
    for name, value, known in zip(Attributes._fields, attrs, (SHAPES, COLOURS, BACKGROUNDS, MOTIONS), strict=True):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}: correct the attributes.")
    return attrs


def caption(attrs: Attributes) -> str:
    """The caption of the attributes, e.g. 'a red star moving left on a teal background'."""
    shape, colour, background, motion = check_attributes(attrs)
    does = "standing still" if motion == "still" else f"moving {motion}"
    return f"a {colour} {shape} {does} on a {background} background"


def parse_caption(text: str) -> Attributes | None:
    """The attributes of a caption, or None where `text` is not a caption of this world.

    Case, surrounding space and a final full stop are ignored; other deviations are not.
    """
    match = _caption_pattern().fullmatch(" ".join(text.lower().split()))
    if match is None:
        return None
    found = match.groupdict()
    return Attributes(found["shape"], found["colour"], found["background"], found["motion"] or "still")


@functools.cache
def _caption_pattern() -> re.Pattern:
    moving = "|".join(m for m in MOTIONS if m != "still")
    return re.compile(
        rf"a (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) "
        rf"(?:moving (?P<motion>{moving})|standing still) on a (?P<background>{'|'.join(BACKGROUNDS)}) background\.?"
    )


@functools.cache
def all_attributes() -> tuple[Attributes, ...]:
    """All 480 combinations in a fixed order: the shape changes slowest, the motion fastest."""
    return tuple(Attributes(*values) for values in itertools.product(SHAPES, COLOURS, BACKGROUNDS, MOTIONS))


def held_out(attrs: Attributes) -> bool:
    """Whether the attributes are held out of all training: 48 combinations whose parts all occur in other ones.

    Red stars and blue triangles (20 each), white circles standing still and purple squares moving left (4 each).
    """
    shape, colour, _, motion = attrs
    return (
        (colour, shape) in {("red", "star"), ("blue", "triangle")}
        or (colour, shape, motion) == ("white", "circle", "still")
        or (colour, shape, motion) == ("purple", "square", "left")
    )


TRAIN = tuple(a for a in all_attributes() if not held_out(a))
HELD_OUT = tuple(a for a in all_attributes() if held_out(a))


def _regular_normals(count: int, first: float) -> np.ndarray:
    angles = first + 2 * math.pi * np.arange(count) / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


class _Geometry(NamedTuple):
    """A shape of radius 1: the points for which the `rank`-th largest of (normals @ point - offsets) is negative.

    Points are relative to the centre of the shape's bounding box.
    """

    normals: np.ndarray
    offsets: np.ndarray
    rank: int
    half_width: float
    half_height: float


def _polygon(sides: int, first: float, apothem: float, *, rank: int, box: tuple[float, float, float]) -> _Geometry:
    """A regular polygon (rank 1) or star polygon (rank 2).

    `box` is its half width, top and bottom relative to the centre of its circumscribed circle.
    """
    half_width, top, bottom = box
    normals = _regular_normals(sides, first)
    offsets = apothem - normals @ np.array([0.0, (top + bottom) / 2])
    return _Geometry(normals, offsets, rank, half_width, (bottom - top) / 2)


# A shape's position is the centre of its bounding box, which is at most two radii wide and high. Triangle and star are
# two radii wide; the square has the area of the circle.
_SIDE = math.sqrt(math.pi) / 2
_TRIANGLE_CIRCLE = 2 / math.sqrt(3)
_STAR_CIRCLE = 1 / math.cos(math.pi / 10)
_POLYGONS = {
    "square": _polygon(4, 0.0, _SIDE, rank=1, box=(_SIDE, -_SIDE, _SIDE)),
    # The first normal points down, so the base is horizontal
    "triangle": _polygon(
        3, math.pi / 2, _TRIANGLE_CIRCLE / 2, rank=1, box=(1.0, -_TRIANGLE_CIRCLE, _TRIANGLE_CIRCLE / 2)
    ),
    # A point is in a pentagram if it is outside of at most one of its five lines, hence the second largest
    "star": _polygon(
        5,
        -math.pi / 2,
        _STAR_CIRCLE * math.cos(2 * math.pi / 5),
        rank=2,
        box=(1.0, -_STAR_CIRCLE, _STAR_CIRCLE * math.cos(math.pi / 5)),
    ),
}


def half_extent(shape: str) -> tuple[float, float]:
    """Half the width and half the height of the shape's bounding box, in radii."""
    if shape == "circle":
        return 1.0, 1.0
    geometry = _POLYGONS[shape]
    return geometry.half_width, geometry.half_height


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """A function of points that is negative inside the shape, positive outside, and 1-Lipschitz."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    geometry = _POLYGONS[shape]
    largest = second = None
    for (nx, ny), offset in zip(geometry.normals, geometry.offsets, strict=True):
        beyond = x * np.float32(nx) + y * np.float32(ny) - radius * np.float32(offset)
        if largest is None:
            largest = beyond
        elif geometry.rank == 1:
            largest = np.maximum(largest, beyond)
        else:
            lower = np.minimum(largest, beyond)
            second = lower if second is None else np.maximum(second, lower)
            largest = np.maximum(largest, beyond)
    return largest if geometry.rank == 1 else second


def coverage(
    shape: str, x: np.ndarray, y: np.ndarray, radius: float | np.ndarray, *, height: int, width: int
) -> np.ndarray:
    """The share of each pixel that the shape covers, float32 [T,H,W] in [0, 1].

    `x`, `y` [T] are the centre of the shape's bounding box in each frame, in pixels; it may be outside the frame.
    `radius` is in pixels, one number or [T]. Pixels on the outline are sampled 8 x 8 times, others once.
    """
    x, y = np.atleast_1d(np.asarray(x, np.float64)), np.atleast_1d(np.asarray(y, np.float64))
    radius = np.broadcast_to(np.asarray(radius, np.float64), x.shape)
    extent_x, extent_y = (half * radius for half in half_extent(shape))

    # Only a box around the shape is computed. It has the same size in all frames, so that they form one array
    box_h = min(height, math.ceil(2 * extent_y.max()) + 2)
    box_w = min(width, math.ceil(2 * extent_x.max()) + 2)
    rows = np.clip(np.floor(y - extent_y).astype(int), 0, height - box_h)[:, None] + np.arange(box_h)
    columns = np.clip(np.floor(x - extent_x).astype(int), 0, width - box_w)[:, None] + np.arange(box_w)

    dy = (rows + 0.5 - y[:, None]).astype(np.float32)
    dx = (columns + 0.5 - x[:, None]).astype(np.float32)
    radius = radius.astype(np.float32)
    distance = _inside(shape, dx[:, None, :], dy[:, :, None], radius[:, None, None])
    covered = (distance < 0).astype(np.float32)

    # 0.7072 is half a pixel's diagonal: if the outline is further away, it cannot cross the pixel
    t, i, j = np.nonzero(np.abs(distance) < 0.7072)
    offsets = ((np.arange(_SUPERSAMPLES) + 0.5) / _SUPERSAMPLES - 0.5).astype(np.float32)
    samples = _inside(
        shape,
        dx[t, j][:, None, None] + offsets,
        dy[t, i][:, None, None] + offsets[:, None],
        radius[t][:, None, None],
    )
    covered[t, i, j] = np.mean(samples < 0, axis=(1, 2), dtype=np.float32)

    out = np.zeros((len(x), height, width), np.float32)
    out[np.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]] = covered
    return out


class Trajectory(NamedTuple):
    """The centres `x`, `y` [T] of a shape's bounding box in a clip, and its `radius`, in pixels (float64)."""

    x: np.ndarray
    y: np.ndarray
    radius: float


def trajectory(attrs: Attributes, seed: int, times: np.ndarray, *, height: int, width: int) -> Trajectory:
    """The shape's path at `times` [T], in [0, 1) as shares of the clip's 16/3 s; the seed determines it.

    For one aspect ratio the path is the same at every size. The radius is 0.22-0.30 of the frame's shorter side. The
    path is 35-60% of the frame's side along the motion, or less where the shape would leave the frame.
    """
    attrs = check_attributes(attrs)
    size, travel, along, across = np.random.default_rng(seed).random(4)
    aspect = width / height
    # In units of the frame's height
    extent = (aspect, 1.0)
    radius = (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * size) * min(aspect, 1.0)
    place = {}
    for axis, step, draw in zip((0, 1), DIRECTIONS[attrs.motion], (along, across), strict=True):
        if axis == 1 and attrs.motion in ("up", "down"):
            draw = along
        elif axis == 0 and attrs.motion in ("up", "down"):
            draw = across
        room = extent[axis] - 2 * half_extent(attrs.shape)[axis] * radius
        longest = min(TRAVEL[1] * extent[axis], room)
        path = abs(step) * (TRAVEL[0] * extent[axis] + (longest - TRAVEL[0] * extent[axis]) * travel)
        first = half_extent(attrs.shape)[axis] * radius + (room - path) * draw
        # Motion to the left or upwards runs over the same interval in the other direction
        place[axis] = first + path * (np.asarray(times) if step >= 0 else 1 - np.asarray(times))
    return Trajectory(place[0] * height, place[1] * height, radius * height)


def frame_times(frames: int) -> np.ndarray:
    """The times k / frames of a clip's frames, float64 [T]: every second frame of a clip of 2T is a clip of T."""
    return np.arange(frames) / frames


def level(rgb: tuple[int, int, int]) -> np.ndarray:
    """Converts an sRGB colour of 0..255 to the video's range, float32 [3] in [-1, 1]."""
    return np.asarray(rgb, np.float32) / np.float32(127.5) - np.float32(1)


def render_at(
    attrs: Attributes,
    seed: int,
    times: np.ndarray,
    *,
    height: int,
    width: int,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> np.ndarray:
    """Draws the frames at `times` [T], in [0, 1) as shares of the clip, as float32 [T,H,W,3] in [-1, 1].

    `rows` and `columns` select the part of the frame that is drawn. The other pixels cost no time.
    """
    attrs = check_attributes(attrs)
    if height < 4 or width < 4:
        raise ValueError(f"A frame is {height} x {width} pixels, expected at least 4 x 4: ask for larger frames.")
    path = trajectory(attrs, seed, times, height=height, width=width)
    (top, bottom, _), (left, right, _) = rows.indices(height), columns.indices(width)
    share = coverage(attrs.shape, path.x - left, path.y - top, path.radius, height=bottom - top, width=right - left)
    background, colour = level(BACKGROUNDS[attrs.background]), level(COLOURS[attrs.colour])
    return background + share[..., None] * (colour - background)


def render(attrs: Attributes, seed: int, *, frames: int, height: int, width: int) -> np.ndarray:
    """Draws the clip of these attributes and seed, float32 [T,H,W,3] in [-1, 1], spanning 16/3 s.

    Frame k shows time k / frames. A clip with fewer frames is exactly a longer one with frames skipped. A smaller clip
    is a larger one averaged over boxes, up to anti-aliasing. ValueError for unknown attributes, fewer than one frame,
    or frames smaller than 4 x 4 pixels.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}, expected 1 or more: ask for a longer clip.")
    return render_at(attrs, seed, frame_times(frames), height=height, width=width)

"""Decides, from what was measured, which files a set contains, and gives the reason for each that it leaves out."""

from collections.abc import Callable
from typing import NamedTuple

from ivideo.data.preparing.duplicates import duplicates
from ivideo.data.preparing.items import Rejected

RATE_SHARE = 0.995  # of the wanted rate that a clip has at least: 23.976 is enough for 24
# Of the wanted rate that a clip has at least in different frames: coarse coding repeats some frames of true 24 fps
DISTINCT_SHARE = 0.75

# Each reason for leaving a file out, in one word, and what it means in the report
REASONS = {
    "row": "a row of the table that has no file",
    "missing": "a file of the table that does not exist",
    "tar": "a damaged tar, or a damaged file of a TFDS set",
    "caption": "no caption, or one that cannot be read",
    "long_caption": "a caption longer than the text encoder reads",
    "unreadable": "a file that cannot be decoded",
    "truncated": "a file that ends before the length that it states",
    "crashed": "a file that ended the process that decoded it",
    "timeout": "a file that takes too long to read, as one on which the decoder hangs",
    "large": "a file of 1 GiB or more",
    "short": "a clip shorter than a training clip",
    "rate": "a clip with fewer different frames per second than the stage",
    "small": "a resolution below the stage's",
    "aspect": "an aspect ratio that the crop would take too much of",
    "still": "a clip in which nothing moves",
    "jump": "a clip with a cut or a flash",
    "duplicate": "nearly the same as a file that is kept",
}


class Limits(NamedTuple):
    """What a file must satisfy (`config.prepare`), with the stage's own values where the config has 0.

    `height`, `width` in pixels are the stage's; `scale` is the smallest ratio of a file's size to it.
    """

    seconds: float
    fps: float
    height: int
    width: int
    scale: float
    cropped: float
    motion: float
    jump: float
    duplicate_bits: int
    crop_bars: bool

    @classmethod
    def of(cls, config) -> "Limits":
        """The limits of a stage's config."""
        frames = config.train.crop_frames or config.video.frames
        return cls(
            seconds=config.prepare.min_seconds or (frames - 1) / config.video.fps,
            fps=config.prepare.min_fps or config.video.fps,
            height=config.video.height,
            width=config.video.width,
            scale=config.prepare.min_scale,
            cropped=config.prepare.max_cropped,
            motion=config.prepare.min_motion,
            jump=config.prepare.max_jump,
            duplicate_bits=config.prepare.duplicate_bits,
            crop_bars=config.prepare.crop_bars,
        )


def choose(
    rows: list[dict], limits: Limits, *, is_too_long: Callable[[str], bool] | None = None
) -> tuple[list[dict], list[Rejected]]:
    """Divides measured files into those of the set and those that are left out, in their order.

    A row has the values of `records.features` and the number of the file (`index`), or a `reason` and a `detail`.
    `is_too_long`: whether a caption is longer than the text encoder reads; such captions are removed.
    """
    kept, rejected = [], []
    for row in rows:
        found = _problem(row, limits, is_too_long)
        if found:
            rejected.append(Rejected(row["name"], *found))
        else:
            kept.append(row)
    copies = duplicates(kept, limits.duplicate_bits)
    for number, first in copies.items():
        rejected.append(Rejected(kept[number]["name"], "duplicate", f"of {kept[first]['name']}"))
    return [row for number, row in enumerate(kept) if number not in copies], sorted(rejected)


def _problem(row: dict, limits: Limits, is_too_long) -> tuple[str, str] | None:
    """The reason to leave out a file, and its detail."""
    if "reason" in row:
        return row["reason"], row["detail"]
    if not row["captions"]:
        return "caption", "it has none"
    if is_too_long is not None:
        row["captions"] = [caption for caption in row["captions"] if not is_too_long(caption)]
        if not row["captions"]:
            return "long_caption", "it has more tokens than config.text.length"
    if not limits.crop_bars:
        row["box"] = [0] * 4
    return _size_problem(row, limits) or ("frames" in row and _video_problem(row, limits)) or None


def _size_problem(row: dict, limits: Limits) -> tuple[str, str] | None:
    height, width = row["box"][2:] if any(row["box"]) else (row["height"], row["width"])
    # After the centre crop to the stage's aspect ratio (ivideo.data.resizing)
    used_height = min(height, width * limits.height / limits.width)
    cropped = 1 - used_height * (used_height * limits.width / limits.height) / (height * width)
    if cropped > limits.cropped:
        return "aspect", f"{width} x {height}: the crop takes {cropped:.0%}"
    if used_height < limits.scale * limits.height:
        return "small", f"{width} x {height}: after the crop {used_height:.0f} of {limits.height} rows"
    return None


def _video_problem(row: dict, limits: Limits) -> tuple[str, str] | None:
    if row["seconds"] < limits.seconds:
        return "short", f"{row['seconds']:.2f} of {limits.seconds:.2f} seconds"
    if row["fps"] < RATE_SHARE * limits.fps:
        return "rate", f"{row['fps']:.2f} of {limits.fps:g} frames per second"
    if row["distinct_fps"] < DISTINCT_SHARE * limits.fps and row["motion"] >= limits.motion:  # otherwise it is still
        shown = f"{row['distinct_fps']:.2f} of {limits.fps:g} different frames per second"
        return "rate", f"{shown}, stored as {row['fps']:.2f}: frames are repeated (config.prepare.min_fps)"
    if row["motion"] < limits.motion:
        return "still", f"frames differ by {row['motion']:.2f} of {limits.motion:g} levels (config.prepare.min_motion)"
    if row["jump"] > limits.jump:
        shown = f"two frames differ by {row['jump']:.0f} levels"
        return "jump", f"{shown}, at most {limits.jump:g} (config.prepare.max_jump)"
    return None

"""Random-access sources of captioned clips: rendered on the fly (shapes), or read from a set prepared with TFDS.

A source has `__len__` and three methods. `read(i, rng) -> {"video": [T,H,W,3], "caption": str}` is a part of clip i, at
a place in time and space that `rng` draws. `image(i, rng) -> {"image": [H,W,3], "caption": str}` is such a part of one
frame that `rng` draws. Pixels are uint8, or float in [-1, 1]. `check(i)` raises VideoError if any part of clip i cannot
be read. All depend only on their arguments, so a run that is stopped and resumed sees the same data.
Data workers import this module, so it does not import jax.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ivideo.data import sets, shapes, video_io
from ivideo.data.images import read_image
from ivideo.data.mixtures import Mixture, parse
from ivideo.data.resizing import resize_video
from ivideo.errors import UserError


class Crop(NamedTuple):
    """The size of a training crop, and the factors `space` and `time` that its position is a multiple of.

    So a crop covers whole pixels and frames of the low-resolution clip, which is smaller by these factors.
    """

    frames: int
    height: int
    width: int
    space: int = 1
    time: int = 1

    def place(self, rng: np.random.Generator, *, frames: int, height: int, width: int) -> tuple[slice, slice, slice]:
        """Draws the crop's position in a clip of this size. UserError where the crop does not fit."""
        slices = []
        for name, size, length, step in (
            ("frames", self.frames, frames, self.time),
            ("height", self.height, height, self.space),
            ("width", self.width, width, self.space),
        ):
            if not 0 < size <= length:
                raise UserError(
                    f"the crop's {name} is {size} in a clip of {length}, expected 1 to {length}: change it."
                )
            start = step * int(rng.integers((length - size) // step + 1))
            slices.append(slice(start, start + size))
        return tuple(slices)


class ShapesSource:
    """Clips of the captioned-shapes world, rendered on access; clip i is the same in every run.

    Clip i has attributes[i % len(attributes)], so captions occur equally often (to within one clip, unless `num_clips`
    is a multiple of their number). `attributes` is, for instance, `shapes.TRAIN`. `frames`, `height`, `width` are the
    size of every clip; UserError where a number is not positive. With `crop`, only that part of each clip is rendered.
    """

    def __init__(
        self,
        attributes: Sequence[shapes.Attributes] = shapes.TRAIN,
        *,
        num_clips: int,
        seed: int,
        frames: int,
        height: int,
        width: int,
        crop: Crop | None = None,
    ):
        if not attributes:
            raise UserError("attributes is empty, expected one or more: pass e.g. shapes.TRAIN.")
        _check_positive(num_clips=num_clips, frames=frames, height=height, width=width)
        if seed < 0:
            raise UserError(f"seed is {seed}, expected 0 or more: pass another seed.")
        self.attributes = tuple(shapes.check_attributes(a) for a in attributes)
        self.num_clips, self.seed = num_clips, seed
        self.frames, self.height, self.width, self.crop = frames, height, width, crop

    def __len__(self) -> int:
        return self.num_clips

    def clip(self, index: int) -> tuple[shapes.Attributes, int]:
        """The attributes and the seed of clip `index`."""
        if not 0 <= index < self.num_clips:
            raise IndexError(f"clip {index} of a source of {self.num_clips}: ask for 0 to {self.num_clips - 1}.")
        # Sources with different seeds share no clip, as long as each has fewer than 2^32 clips
        return self.attributes[index % len(self.attributes)], (self.seed << 32) + int(index)

    def read(self, index: int, rng: np.random.Generator) -> dict:
        """Clip `index`, or a crop of it that `rng` places, float32 in [-1, 1], and its caption."""
        attrs, seed = self.clip(index)
        frames, rows, columns = self._place(rng)
        video = self._draw(attrs, seed, shapes.frame_times(self.frames)[frames], rows, columns)
        return {"video": video, "caption": shapes.caption(attrs)}

    def _place(self, rng: np.random.Generator) -> tuple[slice, slice, slice]:
        if self.crop is None:
            return (slice(None),) * 3
        return self.crop.place(rng, frames=self.frames, height=self.height, width=self.width)

    def image(self, index: int, rng: np.random.Generator) -> dict:
        """One frame of clip `index`, chosen by `rng`, and the clip's caption. The other frames are not rendered."""
        attrs, seed = self.clip(index)
        time = shapes.frame_times(self.frames)[[rng.integers(self.frames)]]
        _, rows, columns = self._place(rng)
        image = self._draw(attrs, seed, time, rows, columns)[0]
        return {"image": image, "caption": shapes.caption(attrs)}

    def check(self, index: int) -> None:
        """Does nothing: every clip can be drawn."""

    def _draw(self, attrs, seed, times, rows, columns) -> np.ndarray:
        return shapes.render_at(attrs, seed, times, height=self.height, width=self.width, rows=rows, columns=columns)


class TFDSSource:
    """Clips of a set prepared with TFDS as array_record: by mode prepare_data, or by code of one's own.

    The set is `sets.EncodedSet`; each read of a clip with several captions draws one. `fps` is the rate at which frames
    are taken. Frames are cropped inside their black bars, about their centre, to the target aspect ratio, then resized
    by an antialiased bilinear filter. `frames`, `height`, `width` are the size of a clip. With `crop`, only that part
    is decoded and resized. VideoError for a clip that cannot be read or is shorter than the part that is read; remove
    such clips when you prepare the set.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike,
        split: str = "train",
        *,
        frames: int,
        height: int,
        width: int,
        fps: video_io.Rate,
        crop: Crop | None = None,
        video_feature: str = "video",
        caption_feature: str | None = None,
    ):
        _check_positive(frames=frames, height=height, width=width)
        self.records = sets.EncodedSet(data_dir, split, video_feature, caption_feature)
        self.height, self.width, self.fps = height, width, fps
        # Decoded at any time of a clip, so a crop needs no clip of the full length
        self.crop = crop or Crop(frames, height, width)

    def __len__(self) -> int:
        return len(self.records)

    def _decode(self, index: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """A crop of `count` frames of clip `index`, uint8, and the clip's caption."""
        record = self.records[index]
        crop = self.crop._replace(frames=count)
        _, rows, columns = crop.place(rng, frames=count, height=self.height, width=self.width)
        with self.records.naming(index):
            frames = video_io.iter_frames(record.data, frames=count, fps=self.fps, choose=rng.integers)
            frames = map(record.inside_bars, frames)
            video = resize_video(frames, height=self.height, width=self.width, rows=rows, columns=columns)
        return video, record.caption(rng)

    def read(self, index: int, rng: np.random.Generator) -> dict:
        """A part of clip `index`, uint8, at a time and a place that `rng` draws, and the clip's caption.

        It begins at any frame of the file after which enough frames follow.
        """
        video, caption = self._decode(index, self.crop.frames, rng)
        return {"video": video, "caption": caption}

    def image(self, index: int, rng: np.random.Generator) -> dict:
        """A part of one frame of clip `index`, both chosen by `rng`, and the clip's caption."""
        video, caption = self._decode(index, 1, rng)
        return {"image": video[0], "caption": caption}

    def check(self, index: int) -> None:
        """Decodes the whole clip. VideoError if it cannot be read or is too short."""
        with self.records.naming(index):
            video_io.check_frames(self.records[index].data, frames=self.crop.frames, fps=self.fps)


class ImageSource:
    """Images of a set that mode prepare_data made, to be packed behind videos. It has `image` and `check` alone.

    `height`, `width` and `crop` are those of the videos, and the images are cropped and resized as their frames are.
    """

    def __init__(
        self, data_dir: str | os.PathLike, split: str = "train", *, height: int, width: int, crop: Crop | None = None
    ):
        self.records = sets.EncodedSet(data_dir, split, "image")
        self.height, self.width, self.crop = height, width, crop or Crop(1, height, width)

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int, rng: np.random.Generator) -> dict:
        """A part of image `index`, uint8, at a place that `rng` draws, and a caption. VideoError for damaged files."""
        record, crop = self.records[index], self.crop._replace(frames=1)
        _, rows, columns = crop.place(rng, frames=1, height=self.height, width=self.width)
        with self.records.naming(index):
            picture = record.inside_bars(read_image(record.data))
        (image,) = resize_video([picture], height=self.height, width=self.width, rows=rows, columns=columns)
        return {"image": image, "caption": record.caption(rng)}

    def check(self, index: int) -> None:
        """Decodes the image. VideoError if it cannot be read."""
        with self.records.naming(index):
            read_image(self.records[index].data)


def make_source(
    name: str,
    *,
    frames: int,
    height: int,
    width: int,
    num_clips: int = 0,
    seed: int = 0,
    data_dir: str = "",
    split: str = "train",
    fps: video_io.Rate = 24,
    crop: Crop | None = None,
) -> ShapesSource | TFDSSource | Mixture:
    """The source named 'shapes' (uses num_clips, seed, split) or 'tfds' (uses data_dir, split, fps).

    `data_dir` is one folder, or several with weights (`mixtures.parse`).

    The shapes have the splits 'train' (432 captions) and 'held_out' (48). UserError for other names.
    """
    if name == "shapes":
        attributes = {"train": shapes.TRAIN, "held_out": shapes.HELD_OUT}
        if split not in attributes:
            raise UserError(f"split is {split!r}, expected one of {', '.join(attributes)}: choose one of them.")
        size = dict(frames=frames, height=height, width=width, crop=crop)
        return ShapesSource(attributes[split], num_clips=num_clips, seed=seed, **size)
    if name == "tfds":
        size = dict(frames=frames, height=height, width=width, fps=fps, crop=crop)
        return _mixed(data_dir, lambda folder: TFDSSource(folder, split, **size))
    raise UserError(f"the source is {name!r}, expected 'shapes' or 'tfds': choose one of them.")


def make_image_source(
    data_dir: str, split: str = "train", *, height: int, width: int, crop: Crop | None = None
) -> ImageSource | Mixture | None:
    """The source of the images in one folder, or in several with weights; None without a folder."""
    if not data_dir:
        return None
    return _mixed(data_dir, lambda folder: ImageSource(folder, split, height=height, width=width, crop=crop))


def _mixed(data_dir, make):
    """The source of one folder, or the mixture of several (`mixtures.parse`)."""
    if len(sets := parse(data_dir)) < 2:
        return make(data_dir)
    return Mixture([make(folder) for folder, _ in sets], [weight for _, weight in sets])


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} is {value}, expected 1 or more: pass a positive number.")

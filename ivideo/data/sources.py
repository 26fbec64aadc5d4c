"""Random-access sources of captioned clips: rendered on the fly (shapes), or read from a set prepared with TFDS.

A source has `__len__` and three methods. `read(i, rng) -> {"video": [T,H,W,3], "caption": str}` is a part of clip i, at
a place in time and space that `rng` draws. `image(i, rng) -> {"image": [H,W,3], "caption": str}` is such a part of one
frame that `rng` draws. Pixels are uint8, or float in [-1, 1]. `check(i)` raises VideoError if any part of clip i cannot
be read. All depend only on their arguments, so a run that is stopped and resumed sees the same data.
Data workers import this module, so it does not import jax. TFDS takes seconds to import, and is imported on first use.
"""

import contextlib
import functools
import importlib
import os
import pathlib
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from ivideo.data import shapes, video_io
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
    """Clips of a set prepared with TFDS as array_record; its feature `video` is a file's bytes, and `caption` a text.

    `data_dir` is the folder of one prepared set, with its dataset_info.json. `fps` is the rate at which frames are
    taken. Frames are cropped about their centre to the target aspect ratio, then resized by an antialiased bilinear
    filter. `frames`, `height`, `width` are the size of a clip. With `crop`, only that part is decoded and resized.
    UserError where there is no set, or its features have other names. VideoError for a clip that cannot be read or is
    shorter than the part that is read; remove such clips when you prepare the set.
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
        caption_feature: str = "caption",
    ):
        _check_positive(frames=frames, height=height, width=width)
        self._check_folder(data_dir)
        tfds = importlib.import_module("tensorflow_datasets")
        builder = tfds.builder_from_directory(os.fspath(data_dir))
        splits = builder.info.splits
        if split.split("[")[0] not in splits:
            raise UserError(f"split is {split!r}, expected one of {', '.join(splits)}: choose one of them.")
        missing = [f for f in (video_feature, caption_feature) if f not in builder.info.features]
        if missing:
            raise UserError(
                f"{data_dir} has no feature {missing[0]!r}, expected one of {', '.join(builder.info.features)}: name "
                "the features of the encoded video and of its caption."
            )
        self._records = builder.as_data_source(split=split)
        self._features = (video_feature, caption_feature)
        self.split, self.data_dir = split, os.fspath(data_dir)
        self.height, self.width, self.fps = height, width, fps
        # Decoded at any time of a clip, so a crop needs no clip of the full length
        self.crop = crop or Crop(frames, height, width)

    @staticmethod
    def _check_folder(data_dir: str | os.PathLike) -> None:
        if os.path.isfile(os.path.join(data_dir, "dataset_info.json")):
            return
        prepared = sorted(str(p.parent) for p in pathlib.Path(data_dir).glob("**/dataset_info.json"))[:3]
        advice = f"did you mean {' or '.join(prepared)}?" if prepared else "prepare the set first."
        raise UserError(f"data_dir is {str(data_dir)!r}, expected a folder with dataset_info.json: {advice}")

    def __len__(self) -> int:
        return len(self._records)

    def _record(self, index: int) -> tuple[bytes, str]:
        record = self._records[int(index)]
        video, caption = (record[name] for name in self._features)
        return bytes(video), caption.decode() if isinstance(caption, bytes) else str(caption)

    @contextlib.contextmanager
    def _naming(self, index: int):
        """Adds the clip's place in the set to the message of a VideoError."""
        try:
            yield
        except video_io.VideoError as error:
            raise video_io.VideoError(f"clip {index} of {self.split!r} in {self.data_dir}: {error}") from error

    def _decode(self, index: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """A crop of `count` frames of clip `index`, uint8, and the clip's caption."""
        data, caption = self._record(index)
        crop = self.crop._replace(frames=count)
        _, rows, columns = crop.place(rng, frames=count, height=self.height, width=self.width)
        with self._naming(index):
            frames = video_io.iter_frames(data, frames=count, fps=self.fps, choose=rng.integers)
            video = resize_video(frames, height=self.height, width=self.width, rows=rows, columns=columns)
        return video, caption

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
        with self._naming(index):
            video_io.check_frames(self._record(index)[0], frames=self.crop.frames, fps=self.fps)


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
) -> ShapesSource | TFDSSource:
    """The source named 'shapes' (uses num_clips, seed, split) or 'tfds' (uses data_dir, split, fps).

    The shapes have the splits 'train' (432 captions) and 'held_out' (48). UserError for other names.
    """
    if name == "shapes":
        attributes = {"train": shapes.TRAIN, "held_out": shapes.HELD_OUT}
        if split not in attributes:
            raise UserError(f"split is {split!r}, expected one of {', '.join(attributes)}: choose one of them.")
        size = dict(frames=frames, height=height, width=width, crop=crop)
        return ShapesSource(attributes[split], num_clips=num_clips, seed=seed, **size)
    if name == "tfds":
        return TFDSSource(data_dir, split, frames=frames, height=height, width=width, fps=fps, crop=crop)
    raise UserError(f"the source is {name!r}, expected 'shapes' or 'tfds': choose one of them.")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} is {value}, expected 1 or more: pass a positive number.")


def prepare_shapes(
    data_dir: str | os.PathLike,
    *,
    num_train: int,
    num_held_out: int,
    frames: int,
    height: int,
    width: int,
    seed: int = 0,
    crf: int = 18,
) -> str:
    """Builds the captioned shapes as a TFDS set of mp4 files under `data_dir`; returns its folder, for `TFDSSource`.

    It needs neither TensorFlow nor the network. An existing set is kept. UserError for odd sizes.
    """
    config_type, builder_type = _captioned_shapes()
    config = config_type(
        name=f"{frames}x{height}x{width}-{num_train}-{num_held_out}-seed{seed}-crf{crf}",
        description="Clips of one moving shape, with captions.",
        num_train=num_train,
        num_held_out=num_held_out,
        frames=frames,
        height=height,
        width=width,
        seed=seed,
        crf=crf,
    )
    # array_record is the format that does not need TensorFlow
    builder = builder_type(data_dir=os.fspath(data_dir), config=config, file_format="array_record")
    builder.download_and_prepare()
    return os.fspath(builder.data_path)


def __getattr__(name: str):
    # The two classes derive from TFDS's, which is slow to import, so they are defined on first use
    if name in ("CaptionedShapesConfig", "CaptionedShapes"):
        return _captioned_shapes()[name == "CaptionedShapes"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _captioned_shapes() -> tuple[type, type]:
    """The classes (CaptionedShapesConfig, CaptionedShapes)."""
    import dataclasses

    import tensorflow_datasets as tfds

    @dataclasses.dataclass(eq=False, kw_only=True)
    class CaptionedShapesConfig(tfds.core.BuilderConfig):
        """The number of clips in each split, their size (frames, pixels), their seed, and the quality of the mp4."""

        num_train: int
        num_held_out: int
        frames: int
        height: int
        width: int
        seed: int = 0
        crf: int = 18

    class CaptionedShapes(tfds.core.GeneratorBasedBuilder):
        """The captioned-shapes world as encoded clips: 432 captions in 'train', the other 48 in 'held_out'."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's way to list configs)
            CaptionedShapesConfig(
                name="32x24x40",
                description="Clips of one moving shape, with captions.",
                num_train=43200,
                num_held_out=480,
                frames=32,
                height=24,
                width=40,
            )
        ]

        def _info(self):
            text = tfds.features.Text()
            features = {
                "video": tfds.features.Tensor(shape=(), dtype=np.object_),
                "caption": text,
                "shape": text,
                "colour": text,
                "background": text,
                "motion": text,
                "seed": tfds.features.Scalar(dtype=np.int64),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=type(self).__doc__,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("caption", "video"),
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            config = self.builder_config
            # Sources with different seeds share no clip
            return {
                "train": self._generate_examples(shapes.TRAIN, config.num_train, 2 * config.seed),
                "held_out": self._generate_examples(shapes.HELD_OUT, config.num_held_out, 2 * config.seed + 1),
            }

        def _generate_examples(self, attributes, num_clips, seed):
            config = self.builder_config
            source = ShapesSource(
                attributes,
                num_clips=num_clips,
                seed=seed,
                frames=config.frames,
                height=config.height,
                width=config.width,
            )
            fps = config.frames / Fraction(shapes.DURATION).limit_denominator(3)
            for i in range(num_clips):
                attrs, clip_seed = source.clip(i)
                video = shapes.render(attrs, clip_seed, frames=config.frames, height=config.height, width=config.width)
                yield (
                    i,
                    {
                        "video": video_io.encode(video, fps=fps, crf=config.crf),
                        "caption": shapes.caption(attrs),
                        **attrs._asdict(),
                        "seed": clip_seed,
                    },
                )

    return CaptionedShapesConfig, CaptionedShapes

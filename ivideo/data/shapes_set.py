"""The captioned shapes as a set of video files, prepared with TFDS: for tests, and for those without videos."""

import functools
import os
from fractions import Fraction

import numpy as np

from ivideo.data import shapes, video_io
from ivideo.data.sources import ShapesSource


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

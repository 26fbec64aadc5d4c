"""Opens data sets that TFDS reads, as array_record files: of encoded videos or images, with their captions.

Data workers import this module, so it does not import jax. TFDS takes seconds to import, and is imported on first use.
"""

import contextlib
import importlib
import os
import pathlib
from typing import NamedTuple

import numpy as np

from ivideo.data.pictures import VideoError
from ivideo.errors import UserError


class Record(NamedTuple):
    """A file's bytes, its captions, and the box (top, left, height, width) inside its black bars, if it has bars."""

    data: bytes
    captions: tuple[str, ...]
    box: tuple[int, int, int, int] | None = None

    def inside_bars(self, frame: np.ndarray) -> np.ndarray:
        """The part of a frame [H,W,3] without bars."""
        if self.box is None:
            return frame
        top, left, height, width = self.box
        return frame[top : top + height, left : left + width]

    def caption(self, rng: np.random.Generator) -> str:
        """One of the captions; `rng` draws it if there are several."""
        return self.captions[rng.integers(len(self.captions)) if len(self.captions) > 1 else 0]


class EncodedSet:
    """Random access to the records of a split of a prepared set, in the folder `data_dir` with its dataset_info.json.

    `media`, 'video' or 'image', is the feature that holds a file's bytes. The feature `captions` has its captions, or
    `caption` its only one; `caption_feature` is another name. UserError where there is no set, or its features have
    other names.
    """

    def __init__(self, data_dir: str | os.PathLike, split: str, media: str, caption_feature: str | None = None):
        _check_folder(data_dir)
        tfds = importlib.import_module("tensorflow_datasets")
        builder = tfds.builder_from_directory(os.fspath(data_dir))
        splits, features = builder.info.splits, builder.info.features
        if split.split("[")[0] not in splits:
            raise UserError(f"split is {split!r}, expected one of {', '.join(splits)}: choose one of them.")
        if caption_feature is None:
            caption_feature = "captions" if "captions" in features else "caption"
        missing = [name for name in (media, caption_feature) if name not in features]
        if missing:
            raise UserError(
                f"{data_dir} has no feature {missing[0]!r}, expected one of {', '.join(features)}: name the features "
                f"of the encoded {media} and of its caption."
            )
        self._records, self._features = builder.as_data_source(split=split), (media, caption_feature)
        self.split, self.data_dir = split, os.fspath(data_dir)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[int(index)]
        data, captions = (record[name] for name in self._features)
        captions = captions if isinstance(captions, list | tuple | np.ndarray) else [captions]
        texts = tuple(text.decode() if isinstance(text, bytes) else str(text) for text in captions)
        box = tuple(map(int, record.get("box", ())))
        return Record(bytes(data), texts, box if any(box) else None)

    @contextlib.contextmanager
    def naming(self, index: int):
        """Adds a file's place in the set to the message of a VideoError."""
        try:
            yield
        except VideoError as error:
            raise VideoError(f"clip {index} of {self.split!r} in {self.data_dir}: {error}") from error


def _check_folder(data_dir: str | os.PathLike) -> None:
    if os.path.isfile(os.path.join(data_dir, "dataset_info.json")):
        return
    prepared = sorted(str(p.parent) for p in pathlib.Path(data_dir).glob("**/dataset_info.json"))[:3]
    advice = f"did you mean {' or '.join(prepared)}?" if prepared else "prepare the set first."
    if "," in str(data_dir):
        advice = "several folders have a weight after each, such as films:3,web:1."
    raise UserError(f"data_dir is {str(data_dir)!r}, expected a folder with dataset_info.json: {advice}")

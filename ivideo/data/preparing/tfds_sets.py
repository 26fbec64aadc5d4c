"""Finds files and captions in sets of TensorFlow Datasets (TFDS) that are on this machine. No TensorFlow is needed.

A set is a folder of array_record or TFRecord files, whose records are serialized `tf.train.Example`s. A file, such as
an image, is the bytes of one feature, its captions are those of another. Records are read when they are measured.
"""

import functools
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ivideo.data.preparing import items
from ivideo.data.preparing.items import Rejected
from ivideo.errors import UserError

PREFIX = "tfds:"  # of an --input that names a set
INFO = "dataset_info.json"
FORMATS = ("array_record", "tfrecord")
_HEADER = struct.Struct("<QI")  # before a TFRecord's bytes: their number, and a checksum; another follows them
_FOOTER = 4
_LISTED = 5  # sets in an error's message


class Layout(NamedTuple):
    """Where a record has its file and its captions: the names of two features.

    `labels` are the names of classes if the second feature is a class, and then `templates` make the captions of them.
    """

    file: str
    captions: str
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


class Record(NamedTuple):
    """A file inside a record; like `items.Item`. The record is at `offset` of a TFRecord file, or has that number."""

    name: str
    path: str
    offset: int
    size: int  # bytes of the whole record, 0 where they are not known
    layout: Layout
    captions: tuple[str, ...] = ()  # read later, by `read_captions`

    def _features(self):
        """The features of the record. OSError where it cannot be read."""
        try:
            return _features_at(self.path, self.offset, self.size)
        except Exception as e:  # the libraries raise many types of error for damaged files
            reason = " ".join(str(e).split())[:200]
            raise OSError(f"record {self.name} cannot be read ({type(e).__name__}: {reason})") from e

    def read(self) -> bytes:
        """The file's bytes. OSError where they cannot be read."""
        values = self._features()[self.layout.file].bytes_list.value
        if len(values) != 1:
            raise OSError(f"record {self.name} has {len(values)} values in {self.layout.file}, expected the file alone")
        return values[0]

    def read_captions(self) -> list[str]:
        """The record's captions. ValueError where they are not texts, OSError where they cannot be read."""
        feature = self._features()[self.layout.captions]
        if self.layout.labels:
            words = [items.words(self.layout.labels[label]) for label in feature.int64_list.value if label >= 0]
            return [template.replace("{label}", word) for word in words for template in self.layout.templates]
        try:
            return items.texts([value.decode() for value in feature.bytes_list.value])
        except UnicodeDecodeError as e:
            raise ValueError(f"{self.layout.captions} is not UTF-8 ({e.reason})") from e


@functools.lru_cache(maxsize=1)  # measuring reads a record's captions, and then its file
def _features_at(path: str, offset: int, size: int):
    from tensorflow_datasets.proto import tf_example_pb2

    if size:
        with open(path, "rb") as f:
            f.seek(offset)
            data = f.read(size)
    else:
        (data,) = _reader(path).read([offset])
    return tf_example_pb2.Example.FromString(data).features.feature


@functools.lru_cache(maxsize=4)  # opened shards of this process
def _reader(path: str):
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(path)


def is_set(path: str) -> bool:
    """Whether an --input is a TFDS set: its name after 'tfds:', or its folder."""
    return path.startswith(PREFIX) or os.path.isfile(os.path.join(path, INFO))


def find(
    path: str, media: str, *, split: str, caption_feature: str = "", label_template: str = ""
) -> tuple[list[Record], list[Rejected]]:
    """The files of `media` in a split of a set, in the order of the set.

    `caption_feature` is a text, a list of texts ('captions/text' inside a sequence), or a class, whose names
    `label_template` makes captions of; '' stands for the one that is named as tables name captions, or else for the
    class. UserError where there is no such set, split or feature.
    """
    builder = _open(path)
    info = builder.info
    if split not in info.splits:
        raise UserError(
            f"config.prepare.split = {split!r}: --input={path} has the splits {', '.join(info.splits)}: choose one"
        )
    if info.file_format is None or info.file_format.value not in FORMATS:
        raise UserError(
            f"--input={path} has files of the format {getattr(info.file_format, 'value', None)}: expected "
            f"{' or '.join(FORMATS)}. `tfds build --file_format=array_record` makes them"
        )
    layout = _layout(path, media, info.features, caption_feature, label_template)
    found, rejected = [], []
    for shard, count in zip(info.splits[split].filepaths, info.splits[split].shard_lengths, strict=True):
        shard, name = os.fspath(shard), os.path.basename(shard)
        places = list(_places(shard, count))
        if len(places) < count:
            detail = f"{len(places)} of {count} records: the others are missing, or damaged"
            rejected.append(Rejected(name, "tar", detail))
        found += [Record(f"{name}/{k:08}", shard, *place, layout) for k, place in enumerate(places)]
    return found, rejected


def _open(path: str):
    """The set's builder, made from the files in its folder alone."""
    from tensorflow_datasets.core import read_only_builder

    try:
        if not path.startswith(PREFIX):
            return read_only_builder.builder_from_directory(path)
        return read_only_builder.builder_from_files(path.removeprefix(PREFIX))
    except Exception as e:  # also of the set's own code, which is imported to find its default config
        if not path.startswith(PREFIX):
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"--input={path} cannot be read as a set of TFDS ({type(e).__name__}: {reason})") from e
        from tensorflow_datasets.core import constants

        there = _names(constants.DATA_DIR)
        more = f", … ({len(there)} in all)" if len(there) > _LISTED else ""
        raise UserError(
            f"--input={path}: {constants.DATA_DIR} has {', '.join(there[:_LISTED]) or 'no sets'}{more}: give one of "
            "them, set the environment variable TFDS_DATA_DIR to the folder that has it, or make it there "
            "(`tfds build NAME --file_format=array_record`)"
        ) from e


def _names(folder: str) -> list[str]:
    """The names of the sets in a folder, as they are given after `PREFIX`."""
    infos = [path for depth in ("*/*", "*/*/*") for path in pathlib.Path(folder).glob(f"{depth}/{INFO}")]
    sets = sorted(path.parent.relative_to(folder) for path in infos)
    return [f"{PREFIX}{one.parent.as_posix()}:{one.name}" for one in sets]


def _layout(path: str, media: str, features, caption_feature: str, label_template: str) -> Layout:
    from tensorflow_datasets import features as kinds

    flat = dict(_flat(features))
    files = [name for name, kind in flat.items() if _holds(kind, media)]
    file = media if media in files else files[0] if len(files) == 1 else None
    if file is None:
        frames = " (a feature of the type Video has frames without a rate: give the set's own video files)"
        raise UserError(
            f"--input={path} has {'several features' if files else 'no feature'} with one {media} each: expected "
            f"{media!r}, or one alone, among {', '.join(flat)}{frames if media == 'video' else ''}"
        )
    texts = [name for name, kind in flat.items() if isinstance(kind, kinds.Text)]
    classes = [name for name, kind in flat.items() if isinstance(kind, kinds.ClassLabel)]
    if not caption_feature:
        known = [f"{name}{inner}" for name in items.CAPTIONS for inner in ("", "/text", "/raw")]
        found = [name for name in known if name in texts]
        found += [name for name in classes if len(classes) == 1 or name == "label"]
        if not found:
            raise UserError(
                f"--input={path} has no feature of a known name for captions: set config.prepare.caption_feature to a "
                f"text or a class: {', '.join([*texts, *classes]) or 'it has none'}"
            )
        caption_feature = found[0]
    if caption_feature not in (*texts, *classes):
        raise UserError(
            f"config.prepare.caption_feature = {caption_feature!r}: expected a text or a class of --input={path}: "
            f"{', '.join([*texts, *classes]) or 'it has none'}"
        )
    if caption_feature in texts:
        return Layout(file, caption_feature)
    if not label_template:
        raise UserError(
            f"--input={path} has classes in {caption_feature!r}: set config.prepare.label_template, such as "
            f"'a {'photo' if media == 'image' else media} of {{label}}', or config.prepare.caption_feature to a text"
        )
    return Layout(file, caption_feature, tuple(flat[caption_feature].names), items.templates(label_template))


def _flat(features, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The features inside others, by the names that records have for them."""
    from tensorflow_datasets import features as kinds

    for name, kind in features.items():
        while isinstance(kind, kinds.Sequence) and not isinstance(kind, kinds.Video):
            kind = kind.feature
        if isinstance(kind, kinds.FeaturesDict):
            yield from _flat(kind, f"{prefix}{name}/")
        else:
            yield prefix + name, kind


def _holds(kind, media: str) -> bool:
    """Whether a feature holds the bytes of a file of `media`."""
    from tensorflow_datasets import features as kinds

    if media == "image" and isinstance(kind, kinds.Image):
        return True
    return type(kind) is kinds.Tensor and kind.shape == () and kind.np_dtype in (np.object_, np.bytes_)


def _places(shard: str, count: int) -> Iterator[tuple[int, int]]:
    """The place and the size of each record of a shard, up to its end or to where it is damaged."""
    if ".array_record-" in os.path.basename(shard):
        try:
            there = _reader(shard).num_records()
        except Exception:  # the library raises many types of error for damaged files
            there = 0
        yield from ((k, 0) for k in range(min(count, there)))
        return
    if not os.path.isfile(shard):
        return
    with open(shard, "rb") as f:
        whole, place = os.path.getsize(shard), 0
        while place + _HEADER.size <= whole:
            size, _ = _HEADER.unpack(f.read(_HEADER.size))
            begin = place + _HEADER.size
            if not 0 < size <= whole - begin - _FOOTER:
                return
            yield begin, size
            place = begin + size + _FOOTER
            f.seek(place)

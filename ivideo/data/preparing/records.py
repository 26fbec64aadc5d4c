"""The files of a prepared set: array_record shards and the metadata with which TFDS reads them, without TensorFlow.

A record has a file's bytes as they are (feature `video`, or `image` in a set of images), its captions, and what was
measured of it.
"""

import functools
import os
import pathlib
import tempfile
from collections.abc import Iterable

import numpy as np

from ivideo import files

NAME, SPLIT = "prepared", "train"
INFO = "dataset_info.json"  # written last: a folder with it is a whole set
CAPTIONS = "captions.txt"  # the different captions, one per line
MEDIA = ("video", "image")


@functools.cache
def features(media: str):
    """The features of a set of 'video' or 'image', as TFDS's FeaturesDict."""
    from tensorflow_datasets import features as kinds  # takes seconds

    text, number, real = kinds.Text(), kinds.Scalar(dtype=np.int64), kinds.Scalar(dtype=np.float64)
    found = {
        media: kinds.Tensor(shape=(), dtype=np.object_),  # the bytes of the file
        "captions": kinds.Sequence(text),
        "name": text,  # of the file, in the folder, table or tar that it came from
        "sha256": text,  # of the file's bytes
        "height": number,  # pixels as shown: upright, with square pixels
        "width": number,
        "box": kinds.Tensor(shape=(4,), dtype=np.int32),  # top, left, height, width inside black bars; 0 without bars
        "hash": text,  # perceptual, hexadecimal
    }
    if media == "video":
        found |= {
            "frames": number,
            "seconds": real,
            "fps": real,  # mean rate, in frames per second
            "distinct_fps": real,  # the same of the frames that do not repeat the one before
            "motion": real,  # mean difference of frames a quarter of a second apart, in levels of 255
            "jump": real,  # largest difference of neighbouring frames, in levels of 255
        }
    return kinds.FeaturesDict(found)


def shard_path(folder: str, i: int, shards: int) -> str:
    """The path of shard `i` of `shards`."""
    return os.path.join(folder, f"{NAME}-{SPLIT}.array_record-{i:05}-of-{shards:05}")


def is_shard(name: str) -> bool:
    """Whether a file of this name, in the folder of a set, is one of its shards."""
    return name.startswith(f"{NAME}-{SPLIT}.array_record-")


def record(media: str, row: dict, data: bytes) -> dict:
    """The values of `features` of a file with these measures, captions and name."""
    return {name: row[name] for name in features(media) if name != media} | {media: data}


def write_shard(path: str, media: str, records: Iterable[dict]) -> None:
    """Writes records, dicts of the values of `features`, to a shard. The file appears when it is whole."""
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer

    kinds = features(media)
    serializer = example_serializer.ExampleSerializer(kinds.get_serialized_info())
    with files.atomic_write(path) as temporary:
        # Videos and images are compressed already. A group of one record can be read on its own
        writer = array_record_module.ArrayRecordWriter(temporary, "group_size:1,uncompressed")
        for record in records:
            example = serializer.get_tf_example(kinds.encode_example(record))
            # By default, the order of the features is another one in each process
            writer.write(example.SerializeToString(deterministic=True))
        writer.close()


def write_info(folder: str, media: str, lengths: list[int], size: int, description: str) -> None:
    """Writes the set's metadata, after which the folder is a whole set.

    `lengths`: the records in each shard; `size`: the bytes of all files in them.
    """
    from tensorflow_datasets import core
    from tensorflow_datasets.core import dataset_info, file_adapters

    template = core.ShardedFileTemplate(
        data_dir=folder, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )  # fmt: skip
    identity = dataset_info.DatasetIdentity(name=NAME, version=core.Version("1.0.0"), data_dir=folder, module_name="")
    info = core.DatasetInfo(builder=identity, features=features(media), description=description)
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    split = core.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
    info.set_splits(core.SplitDict([split]))
    with tempfile.TemporaryDirectory() as temporary:
        info.write_to_directory(temporary)
        for name in sorted(os.listdir(temporary), key=lambda name: name == INFO):
            files.write_text(os.path.join(folder, name), pathlib.Path(temporary, name).read_text(encoding="utf-8"))

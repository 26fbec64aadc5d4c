"""Mode prepare_data: sets of TensorFlow Datasets as its input."""

import io
import os
import struct

import collections_of_clips as clips
import numpy as np
import PIL.Image
import pytest
from prepared_sets import one_clip, prepared, quarantine, read_set

from ivideo.data.preparing import inputs
from ivideo.errors import UserError

COUNT = 5


def png(seed):
    file = io.BytesIO()
    PIL.Image.fromarray(clips.texture(seed, count=1)[0]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tfds():
    """TFDS; it imports for seconds."""
    return pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def data_dir(tfds, tmp_path_factory):
    """A folder with a set of five images in two configs, `plain` and `other`, made by TFDS's own builder."""
    kinds = tfds.features

    class SmallPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("plain", "other")]  # noqa: RUF012

        def _info(self):
            features = {
                "image": kinds.Image(shape=(None, None, 3)),
                "label": kinds.ClassLabel(names=["ice_dancing", "ApplyEyeMakeup"]),
                "captions": kinds.Sequence({"text": kinds.Text(), "id": np.int64}),
            }
            if self.builder_config.name == "other":
                del features["captions"]
                features |= {"view": kinds.Image(shape=(None, None, 3)), "comment": kinds.Text()}
            return tfds.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(COUNT, 0), "test": self._generate_examples(1, 100)}

        def _generate_examples(self, count, first):
            for k in range(first, first + count):
                one = {"image": io.BytesIO(png(k)), "label": k % 2}
                if self.builder_config.name == "other":
                    one |= {"view": io.BytesIO(png(k)), "comment": f"comment {k}"}
                else:
                    one["captions"] = [{"text": f"picture {k}", "id": 0}, {"text": f"again {k}", "id": 1}]
                yield k, one

    folder = tmp_path_factory.mktemp("tfds")
    for name in ("plain", "other"):
        SmallPictures(data_dir=str(folder), config=name, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def named(tfds, data_dir, monkeypatch):
    """Lets TFDS find sets in the folder, as TFDS_DATA_DIR does, and gives the name of the set."""
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(data_dir))
    return "tfds:small_pictures"


def captions(out):
    return sorted(tuple(text.decode() for text in record["captions"]) for record in read_set(out).values())


def test_small_a_set_of_images_is_prepared_by_its_name(named, tmp_path):
    out = prepared(f"{named}/plain:1.2.0", tmp_path / "out", media="image")
    assert captions(out) == sorted((f"picture {k}", f"again {k}") for k in range(COUNT))
    assert {record["image"] for record in read_set(out).values()} == {png(k) for k in range(COUNT)}
    out = prepared(f"{named}/plain", tmp_path / "test", media="image", split="test")
    assert captions(out) == [("picture 100", "again 100")]


def test_small_captions_are_made_of_classes_or_taken_from_a_feature(named, data_dir, tmp_path):
    by_label = dict(media="image", caption_feature="label", label_template="{label}|a photo of {label}")
    out = prepared(f"{named}/plain", tmp_path / "labels", **by_label)
    assert captions(out)[0] == ("apply eye makeup", "a photo of apply eye makeup") and len(captions(out)) == COUNT
    folder = data_dir / "small_pictures" / "other" / "1.2.0"
    found = inputs.find(str(folder), "image", caption_feature="comment").items
    assert sorted(item.read_captions() for item in found) == [[f"comment {k}"] for k in range(COUNT)]


def test_small_a_prepared_set_is_prepared_again(tmp_path):
    """With other limits, such as those of another stage."""
    first = prepared(one_clip(tmp_path / "in"), tmp_path / "first")
    (record,) = read_set(prepared(first, tmp_path / "again", min_seconds=0.5)).values()
    assert record["video"] == (tmp_path / "in" / "a.mp4").read_bytes() and list(record["captions"]) == [b"a clip"]


def as_tfrecord(folder, out):
    """A copy of a set whose records are in TFRecord files. Their checksums are zeros, which only TensorFlow reads."""
    from array_record.python import array_record_module

    out.mkdir()
    for path in folder.iterdir():
        if "array_record" not in path.name:
            text = path.read_text().replace("array_record", "tfrecord")
            (out / path.name).write_text(text)
            continue
        reader = array_record_module.ArrayRecordReader(str(path))
        with open(out / path.name.replace("array_record", "tfrecord"), "wb") as f:
            for data in reader.read_all():
                f.write(struct.pack("<QI", len(data), 0) + data + bytes(4))
    return out


def test_small_tfrecord_files_are_read_without_tensorflow(data_dir, tmp_path):
    folder = data_dir / "small_pictures" / "plain" / "1.2.0"
    wanted = inputs.find(str(folder), "image").items
    records = as_tfrecord(folder, tmp_path / "records")
    found = inputs.find(str(records), "image").items
    assert [item.read() for item in found] == [item.read() for item in wanted]
    assert [item.read_captions() for item in found] == [item.read_captions() for item in wanted]
    (shard,) = (path for path in records.iterdir() if "-train." in path.name)
    os.truncate(shard, shard.stat().st_size - 10)
    out = prepared(records, tmp_path / "out", media="image")
    assert len(read_set(out)) == COUNT - 1 and quarantine(out) == {shard.name: "tar"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tfds:no_such_set", {}, "has tfds:small_pictures/other:1.2.0, tfds:small_pictures/plain:1.2.0: give one"),
        ("{}/plain:9.9.9", {}, "has tfds:small_pictures/other:1.2.0, .*set the environment variable TFDS_DATA_DIR"),
        ("{}/plain", {"split": "dev"}, "config.prepare.split = 'dev': .* has the splits train, test: choose one"),
        ("{}/plain", {"media": "video"}, "has no feature with one video each: expected 'video'"),
        ("{}/other", {}, "has classes in 'label': set config.prepare.label_template, such as 'a photo of {label}'"),
        ("{}/plain", {"caption_feature": "text"}, "'text': expected a text or a class .*captions/text"),
    ],
)
def test_small_what_a_set_lacks_is_said_in_one_line(named, name, options, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        prepared(name.format(named), tmp_path / "out", **{"media": "image", **options})
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

"""Prepares sets for tests of mode prepare_data, and reads them back."""

import csv
import io
import json
import tarfile

import collections_of_clips as clips
import pyarrow
from pyarrow import parquet

from configs import base
from ivideo.data.preparing import prepare


def here(function, tasks):
    """Runs tasks in this process."""
    return ((task, function(task)) for task in tasks)


def prepared(path, out, *, run=here, is_too_long=None, spread=None, **options):
    config = base.get_config("small")
    config.update_from_flattened_dict({f"prepare.{name}": value for name, value in options.items()})
    prepare.prepare(config, str(path), str(out), run=run, is_too_long=is_too_long, spread=spread)
    return out


def read_set(out):
    """The records of a prepared set, by name."""
    import tensorflow_datasets as tfds

    found = tfds.builder_from_directory(str(out)).as_data_source(split="train")
    return {record["name"].decode(): record for record in found}


def quarantine(out):
    lines = (out / prepare.QUARANTINE).read_text(encoding="utf-8").splitlines()
    return {line["name"]: line["reason"] for line in map(json.loads, lines)}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def one_clip(folder, video=None, caption="a clip"):
    folder.mkdir(exist_ok=True)
    (folder / "a.mp4").write_bytes(clips.h264(clips.texture(0) if video is None else video, 24))
    (folder / "a.txt").write_text(caption)
    return folder


def write_table(path, rows):
    """A table of rows (file, caption), in the form and with the column names of one of the tools that write such."""
    kind = path.suffix
    if kind in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, delimiter={".csv": ",", ".tsv": "\t"}[kind])
            writer.writerows([("path", "text", "num_frames"), *((*row, 1) for row in rows)])
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps({"file_name": n, "caption": c}) + "\n" for n, c in rows))
    elif kind == ".json":
        path.write_text(json.dumps([{"path": n, "cap": [c, "other"]} for n, c in rows]))
    else:
        parquet.write_table(pyarrow.table({"video": [n for n, _ in rows], "text": [c for _, c in rows]}), path)


def add_to_tar(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def command(folder, out, *more):
    return [
        "ivideo", "--config=configs/base.py:small", "--mode=prepare_data", f"--input={folder}", f"--out={out}", *more
    ]  # fmt: skip

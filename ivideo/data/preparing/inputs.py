"""Finds the files to prepare and their captions: in folders, tables, text files, tars and sets of TFDS.

Nothing is decoded here. What cannot be used, such as a table's row without a file, is listed with its reason.
"""

import glob
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ivideo import files
from ivideo.data.preparing import tables, tars, tfds_sets
from ivideo.data.preparing.items import EXTENSIONS, Item, Rejected, caption_of_file, ending, printable, templates, words
from ivideo.errors import UserError

PAIRS = (("videos.txt", "videos"), ("video.txt", "videos"))  # lists of files, line by line with a list of captions
CAPTION_LISTS = ("prompt.txt", "prompts.txt", "captions.txt", "caption.txt")
_EXPECTED = "expected a folder, a .csv, .tsv, .json, .jsonl or .parquet table, .tar files, or tfds:NAME"


class Found(NamedTuple):
    """The files of an input, in an order that does not depend on the machine, and what is left out of it."""

    items: list[Item | tfds_sets.Record]
    rejected: list[Rejected]


def find(
    path: str,
    media: str,
    *,
    label_template: str = "",
    split: str = "train",
    caption_feature: str = "",
    index: Callable | None = None,
) -> Found:
    """Finds the files of `media`, 'video' or 'image', in a folder, a table, tars or a pattern of them, or a TFDS set.

    A folder's own table, lists or tars are used if it has any. Otherwise its files are searched at every depth, each
    with a .txt or .json of the same name beside it. A file with neither gets a caption made from the name of its
    folder by `label_template`, such as 'a video of {label}', if that is not empty; several templates, with | between
    them, make several captions. `split` and `caption_feature` are of TFDS sets (`tfds_sets.find`). `index` lists
    tars (`tars.find`). UserError where nothing is found.
    """
    if tfds_sets.is_set(path):
        found = tfds_sets.find(path, media, split=split, caption_feature=caption_feature, label_template=label_template)
    elif files.in_bucket(path):
        paths = tars.matching(path)
        found = tars.find(paths, media, root=os.path.dirname(paths[0]) if paths else "", index=index)
    elif any(character in path for character in "*?[") and not os.path.exists(path):
        found = tars.find(sorted(glob.glob(path)), media, root=os.path.dirname(path), index=index)
    elif os.path.isdir(path):
        found = _in_folder(path, media, label_template, index)
    elif not os.path.isfile(path):
        raise UserError(f"--input={path} does not exist: {_EXPECTED}")
    elif path.endswith(tables.EXTENSIONS):
        found = tables.find(path, media)
    elif path.endswith(".tar"):
        found = tars.find([path], media, root=os.path.dirname(path), index=index)
    else:
        raise UserError(f"--input={path} is of no known kind: {_EXPECTED}")
    items, rejected = found
    if not items and not rejected:
        raise UserError(f"--input={path} has no {media}s: {_EXPECTED}; {_hint(path, media)}")
    return Found(sorted(items), sorted(rejected))


def _hint(path: str, media: str) -> str:
    if files.in_bucket(path):
        return "of a bucket only .tar files are read, in one folder"
    other = "image" if media == "video" else "video"
    if os.path.isdir(path) and next(_walk(path, other), None):
        return f"it has {other}s, which --config.prepare.media={other} prepares"
    return f"the names of {media}s end in {', '.join(EXTENSIONS[media])}"


def _in_folder(folder: str, media: str, label_template: str, index: Callable | None):
    names = sorted(os.listdir(folder))
    if own_tables := [name for name in names if name.endswith(tables.EXTENSIONS) and not name.startswith(".")]:
        known = [name for name in own_tables if tables.has_columns(os.path.join(folder, name))]
        if len(known) > 1:
            raise UserError(f"--input={folder} has {len(known)} tables, {', '.join(known[:3])}, …: give one of them")
        if known:
            return tables.find(os.path.join(folder, known[0]), media)
    for list_name, inside in PAIRS:
        captions = [name for name in CAPTION_LISTS if name in names]
        if list_name in names and captions:
            return _of_lists(folder, list_name, captions[0], inside)
    if own_tars := [os.path.join(folder, name) for name in names if name.endswith(".tar")]:
        return tars.find(own_tars, media, root=folder, index=index)
    return _of_sidecars(folder, media, label_template)


def _of_lists(folder: str, list_name: str, captions_name: str, inside: str):
    """A list of files and one of captions, which belong together line by line."""
    lines = []
    for name in (list_name, captions_name):
        text = files.read_bytes(os.path.join(folder, name)).decode("utf-8-sig", "replace")
        lines.append([line.strip() for line in text.splitlines()])
    paths, captions = lines
    if len(paths) != len(captions):
        raise UserError(
            f"--input={folder}: {list_name} has {len(paths)} lines and {captions_name} has {len(captions)}, expected "
            "the same number: line n of one belongs to line n of the other"
        )
    pairs = [(path, [caption]) for path, caption in zip(paths, captions, strict=True) if path]
    return tables.joined(folder, pairs, rejected=[], inside=inside)


def _of_sidecars(folder: str, media: str, label_template: str):
    items, rejected = [], []
    for path in _walk(folder, media):
        name = printable(os.path.relpath(path, folder))
        try:
            captions = _sidecar(path)
        except ValueError as e:
            rejected.append(Rejected(name, "caption", str(e)))
            continue
        label = os.path.basename(os.path.dirname(path))
        if not captions and label_template:
            captions = [one.replace("{label}", words(label)) for one in templates(label_template)]
        items.append(Item(name, path, captions=tuple(captions)))
    return items, rejected


def _walk(folder: str, media: str) -> Iterator[str]:
    """The media files at every depth. Names that begin with a dot, such as macOS's copies of attributes, are not."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if ending(name) in EXTENSIONS[media] and not name.startswith("."):
                yield os.path.join(parent, name)


def _sidecar(path: str) -> list[str]:
    """The captions in the .txt or .json beside a file. ValueError where it cannot be read."""
    stem = os.path.splitext(path)[0]
    for extension in (".txt", ".caption", ".json"):
        for beside in (stem + extension, path + extension):
            if os.path.isfile(beside):
                return caption_of_file(os.path.basename(beside), files.read_bytes(beside))
    return []

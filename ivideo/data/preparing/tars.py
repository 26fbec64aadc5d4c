"""Finds files and captions inside WebDataset tars. A tar is read once; later its files are read at their offsets."""

import fnmatch
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from ivideo import files
from ivideo.data.preparing.items import EXTENSIONS, Item, Rejected, caption_of_file, ending, printable

_TEXTS = ("txt", "caption", "cap", "json")


class Tar(NamedTuple):
    """A tar, on this machine or in a bucket, its name in messages, and which files of it are wanted."""

    path: str
    name: str
    media: str


def find(
    paths: list[str], media: str, *, root: str, index: Callable | None = None
) -> tuple[list[Item], list[Rejected]]:
    """The files of `media` in tars, each with the .txt or .json of the same name up to its first dot.

    `index`: lists several `Tar`s, as `in_tar` lists one.
    """
    tars = [Tar(path, printable(os.path.relpath(path, root or ".")), media) for path in paths]
    items, rejected = [], []
    for found in itertools.chain.from_iterable(index(tars) if index else map(in_tar, tars)):
        (items if isinstance(found, Item) else rejected).append(found)
    return items, rejected


def matching(path: str) -> list[str]:
    """The tars of a pattern or a folder in a bucket, sorted."""
    folder, _, pattern = path.rpartition("/")
    if not pattern.endswith(".tar"):
        folder, pattern = path.rstrip("/"), "*.tar"
    return [f"{folder}/{name}" for name in fnmatch.filter(files.list_names(folder), pattern)]


def in_tar(wanted: Tar) -> Iterator[Item | Rejected]:
    """Yields an Item or a Rejected for each file of `media`, and a Rejected for a tar that is damaged."""
    path, tar_name, media = wanted
    members, captions, bad, problem = {}, {}, {}, ""
    try:
        with files.open_read(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                if not member.isfile() or base.startswith("."):
                    continue
                if ending(base) in EXTENSIONS[media]:
                    members[f"{folder}/{base}"] = (f"{folder}/{key}", member.offset_data, member.size)
                elif extension.lower() in _TEXTS:
                    try:
                        found = caption_of_file(base, tar.extractfile(member).read())
                        captions.setdefault(f"{folder}/{key}", found)
                    except ValueError as e:
                        bad[f"{folder}/{key}"] = str(e)
            if not _ends(file):  # the library takes a tar for whole if it ends inside a header
                problem = "it has no end mark"
    except (tarfile.TarError, OSError, EOFError) as e:
        problem = str(e)
    if problem:
        detail = f"{problem}: the files before the damage are used; expected an uncompressed, whole tar"
        yield Rejected(tar_name, "tar", detail)
    for name, (key, offset, size) in members.items():
        full = printable(f"{tar_name}/{name.lstrip('/')}")
        if key in bad and not captions.get(key):
            yield Rejected(full, "caption", bad[key])
        else:
            yield Item(full, path, offset, size, tuple(captions.get(key, ())))


def _ends(file: IO[bytes]) -> bool:
    """Whether a tar ends with a block of zeros, as whole ones do."""
    size = file.seek(0, os.SEEK_END)
    file.seek(-min(512, size), os.SEEK_END)
    return not any(file.read())

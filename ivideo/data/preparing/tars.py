"""Finds files and captions inside WebDataset tars. A tar is read once; later its files are read at their offsets."""

import os
import tarfile

from ivideo.data.preparing.items import EXTENSIONS, Item, Rejected, caption_of_file, ending, printable

_TEXTS = ("txt", "caption", "cap", "json")


def find(paths: list[str], media: str, *, root: str) -> tuple[list[Item], list[Rejected]]:
    """The files of `media` in tars, each with the .txt or .json of the same name up to its first dot."""
    items, rejected = [], []
    for path in paths:
        for found in _in_tar(path, media, printable(os.path.relpath(path, root or "."))):
            (items if isinstance(found, Item) else rejected).append(found)
    return items, rejected


def _in_tar(path: str, media: str, tar_name: str):
    """Yields an Item or a Rejected for each file of `media`, and a Rejected for a tar that is damaged."""
    members, captions, bad, problem = {}, {}, {}, ""
    try:
        with tarfile.open(path, "r:") as tar:
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
        if not _ends(path):  # the library takes a tar for whole if it ends inside a header
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


def _ends(path: str) -> bool:
    """Whether a tar ends with a block of zeros, as whole ones do."""
    with open(path, "rb") as f:
        f.seek(-min(512, os.path.getsize(path)), os.SEEK_END)
        return not any(f.read())

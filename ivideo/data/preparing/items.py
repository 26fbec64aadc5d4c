"""What is prepared: files, in folders or inside tars, with their captions."""

import json
import os
from typing import NamedTuple

from ivideo import files
from ivideo.prompts import one_line

EXTENSIONS = {
    "video": (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".gif"),
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
}
FILES = {  # names of a table's column, or of a JSON object's value, that holds the file
    "video": ("video", "path", "file_name", "media_path", "video_path", "filename", "file"),
    "image": ("image", "path", "file_name", "media_path", "image_path", "filename", "file"),
}
CAPTIONS = ("captions", "caption", "text", "cap", "prompt")  # likewise, of its captions


class Item(NamedTuple):
    """A file to prepare: its name in messages and in the set, and where it is.

    It is the whole file at `path`, or if `size` is not negative the bytes from `offset` on, as inside a tar.
    """

    name: str
    path: str
    offset: int = 0
    size: int = -1
    captions: tuple[str, ...] = ()

    def read(self) -> bytes:
        """The file's bytes. OSError where they cannot be read, or there are fewer."""
        data = files.read_bytes(self.path, self.offset, None if self.size < 0 else self.offset + self.size)
        if 0 <= self.size != len(data):
            raise OSError(f"{self.path} has {len(data)} of the file's {self.size} bytes: the tar is truncated")
        return data

    def read_captions(self) -> list[str]:
        """The captions, which were read when the file was found."""
        return list(self.captions)


class Rejected(NamedTuple):
    """What is left out: the name of a file or a table's row, why in one word, and in detail."""

    name: str
    reason: str
    detail: str


def ending(name: str) -> str:
    """A name's extension in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def printable(name: str) -> str:
    """A file's name as valid Unicode with / between folders."""
    return name.replace(os.sep, "/").encode(errors="surrogateescape").decode(errors="backslashreplace")


def texts(value) -> list[str]:
    """A table's or an object's captions: a text, a list of texts, or nothing."""
    values = value if isinstance(value, list | tuple) else [value]
    return [text for value in values if isinstance(value, str) and (text := one_line(value.replace("\0", "")))]


def templates(text: str) -> tuple[str, ...]:
    """The templates of captions in `config.prepare.label_template`."""
    return tuple(one.strip() for one in text.split("|"))


def words(label: str) -> str:
    """A class's name as words: 'ApplyEyeMakeup' and 'apply_eye_makeup' are 'apply eye makeup'."""
    spaced = "".join(f" {c}" if c.isupper() and i and label[i - 1].islower() else c for i, c in enumerate(label))
    return one_line(spaced.replace("_", " ").replace("-", " ")).lower()


def captions_in(row: dict) -> list[str]:
    """The captions of a table's row or an object: the first of the known names that has any."""
    return next((found for name in CAPTIONS if (found := texts(row.get(name)))), [])


def caption_of_file(name: str, data: bytes) -> list[str]:
    """The captions in a .txt, or in an object in a .json. ValueError where it cannot be read."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{name} is not UTF-8 ({e.reason}): convert it") from e
    if not name.lower().endswith(".json"):
        return texts(text)
    try:
        row = json.loads(text)
    except ValueError as e:
        raise ValueError(f"{name} is not JSON ({e}): write it again") from e
    return captions_in(row) if isinstance(row, dict) else texts(row)

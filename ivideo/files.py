"""Files that are whole or not there."""

import json
import os

from ivideo.errors import UserError

BUCKET = "gs://"  # what the path of an object in Google's cloud storage begins with


def write_text(path, text: str) -> None:
    """Writes a file under a temporary name and renames it: another process sees the old one or the new one."""
    temporary = f"{path}.tmp{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(temporary, path)


def read_json(path):
    """A JSON file's value; UserError where it is damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): copy it again") from e


def write_json(path, value) -> None:
    """Writes a value as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")

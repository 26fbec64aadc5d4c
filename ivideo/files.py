"""Files that are whole or not there."""

import json
import os


def write_text(path, text: str) -> None:
    """Writes a file under a temporary name and renames it: another process sees the old one or the new one."""
    temporary = f"{path}.tmp{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(temporary, path)


def write_json(path, value) -> None:
    """Writes a value as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")

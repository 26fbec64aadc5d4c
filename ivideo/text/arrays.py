"""Arrays in checkpoint files, read when they are asked for, and the rule that no link leads out of a checkpoint."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

import numpy as np
from safetensors import SafetensorError

from ivideo.errors import UserError
from ivideo.files import in_bucket

EXPECTED = (
    "expected a T5X directory (checkpoint_STEP with its file `checkpoint`), a Hugging Face directory (config.json and "
    "safetensors), or a .safetensors file of this package"
)


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file: its shape, the name of its dtype, and `read(index)`, which reads all of it or one index."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]


def read_values(path: str, name: str, array: StoredArray, index=()) -> np.ndarray:
    """The array's values, or those at `index`. UserError where the data of `name` in the checkpoint is damaged."""
    try:
        return array.read(index)
    except (ValueError, OSError, SafetensorError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{path}: {name} cannot be read ({reason}): copy the checkpoint again") from e


def inside(root: str, name: str) -> str:
    """The path of a file or directory of the checkpoint `root`.

    UserError where it is a link that leads out of the checkpoint, or a directory that holds such a link.
    """
    if in_bucket(root):  # buckets have no links
        return os.path.join(root, name)
    path, allowed = os.path.join(root, name), [pathlib.Path(os.path.realpath(root))]
    # Hugging Face's cache links the files of hub/models--…/snapshots/REVISION to hub/models--…/blobs
    if allowed[0].parent.name == "snapshots":
        allowed.append(allowed[0].parent.parent / "blobs")
    below = (os.path.join(at, entry) for at, folders, names in os.walk(path) for entry in (*folders, *names))
    for entry in (path, *below):
        target = pathlib.Path(os.path.realpath(entry))
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise UserError(f"{entry} is a link to {target}, outside of the checkpoint: put the file itself there")
    return path

"""Detects damaged checkpoints: WORKDIR/digests/STEP.json has the SHA-256 of each file in WORKDIR/checkpoints/STEP."""

import concurrent.futures
import contextlib
import json
import logging
import pathlib

from ivideo.files import digest, write_json

log = logging.getLogger("ivideo")

READERS = 8  # files that are read at the same time

WHOLE, UNCHECKED = "whole", "unchecked"  # results of `compare` for a checkpoint without a known problem


def path(workdir, step) -> pathlib.Path:
    """The path of a checkpoint's digests."""
    return pathlib.Path(workdir) / "digests" / f"{step}.json"


def write(workdir, step: int, *, kept) -> None:
    """Writes the digests of a checkpoint, and deletes the digests of steps that are not in `kept`."""
    target = path(workdir, step)
    target.parent.mkdir(exist_ok=True)
    write_json(target, folder_digests(_checkpoint(workdir, step)))
    names = {path(workdir, s).name for s in kept}
    for other in target.parent.iterdir():
        if other.name not in names:
            other.unlink()


def forget(workdir, step) -> None:
    """Deletes the digests of a checkpoint, if there are any."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path(workdir, step).unlink()


def compare(workdir, step: int, folder=None) -> str:
    """Compares a checkpoint's files with its digests. The files may be read from another `folder`.

    Returns WHOLE, UNCHECKED if the checkpoint has no digests, or a description of the first problem.
    """
    wanted = _read(workdir, step)
    if wanted is None:
        return UNCHECKED
    try:
        found = folder_digests(folder or _checkpoint(workdir, step))
    except OSError as e:
        return f"it cannot be read: {e}"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} was not there when the checkpoint was written"
        if wanted[name] != found[name]:
            return f"{name} has changed since it was written"
    return WHOLE


def folder_digests(folder) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by relative path. Files are read in parallel, and in chunks."""
    folder = pathlib.Path(folder)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        return dict(zip((str(file.relative_to(folder)) for file in files), pool.map(digest, files), strict=True))


def _checkpoint(workdir, step):
    return pathlib.Path(workdir) / "checkpoints" / str(step)


def _read(workdir, step):
    """A checkpoint's digests. None if they were never written, or if they are damaged."""
    file = path(workdir, step)
    try:
        found = json.loads(file.read_text())
        if isinstance(found, dict) and found:
            return found
        problem = f"it holds {str(found)[:50]}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        problem = f"{type(e).__name__}: {e}"
    log.warning("%s is damaged (%s): only Orbax's own checks remain for checkpoint %s", file, problem, step)
    return None

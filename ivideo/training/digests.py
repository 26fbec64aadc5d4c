"""Digests of checkpoints: WORKDIR/digests/STEP.json holds the SHA-256 of every file of WORKDIR/checkpoints/STEP."""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import pathlib

from ivideo.files import write_json

log = logging.getLogger("ivideo")

WHOLE, UNCHECKED = "whole", "unchecked"  # what is said of a checkpoint with which nothing is found wrong


def path(workdir, step) -> pathlib.Path:
    """The file with the digests of a checkpoint."""
    return pathlib.Path(workdir) / "digests" / f"{step}.json"


def write(workdir, step: int, *, kept) -> None:
    """Writes the digests of a checkpoint, and deletes those of steps that are not `kept`."""
    target = path(workdir, step)
    target.parent.mkdir(exist_ok=True)
    write_json(target, of_folder(_checkpoint(workdir, step)))
    names = {path(workdir, s).name for s in kept}
    for other in target.parent.iterdir():
        if other.name not in names:
            other.unlink()


def forget(workdir, step) -> None:
    """Deletes the digests of a checkpoint, if there are any."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path(workdir, step).unlink()


def compare(workdir, step: int, folder=None) -> str:
    """WHOLE, UNCHECKED where the checkpoint has no digests, or what is wrong with its files, which are in `folder`."""
    wanted = _read(workdir, step)
    if wanted is None:
        return UNCHECKED
    try:
        found = of_folder(folder or _checkpoint(workdir, step))
    except OSError as e:
        return f"it cannot be read: {e}"
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} was not there when it was written"
        if wanted[name] != found[name]:
            return f"{name} has changed since it was written"
    return WHOLE


def of_folder(folder) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its relative path; several files at a time, none whole in memory."""
    folder = pathlib.Path(folder)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip((str(file.relative_to(folder)) for file in files), pool.map(_of_file, files), strict=True))


def _of_file(file):
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _checkpoint(workdir, step):
    return pathlib.Path(workdir) / "checkpoints" / str(step)


def _read(workdir, step):
    """The digests that were written for a checkpoint. None where it was not finished, or where they are damaged."""
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
    log.warning("%s is damaged (%s): checkpoint %s is checked by Orbax alone", file, problem, step)
    return None

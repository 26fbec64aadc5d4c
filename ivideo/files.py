"""Reads files and writes them atomically, on this machine or in a Google Cloud Storage bucket (gs://BUCKET/…)."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid

from ivideo.errors import UserError

BUCKET = "gs://"  # the prefix of paths in a bucket
PROBE_BYTES = 2**20  # room that an output folder must have


def expand_home(path: str) -> str:
    """Replaces ~ or ~NAME at the start of a path by the user's home folder. UserError where there is none.

    Shells expand ~ in `--out ~/x.mp4`, but not in `--out=~/x.mp4`, and configs do not expand it.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise UserError(f"{path}: {user} has no home folder; write ./{path} for a file whose name begins with ~")
    return expanded


def in_bucket(path) -> bool:
    """Whether a path is in a bucket; other paths are on this machine."""
    return str(path).startswith(BUCKET)


def kvstore(folder: str) -> dict:
    """A folder as the `kvstore` of a TensorStore spec."""
    if in_bucket(folder):
        bucket, _, inner = folder.removeprefix(BUCKET).partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{inner.rstrip('/')}/".lstrip("/")}
    return {"driver": "file", "path": f"{os.path.abspath(folder).rstrip('/')}/"}


def exists(path: str) -> bool:
    """Whether a file exists, or on this machine a folder. OSError where a bucket cannot be reached."""
    if not in_bucket(path):
        return os.path.exists(path)
    name = os.path.basename(path)
    import tensorstore as ts

    return bool(_call_store(path, lambda store: store.list(range=ts.KvStore.KeyRange(name, name + "\0"))))


def list_names(folder: str) -> list[str]:
    """The names in a folder, sorted. A folder in a bucket that does not exist is empty."""
    if not in_bucket(folder):
        return sorted(os.listdir(folder))
    keys = _call_store(f"{folder.rstrip('/')}/", lambda store: store.list())
    return sorted({key.decode().partition("/")[0] for key in keys})


def open_read(path: str):
    """Opens a file for reading bytes. A file in a bucket is read into memory first."""
    return io.BytesIO(read_bytes(path)) if in_bucket(path) else open(path, "rb")


def read_bytes(path: str, begin: int = 0, end: int | None = None) -> bytes:
    """A file's bytes, or those from `begin` to `end`. OSError where the file cannot be read."""
    if not in_bucket(path):
        with open(path, "rb") as f:
            f.seek(begin)
            return f.read() if end is None else f.read(end - begin)
    if end == begin:
        return b""  # TensorStore takes an empty range for the rest of the file
    options = {} if begin == 0 and end is None else {"byte_range": slice(begin, end)}
    result = _call_store(path, lambda store: store.read(os.path.basename(path), **options))
    if result.state != "value":
        raise FileNotFoundError(2, "there is no such file", path)
    return result.value


def digest(path) -> str:
    """The SHA-256 of a file of this machine, in hexadecimal. The file is read in chunks."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def refuse_existing(paths: list[str], *, overwrite: bool, hint: str = "") -> None:
    """UserError where one of the paths exists and `overwrite` is off, or is a folder. `hint` ends the message."""
    for path in paths:
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder: choose another --out")
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"{path} exists: choose another --out, or pass --overwrite to replace it{hint}")


@contextlib.contextmanager
def atomic_write(path: str):
    """Yields a temporary name to write to. The file appears at `path` when the block ends, and not if it fails."""
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, os.path.basename(path))
            yield temporary
            with open(temporary, "rb") as f:
                _call_store(path, lambda store: store.write(os.path.basename(path), f.read()))
        return
    # Unique, unlike a process number, which a writer on another machine may share
    temporary = f"{path}.tmp{uuid.uuid4().hex}"
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())  # otherwise a crash of the machine after the rename could leave an empty file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def remove(path: str) -> None:
    """Removes a file, or a folder with all that is in it. In a bucket both may be missing."""
    if not in_bucket(path):
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        return
    import tensorstore as ts

    name = os.path.basename(path.rstrip("/"))
    for span in (ts.KvStore.KeyRange(name, name + "\0"), ts.KvStore.KeyRange(f"{name}/", f"{name}0")):  # 0 follows /
        _call_store(path.rstrip("/"), lambda store, span=span: store.delete_range(span))


def write_text(path, text: str) -> None:
    """Writes a file atomically: other processes see the old content or the new."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write(text)


def read_json(path):
    """The object in a JSON file. UserError where the file is damaged, or its value is not an object."""
    try:
        value = json.loads(read_bytes(path))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): copy it again") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {str(value)[:50]}, expected an object with names: copy it again")
    return value


def write_json(path, value) -> None:
    """Writes a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def prepare_folders(paths: list[str]) -> None:
    """Makes the folders of files that will be written, and checks with a temporary file that each has room.

    UserError if a file's name is too long, or if a folder cannot be made or written to.
    """
    for path in paths:
        try:
            os.lstat(path)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise UserError(f"{path} cannot be written ({e.strerror}): choose another --out") from e
    for folder in {os.path.dirname(os.path.realpath(path)) for path in paths}:  # a link's target folder
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as f:
                f.write(bytes(PROBE_BYTES))
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            advice = "make room" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another --out"
            raise UserError(f"{folder} cannot be written to ({e.strerror}): {advice}") from e


def _call_store(path: str, operation):
    """The result of an operation of TensorStore on the folder of a path in a bucket. OSError where it fails."""
    import tensorstore as ts

    try:
        return operation(ts.KvStore.open(kvstore(os.path.dirname(path))).result()).result()
    except ValueError as e:
        raise OSError(f"{path} cannot be reached ({' '.join(str(e).split())[:300]})") from e

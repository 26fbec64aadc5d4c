"""Files that are whole or not there, on this machine or in a bucket of Google's cloud storage (gs://BUCKET/…)."""

import contextlib
import errno
import io
import json
import os
import tempfile
import uuid

from ivideo.errors import UserError

BUCKET = "gs://"  # what a path in a bucket begins with
PROBE_BYTES = 2**20  # room that an output folder must have


def expand_home(path: str) -> str:
    """A path that a user gave, with ~ or ~NAME at its head as that user's home folder; UserError where there is none.

    Shells expand it in `--out ~/x.mp4` but not in `--out=~/x.mp4`, nor do configs.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0]
        raise UserError(f"{path}: {user} has no home folder; write ./{path} for a file whose name begins with ~")
    return found


def in_bucket(path) -> bool:
    """Whether a path is of an object in a bucket; others are of this machine's files."""
    return str(path).startswith(BUCKET)


def kvstore(folder: str) -> dict:
    """TensorStore's name of a folder, for its drivers."""
    if in_bucket(folder):
        bucket, _, inner = folder.removeprefix(BUCKET).partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{inner.rstrip('/')}/".lstrip("/")}
    return {"driver": "file", "path": f"{os.path.abspath(folder).rstrip('/')}/"}


def exists(path: str) -> bool:
    """Whether there is a file of this path; on this machine, or a folder. OSError where a bucket cannot be asked."""
    if not in_bucket(path):
        return os.path.exists(path)
    name = os.path.basename(path)
    import tensorstore as ts

    return bool(_asked(path, lambda store: store.list(range=ts.KvStore.KeyRange(name, name + "\0"))))


def list_names(folder: str) -> list[str]:
    """The names in a folder, sorted; none in a bucket's that is not there."""
    if not in_bucket(folder):
        return sorted(os.listdir(folder))
    below = _asked(f"{folder.rstrip('/')}/", lambda store: store.list())
    return sorted({name.decode().partition("/")[0] for name in below})


def open_read(path: str):
    """A file open for reading bytes; of a bucket, in memory."""
    return io.BytesIO(read_bytes(path)) if in_bucket(path) else open(path, "rb")


def read_bytes(path: str, begin: int = 0, end: int | None = None) -> bytes:
    """A file's bytes, or a part of them. OSError where there are none."""
    if not in_bucket(path):
        with open(path, "rb") as f:
            f.seek(begin)
            return f.read() if end is None else f.read(end - begin)
    part = {} if begin == 0 and end is None else {"byte_range": slice(begin, end)}
    found = _asked(path, lambda store: store.read(os.path.basename(path), **part))
    if found.state != "value":
        raise FileNotFoundError(2, "there is no such file", path)
    return found.value


def refuse_existing(paths: list[str], *, overwrite: bool, hint: str = "") -> None:
    """UserError where one of the files is there and is not to be replaced, or cannot be since it is a folder."""
    for path in paths:
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder: choose another --out")
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"{path} exists: choose another --out, or pass --overwrite to replace it{hint}")


@contextlib.contextmanager
def atomic_write(path: str):
    """The name of a file to write, which is at `path` once the block has ended, and not there if it fails."""
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, os.path.basename(path))
            yield temporary
            with open(temporary, "rb") as f:
                _asked(path, lambda store: store.write(os.path.basename(path), f.read()))
        return
    # Of this writer alone: those of other machines may have the same process number
    temporary = f"{path}.tmp{uuid.uuid4().hex}"
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())  # a machine that is lost after the renaming would leave an empty file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def write_text(path, text: str) -> None:
    """Writes a file that another process sees as the old one or the new one."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write(text)


def read_json(path):
    """A JSON file's object; UserError where it is damaged, or holds something else."""
    try:
        value = json.loads(read_bytes(path))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): copy it again") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {str(value)[:50]}, expected an object with names: copy it again")
    return value


def write_json(path, value) -> None:
    """Writes a value as JSON, as `write_text` does."""
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


def _asked(path: str, question):
    """What TensorStore answers about the folder that a path in a bucket is in; OSError where it cannot."""
    import tensorstore as ts

    try:
        return question(ts.KvStore.open(kvstore(os.path.dirname(path))).result()).result()
    except ValueError as e:
        raise OSError(f"{path} cannot be reached ({' '.join(str(e).split())[:300]})") from e

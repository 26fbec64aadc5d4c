"""The tasks of mode prepare_data: each measures some files or writes a shard, and its result is one file.

A task depends on its arguments alone. So any process of any machine can run it, and its result is the same.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ivideo import files
from ivideo.data.pictures import VideoError
from ivideo.data.preparing import measuring, pool, records, shots, tars
from ivideo.data.preparing.items import Item, Rejected
from ivideo.errors import UserError

LARGEST = 2**30  # bytes: a record must be smaller than 2 GiB, and a worker holds a file in memory


class MeasureTask(NamedTuple):
    """Files to measure, and the file that their measures are written to.

    `splitting`: the difference of frames at which videos are divided, and the shortest shot, in seconds. None: they are
    not divided. `timeout`: seconds after which the process ends if a file is not measured. `gop`: frames from each key
    frame to the next, with which all videos are encoded again; 0: only those that are divided are encoded.
    """

    path: str
    media: str
    items: list[tuple[int, Item]]  # with their numbers
    splitting: tuple[float, float] | None = None
    timeout: float = 0.0
    gop: int = 0


class WriteTask(NamedTuple):
    """A shard to write: its path, and its files with their measures."""

    path: str
    media: str
    rows: list[tuple[Item, dict]]


class IndexTask(NamedTuple):
    """A tar to list, and the file that the list is written to."""

    path: str
    tar: tars.Tar

    def read(self) -> list[Item | Rejected]:
        """The list that was written."""
        kinds = {kind.__name__: kind for kind in (Item, Rejected)}
        found = json.loads(files.read_bytes(self.path))
        # Captions are a tuple in items that were not written, too
        return [kinds[kind](*(tuple(value) if isinstance(value, list) else value for value in one))
                for kind, one in found]  # fmt: skip


def index_all(tasks: list[IndexTask], run: Callable) -> Iterator[IndexTask]:
    """Runs tasks by `run` and yields each. UserError where the process of one ends."""
    for task, result in run(index, tasks):
        if isinstance(result, pool.Ended):
            raise UserError(f"{task.tar.path} could not be listed, since its process ended: is memory full?")
        yield task


def index(task: IndexTask) -> None:
    """Lists a tar."""
    found = [(type(one).__name__, one) for one in tars.in_tar(task.tar)]
    files.write_text(task.path, json.dumps(found))


def measure_all(tasks: list[MeasureTask], run: Callable) -> Iterator[MeasureTask]:
    """Runs tasks by `run`, such as `pool.run`, and yields each. Files that end their process get rows that say so."""
    ended = []
    for task, result in run(measure, tasks):
        if isinstance(result, pool.Ended):
            ended.append((task, result))
        else:
            yield task
    for task, result in ended:
        _write_rows(task.path, _apart(task, result, run))
        yield task


def write_all(tasks: list[WriteTask], run: Callable) -> Iterator[WriteTask]:
    """Runs tasks by `run` and yields each. UserError where the process of one ends."""
    for task, result in run(write, tasks):
        if isinstance(result, pool.Ended):
            raise UserError(f"{task.path} could not be written, since its process ended: is memory full?")
        yield task


def _apart(task: MeasureTask, ended: pool.Ended, run: Callable) -> list[dict]:
    """The rows of a task that ended its process: its halves are run, and so on, down to the files that cause it."""
    if len(task.items) == 1:
        ((number, item),) = task.items
        reason, detail = "crashed", "the process that decoded it ended: the decoder crashed, or memory was full"
        row = _described(number, item) | {"reason": reason, "detail": detail}
        if ended.timed_out:
            detail = f"not read after {task.timeout:g} seconds (config.prepare.timeout)"
            row |= {"reason": "timeout", "detail": detail, "timeout": task.timeout}
        return [row]
    rows, middle = [], len(task.items) // 2
    for part in (task.items[:middle], task.items[middle:]):
        half = task._replace(path=f"{task.path}.{part[0][0]}-{part[-1][0]}", items=part)
        ((_, result),) = run(measure, [half])
        rows += _apart(half, result, run) if isinstance(result, pool.Ended) else read_rows(half)
    return rows


def read_rows(task: MeasureTask) -> list[dict]:
    """The rows that a task wrote."""
    lines = files.read_bytes(task.path).splitlines()
    return json.loads(b"[" + b",".join(lines) + b"]")  # at once, so that the rows share the names of their values


def measure(task: MeasureTask) -> int:
    """Measures a task's files and writes a line for each. Returns their number."""
    rows = []
    for number, item in task.items:
        with pool.limited(task.timeout):
            rows += _rows_of(task, number, item)
    _write_rows(task.path, rows)
    return len(rows)


def _rows_of(task: MeasureTask, number: int, item: Item) -> list[dict]:
    """The row of a file, or of each shot of a video that is divided."""
    row = _described(number, item)
    try:
        row["captions"] = item.read_captions()
    except ValueError as e:
        return [row | {"reason": "caption", "detail": str(e)}]
    except OSError as e:
        return [row | {"reason": "unreadable", "detail": str(e)}]
    row |= measured(item, task.media, task.splitting)
    if "reason" in row or task.media == "image" or (len(row["firsts"]) == 1 and not task.gop):
        return [row]
    try:
        return _shots_of(task, item, row)
    except (VideoError, OSError) as e:
        return [_described(number, item) | {"reason": "unreadable", "detail": str(e)}]


def _shots_of(task: MeasureTask, item: Item, row: dict) -> list[dict]:
    """The rows of a video's shots, or of the whole one. Those of enough length are encoded beside the task's file."""
    rows, (_, shortest) = [], task.splitting or (0, 0)
    times = list(itertools.pairwise(row["times"]))
    for k, data in enumerate(shots.split(_source(item), row["firsts"], gop=task.gop)):
        name = f"{row['name']}#{k:05}" if len(times) > 1 else row["name"]
        shot = {"index": row["index"], "name": name, "captions": row["captions"]}
        begin, end = times[k]
        if end - begin < shortest:
            detail = f"{end - begin:.2f} of {shortest:.2f} seconds, from {begin:.2f} on"
            rows.append(shot | {"reason": "short", "detail": detail})
            continue
        path = f"{task.path.removesuffix('.jsonl')}-{row['index']}-{k:05}.mp4"
        with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
            f.write(data)
        measures = measuring.measure_video(data)
        rows.append(shot | measures | {"bytes": len(data), "clip": os.path.basename(path)})
    return rows


def _write_rows(path: str, rows: list[dict]) -> None:
    files.write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def _described(number: int, item: Item) -> dict:
    return {"index": number, "name": item.name, "captions": list(item.captions)}


def _source(item: Item) -> str | bytes:
    """A file's path, or the bytes of one in a tar."""
    return item.path if item.size < 0 else item.read()


def measured(item: Item, media: str, splitting: tuple[float, float] | None = None) -> dict:
    """A file's measures and its size in bytes, or the reason why it cannot be used."""
    cut = splitting[0] if splitting else math.inf
    try:
        if (size := size_of(item)) >= LARGEST and not splitting:
            raise measuring.Refused("large", f"{size / 2**30:.2f} GiB: cut it, or set config.prepare.split_shots")
        source = _source(item) if media == "video" else item.read()
        measures = measuring.measure_video(source, cut=cut) if media == "video" else measuring.measure_image(source)
        if size >= LARGEST and len(measures["firsts"]) == 1:
            raise measuring.Refused("large", f"{size / 2**30:.2f} GiB in one shot: cut it into clips")
    except measuring.Refused as e:
        return {"reason": e.reason, "detail": str(e)}
    except (VideoError, OSError) as e:
        return {"reason": "unreadable", "detail": " ".join(str(e).split())[:500]}
    return measures | {"bytes": len(source) if isinstance(source, bytes) else size}


def size_of(item: Item) -> int:
    return item.size if item.size >= 0 else os.path.getsize(item.path)


def write(task: WriteTask) -> int:
    """Writes a shard. Returns the number of its records. UserError where a file has changed since it was measured."""

    def made():
        for item, row in task.rows:
            data = item.read()
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise UserError(f"{item.path} has changed since it was measured: prepare the set again in a new --out")
            yield records.record(task.media, row, data)

    records.write_shard(task.path, task.media, made())
    return len(task.rows)

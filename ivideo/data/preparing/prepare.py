"""Mode prepare_data: finds files, measures them, chooses among them, and writes a set that training reads.

Files are measured and shards written by tasks, each of which writes one file. So the same command continues after an
interruption, and the set's bytes do not depend on the number of workers.
"""

import collections
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

import tqdm

from ivideo import files
from ivideo.data.pictures import VideoError
from ivideo.data.preparing import inputs, measuring, pool, records, report, shots
from ivideo.data.preparing.choosing import REASONS, Limits, choose
from ivideo.data.preparing.items import Item, Rejected
from ivideo.errors import UserError

VERSION = 1  # of what is measured; a set that another version began is not continued
PLAN, QUARANTINE, REPORT = "plan.json", "quarantine.jsonl", "report.html"
WORK = ".unfinished"  # folder of measurements, until the set is finished
PER_TASK = 16  # files that a task measures
LARGEST = 2**30  # bytes: a record must be smaller than 2 GiB, and a worker holds a file in memory


class MeasureTask(NamedTuple):
    """Files to measure, and the file that their measures are written to.

    `splitting`: the difference of frames at which videos are divided, and the shortest shot, in seconds. None: they are
    not divided. `timeout`: seconds after which the process ends if a file is not measured.
    """

    path: str
    media: str
    items: list[tuple[int, Item]]  # with their numbers
    splitting: tuple[float, float] | None = None
    timeout: float = 0.0


class WriteTask(NamedTuple):
    """A shard to write: its path, and its files with their measures."""

    path: str
    media: str
    rows: list[tuple[Item, dict]]


def prepare(
    config, path: str, out: str, *, is_too_long: Callable[[str], bool] | None = None, run: Callable | None = None
) -> None:
    """Prepares the files of `path` (`inputs.find`) as a data set in the folder `out`, by `config.prepare`.

    A bad file never stops it: it is left out and listed with its reason in `out`/quarantine.jsonl. A report is in
    `out`/report.html. The same call resumes after an interruption. `is_too_long`: whether a caption has more tokens
    than the text encoder reads. `run` runs tasks, as `pool.run`. UserError, before anything is written, where there
    are no files, or `out` holds something else; also where no file is left.
    """
    media, limits = config.prepare.media, Limits.of(config)
    items, rejected = inputs.find(
        path, media, label_template=config.prepare.label_template, split=config.prepare.split,
        caption_feature=config.prepare.caption_feature,
    )  # fmt: skip
    run = run or functools.partial(pool.run, processes=config.prepare.workers)
    if not _begin(out, _plan(config, limits, items, rejected)):
        print(f"{out} is finished already: its report is {os.path.join(out, REPORT)}")
        return
    splitting = (limits.jump, limits.seconds) if config.prepare.split_shots and media == "video" else None
    rows = _measure(out, media, items, run, splitting, config.prepare.timeout)
    of_row = {row["name"]: _item(out, items, row) for row in rows}
    kept, left_out = choose(rows, limits, is_too_long=is_too_long)
    rejected = sorted([*rejected, *left_out])
    lines = [json.dumps(one._asdict(), ensure_ascii=False) for one in rejected]
    files.write_text(os.path.join(out, QUARANTINE), "".join(f"{line}\n" for line in lines))
    report.write(os.path.join(out, REPORT), media, kept, rejected, of_row)
    captions = dict.fromkeys(caption for row in kept for caption in row["captions"])
    files.write_text(os.path.join(out, records.CAPTIONS), "".join(f"{caption}\n" for caption in captions))
    if not kept:
        raise UserError(f"none of {len(items)} {media}s is left: {_counted(rejected)}. See {os.path.join(out, REPORT)}")
    shards = _shards(kept, config.prepare.shard_megabytes * 10**6)
    _write(out, media, of_row, shards, run)
    records.write_info(out, media, list(map(len, shards)), f"Prepared from {len(items)} {media}s.")
    shutil.rmtree(os.path.join(out, WORK))
    print(summary(out, media, kept, rejected))


def summary(out: str, media: str, kept: list[dict], rejected: list[Rejected]) -> str:
    """Describes a finished set in a few lines."""
    size = sum(row["bytes"] for row in kept) / 1e6
    length = f", {sum(row['seconds'] for row in kept) / 60:,.1f} minutes" if media == "video" else ""
    lines = [f"{out}: {len(kept):,} {media}s{length}, {size:,.1f} MB"]
    if rejected:
        lines.append(f"left out {len(rejected):,}: {_counted(rejected)}; {os.path.join(out, QUARANTINE)} lists them")
    lines.append(f"report: {os.path.join(out, REPORT)}")
    return "\n".join(lines)


def _counted(rejected: list[Rejected]) -> str:
    counts = collections.Counter(one.reason for one in rejected)
    return ", ".join(f"{counts[reason]:,} {reason}" for reason in REASONS if counts[reason])


def _plan(config, limits: Limits, items: list[Item], rejected: list[Rejected]) -> dict:
    """What determines the set's bytes, apart from the contents of the files."""
    listed = [(item.name, item.offset, _size(item), item.captions) for item in items]
    digest = hashlib.sha256(json.dumps([listed, rejected]).encode()).hexdigest()
    return {
        "version": VERSION,
        "files": digest,
        "media": config.prepare.media,
        "limits": limits._asdict(),
        "long_captions": config.prepare.long_captions,
        "split_shots": config.prepare.split_shots,
        "shard_megabytes": config.prepare.shard_megabytes,
    }


def _size(item: Item) -> int:
    return item.size if item.size >= 0 else os.path.getsize(item.path)


def _begin(out: str, plan: dict) -> bool:
    """Writes the plan of a new set to `out`, or checks that `out` has the same. Returns whether work is left."""
    path = os.path.join(out, PLAN)
    if os.path.exists(path):
        existing = files.read_json(path)
        if different := [name for name in plan if json.loads(json.dumps(plan[name])) != existing.get(name)]:
            raise UserError(
                f"--out={out} was begun with other {' and '.join(different)}: choose another folder, or remove it"
            )
        return not os.path.exists(os.path.join(out, records.INFO))
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"--out={out} holds something else: choose another folder, or an empty one")
    files.prepare_folders([path])
    files.write_json(path, plan)
    return True


def _item(out: str, items: list[Item], row: dict) -> Item:
    """Where the file of a row is: in the input, or for a shot in the folder of unfinished work."""
    return Item(row["name"], os.path.join(out, WORK, row["clip"])) if "clip" in row else items[row["index"]]


def _measure(out: str, media: str, items: list[Item], run: Callable, splitting, timeout: float) -> list[dict]:
    """The measures of all files, in order. Those that an earlier call wrote are read."""
    folder = os.path.join(out, WORK)
    os.makedirs(folder, exist_ok=True)
    numbered = list(enumerate(items))
    parts = [numbered[start : start + PER_TASK] for start in range(0, len(items), PER_TASK)]
    tasks = [
        MeasureTask(os.path.join(folder, f"{i:08}.jsonl"), media, part, splitting, timeout)
        for i, part in enumerate(parts)
    ]
    todo = [task for task in tasks if not os.path.exists(task.path)]
    with tqdm.tqdm(total=len(items), unit=media, desc="measuring", disable=None) as bar:
        bar.update(len(items) - sum(len(task.items) for task in todo))
        crashed = []
        for task, result in run(measure, todo):
            if isinstance(result, pool.Ended):
                crashed.append(task)
            bar.update(len(task.items))
        for task in crashed:
            _write_rows(task.path, _one_by_one(task, run))
    rows = []
    for task in tasks:
        rows += map(json.loads, files.read_bytes(task.path).decode().splitlines())
    return rows


def _one_by_one(task: MeasureTask, run: Callable) -> list[dict]:
    """The measures of files of which one or more end the process that decodes them, or take too long."""
    rows = []
    for number, item in task.items:
        part = task._replace(path=f"{task.path}.{number}", items=[(number, item)])
        ((_, result),) = run(measure, [part])
        if isinstance(result, pool.Ended):
            reason, detail = "crashed", "the process that decoded it ended: the decoder crashed, or memory was full"
            if result.timed_out:
                reason, detail = "timeout", f"not read after {task.timeout:g} seconds (config.prepare.timeout)"
            rows.append(_described(number, item) | {"reason": reason, "detail": detail})
        else:
            rows += map(json.loads, files.read_bytes(part.path).decode().splitlines())
    return rows


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
    if len(row.get("firsts", ())) == 1 or "reason" in row or task.media == "image":
        return [row]
    try:
        return _shots_of(task, item, row)
    except (VideoError, OSError) as e:
        return [_described(number, item) | {"reason": "unreadable", "detail": str(e)}]


def _shots_of(task: MeasureTask, item: Item, row: dict) -> list[dict]:
    """The rows of a video's shots. Those that are long enough are encoded beside the task's file."""
    rows, (_, shortest) = [], task.splitting
    times = list(itertools.pairwise(row["times"]))
    for k, data in enumerate(shots.split(_source(item), row["firsts"])):
        shot = {"index": row["index"], "name": f"{row['name']}#{k:05}", "captions": row["captions"]}
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
        if (size := _size(item)) >= LARGEST and not splitting:
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


def _shards(rows: list[dict], largest: int) -> list[list[dict]]:
    """Divides rows into shards of up to `largest` bytes, or of a single file."""
    shards, size = [[]], 0
    for row in rows:
        if shards[-1] and size + row["bytes"] > largest:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += row["bytes"]
    return shards


def _write(out: str, media: str, of_row: dict[str, Item], shards: list[list[dict]], run: Callable) -> None:
    tasks = []
    for i, rows in enumerate(shards):
        path = records.shard_path(out, i, len(shards))
        tasks.append(WriteTask(path, media, [(of_row[row["name"]], row) for row in rows]))
    todo = [task for task in tasks if not os.path.exists(task.path)]
    with tqdm.tqdm(total=len(shards), unit="shard", desc="writing", disable=None) as bar:
        bar.update(len(tasks) - len(todo))
        for task, result in run(write, todo):
            if isinstance(result, pool.Ended):
                raise UserError(f"{task.path} could not be written, since its process ended: is memory full?")
            bar.update()


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

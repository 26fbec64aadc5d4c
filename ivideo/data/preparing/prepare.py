"""Mode prepare_data: finds files, measures them, chooses among them, and writes a set that training reads.

Files are measured and shards written by tasks, each of which writes one file. So the same command continues after an
interruption, and the set's bytes do not depend on the number of workers or on the machines that they run on.
"""

import collections
import concurrent.futures
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator

import tqdm

from ivideo import files
from ivideo.data.preparing import inputs, pool, records, report
from ivideo.data.preparing.choosing import REASONS, Limits, choose
from ivideo.data.preparing.items import Item, Rejected
from ivideo.data.preparing.tasks import (
    IndexTask,
    MeasureTask,
    WriteTask,
    index_all,
    measure_all,
    read_rows,
    size_of,
    write_all,
)
from ivideo.errors import UserError

VERSION = 2  # of what is measured; a set that another version began is not continued
PLAN, QUARANTINE, REPORT = "plan.json", "quarantine.jsonl", "report.html"
WORK = ".unfinished"  # folder of measurements, until the set is finished
CHOSEN = "chosen.json"  # in WORK: a digest of what the shards hold
PER_TASK = 16  # files that a task measures
PER_SPREAD_TASK = 256  # the same on workers that begin a process for each task
_LEFTOVER = re.compile(r"\.tmp[0-9a-f]{32}$")  # of processes that were killed while they wrote


def prepare(
    config,
    path: str,
    out: str,
    *,
    is_too_long: Callable[[str], bool] | None = None,
    run: Callable | None = None,
    spread: Callable | None = None,
) -> None:
    """Prepares the files of `path` (`inputs.find`) as a data set in the folder `out`, by `config.prepare`.

    A bad file never stops it: it is left out and listed with its reason in `out`/quarantine.jsonl. A report is in
    `out`/report.html. The same call resumes after an interruption. `is_too_long`: whether a caption has more tokens
    than the text encoder reads. `run` runs tasks on this machine, as `pool.run`; `spread` on several (`beam.spread`),
    which must all see the input and `out`. UserError, before anything is written, where there are no files, or `out`
    holds something else; also where no file is left.
    """
    media, limits = config.prepare.media, Limits.of(config)
    run = run or functools.partial(pool.run, processes=config.prepare.workers)
    _check_free(out)
    items, rejected = inputs.find(
        path, media, label_template=config.prepare.label_template, split=config.prepare.split,
        caption_feature=config.prepare.caption_feature, index=spread and functools.partial(_index, out, spread),
    )  # fmt: skip
    if not _begin(out, _plan(config, limits, items, rejected)):
        if WORK in files.list_names(out):  # it was ended before its last step
            files.remove(os.path.join(out, WORK))
        print(f"{out} is finished already: its report is {os.path.join(out, REPORT)}")
        return
    per_task = PER_SPREAD_TASK if spread else PER_TASK
    spread = spread or (lambda function, tasks: function(tasks, run))
    tasks = _measure_tasks(out, items, config, limits, per_task)
    rows = _measure(out, media, tasks, spread)
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
    _write(out, media, of_row, shards, spread)
    for name in filter(_LEFTOVER.search, files.list_names(out)):
        files.remove(os.path.join(out, name))
    size = sum(row["bytes"] for row in kept)
    records.write_info(out, media, list(map(len, shards)), size, f"Prepared from {len(items)} {media}s.")
    files.remove(os.path.join(out, WORK))
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
    """What determines the set's bytes, apart from the contents of the files; and `timeout`, which may be changed."""
    listed = [(item.name, item.offset, size_of(item), item.captions) for item in items]
    digest = hashlib.sha256(json.dumps([listed, rejected]).encode()).hexdigest()
    dropping = config.prepare.long_captions == "drop"
    return {
        "version": VERSION,
        "files": digest,
        "media": config.prepare.media,
        "limits": limits._asdict(),
        "long_captions": config.prepare.long_captions,
        "text_length": config.text.length if dropping else None,
        "split_shots": config.prepare.split_shots,
        "gop": config.prepare.gop,
        "shard_megabytes": config.prepare.shard_megabytes,
        "timeout": config.prepare.timeout,
    }


def _check_free(out: str) -> None:
    """UserError where `out` holds something that is no set."""
    folder = files.in_bucket(out) or os.path.isdir(out)
    names = files.list_names(out) if folder else [out] if os.path.exists(out) else []
    if PLAN not in names and set(names) - {WORK}:
        raise UserError(f"--out={out} holds something else: choose another folder, or an empty one")


def _begin(out: str, plan: dict) -> bool:
    """Writes the plan of a new set to `out`, or checks that `out` has the same. Returns whether work is left."""
    path = os.path.join(out, PLAN)
    if files.exists(path):
        existing, wanted = files.read_json(path), json.loads(json.dumps(plan))
        if different := [name for name in plan if name != "timeout" and wanted[name] != existing.get(name)]:
            raise UserError(
                f"--out={out} was begun with other {' and '.join(different)}: choose another folder, or remove it"
            )
        if files.exists(os.path.join(out, records.INFO)):
            lines = files.read_bytes(os.path.join(out, QUARANTINE)).decode().splitlines()
            timed_out = sum(json.loads(line)["reason"] == "timeout" for line in lines)
            if timed_out and _allows_more(plan["timeout"], existing["timeout"]):
                raise UserError(
                    f"--out={out} is finished, and {timed_out} of its files took longer than config.prepare.timeout = "
                    f"{existing['timeout']:g}: choose another folder to try them with {plan['timeout']:g} seconds, or "
                    "remove it"
                )
            return False
    elif not files.in_bucket(out):
        files.prepare_folders([path])
    files.write_json(path, plan)
    return True


def _allows_more(timeout: float, before: float) -> bool:
    """Whether a file may take longer than before; 0 stands for no limit."""
    return bool(before) and (not timeout or timeout > before)


def _item(out: str, items: list[Item], row: dict) -> Item:
    """Where the file of a row is: in the input, or for a shot in the folder of unfinished work."""
    return Item(row["name"], os.path.join(out, WORK, row["clip"])) if "clip" in row else items[row["index"]]


def _work(out: str) -> tuple[str, set[str]]:
    """The folder of unfinished work, and the names in it."""
    folder = os.path.join(out, WORK)
    if not files.in_bucket(out):
        os.makedirs(folder, exist_ok=True)
    return folder, set(files.list_names(folder))


def _index(out: str, spread: Callable, tars: Iterable) -> Iterator[list]:
    """What each of the tars (`tars.Tar`) holds, listed by workers. What an earlier call listed is read."""
    folder, there = _work(out)
    names = [f"tar-{hashlib.sha256(repr(tar).encode()).hexdigest()[:32]}.json" for tar in tars]
    tasks = [IndexTask(os.path.join(folder, name), tar) for name, tar in zip(names, tars, strict=True)]
    todo = [task for task, name in zip(tasks, names, strict=True) if name not in there]
    _progress(spread(index_all, todo), len(tars), len(tars) - len(todo), unit="tar", desc="listing")
    for task in tasks:
        yield task.read()


def _progress(done: Iterable, total: int, before: int, *, unit: str, desc: str, count: Callable = lambda task: 1):
    """Goes through tasks that are done and shows a bar, if the output is a terminal."""
    with tqdm.tqdm(total=total, unit=unit, desc=desc, disable=None) as bar:
        bar.update(before)
        for task in done:
            bar.update(count(task))


def _measure_tasks(out: str, items: list[Item], config, limits: Limits, per_task: int) -> list[MeasureTask]:
    folder, media = os.path.join(out, WORK), config.prepare.media
    splitting = (limits.jump, limits.seconds) if config.prepare.split_shots and media == "video" else None
    numbered = list(enumerate(items))
    parts = [numbered[start : start + per_task] for start in range(0, len(items), per_task)]
    return [
        MeasureTask(os.path.join(folder, f"{part[0][0]:010}-{len(part)}.jsonl"), media, part, splitting,
                    config.prepare.timeout, config.prepare.gop if media == "video" else 0)
        for part in parts
    ]  # fmt: skip


def _measure(out: str, media: str, tasks: list[MeasureTask], spread: Callable) -> list[dict]:
    """The measures of all files, in order.

    Those that an earlier call wrote are read, unless a file took too long then and may take longer now.
    """
    _, there = _work(out)
    with concurrent.futures.ThreadPoolExecutor(32) as threads:  # in a bucket each read takes long
        old = [task for task in tasks if os.path.basename(task.path) in there]
        rows = {task.path: found for task, found in zip(old, threads.map(read_rows, old), strict=True)}

        def is_done(task):
            timeouts = [row["timeout"] for row in rows.get(task.path, ()) if "timeout" in row]
            return task.path in rows and not any(_allows_more(task.timeout, before) for before in timeouts)

        todo = [task for task in tasks if not is_done(task)]
        total, left = (sum(len(task.items) for task in some) for some in (tasks, todo))
        _progress(spread(measure_all, todo), total, total - left, unit=media, desc="measuring",
                  count=lambda task: len(task.items))  # fmt: skip
        rows |= {task.path: found for task, found in zip(todo, threads.map(read_rows, todo), strict=True)}
    return [row for task in tasks for row in rows[task.path]]


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


def _write(out: str, media: str, of_row: dict[str, Item], shards: list[list[dict]], spread: Callable) -> None:
    """Writes the shards. Those that an earlier call wrote are kept if they hold the same."""
    digest = hashlib.sha256()
    for rows in shards:
        digest.update(json.dumps(rows).encode())
    path, chosen = os.path.join(out, WORK, CHOSEN), {"sha256": digest.hexdigest()}
    if files.exists(path) and files.read_json(path) != chosen:
        for name in files.list_names(out):
            if records.is_shard(name):
                files.remove(os.path.join(out, name))
    files.write_json(path, chosen)
    there, tasks = set(files.list_names(out)), []
    for i, rows in enumerate(shards):
        path = records.shard_path(out, i, len(shards))
        tasks.append(WriteTask(path, media, [(of_row[row["name"]], row) for row in rows]))
    todo = [task for task in tasks if os.path.basename(task.path) not in there]
    _progress(spread(write_all, todo), len(tasks), len(tasks) - len(todo), unit="shard", desc="writing")

"""Reads tables of files and captions: csv, tsv, json, jsonl and parquet, under the column names that data sets use."""

import csv
import json
import os
import sys
from collections.abc import Iterator

from ivideo.data.preparing.items import CAPTIONS, FILES, Item, Rejected, captions_in, ending, printable
from ivideo.data.preparing.items import EXTENSIONS as ENDINGS
from ivideo.errors import UserError

EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
INSIDE = ("", "videos", "video", "images", "clips")  # folders, beside the table, in which its files may be


def has_columns(path: str) -> bool:
    """Whether the first row of a table has a file and a caption, under any of the known names."""
    try:
        row = next((row for row in _rows(path) if isinstance(row, dict)), {})
    except (UserError, OSError):
        return False
    return any(name in row for names in FILES.values() for name in names) and any(name in row for name in CAPTIONS)


def find(path: str, media: str) -> tuple[list[Item], list[Rejected]]:
    """The files that a table names, relative to its folder or absolute. Rows of one file are its several captions.

    UserError where the table cannot be read, or has no column of a known name.
    """
    table, pairs, rejected = os.path.basename(path), [], []
    for number, row in enumerate(_rows(path), 1):
        if not isinstance(row, dict):
            rejected.append(Rejected(f"{table}, row {number:09}", "row", str(row)))
            continue
        name = next((row[name] for name in FILES[media] if isinstance(row.get(name), str) and row[name]), None)
        if name is None:
            if number == 1 and not any(name in row for name in FILES[media]):
                raise UserError(
                    f"--input={path} has the columns {', '.join(map(str, row))}: expected one of "
                    f"{', '.join(FILES[media])} for the file, and one of {', '.join(CAPTIONS)} for its caption"
                )
            rejected.append(Rejected(f"{table}, row {number:09}", "row", f"names no {media}"))
            continue
        pairs.append((name.strip(), captions_in(row)))
    return joined(os.path.dirname(path), pairs, rejected=rejected)


def joined(folder: str, pairs: list[tuple[str, list[str]]], *, rejected: list[Rejected], inside: str = ""):
    """The items of pairs (path, captions). Captions of the same file are joined; files that do not exist rejected."""
    by_path, by_file = {}, {}
    for path, captions in pairs:
        by_path.setdefault(path, []).extend(captions)
    for path, captions in by_path.items():  # a file is searched once, however many rows it has
        candidates = [os.path.normpath(os.path.join(folder, parent, path)) for parent in (*INSIDE, inside)]
        existing = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
        if existing is None:
            rejected.append(Rejected(printable(path), "missing", f"there is no {path} in {folder or '.'}"))
        else:
            by_file.setdefault(existing, (printable(path), {}))[1].update(dict.fromkeys(captions))
    return [Item(name, path, captions=tuple(found)) for path, (name, found) in by_file.items()], rejected


def _rows(path: str) -> Iterator[dict | str]:
    """The rows of a table as dicts, or as a text what is wrong with one. UserError where the file cannot be read."""
    try:
        yield from _READERS[os.path.splitext(path)[1]](path)
    except (ValueError, csv.Error) as e:
        raise UserError(f"--input={path} cannot be read ({' '.join(str(e).split())[:200]}): write it again") from e


def _of_csv(path: str, delimiter: str = ",") -> Iterator[dict | str]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
        for row in csv.DictReader(f, delimiter=delimiter):
            yield "has more values than the table has columns" if None in row else row


def _of_jsonl(path: str) -> Iterator[dict | str]:
    with open(path, "rb") as f:
        for line in filter(bytes.strip, f):
            try:
                row = json.loads(line)
            except ValueError as e:
                yield f"is not JSON ({e})"
            else:
                yield row if isinstance(row, dict) else "is not an object"


def _of_json(path: str) -> Iterator[dict | str]:
    """A list of objects, or one object with a caption for each file."""
    with open(path, "rb") as f:
        value = json.load(f)
    if isinstance(value, dict) and all(ending(path) in sum(ENDINGS.values(), ()) for path in value):
        value = [{"path": path, "caption": caption} for path, caption in value.items()]
    if not isinstance(value, list):
        raise ValueError("expected a list of objects, or an object with a caption for each file")
    yield from (row if isinstance(row, dict) else "is not an object" for row in value)


def _of_parquet(path: str) -> Iterator[dict]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        known = {name for names in FILES.values() for name in names} | set(CAPTIONS)
        columns = [name for name in table.schema_arrow.names if name in known]
        if not columns:
            yield dict.fromkeys(table.schema_arrow.names)
        for batch in table.iter_batches(columns=columns, batch_size=4096):
            yield from batch.to_pylist()


_READERS = {
    ".csv": _of_csv,
    ".tsv": lambda path: _of_csv(path, "\t"),
    ".json": _of_json,
    ".jsonl": _of_jsonl,
    ".parquet": _of_parquet,
}

"""T5 in T5X directories: a msgpack index of the arrays, which are inside it or beside it in zarr format."""

import itertools
import os
import re

import numpy as np

from ivideo.errors import UserError
from ivideo.files import exists, kvstore, read_bytes
from ivideo.text.arrays import StoredArray, inside, read_values

INDEXES = ("checkpoint", os.path.join("state", "checkpoint"))
SCANNED = (
    "encoder/encoder/"  # the prefix of parameters whose layers are stacked along axis 1, as T5X's scan stores them
)
_PLACEHOLDER = "PLACEHOLDER://"


def read_directory(path: str, index: str) -> dict[str, StoredArray]:
    """The encoder's arrays in a T5X directory, by T5X's names. UserError where a file is damaged or missing."""
    from flax import serialization

    raw = read_bytes(inside(path, index))
    root = os.path.dirname(os.path.join(path, index))
    try:
        tree = serialization.msgpack_restore(raw)
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__}, expected a tree")
    except Exception as e:  # msgpack raises many types of error, all of them for a damaged file
        raise UserError(f"{root}/checkpoint is not a T5X index ({e}): copy it again") from e
    if "optimizer" in tree:
        if tree.get("version", 0) not in (2, 3):
            raise UserError(
                f"{root}/checkpoint is of version {tree.get('version')!r}, expected 2 or 3: save it again "
                "with a newer T5X"
            )
        tree = tree["optimizer"]
    target = tree.get("target") if isinstance(tree, dict) else None
    if not isinstance(target, dict):
        raise UserError(
            f"{root}/checkpoint has no tree `target` of parameters: expected one as T5X writes it; copy it again"
        )
    encoder = {name: target[name] for name in ("token_embedder", "encoder") if name in target}
    return {name: _array(root, name, entry) for name, entry in _flat(encoder)}


def _is_spec(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("driver"), str)


def _flat(tree: dict, prefix: str = ""):
    """(name, entry) of each parameter in an index. An entry is an array, a TensorStore spec or a placeholder."""
    for key, value in tree.items():
        if isinstance(value, dict) and not _is_spec(value):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _array(root: str, name: str, entry) -> StoredArray:
    """The array of an entry. Its place on disk follows from its name, never from a path in the index."""
    if not re.fullmatch(r"[\w\-]+(/[\w\-]+)*", name):
        raise UserError(
            f"{root}/checkpoint names a parameter {name!r}, expected letters, digits, `_`, `-` and `/`: copy it"
        )
    directory = f"target.{name.replace('/', '.')}"
    if isinstance(entry, np.ndarray):
        return StoredArray(entry.shape, entry.dtype.name, lambda index=(): entry[index])
    if isinstance(entry, str) and entry.startswith(_PLACEHOLDER):
        stored = entry.removeprefix(_PLACEHOLDER)
        if stored != directory:
            raise UserError(f"{root}/checkpoint: {name} is stored as {stored!r}, expected {directory!r}: copy it again")
    elif _is_spec(entry):
        store = entry.get("kvstore")
        stored = str((store if isinstance(store, dict) else {}).get("path", entry.get("path", "")))
        if entry["driver"] != "zarr" or ".." in stored.split("/"):
            raise UserError(
                f"{root}/checkpoint: {name} is stored by {entry['driver']!r} in {stored!r}, expected zarr and a path "
                "without `..`: copy it again"
            )
    else:
        raise UserError(f"{root}/checkpoint: {name} is a {type(entry).__name__}, expected an array: copy it again")
    return _zarr(root, name, directory)


def _zarr(root: str, name: str, directory: str) -> StoredArray:
    import tensorstore as ts

    if not exists(os.path.join(root, directory, ".zarray")):
        raise UserError(f"{root} lacks {directory}, the array of {name}: copy the whole directory")
    spec = {"driver": "zarr", "kvstore": kvstore(inside(root, directory))}
    try:
        store = ts.open(spec, open=True, read=True).result()
    except ValueError as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{root}/{directory} is not a zarr array ({reason}): copy it again") from e

    def read(index=()):
        _check_chunks(store)
        return store[index].read().result() if index else store.read().result()

    return StoredArray(tuple(store.shape), store.dtype.name, read)


def _check_chunks(store):
    """ValueError where a chunk's file is missing: zarr would read zeros in its place."""
    separator = store.spec().to_json()["metadata"].get("dimension_separator", ".")
    grid = (-(-size // chunk) for size, chunk in zip(store.shape, store.chunk_layout.read_chunk.shape, strict=True))
    expected = {separator.join(map(str, chunk)).encode() or b"0" for chunk in itertools.product(*map(range, grid))}
    missing = expected - set(store.kvstore.list().result())
    if missing:
        raise ValueError(f"{len(missing)} of {len(expected)} chunks are missing, such as {min(missing).decode()}")


def unstack(path: str, stored: dict[str, StoredArray]) -> dict[str, StoredArray]:
    """Splits arrays that hold all layers along axis 1 into one array per layer, and joins each layer's heads."""
    arrays = {name: array for name, array in stored.items() if not name.startswith(SCANNED)}
    stacked = {name.removeprefix(SCANNED): array for name, array in stored.items() if name.startswith(SCANNED)}
    counts = {array.shape[1] if len(array.shape) > 1 else 0 for array in stacked.values()}
    if len(counts) != 1 or 0 in counts:
        raise UserError(
            f"{path}: the stacked arrays hold {' or '.join(map(str, sorted(counts)))} layers, expected the same number "
            "along axis 1 of each: copy the checkpoint again"
        )
    layers = counts.pop()
    tables = stacked.pop("relpos_bias/rel_embedding", None)
    if tables is not None:
        tables = [_layer(tables, i, "relpos_bias") for i in range(layers)]
        values = [read_values(path, "relpos_bias/rel_embedding", table) for table in tables]
        if all(np.array_equal(value, values[0]) for value in values[1:]):
            arrays["encoder/relpos_bias/rel_embedding"] = tables[0]
        else:
            arrays |= {f"encoder/layers_{i}/relpos_bias/rel_embedding": table for i, table in enumerate(tables)}
    for name, array in stacked.items():
        arrays |= {f"encoder/layers_{i}/{name}": _layer(array, i, name) for i in range(layers)}
    return arrays


def _layer(stacked: StoredArray, i: int, name: str) -> StoredArray:
    """Layer i of a stacked array, as a matrix: heads and channels per head become one axis."""
    shape = (stacked.shape[0], *stacked.shape[2:])
    if len(shape) == 3 and name.startswith("attention/out"):
        shape = (shape[0] * shape[1], shape[2])
    elif len(shape) == 3:
        shape = (shape[0], shape[1] * shape[2])

    def read(index=()):
        return stacked.read((slice(None), i)).reshape(shape)[index]

    return StoredArray(shape, stacked.dtype, read)

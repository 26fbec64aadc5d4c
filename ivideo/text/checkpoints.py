"""T5 encoders in the files that people have: T5X directories, Hugging Face directories, and this package's own files.

None needs the library that wrote it. What is there is found from headers alone; each parameter is then read when it is
asked for, so that memory never holds more than one beside those that are kept. Names and shapes are those of
`ivideo.text.t5.T5Encoder`, which are minimal T5X's; other layouts are turned into them on the way. Decoders are left.

A checkpoint is data from somewhere else: nothing in it is run, no path written in it is followed, and links that lead
out of its directory are refused. It may lie in a bucket, gs://…, of which only what is asked for is read.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ivideo.errors import UserError
from ivideo.files import exists, in_bucket, kvstore, names, read_bytes, read_json

DTYPES = ("float64", "float32", "float16", "bfloat16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
EXPECTED = (
    "expected a T5X directory (checkpoint_STEP with its file `checkpoint`), a Hugging Face directory (config.json and "
    "safetensors), or a .safetensors file of this package"
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter in a file: its shape and type, and `read(index)`, which reads it or a part of it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An encoder in a file: `sizes`, the fields of its T5Encoder, and its parameters by name, a/b/c, unread."""

    path: str
    sizes: dict
    leaves: dict[str, Leaf]


def open_checkpoint(path: str) -> Checkpoint:
    """Finds an encoder's parameters, unread. UserError where they are not all there, or are not an encoder's."""
    leaves = _canonical(path, _found(path))
    for name, leaf in leaves.items():
        if leaf.dtype not in DTYPES:
            hint = "; T5X before version 2 wrote bfloat16 so: save it again with a newer one" * (leaf.dtype == "uint16")
            raise UserError(f"{path}: {name} is of type {leaf.dtype}, expected one of {', '.join(DTYPES)}{hint}")
    sizes = _sizes(path, leaves)
    wanted = _shapes(sizes)
    for name in sorted(wanted.keys() | leaves.keys()):
        found = leaves[name].shape if name in leaves else "absent"
        if found != wanted.get(name):
            raise UserError(
                f"{path} is not a whole T5 1.1 encoder: {name} is {found}, expected {wanted.get(name, 'nothing there')}"
            )
    return Checkpoint(path, sizes, leaves)


def read_array(checkpoint: Checkpoint, name: str, index=()) -> np.ndarray:
    """A parameter's values, or those at an index. UserError where its data is damaged."""
    return _read(checkpoint.path, name, checkpoint.leaves[name], index)


def _read(path: str, name: str, leaf: Leaf, index=()) -> np.ndarray:
    try:
        return leaf.read(index)
    except (ValueError, OSError, SafetensorError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{path}: {name} cannot be read ({reason}): copy the checkpoint again") from e


def _found(path: str) -> dict[str, Leaf]:
    """All arrays at a path, by the names in its format."""
    try:
        if path.endswith(PICKLES) and exists(path):
            raise UserError(f"{path} is a pickle, which can run any program when read: {_CONVERT}")
        if path.endswith(".safetensors") and exists(path):
            return _safetensors(path)
        for index in _INDEXES:
            if exists(os.path.join(path, index)):
                return _t5x(path, index)
        if os.path.isfile(path):
            raise UserError(f"{path} is not a text encoder: {EXPECTED}")
        there = names(path) if in_bucket(path) or exists(path) else []
        if "config.json" in there or any(name.endswith((".safetensors", *PICKLES)) for name in there):
            return _huggingface(path, there)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e}): {EXPECTED}") from e
    if not there:
        raise UserError(f"no text encoder at {path}: {EXPECTED}")
    steps = [name for name in there if re.fullmatch(r"checkpoint_\d+", name)]
    hint = f"; did you mean {os.path.join(path, steps[-1])}?" if steps else ""
    raise UserError(f"{path} is not a text encoder: {EXPECTED}{hint}")


# ---- safetensors and Hugging Face

_CONVERT = (
    "save it as safetensors, with `T5EncoderModel.from_pretrained(DIR).save_pretrained(NEW)` of transformers on a "
    "machine where you trust it"
)
_SAFETENSORS_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HEADER = 2**27  # bytes that a header of safetensors may have, by the library's own limit of 100 MB, about


def _safetensors(path: str) -> dict[str, Leaf]:
    if in_bucket(path):
        return _safetensors_in_bucket(path)

    def read(name, index=()):
        # Opened anew for every array: the pages of an open file's arrays count as this process's memory
        with safe_open(path, framework="numpy") as f:
            return f.get_slice(name)[index] if index else f.get_tensor(name)

    try:
        with safe_open(path, framework="numpy") as f:
            headers = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {
                name: Leaf(
                    tuple(header.get_shape()),
                    _SAFETENSORS_TYPES.get(header.get_dtype(), header.get_dtype()),
                    functools.partial(read, name),
                )
                for name, header in headers.items()
            }
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is not a whole safetensors file ({e}): copy it again") from e


def _safetensors_in_bucket(path: str) -> dict[str, Leaf]:
    """Of the file, its header now, and each array when it is asked for: the library reads files of this machine."""

    def read(dtype, shape, begin, end, index=()):
        data = np.frombuffer(read_bytes(path, begin, end), dtype)
        return data.reshape(shape)[index]

    try:
        size = int.from_bytes(read_bytes(path, 0, 8), "little")
        if not 2 <= size <= _HEADER:
            raise ValueError(f"its header would have {size} bytes")
        header = json.loads(read_bytes(path, 8, 8 + size))
        header.pop("__metadata__", None)
        leaves = {}
        for name, entry in header.items():
            dtype, shape = _SAFETENSORS_TYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
            leaves[name] = Leaf(shape, dtype, functools.partial(read, stored, shape, begin, end))
        return leaves
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not a whole safetensors file ({e}): copy it again") from e


def _huggingface(path: str, there: list[str]) -> dict[str, Leaf]:
    shards = _shards(path, there)
    config = read_json(inside(path, "config.json")) if "config.json" in there else None
    if config is None:
        raise UserError(f"{path} has no config.json: copy the whole Hugging Face directory")
    wanted = {
        "model_type": ("t5", "mt5", None),
        "feed_forward_proj": ("gated-gelu",),
        "relative_attention_num_buckets": (32, None),
        "relative_attention_max_distance": (128, None),
        "layer_norm_epsilon": (1e-6, None),
    }
    for key, values in wanted.items():
        if config.get(key) not in values:
            raise UserError(
                f"{path}/config.json has {key} = {config.get(key)!r}, expected {values[0]!r}: only T5 1.1 and ByT5, "
                "such as google/t5-v1_1-xxl, are read"
            )
    leaves = {}
    for shard in shards:
        leaves |= _safetensors(inside(path, shard))
    return leaves


def _shards(path: str, there: list[str]) -> list[str]:
    """The safetensors files of a Hugging Face directory."""
    if "model.safetensors.index.json" in there:
        weight_map = read_json(inside(path, "model.safetensors.index.json")).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{path}/model.safetensors.index.json has no weight_map of files: copy it again")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not re.fullmatch(r"[\w.\-]+\.safetensors", shard):
                raise UserError(f"{path}/model.safetensors.index.json names {shard!r}, expected a file beside it")
            if shard not in there:
                raise UserError(f"{path} lacks {shard}, which its index names: copy the whole directory")
        return shards
    if "model.safetensors" in there:
        return ["model.safetensors"]
    pickles = [name for name in there if name.endswith(PICKLES)]
    if pickles:
        raise UserError(
            f"{path} has no safetensors, and {pickles[0]} is a pickle, which can run any program when read: {_CONVERT}"
        )
    raise UserError(f"{path} has no model.safetensors: {EXPECTED}")


def inside(root: str, name: str) -> str:
    """The path of a file or directory in a checkpoint. UserError where it is, or holds, a link that leads out of it."""
    if in_bucket(root):  # where there are no links
        return os.path.join(root, name)
    path, places = os.path.join(root, name), [pathlib.Path(os.path.realpath(root))]
    # Hugging Face's own cache keeps the files of hub/models--…/snapshots/REVISION in hub/models--…/blobs
    if places[0].parent.name == "snapshots":
        places.append(places[0].parent.parent / "blobs")
    below = (os.path.join(at, entry) for at, folders, there in os.walk(path) for entry in (*folders, *there))
    for entry in (path, *below):
        target = pathlib.Path(os.path.realpath(entry))
        if not any(target.is_relative_to(place) for place in places):
            raise UserError(f"{entry} is a link to {target}, outside of the checkpoint: put the file itself there")
    return path


# ---- T5X

_INDEXES = ("checkpoint", os.path.join("state", "checkpoint"))
_PLACEHOLDER = "PLACEHOLDER://"


def _t5x(path: str, index: str) -> dict[str, Leaf]:
    """Arrays of a T5X directory, whose index has them inline or names those that lie beside it, in zarr's format."""
    from flax import serialization

    raw = read_bytes(inside(path, index))
    root = os.path.dirname(os.path.join(path, index))
    try:
        tree = serialization.msgpack_restore(raw)
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__}, expected a tree")
    except Exception as e:  # msgpack raises many kinds; whatever it is, the file is at fault
        raise UserError(f"{root}/checkpoint is not a T5X index ({e}): copy it again") from e
    if "optimizer" in tree:
        if tree.get("version", 0) not in (2, 3):
            raise UserError(f"{root}/checkpoint is of version {tree.get('version')!r}, expected 2 or 3: save it anew")
        tree = tree["optimizer"]
    target = tree.get("target") if isinstance(tree, dict) else None
    if not isinstance(target, dict):
        raise UserError(f"{root}/checkpoint has no tree `target` of parameters: expected one as T5X writes it")
    kept = {name: target[name] for name in ("token_embedder", "encoder") if name in target}
    return {name: _t5x_leaf(root, name, value) for name, value in _flat(kept)}


def _is_spec(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("driver"), str)


def _flat(tree: dict, prefix: str = ""):
    """The leaves of an index: (name, inline array, TensorStore spec or placeholder)."""
    for key, value in tree.items():
        if isinstance(value, dict) and not _is_spec(value):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _t5x_leaf(root: str, name: str, value) -> Leaf:
    """A leaf of the index. Where an array is stored follows from its name, never from what the index says of it."""
    if not re.fullmatch(r"[\w\-]+(/[\w\-]+)*", name):
        raise UserError(f"{root}/checkpoint names a parameter {name!r}, expected letters, digits, `_`, `-` and `/`")
    directory = f"target.{name.replace('/', '.')}"
    if isinstance(value, np.ndarray):
        return Leaf(value.shape, value.dtype.name, lambda index=(): value[index])
    if isinstance(value, str) and value.startswith(_PLACEHOLDER):
        stored = value.removeprefix(_PLACEHOLDER)
        if stored != directory:
            raise UserError(f"{root}/checkpoint: {name} is stored as {stored!r}, expected {directory!r}")
    elif _is_spec(value):
        kvstore = value.get("kvstore")
        stored = str((kvstore if isinstance(kvstore, dict) else {}).get("path", value.get("path", "")))
        if value["driver"] != "zarr" or ".." in stored.split("/"):
            raise UserError(
                f"{root}/checkpoint: {name} is stored by {value['driver']!r} in {stored!r}, expected zarr and a path "
                "without `..`"
            )
    else:
        raise UserError(f"{root}/checkpoint: {name} is a {type(value).__name__}, expected an array")
    return _zarr(root, name, directory)


def _zarr(root: str, name: str, directory: str) -> Leaf:
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

    return Leaf(tuple(store.shape), store.dtype.name, read)


def _check_chunks(store):
    """ValueError where a chunk has no file: zarr would take it to be zeros."""
    separator = store.spec().to_json()["metadata"].get("dimension_separator", ".")
    grid = (-(-size // chunk) for size, chunk in zip(store.shape, store.chunk_layout.read_chunk.shape, strict=True))
    wanted = {separator.join(map(str, place)).encode() or b"0" for place in itertools.product(*map(range, grid))}
    missing = wanted - set(store.kvstore.list().result())
    if missing:
        raise ValueError(f"{len(missing)} of {len(wanted)} chunks are not there, such as {min(missing).decode()}")


# ---- to the names and shapes of T5Encoder

_LAYER = r"encoder\.block\.(\d+)\.layer\."
# Names there, names here, and whether the axes are the other way round
_HUGGINGFACE = (
    (r"(?:shared|encoder\.embed_tokens)\.weight", "token_embedder/embedding", False),
    (
        r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        "encoder/relpos_bias/rel_embedding",
        True,
    ),
    (_LAYER + r"0\.SelfAttention\.q\.weight", "encoder/layers_{}/attention/query/kernel", True),
    (_LAYER + r"0\.SelfAttention\.k\.weight", "encoder/layers_{}/attention/key/kernel", True),
    (_LAYER + r"0\.SelfAttention\.v\.weight", "encoder/layers_{}/attention/value/kernel", True),
    (_LAYER + r"0\.SelfAttention\.o\.weight", "encoder/layers_{}/attention/out/kernel", True),
    (_LAYER + r"0\.layer_norm\.weight", "encoder/layers_{}/pre_attention_layer_norm/scale", False),
    (_LAYER + r"1\.DenseReluDense\.(wi_0|wi_1|wo)\.weight", "encoder/layers_{}/mlp/{}/kernel", True),
    (_LAYER + r"1\.layer_norm\.weight", "encoder/layers_{}/pre_mlp_layer_norm/scale", False),
    (r"encoder\.final_layer_norm\.weight", "encoder/encoder_norm/scale", False),
)
_SCANNED = "encoder/encoder/"


def _canonical(path: str, found: dict[str, Leaf]) -> dict[str, Leaf]:
    """The encoder's parameters, whatever the layout; a decoder's are left out."""
    if any(name.startswith(("encoder.", "shared.")) for name in found):
        found = _from_huggingface(found)
    elif any(name.startswith(_SCANNED) for name in found):
        found = _unscanned(path, found)
    if not any(name.startswith("encoder/") for name in found):
        some = ", ".join(itertools.islice(found, 3)) or "nothing"
        raise UserError(
            f"{path} has no T5 encoder (it holds {some}): give a checkpoint of a whole T5, or its encoder's"
        )
    return found


def _from_huggingface(found: dict[str, Leaf]) -> dict[str, Leaf]:
    leaves = {}
    for name, leaf in found.items():
        for pattern, ours, transposed in _HUGGINGFACE:
            if match := re.fullmatch(pattern, name):
                leaves[ours.format(*match.groups())] = _transposed(leaf) if transposed else leaf
                break
        else:
            if name.startswith("encoder."):  # refused later, by its name: it would change the outputs
                leaves[name] = leaf
    return leaves


def _transposed(leaf: Leaf) -> Leaf:
    def read(index=()):
        # safetensors reads slices of the first dimensions: those of the last are the first ones' here
        return leaf.read((slice(None), *index)).T if index else leaf.read().T

    return Leaf(leaf.shape[::-1], leaf.dtype, read)


def _unscanned(path: str, found: dict[str, Leaf]) -> dict[str, Leaf]:
    """Layers that are stored stacked along the second axis, one by one; heads joined where they are apart."""
    leaves = {name: leaf for name, leaf in found.items() if not name.startswith(_SCANNED)}
    stacked = {name.removeprefix(_SCANNED): leaf for name, leaf in found.items() if name.startswith(_SCANNED)}
    counts = {leaf.shape[1] if len(leaf.shape) > 1 else 0 for leaf in stacked.values()}
    if len(counts) != 1 or 0 in counts:
        raise UserError(
            f"{path}: the scanned layers differ in number, {sorted(counts)}: expected one number along axis 1"
        )
    layers = counts.pop()
    tables = stacked.pop("relpos_bias/rel_embedding", None)
    if tables is not None:
        tables = [_layer(tables, i, "relpos_bias") for i in range(layers)]
        values = [_read(path, "relpos_bias/rel_embedding", table) for table in tables]
        if all(np.array_equal(value, values[0]) for value in values[1:]):
            leaves["encoder/relpos_bias/rel_embedding"] = tables[0]
        else:
            leaves |= {f"encoder/layers_{i}/relpos_bias/rel_embedding": table for i, table in enumerate(tables)}
    for name, leaf in stacked.items():
        leaves |= {f"encoder/layers_{i}/{name}": _layer(leaf, i, name) for i in range(layers)}
    return leaves


def _layer(leaf: Leaf, i: int, name: str) -> Leaf:
    shape = (leaf.shape[0], *leaf.shape[2:])
    if len(shape) == 3:
        joined = (
            (shape[0] * shape[1], shape[2]) if name.startswith("attention/out") else (shape[0], shape[1] * shape[2])
        )
    else:
        joined = shape

    def read(index=()):
        return leaf.read((slice(None), i)).reshape(joined)[index]

    return Leaf(joined, leaf.dtype, read)


def _sizes(path: str, leaves: dict[str, Leaf]) -> dict:
    """The fields of T5Encoder, from shapes: only the relative positions' table tells the number of heads."""

    def shape(name, rank=2):
        leaf = leaves.get(name)
        if leaf is None or len(leaf.shape) != rank:
            raise UserError(
                f"{path}: {name} is {'absent' if leaf is None else leaf.shape}, expected an array of {rank} "
                "dimensions: the checkpoint is not whole, or not a T5 1.1's"
            )
        return leaf.shape

    vocab, dim = shape("token_embedder/embedding")
    own = "encoder/relpos_bias/rel_embedding" not in leaves
    heads, _ = shape(f"encoder/{'layers_0/' if own else ''}relpos_bias/rel_embedding")
    _, inner = shape("encoder/layers_0/attention/query/kernel")
    _, ff = shape("encoder/layers_0/mlp/wi_0/kernel")
    if not heads or inner % heads:
        raise UserError(f"{path}: {heads} heads do not divide the {inner} channels of attention")
    numbers = {int(m[1]) for name in leaves if (m := re.match(r"encoder/layers_(\d+)/", name))}
    return {
        "vocab": vocab, "dim": dim, "layers": max(numbers) + 1, "heads": heads, "head_dim": inner // heads, "ff": ff,
        "own_positions": own,
    }  # fmt: skip


def _shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape in the network of these sizes."""
    import jax

    from ivideo.text.t5 import T5Encoder
    from ivideo.weights import shapes_of

    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    return shapes_of(jax.eval_shape(T5Encoder(**sizes).init, jax.random.key(0), tokens, tokens)["params"])

"""T5 encoders in the files that people have: T5X directories, Hugging Face directories, and this package's own files.

No format needs the library that wrote it. Opening a checkpoint reads headers alone. Each parameter is read when it is
asked for, so memory holds at most one parameter besides those that the caller keeps. Names and shapes are those of
`ivideo.text.t5.T5Encoder`, which follow minimal T5X; other layouts are converted. Decoders are ignored.

A checkpoint is untrusted data: nothing in it is executed, no path written in it is followed, and links that lead out of
its directory are refused. In a bucket (gs://…) only the bytes that are asked for are read.
"""

import dataclasses
import itertools
import os
import re

import numpy as np

from ivideo.errors import UserError
from ivideo.files import exists, in_bucket, list_names
from ivideo.text import huggingface, t5x
from ivideo.text.arrays import EXPECTED, StoredArray, read_values

DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An encoder in a file: `sizes`, the fields of its T5Encoder, and its parameters, unread, by name (a/b/c)."""

    path: str
    sizes: dict
    params: dict[str, StoredArray]


def open_checkpoint(path: str) -> Checkpoint:
    """Finds an encoder's parameters without reading them.

    UserError where a parameter is missing, or the checkpoint is not a T5 1.1 encoder's.
    """
    params = _encoder_params(path, _stored_arrays(path))
    for name, array in params.items():
        if array.dtype not in DTYPES:
            hint = "; T5X before version 2 wrote bfloat16 so: save it again with a newer one"
            raise UserError(
                f"{path}: {name} is of type {array.dtype}, expected one of {', '.join(DTYPES)}"
                f"{hint if array.dtype == 'uint16' else ''}"
            )
    sizes = _sizes(path, params)
    expected = _expected_shapes(sizes)
    for name in sorted(expected.keys() | params.keys()):
        shape = params[name].shape if name in params else "absent"
        if shape != expected.get(name):
            raise UserError(
                f"{path} is not a complete T5 1.1 encoder: {name} is {shape}, expected "
                f"{expected.get(name, 'no such parameter')}; copy the checkpoint again, or give a T5 1.1"
            )
    return Checkpoint(path, sizes, params)


def read_array(checkpoint: Checkpoint, name: str, index=()) -> np.ndarray:
    """A parameter's values, or those at an index. UserError where its data is damaged."""
    return read_values(checkpoint.path, name, checkpoint.params[name], index)


def _stored_arrays(path: str) -> dict[str, StoredArray]:
    """All arrays of the checkpoint, by the names that its format gives them."""
    try:
        if path.endswith(huggingface.PICKLES) and exists(path):
            raise UserError(f"{path} is a pickle, which can run any program when read: {huggingface.CONVERT}")
        if path.endswith(".safetensors") and exists(path):
            return huggingface.read_file(path)
        for index in t5x.INDEXES:
            if exists(os.path.join(path, index)):
                return t5x.read_directory(path, index)
        if os.path.isfile(path):
            raise UserError(f"{path} is not a text encoder: {EXPECTED}")
        files = list_names(path) if in_bucket(path) or exists(path) else []
        if "config.json" in files or any(name.endswith((".safetensors", *huggingface.PICKLES)) for name in files):
            return huggingface.read_directory(path, files)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e}): {EXPECTED}") from e
    if not files:
        raise UserError(f"no text encoder at {path}: {EXPECTED}")
    steps = [name for name in files if re.fullmatch(r"checkpoint_\d+", name)]
    hint = f"; did you mean {os.path.join(path, steps[-1])}?" if steps else ""
    raise UserError(f"{path} is not a text encoder: {EXPECTED}{hint}")


def _encoder_params(path: str, stored: dict[str, StoredArray]) -> dict[str, StoredArray]:
    """The encoder's parameters by T5Encoder's names, whatever the layout of the file."""
    if any(name.startswith(("encoder.", "shared.")) for name in stored):
        stored = huggingface.to_encoder(stored)
    elif any(name.startswith(t5x.SCANNED) for name in stored):
        stored = t5x.unstack(path, stored)
    if not any(name.startswith("encoder/") for name in stored):
        some = ", ".join(itertools.islice(stored, 3)) or "nothing"
        raise UserError(f"{path} has no T5 encoder (it holds {some}): give a checkpoint of a T5, or of its encoder")
    return stored


def _sizes(path: str, params: dict[str, StoredArray]) -> dict:
    """The fields of T5Encoder, read off shapes. Only the table of relative positions shows the number of heads."""

    def shape(name):
        array = params.get(name)
        if array is None or len(array.shape) != 2:
            raise UserError(
                f"{path}: {name} is {'absent' if array is None else array.shape}, expected an array of 2 dimensions: "
                "the checkpoint is incomplete, or not a T5 1.1"
            )
        return array.shape

    vocab, dim = shape("token_embedder/embedding")
    own_positions = "encoder/relpos_bias/rel_embedding" not in params
    heads, _ = shape(f"encoder/{'layers_0/' if own_positions else ''}relpos_bias/rel_embedding")
    _, inner = shape("encoder/layers_0/attention/query/kernel")
    _, ff = shape("encoder/layers_0/mlp/wi_0/kernel")
    if not heads or inner % heads:
        raise UserError(f"{path}: {heads} heads do not divide the {inner} channels of attention: copy it again")
    layers = {int(match[1]) for name in params if (match := re.match(r"encoder/layers_(\d+)/", name))}
    return {
        "vocab": vocab, "dim": dim, "layers": max(layers) + 1, "heads": heads, "head_dim": inner // heads, "ff": ff,
        "own_positions": own_positions,
    }  # fmt: skip


def _expected_shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape in the encoder of these sizes."""
    import jax

    from ivideo.text.t5 import T5Encoder
    from ivideo.weights import shapes_of

    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    return shapes_of(jax.eval_shape(T5Encoder(**sizes).init, jax.random.key(0), tokens, tokens)["params"])

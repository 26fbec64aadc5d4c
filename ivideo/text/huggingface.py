"""T5 in safetensors files and in Hugging Face directories. Arrays stay unread until they are asked for."""

import functools
import json
import re

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ivideo.errors import UserError
from ivideo.files import in_bucket, read_bytes, read_json
from ivideo.text.arrays import EXPECTED, StoredArray, inside

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT = (
    "save it as safetensors, with `T5EncoderModel.from_pretrained(DIR).save_pretrained(NEW)` of transformers on a "
    "machine where you trust it"
)
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_HEADER = 2**27  # bytes of a safetensors header: a little above the library's own limit of 100 MB

_LAYER = r"encoder\.block\.(\d+)\.layer\."
# Hugging Face's name, T5Encoder's name, and whether the matrix has to be transposed
_NAMES = (
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


def read_file(path: str) -> dict[str, StoredArray]:
    """The arrays of a safetensors file by name. UserError where the file is incomplete."""
    if in_bucket(path):
        return _read_from_bucket(path)

    def read(name, index=()):
        # Opens the file for every array: while it is open, the pages that were read count as this process's memory
        with safe_open(path, framework="numpy") as f:
            return f.get_slice(name)[index] if index else f.get_tensor(name)

    try:
        with safe_open(path, framework="numpy") as f:
            headers = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {
                name: StoredArray(
                    tuple(header.get_shape()),
                    _DTYPES.get(header.get_dtype(), header.get_dtype()),
                    functools.partial(read, name),
                )
                for name, header in headers.items()
            }
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is not a complete safetensors file ({e}): copy it again") from e


def _read_from_bucket(path: str) -> dict[str, StoredArray]:
    """As `read_file`, for a bucket: the library reads local files alone. Only the header is read now."""

    def read(dtype, shape, begin, end, index=()):
        data = np.frombuffer(read_bytes(path, begin, end), dtype)
        return data.reshape(shape)[index]

    try:
        size = int.from_bytes(read_bytes(path, 0, 8), "little")
        if not 2 <= size <= _MAX_HEADER:
            raise ValueError(f"its header would have {size} bytes")
        header = json.loads(read_bytes(path, 8, 8 + size))
        header.pop("__metadata__", None)
        arrays = {}
        for name, entry in header.items():
            dtype, shape = _DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
            arrays[name] = StoredArray(shape, dtype, functools.partial(read, numpy_dtype, shape, begin, end))
        return arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not a complete safetensors file ({e}): copy it again") from e


def read_directory(path: str, files: list[str]) -> dict[str, StoredArray]:
    """The arrays of a Hugging Face directory by name; `files` are the names in it. UserError unless it is a T5 1.1."""
    names = shards(path, files)
    if "config.json" not in files:
        raise UserError(f"{path} has no config.json: copy the whole Hugging Face directory")
    config = read_json(inside(path, "config.json"))
    allowed = {
        "model_type": ("t5", "mt5", None),
        "feed_forward_proj": ("gated-gelu",),
        "relative_attention_num_buckets": (32, None),
        "relative_attention_max_distance": (128, None),
        "layer_norm_epsilon": (1e-6, None),
    }
    for key, values in allowed.items():
        if config.get(key) not in values:
            raise UserError(
                f"{path}/config.json has {key} = {config.get(key)!r}, expected {values[0]!r}: only T5 1.1 and ByT5, "
                "such as google/t5-v1_1-xxl, are read"
            )
    arrays = {}
    for shard in names:
        arrays |= read_file(inside(path, shard))
    return arrays


def shards(path: str, files: list[str]) -> list[str]:
    """The names of the safetensors files in a Hugging Face directory."""
    if "model.safetensors.index.json" in files:
        weight_map = read_json(inside(path, "model.safetensors.index.json")).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{path}/model.safetensors.index.json has no weight_map of files: copy it again")
        names = sorted(set(weight_map.values()))
        for shard in names:
            if not re.fullmatch(r"[\w.\-]+\.safetensors", shard):
                raise UserError(
                    f"{path}/model.safetensors.index.json names {shard!r}, expected a file beside it: copy it again"
                )
            if shard not in files:
                raise UserError(f"{path} lacks {shard}, which its index names: copy the whole directory")
        return names
    if "model.safetensors" in files:
        return ["model.safetensors"]
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        raise UserError(
            f"{path} has no safetensors, and {pickles[0]} is a pickle, which can run any program when read: {CONVERT}"
        )
    raise UserError(f"{path} has no model.safetensors: {EXPECTED}")


def to_encoder(stored: dict[str, StoredArray]) -> dict[str, StoredArray]:
    """The arrays of a Hugging Face T5 by T5Encoder's names, without the decoder.

    An encoder's parameter that T5Encoder does not have keeps its name. It would change the outputs, so
    `checkpoints.open_checkpoint` refuses it.
    """
    arrays = {}
    for name, array in stored.items():
        for pattern, ours, transposed in _NAMES:
            if match := re.fullmatch(pattern, name):
                arrays[ours.format(*match.groups())] = _transposed(array) if transposed else array
                break
        else:
            if name.startswith("encoder."):
                arrays[name] = array
    return arrays


def _transposed(array: StoredArray) -> StoredArray:
    def read(index=()):
        # An index of the first dimension here is one of the last dimension in the file
        return array.read((slice(None), *index)).T if index else array.read().T

    return StoredArray(array.shape[::-1], array.dtype, read)

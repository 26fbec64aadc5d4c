"""Encoders with random weights, written in other libraries' file formats from the descriptions of those formats."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts
from flax import serialization, traverse_util
from safetensors.numpy import save_file

from ivideo.text.t5 import T5Encoder

TINY = {"vocab": 384, "dim": 24, "layers": 3, "heads": 2, "head_dim": 8, "ff": 40}


def random_weights(sizes, seed=0) -> dict[str, np.ndarray]:
    """Parameters by their names a/b/c, in numbers that depend on the seed alone."""
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    shapes = jax.eval_shape(T5Encoder(**sizes).init, jax.random.key(0), tokens, tokens)["params"]
    rng = np.random.default_rng(seed)
    weights = {}
    for name, leaf in sorted(traverse_util.flatten_dict(shapes, sep="/").items()):
        values = rng.normal(size=leaf.shape)
        if name.endswith("scale"):
            values = 1 + 0.1 * values
        elif name.endswith("kernel"):
            values *= leaf.shape[0] ** -0.5
            if "query" in name:  # T5 does not divide its logits
                values *= sizes["head_dim"] ** -0.5
        weights[name] = values.astype(np.float32)
    return weights


def random_tokens(sizes, batch=3, length=40, seed=1):
    """Padded rows of different lengths: tokens [B, L], mask [B, L]."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(length, 1, batch).astype(int)
    mask = np.arange(length) < lengths[:, None]
    return (rng.integers(3, sizes["vocab"], (batch, length)) * mask).astype(np.int32), mask


def output(weights, sizes, tokens, mask):
    params = traverse_util.unflatten_dict(weights, sep="/")
    return np.asarray(T5Encoder(**sizes).apply({"params": params}, tokens, mask))


# ---- Hugging Face

_LAYER = {
    "attention/query/kernel": "layer.0.SelfAttention.q", "attention/key/kernel": "layer.0.SelfAttention.k",
    "attention/value/kernel": "layer.0.SelfAttention.v", "attention/out/kernel": "layer.0.SelfAttention.o",
    "pre_attention_layer_norm/scale": "layer.0.layer_norm", "pre_mlp_layer_norm/scale": "layer.1.layer_norm",
    "mlp/wi_0/kernel": "layer.1.DenseReluDense.wi_0", "mlp/wi_1/kernel": "layer.1.DenseReluDense.wi_1",
    "mlp/wo/kernel": "layer.1.DenseReluDense.wo",
}  # fmt: skip
_WHOLE = {
    "token_embedder/embedding": "shared",
    "encoder/relpos_bias/rel_embedding": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "encoder/encoder_norm/scale": "encoder.final_layer_norm",
}


def huggingface_weights(weights) -> dict[str, np.ndarray]:
    """The same weights by their names in transformers: kernels [out, in]."""
    named = {}
    for name, value in weights.items():
        if name in _WHOLE:
            theirs = _WHOLE[name]
        else:
            layer, _, rest = name.removeprefix("encoder/layers_").partition("/")
            theirs = f"encoder.block.{layer}.{_LAYER[rest]}"
        turned = name.endswith(("kernel", "rel_embedding"))
        named[f"{theirs}.weight"] = np.ascontiguousarray(value.T if turned else value)
    return named


def huggingface_config(sizes) -> dict:
    return {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "vocab_size": sizes["vocab"], "d_model": sizes["dim"],
        "num_layers": sizes["layers"], "num_heads": sizes["heads"], "d_kv": sizes["head_dim"], "d_ff": sizes["ff"],
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    }  # fmt: skip


def write_huggingface(folder: pathlib.Path, weights, sizes, *, shards=1, more=None) -> pathlib.Path:
    """A directory as save_pretrained writes it, in one file or several with their index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(huggingface_config(sizes)))
    named = {**huggingface_weights(weights), **(more or {})}
    if shards == 1:
        save_file(named, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i, names in enumerate(np.array_split(sorted(named), shards), 1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        save_file({name: named[name] for name in names}, folder / file)
        weight_map |= {str(name): file for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# ---- T5X


def scanned(weights, sizes, *, joined: bool) -> dict[str, np.ndarray]:
    """Layers stacked along the second axis, one level deeper; heads apart unless `joined`."""
    layers, heads, width = sizes["layers"], sizes["heads"], sizes["head_dim"]
    tree = {name: value for name, value in weights.items() if not name.startswith(("encoder/layers", "encoder/relpos"))}
    for rest in _LAYER:
        values = [weights[f"encoder/layers_{i}/{rest}"] for i in range(layers)]
        if not joined and rest.startswith("attention/out"):
            values = [value.reshape(heads, width, -1) for value in values]
        elif not joined and rest.startswith("attention"):
            values = [value.reshape(-1, heads, width) for value in values]
        tree[f"encoder/encoder/{rest}"] = np.stack(values, axis=1)
    own = [weights.get(f"encoder/layers_{i}/relpos_bias/rel_embedding") for i in range(layers)]
    tables = [weights["encoder/relpos_bias/rel_embedding"]] * layers if own[0] is None else own
    tree["encoder/encoder/relpos_bias/rel_embedding"] = np.stack(tables, axis=1)
    return tree


def write_array(folder: pathlib.Path, value: np.ndarray, *, chunks=None, compressor=None):
    """A zarr array as T5X stores one."""
    dtype = "bfloat16" if value.dtype == ml_dtypes.bfloat16 else value.dtype.str
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {
            "shape": value.shape,
            "chunks": chunks or value.shape,
            "dtype": dtype,
            "compressor": compressor or {"id": "gzip", "level": 1},
        },
    }
    ts.open(spec, create=True).result().write(value).result()


def write_t5x(
    folder: pathlib.Path,
    tree,
    *,
    inline=("scale",),
    orbax=False,
    split=False,
    compressor=None,
    old_path=False,
    more=None,
) -> pathlib.Path:
    """A T5X directory: parameters whose names end in one of `inline` are in the index, the others lie beside it.

    `orbax`: the later layout, its index in state/ and placeholders for arrays. `split`: arrays in several chunks.
    `more`: other parts of the tree `target`.
    """
    root = folder / "state" if orbax else folder
    root.mkdir(parents=True)
    index = {}
    for name, value in tree.items():
        if name.endswith(inline) and not orbax:
            index[name] = value
            continue
        dotted = "target." + name.replace("/", ".")
        chunks = [-(-size // 2) for size in value.shape] if split else list(value.shape)
        write_array(root / dotted, value, chunks=chunks, compressor=compressor)
        kvstore = {"driver": "gfile", "path": f"/a/dummy/bucket/{dotted}" + "/" * split}
        metadata = {"shape": list(value.shape), "chunks": chunks, "compressor": {"id": "gzip", "level": 1}}
        spec = {"driver": "zarr", "dtype": "float32", "kvstore": kvstore, "metadata": metadata}
        if old_path:
            spec["path"] = spec["kvstore"].pop("path")
        index[name] = f"PLACEHOLDER://{dotted}" if orbax else spec
    target = {**traverse_util.unflatten_dict(index, sep="/"), **(more or {})}
    state = {"param_states": {"decoder": {"m": np.zeros(3, np.float32)}}, "step": np.int32(7)}
    whole = {"target": target, "state": state} if orbax else {
        "version": 3, "optimizer": {"target": target, "state": state}
    }  # fmt: skip
    write_index(root, whole)
    if orbax:
        (folder / "_METADATA").write_text("{}")
    return folder


def write_index(root: pathlib.Path, tree):
    (root / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


# ---- sentencepiece

WORDS = ["a", "the", "red", "green", "blue", "star", "circle", "square", "moving", "left", "right", "up", "on"]


def write_spiece(folder: pathlib.Path, size: int = 300, *, pad=0, end=1, name="spiece.model", words=0) -> str:
    """A small sentencepiece model with T5's special ids, normalising as T5's does (NFKC).

    `words`: pieces that are given, for a size that the few sentences here do not have.
    """
    import sentencepiece

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    sentences = [" ".join(rng.choice(WORDS, 8)) for _ in range(200)]
    sentences += [" ".join("".join(rng.choice(letters, 5)) for _ in range(8)) for _ in range(400)]
    prefix = str(folder / "trained")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=prefix,
        vocab_size=size,
        pad_id=pad,
        eos_id=end,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=[f"word{i}" for i in range(words)],
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        num_threads=1,
    )
    path = folder / name
    pathlib.Path(f"{prefix}.model").rename(path)
    return str(path)

"""Encoders from files of T5X and Hugging Face: the same outputs for every layout, and helpful errors."""

import json
import os
import pickle

import fake_bucket
import ml_dtypes
import numpy as np
import pytest
import t5_files as files

from configs import base
from ivideo import text
from ivideo.errors import UserError
from ivideo.text.checkpoints import open_checkpoint, read_array

TOKENS, MASK = files.random_tokens(files.TINY)
DECODER = {"decoder": {"layers_0": {"mlp": {"wi_0": {"kernel": np.zeros((4, 4), np.float32)}}}}}


@pytest.fixture(scope="module")
def weights():
    return files.random_weights(files.TINY)


@pytest.fixture(scope="module")
def wanted(weights):
    return files.output(weights, files.TINY, TOKENS, MASK)


T5X = {
    "minimal": {},
    "all in the index": {"inline": ("kernel", "scale", "embedding")},
    "nothing in the index": {"inline": ()},
    "chunks": {"split": True},
    "zstd": {"compressor": {"id": "zstd", "level": 3}},
    "old path": {"old_path": True},
    "with a decoder": {"more": DECODER},
    "orbax": {"orbax": True},
}


def same(path, wanted):
    encoder = text.load_encoder(str(path), length=TOKENS.shape[1])
    assert {name: getattr(encoder.module, name) for name in files.TINY} == files.TINY
    np.testing.assert_allclose(encoder.encode(TOKENS, MASK), wanted, atol=1e-5)
    return encoder


@pytest.mark.parametrize("layout", T5X)
def test_small_t5x_directory(layout, tmp_path, weights, wanted):
    same(files.write_t5x(tmp_path / "checkpoint_7", weights, **T5X[layout]), wanted)


@pytest.mark.parametrize("joined", [False, True], ids=["heads apart", "heads joined"])
@pytest.mark.parametrize("options", [{}, {"orbax": True, "split": True}], ids=["t5x", "orbax, chunks"])
def test_small_t5x_directory_of_scanned_layers(joined, options, tmp_path, weights, wanted):
    tree = files.scanned(weights, files.TINY, joined=joined)
    same(files.write_t5x(tmp_path / "checkpoint_7", tree, **options), wanted)


def test_small_scanned_layers_with_tables_of_their_own(tmp_path):
    sizes = {**files.TINY, "own_positions": True}
    weights = files.random_weights(sizes)
    path = files.write_t5x(tmp_path / "checkpoint_7", files.scanned(weights, sizes, joined=False))
    encoder = text.load_encoder(str(path), length=TOKENS.shape[1])
    assert encoder.module.own_positions
    wanted = files.output(weights, sizes, TOKENS, MASK)
    np.testing.assert_allclose(encoder.encode(TOKENS, MASK), wanted, atol=1e-5)
    shared = {**weights, **{f"encoder/layers_{i}/relpos_bias/rel_embedding": np.zeros((2, 32)) for i in range(3)}}
    assert np.abs(files.output(shared, sizes, TOKENS, MASK) - wanted).max() > 0.1


@pytest.mark.parametrize("shards", [1, 3])
def test_small_huggingface_directory(shards, tmp_path, weights, wanted):
    more = {"decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((4, 4), np.float32)}
    same(files.write_huggingface(tmp_path / "hf", weights, files.TINY, shards=shards, more=more), wanted)


def test_small_files_of_hugging_faces_own_cache_are_links(tmp_path, weights, wanted):
    written = files.write_huggingface(tmp_path / "hf", weights, files.TINY)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(written.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    same(snapshot, wanted)


def test_small_fingerprint_is_of_what_embeddings_follow_from(tmp_path, weights):
    """The same for every layout; another for other weights, length or type."""
    t5x = str(files.write_t5x(tmp_path / "checkpoint_7", files.scanned(weights, files.TINY, joined=False)))
    hf = str(files.write_huggingface(tmp_path / "hf", weights, files.TINY))
    norm = "encoder/layers_2/pre_mlp_layer_norm/scale"
    other = str(files.write_huggingface(tmp_path / "other", {**weights, norm: weights[norm] + 1e-3}, files.TINY))
    prints = [text.load_encoder(path, length=8).fingerprint for path in (t5x, hf, other)]
    prints += [
        text.load_encoder(hf, length=9).fingerprint,
        text.load_encoder(hf, length=8, dtype="bfloat16").fingerprint,
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


@pytest.mark.parametrize("kept", [ml_dtypes.bfloat16, np.float16])
def test_small_half_precision_files(kept, tmp_path, weights, wanted):
    half = {name: value.astype(kept) for name, value in weights.items()}
    rounded = files.output({k: v.astype(np.float32) for k, v in half.items()}, files.TINY, TOKENS, MASK)
    same(files.write_huggingface(tmp_path / "hf", half, files.TINY), rounded)
    if kept == ml_dtypes.bfloat16:
        same(files.write_t5x(tmp_path / "checkpoint_7", half, inline=()), rounded)
    assert 1e-4 < np.abs(rounded - wanted).max() < 0.3


def test_small_bfloat16_encoder(tmp_path, weights, wanted):
    path = str(files.write_huggingface(tmp_path / "hf", weights, files.TINY))
    encoder = text.load_encoder(path, length=TOKENS.shape[1], dtype="bfloat16")
    assert {leaf.dtype for leaf in jax_leaves(encoder.params)} == {np.dtype(ml_dtypes.bfloat16)}
    found = np.asarray(encoder.encode(TOKENS, MASK))
    assert np.linalg.norm(found - wanted) < 3e-2 * np.linalg.norm(wanted)


def jax_leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_small_parameters_are_split_over_the_devices(tmp_path, weights, wanted, monkeypatch):
    from ivideo.devices import sharding

    monkeypatch.setattr(sharding, "MIN_SHARDED", 1)
    path = str(files.write_huggingface(tmp_path / "hf", weights, files.TINY))
    encoder = text.load_encoder(path, length=TOKENS.shape[1], mesh=sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    layer = encoder.params["encoder"]["layers_1"]
    assert tuple(layer["attention"]["query"]["kernel"].sharding.spec) == ("fsdp", "tensor")
    assert tuple(layer["mlp"]["wo"]["kernel"].sharding.spec) == ("tensor", "fsdp")
    np.testing.assert_allclose(encoder.encode(TOKENS, MASK), wanted, atol=1e-5)


# ---- in a bucket


@pytest.fixture
def objects():
    with fake_bucket.bucket() as objects:
        yield objects


def put(folder, objects) -> str:
    """The files of a folder, or one file, as objects of the bucket; their path."""
    for path in [folder] if folder.is_file() else (p for p in folder.rglob("*") if p.is_file()):
        objects[f"t5/{path.relative_to(folder.parent)}"] = path.read_bytes()
    return f"gs://bucket/t5/{folder.name}"


def test_small_t5x_directory_in_a_bucket(tmp_path, weights, wanted, objects):
    same(put(files.write_t5x(tmp_path / "checkpoint_7", weights, more=DECODER), objects), wanted)


@pytest.mark.parametrize("options", [{"split": True}, {"orbax": True}], ids=["chunks", "orbax"])
def test_other_t5x_directories_in_a_bucket(options, tmp_path, weights, wanted, objects):
    same(put(files.write_t5x(tmp_path / "checkpoint_7", weights, more=DECODER, **options), objects), wanted)


@pytest.mark.parametrize("kept", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_small_huggingface_directory_in_a_bucket(shards, kept, tmp_path, weights, objects):
    """As on this machine: the same parameters, and so the same fingerprint."""
    weights = {name: value.astype(kept) for name, value in weights.items()}
    folder = files.write_huggingface(tmp_path / "hf", weights, files.TINY, shards=shards)
    here, there = (text.load_encoder(path, length=8) for path in (str(folder), put(folder, objects)))
    assert here.fingerprint == there.fingerprint
    np.testing.assert_array_equal(here.encode(TOKENS, MASK), there.encode(TOKENS, MASK))


def test_small_only_the_encoder_is_read_from_a_bucket(tmp_path, weights, objects):
    """Nothing is asked of the decoder's arrays, which are not there."""
    more = {"decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((64, 64), np.float32)}
    path = put(files.write_huggingface(tmp_path / "hf", weights, files.TINY, more=more), objects)
    (name,) = [name for name in objects if name.endswith(".safetensors")]
    header = json.loads(objects[name][8 : 8 + int.from_bytes(objects[name][:8], "little")])
    assert header["decoder.block.0.layer.0.SelfAttention.q.weight"]["data_offsets"][0] == 0
    assert text.load_encoder(path, length=8).module.dim == files.TINY["dim"]


def test_tokenizer_in_a_bucket(tmp_path, objects):
    sizes = {**files.TINY, "vocab": 400}
    folder = files.write_huggingface(tmp_path / "hf", files.random_weights(sizes), sizes)
    spiece = files.write_spiece(folder, 300)
    wanted = text.load_encoder(str(folder), length=8).tokenize(["the red star"])[0]
    path = put(folder, objects)
    np.testing.assert_array_equal(text.load_encoder(path, length=8).tokenize(["the red star"])[0], wanted)
    objects["vocabs/t5.model"] = objects.pop(f"t5/hf/{os.path.basename(spiece)}")
    with pytest.raises(UserError, match="gs://bucket/t5/hf has no spiece.model"):
        text.load_encoder(path, length=8).tokenize(["the red star"])
    found = text.load_encoder(path, length=8, tokenizer="gs://bucket/vocabs/t5.model").tokenize(["the red star"])[0]
    np.testing.assert_array_equal(found, wanted)


def cut_header(objects):
    return {name: data[:20] if name.endswith("safetensors") else data for name, data in objects.items()}


def cut_array(objects):
    return {name: data[:-9] if name.endswith("safetensors") else data for name, data in objects.items()}


def long_header(objects):
    return {name: b"\xff" * 8 + data if name.endswith("safetensors") else data for name, data in objects.items()}


def without_config(objects):
    return {name: data for name, data in objects.items() if not name.endswith("config.json")}


def pickled(objects):
    return {name.replace("model.safetensors", "pytorch_model.bin"): data for name, data in objects.items()}


def deeper(objects):
    return {name.replace("hf/", "hf/checkpoint_12/"): data for name, data in objects.items()}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (cut_header, "model.safetensors is not a complete safetensors file"),
        (long_header, "its header would have 18446744073709551615 bytes"),
        (cut_array, "cannot be read .*: copy the checkpoint again"),
        (without_config, "has no config.json"),
        (pickled, "pytorch_model.bin is a pickle"),
        (deeper, "did you mean gs://bucket/t5/hf/checkpoint_12"),
        (lambda _: {}, "no text encoder at gs://bucket/t5/hf"),
    ],
)
def test_small_what_is_wrong_in_a_bucket_is_named(edit, message, tmp_path, weights, objects):
    path = put(files.write_huggingface(tmp_path / "hf", weights, files.TINY), objects)
    edited = edit(dict(objects))
    objects.clear()
    objects.update(edited)
    with pytest.raises(UserError, match=message):
        text.load_encoder(path, length=8)


# ---- what is wrong with files


def t5x(folder, weights, **options):
    return files.write_t5x(folder / "checkpoint_7", weights, **options)


def edited_index(folder, weights, edit):
    from flax import serialization

    path = t5x(folder, weights)
    tree = serialization.msgpack_restore((path / "checkpoint").read_bytes())
    edit(tree)
    files.write_index(path, tree)
    return path


def missing_shard(folder, weights):
    path = files.write_huggingface(folder / "hf", weights, files.TINY, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    return path


def shard_elsewhere(folder, weights):
    path = files.write_huggingface(folder / "hf", weights, files.TINY, shards=3)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"../{file}" for name, file in index["weight_map"].items()}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def wrong_dtype(folder, weights):
    name = "encoder/layers_1/mlp/wo/kernel"
    return t5x(folder, {**weights, name: weights[name].astype(np.uint16)})


def decoder_only(folder, weights):
    path = folder / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(files.huggingface_config(files.TINY)))
    files.save_file({"decoder.final_layer_norm.weight": np.ones(4, np.float32)}, path / "model.safetensors")
    return path


def move_out(file, folder):
    """A link in a file's place, to where it is now."""
    file.rename(folder / "elsewhere")
    file.symlink_to(folder / "elsewhere")


def linked(folder, weights):
    path = t5x(folder, weights)
    move_out(path / "target.encoder.layers_0.mlp.wo.kernel", folder)
    return path


def linked_chunk(folder, weights):
    path = t5x(folder, weights)
    move_out(path / "target.encoder.layers_0.mlp.wo.kernel" / "0.0", folder)
    return path


def linked_shard(folder, weights):
    path = files.write_huggingface(folder / "hf", weights, files.TINY)
    move_out(path / "model.safetensors", folder)
    return path


def linked_nested_chunk(folder, weights):
    path = t5x(folder, weights)
    array = path / "target.encoder.layers_0.mlp.wo.kernel"
    (array / "0").mkdir()
    (folder / "elsewhere").mkdir()
    (array / "0" / "0").symlink_to(folder / "elsewhere")
    return path


def linked_config(folder, weights):
    path = files.write_huggingface(folder / "hf", weights, files.TINY)
    move_out(path / "config.json", folder)
    return path


def linked_vocabulary(folder, weights):
    path = files.write_huggingface(folder / "hf", weights, files.TINY)
    (folder / "elsewhere").write_text("")
    (path / "spiece.model").symlink_to(folder / "elsewhere")
    return path


def stray_chunk(folder, weights):
    """As an interrupted copy leaves one: as many files as there should be, but one under another name."""
    path = t5x(folder, weights, split=True)
    array = path / "target.encoder.layers_0.mlp.wo.kernel"
    (array / "1.0").rename(array / "1.0_.part")
    return path


def positions_without_chunk(folder, weights):
    path = t5x(folder, files.scanned(weights, files.TINY, joined=False), split=True)
    (path / "target.encoder.encoder.relpos_bias.rel_embedding" / "0.0.0").unlink()
    return path


def umt5(folder, weights):
    path = files.write_huggingface(folder / "hf", weights, files.TINY)
    (path / "config.json").write_text(json.dumps({**files.huggingface_config(files.TINY), "model_type": "umt5"}))
    return path


def tables_of_their_own(folder, weights):
    table = np.zeros((32, files.TINY["heads"]), np.float32)
    more = {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": table}
    return files.write_huggingface(folder / "hf", weights, files.TINY, more=more)


def config_of_a_list(folder, weights):
    path = files.write_huggingface(folder / "hf", weights, files.TINY)
    (path / "config.json").write_text("[]")
    return path


def path_upwards(folder, weights):
    def edit(tree):
        tree["optimizer"]["target"]["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]["kvstore"]["path"] = "../../other"

    return edited_index(folder, weights, edit)


def name_upwards(folder, weights):
    def edit(tree):
        tree["optimizer"]["target"]["encoder"]["../../other"] = {
            "driver": "zarr", "kvstore": {"driver": "file", "path": "x"}, "metadata": {},
        }  # fmt: skip

    return edited_index(folder, weights, edit)


def placeholder_upwards(folder, weights):
    def edit(tree):
        tree["optimizer"]["target"]["encoder"]["layers_0"]["mlp"]["wo"]["kernel"] = "PLACEHOLDER://../other"

    return edited_index(folder, weights, edit)


def old_version(folder, weights):
    return edited_index(folder, weights, lambda tree: tree.update(version=1))


def pickled(folder, weights):
    path = folder / "hf"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"shared.weight": [1.0]}))
    return path


def pickled_file(folder, weights):
    (folder / "model.pt").write_bytes(pickle.dumps({}))
    return folder / "model.pt"


def truncated_chunk(folder, weights):
    path = t5x(folder, weights)
    chunk = path / "target.encoder.layers_0.mlp.wo.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    return path


def missing_chunk(folder, weights):
    path = t5x(folder, weights, split=True)
    (path / "target.encoder.layers_0.mlp.wo.kernel" / "1.0").unlink()
    return path


def missing_array(folder, weights):
    path = t5x(folder, weights)
    (path / "target.encoder.layers_0.mlp.wo.kernel").rename(folder / "elsewhere")
    return path


def truncated_shard(folder, weights):
    path = files.write_huggingface(folder / "hf", weights, files.TINY)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return path


def no_layer(folder, weights):
    return t5x(folder, {name: value for name, value in weights.items() if "layers_1/mlp" not in name})


def empty_index(folder, weights):
    path = t5x(folder, weights)
    (path / "checkpoint").write_bytes(b"")
    return path


def empty_shard(folder, weights):
    path = files.write_huggingface(folder / "hf", weights, files.TINY)
    (path / "model.safetensors").write_bytes(b"")
    return path


def first_t5(folder, weights):
    path = files.write_huggingface(folder / "hf", weights, files.TINY)
    (path / "config.json").write_text(json.dumps({**files.huggingface_config(files.TINY), "feed_forward_proj": "relu"}))
    return path


def folder_of_steps(folder, weights):
    return t5x(folder, weights).parent


def nothing(folder, weights):
    return folder / "none"


MALFORMED = [
    (missing_shard, "lacks model-00002-of-00003.safetensors, which its index names"),
    (shard_elsewhere, r"names '\.\./model-00001-of-00003.safetensors', expected a file beside it"),
    (wrong_dtype, "encoder/layers_1/mlp/wo/kernel is of type uint16, expected one of .*float32.*T5X before version 2"),
    (decoder_only, r"has no T5 encoder \(it holds decoder.final_layer_norm.weight\)"),
    (linked, "target.encoder.layers_0.mlp.wo.kernel is a link to .*elsewhere, outside of the checkpoint"),
    (linked_chunk, r"wo.kernel/0\.0 is a link to .*elsewhere, outside of the checkpoint"),
    (linked_shard, "model.safetensors is a link to .*elsewhere, outside of the checkpoint"),
    (path_upwards, r"wo/kernel is stored by 'zarr' in '\.\./\.\./other', expected zarr and a path without"),
    (name_upwards, r"names a parameter 'encoder/\.\./\.\./other', expected letters"),
    (placeholder_upwards, r"wo/kernel is stored as '\.\./other', expected 'target.encoder.layers_0.mlp.wo.kernel'"),
    (old_version, "is of version 1, expected 2 or 3"),
    (pickled, "pytorch_model.bin is a pickle, which can run any program when read: save it as safetensors"),
    (pickled_file, "model.pt is a pickle"),
    (truncated_chunk, "encoder/layers_0/mlp/wo/kernel cannot be read .*: copy the checkpoint again"),
    (missing_chunk, r"encoder/layers_0/mlp/wo/kernel cannot be read \(1 of 4 chunks are missing, such as \d\.\d\)"),
    (stray_chunk, r"wo/kernel cannot be read \(1 of 4 chunks are missing, such as 1\.0\)"),
    (positions_without_chunk, r"relpos_bias/rel_embedding cannot be read .*chunks are missing, such as 0\.0\.0"),
    (linked_nested_chunk, r"wo.kernel/0/0 is a link to .*elsewhere, outside of the checkpoint"),
    (linked_config, "config.json is a link to .*elsewhere, outside of the checkpoint"),
    (linked_vocabulary, "spiece.model is a link to .*elsewhere, outside of the checkpoint"),
    (umt5, "has model_type = 'umt5', expected 't5'"),
    (
        tables_of_their_own,
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight is .*no such parameter",
    ),
    (config_of_a_list, "config.json holds .., expected an object with names"),
    (missing_array, "lacks target.encoder.layers_0.mlp.wo.kernel"),
    (truncated_shard, "model.safetensors is not a complete safetensors file"),
    (no_layer, "not a complete T5 1.1 encoder: encoder/layers_1/mlp/wi_0/kernel is absent, expected .24, 40."),
    (empty_index, "checkpoint is not a T5X index"),
    (empty_shard, "model.safetensors is not a complete safetensors file"),
    (first_t5, "has feed_forward_proj = 'relu', expected 'gated-gelu': only T5 1.1 and ByT5"),
    (folder_of_steps, "is not a text encoder: .*did you mean .*checkpoint_7?"),
    (nothing, "no text encoder at .*none: expected a T5X directory"),
]


@pytest.mark.parametrize(("make", "message"), MALFORMED, ids=lambda x: getattr(x, "__name__", ""))
def test_small_malformed_files_are_named(make, message, tmp_path, weights):
    path = make(tmp_path, weights)
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        text.load_encoder(str(path))
    assert len(str(error.value)) < 800
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_small_weights_without_a_tokenizer_encode_tokens(tmp_path):
    """It is missed by a program when it is asked for; by a config, whose captions need it, before weights are read."""
    sizes = {**files.TINY, "vocab": 500}
    path = str(t5x(tmp_path, files.random_weights(sizes)))
    encoder = text.load_encoder(path, length=4)
    made = encoder.encode(np.array([[5, 6, 1, 0]]), np.array([[True, True, True, False]]))
    assert made.shape == (1, 4, sizes["dim"]) and np.isfinite(made).all() and not np.any(made[0, 3])
    message = "has no spiece.model, and its vocabulary of 500 is not that of bytes .384.: give its sentencepiece model"
    for asked in (lambda: encoder.tokenize(["a"]), lambda: encoder.fingerprint, lambda: encoder.tokenizer):
        with pytest.raises(UserError, match=message):
            asked()
    config = base.get_config("small").text
    config.update(checkpoint=path, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "read_array", lambda *_: pytest.fail("weights were read"))
        with pytest.raises(UserError, match=message):
            text.load_encoder(config)
        with pytest.raises(UserError, match="nothing.model"):
            text.load_encoder(path, tokenizer="nothing.model")


def test_small_index_of_a_pickle_runs_nothing(tmp_path, weights):
    path = t5x(tmp_path, weights)

    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (path / "checkpoint").write_bytes(pickle.dumps(Program()))
    with pytest.raises(UserError, match="is not a T5X index"):
        open_checkpoint(str(path))
    assert not (tmp_path / "ran").exists()


def test_small_parts_of_arrays_are_read_alone(tmp_path, weights):
    """The first row of every matrix, of every layout."""
    for path in (
        files.write_huggingface(tmp_path / "hf", weights, files.TINY),
        t5x(tmp_path, files.scanned(weights, files.TINY, joined=False), split=True),
    ):
        checkpoint = open_checkpoint(str(path))
        for name, value in weights.items():
            np.testing.assert_array_equal(read_array(checkpoint, name, (0,)), value[0])
            np.testing.assert_array_equal(read_array(checkpoint, name), value)

"""Encoders from files of T5X and Hugging Face: the same outputs for every layout, and helpful errors."""

import json
import os

import fake_bucket
import ml_dtypes
import numpy as np
import pytest
import t5_files as files

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


def test_small_parts_of_arrays_are_read_alone(tmp_path, weights):
    """The first row of every matrix, of every layout."""
    for path in (
        files.write_huggingface(tmp_path / "hf", weights, files.TINY),
        files.write_t5x(tmp_path / "checkpoint_7", files.scanned(weights, files.TINY, joined=False), split=True),
    ):
        checkpoint = open_checkpoint(str(path))
        for name, value in weights.items():
            np.testing.assert_array_equal(read_array(checkpoint, name, (0,)), value[0])
            np.testing.assert_array_equal(read_array(checkpoint, name), value)


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
def test_huggingface_directory_in_a_bucket(shards, kept, tmp_path, weights, objects):
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

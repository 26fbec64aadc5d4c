"""Text checkpoints with something wrong: a function per fault makes one, and MALFORMED has the error of each."""

import json
import pickle

import numpy as np
import t5_files as files


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

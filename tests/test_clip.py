"""CLIP against transformers, with random weights in a Hugging Face directory; CLIP score and R-precision.

The outputs of transformers are kept in clip_outputs.npz, so that the tests do not need it. With transformers and
PyTorch installed, `python tests/test_clip.py` makes the file anew.
"""

import functools
import json
import logging
import pathlib
import re
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import network_files

from ivideo.errors import UserError
from ivideo.evaluation import alignment
from ivideo.evaluation.networks import clip, clip_tokens

KEPT = pathlib.Path(__file__).parent / "clip_outputs.npz"
MERGES = ["t h", "th e</w>", "r e", "re d</w>", "s t", "a r</w>", "st ar</w>", "1 2", "' s</w>", "ã ģ", "o u"]
TEXTS = [
    "The red star",
    "  the STAR's\tcolours, in 2012!!'s  ",
    "a",
    "",
    "Ünïcode e\u0301, 日本の星 ½ ☆☆ we'll they'd I'm",
    "many words of red stars " * 12,
]
SIZES = {
    # as ViT-B/32: text and vision of different widths; as ViT-L/14: a patch that does not divide 8 bits evenly
    "b32": {"text": (24, 48, 2, 2), "vision": (32, 64, 3, 4), "image": 32, "patch": 8, "dims": 16, "act": "quick_gelu"},
    "l14": {"text": (16, 64, 1, 4), "vision": (24, 96, 2, 2), "image": 28, "patch": 14, "dims": 12, "act": "gelu"},
}


def vocabulary():
    symbols = list(clip_tokens._symbols().values())
    names = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in MERGES), "<|startoftext|>"]
    return {name: n for n, name in enumerate([*names, "<|endoftext|>"])}


def config(sizes):
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    groups = {
        f"{tower}_config": dict(zip(keys, sizes[tower], strict=True))
        | {"hidden_act": sizes["act"], "projection_dim": sizes["dims"]}
        for tower in ("text", "vision")
    }
    end = len(vocabulary()) - 1
    groups["text_config"] |= {"vocab_size": end + 1, "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    groups["vision_config"] |= {"image_size": sizes["image"], "patch_size": sizes["patch"]}
    return {"model_type": "clip", "projection_dim": sizes["dims"], **groups}


def arrays(sizes, seed=0):
    """Random weights by Hugging Face's names."""
    rng, found = np.random.default_rng(seed), {"logit_scale": np.float32(2.6)}

    def linear(name, out, into, bias=True):
        found[f"{name}.weight"] = rng.normal(size=(out, into)) * into**-0.5
        if bias:
            found[f"{name}.bias"] = 0.1 * rng.normal(size=out)

    def norm(name, width):
        found[f"{name}.weight"], found[f"{name}.bias"] = 1 + 0.1 * rng.normal(size=width), 0.1 * rng.normal(size=width)

    for tower in ("text", "vision"):
        width, inner, layers, _ = sizes[tower]
        for n in range(layers):
            layer = f"{tower}_model.encoder.layers.{n}"
            for name in "qkv":
                linear(f"{layer}.self_attn.{name}_proj", width, width)
            linear(f"{layer}.self_attn.out_proj", width, width)
            linear(f"{layer}.mlp.fc1", inner, width)
            linear(f"{layer}.mlp.fc2", width, inner)
            norm(f"{layer}.layer_norm1", width)
            norm(f"{layer}.layer_norm2", width)
    text, vision, places = sizes["text"][0], sizes["vision"][0], (sizes["image"] // sizes["patch"]) ** 2 + 1
    found["text_model.embeddings.token_embedding.weight"] = rng.normal(size=(len(vocabulary()), text))
    found["text_model.embeddings.position_embedding.weight"] = rng.normal(size=(77, text))
    found["vision_model.embeddings.position_embedding.weight"] = rng.normal(size=(places, vision))
    found["vision_model.embeddings.class_embedding"] = rng.normal(size=vision)
    found["vision_model.embeddings.patch_embedding.weight"] = rng.normal(size=(vision, 3, *[sizes["patch"]] * 2)) * 0.1
    norm("text_model.final_layer_norm", text)
    norm("vision_model.pre_layrnorm", vision)
    norm("vision_model.post_layernorm", vision)
    linear("text_projection", sizes["dims"], text, bias=False)
    linear("visual_projection", sizes["dims"], vision, bias=False)
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def write(folder, sizes, weights=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(sizes)))
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    # Older files have the numbers of the positions
    positions = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    save_file(arrays(sizes) | positions if weights is None else weights, folder / "model.safetensors")
    return str(folder)


def frames():
    return network_files.clips(3, 40, 56)


def transformers_outputs():
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    outputs = {}
    for name, sizes in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = write(pathlib.Path(folder), sizes)
            tokens = CLIPTokenizer.from_pretrained(path, model_max_length=77)(
                TEXTS, padding="max_length", truncation=True, return_tensors="pt"
            )
        model = CLIPModel(CLIPConfig(**config(sizes))).eval()
        missing, unexpected = model.load_state_dict(
            {name: torch.from_numpy(np.asarray(array)) for name, array in arrays(sizes).items()}, strict=False
        )
        assert not unexpected and not missing
        pixels = torch.from_numpy(clip.prepare(frames(), sizes["image"])).movedim(-1, 1)
        with torch.no_grad():
            found = model(**tokens, pixel_values=pixels)
        outputs |= {f"{name} tokens": tokens["input_ids"].numpy()} if name == "b32" else {}
        outputs |= {f"{name} texts": found.text_embeds.numpy(), f"{name} frames": found.image_embeds.numpy()}
    return outputs


@functools.cache
def kept():
    with np.load(KEPT) as outputs:
        return dict(outputs)


def test_kept_outputs_are_those_of_transformers():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for name, value in transformers_outputs().items():
        np.testing.assert_allclose(kept()[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("size", SIZES)
def test_vectors_of_clip_are_those_of_transformers(size, tmp_path):
    """The vectors have length 1."""
    reader = clip.read(write(tmp_path / "clip", SIZES[size]))
    np.testing.assert_allclose(reader.texts(TEXTS), kept()[f"{size} texts"], rtol=0, atol=3e-6)
    np.testing.assert_allclose(reader.frames(frames()), kept()[f"{size} frames"], rtol=0, atol=3e-6)
    assert reader.protocol()["weights"] == reader.weights.digest


def test_small_tokens_are_those_of_transformers(tmp_path):
    path = write(tmp_path / "clip", SIZES["b32"])
    tokenizer = clip_tokens.Tokenizer.read(path, length=77, vocab=len(vocabulary()))
    np.testing.assert_array_equal(tokenizer(TEXTS), kept()["b32 tokens"])


def test_small_frames_for_clip_are_the_centre_at_the_right_size():
    frame = network_files.clips(1, 40, 56)
    ready = clip.prepare(frame, 20)
    assert ready.shape == (1, 20, 20, 3) and ready.dtype == np.float32
    wanted = np.asarray(Image.fromarray(frame[0]).resize((28, 20), Image.Resampling.BICUBIC))[:, 4:24] / 255
    np.testing.assert_allclose(ready[0], (wanted - clip.MEAN) / clip.DEVIATION, atol=1e-6)
    with pytest.raises(ValueError, match="The frames are float64, expected uint8"):
        clip.prepare(frame / 255, 20)


def test_small_a_long_text_is_cut_with_a_warning(tmp_path, caplog):
    tokenizer = clip.read(write(tmp_path / "clip", SIZES["b32"])).tokenizer
    with caplog.at_level(logging.WARNING, "ivideo"):
        (tokens,) = tokenizer(["red " * 76])
    red = vocabulary()["red</w>"]
    assert tokens.tolist() == [len(vocabulary()) - 2, *[red] * 75, len(vocabulary()) - 1]
    assert "a text has 76 tokens, but CLIP takes 75" in caplog.text


def test_small_directories_that_are_not_clip_are_one_line_errors(tmp_path):
    sizes, folder = SIZES["b32"], tmp_path / "clip"
    path, weights = write(folder, sizes), arrays(sizes)

    def refused(message):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            clip.read(path)
        assert "\n" not in str(error.value)
        write(folder, sizes)

    for name in ("config.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
        refused(f"{path} has no {name}: give the directory of openai/clip-vit-base-patch32")
    (folder / "config.json").write_text(json.dumps(config(sizes) | {"model_type": "siglip"}))
    refused("config.json has model_type = 'siglip', expected 'clip'")
    (folder / "config.json").write_text(json.dumps(config(sizes | {"act": "relu"})))
    refused("text_config.hidden_act = 'relu', expected quick_gelu or gelu")
    (folder / "config.json").write_text(json.dumps(config(sizes | {"text": (24, 48, 2, 5)})))
    refused("has a text_config of sizes [24, 48, 2, 5], expected positive numbers")
    (folder / "vocab.json").write_text(json.dumps(vocabulary() | {"the</w>": 99999}))
    refused("vocab.json has 'the</w>' = 99999, expected a number from 0 to 524")
    (folder / "merges.txt").write_text("t h\nth e e\n")
    refused("merges.txt: merge 2 has 3 parts, expected 2")
    name = "vision_model.encoder.layers.2.mlp.fc1.weight"
    write(folder, sizes, {n: array for n, array in weights.items() if n != name})
    refused("vision/layers_2/fc1/kernel is absent, expected (32, 64)")
    write(folder, sizes, weights | {"vision_model.more.weight": np.ones((2, 2), np.float32)})
    refused("vision/more/kernel is (2, 2), expected no such parameter")
    (folder / "model.safetensors").write_bytes(b"cut")
    refused("is not a complete safetensors file")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused("has no safetensors: save it anew with `CLIPModel.from_pretrained(DIR)")
    with pytest.raises(UserError, match="no CLIP at .*absent: give the directory"):
        clip.read(str(tmp_path / "absent"))


def test_small_clip_score_is_100_times_the_mean_cosine_of_frames():
    rng = np.random.default_rng(0)
    frames, texts = rng.normal(size=(6, 4, 5)), rng.normal(size=(6, 5))
    frames, texts = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (frames, texts))
    found, (low, high) = alignment.score(alignment.clip_vectors(frames), texts)
    wanted = 100 * np.mean(
        [np.mean([frame @ text for frame in clip]) for clip, text in zip(frames, texts, strict=True)]
    )
    assert found == pytest.approx(wanted, rel=1e-12)
    assert low < found < high


def test_small_r_precision_counts_clips_whose_own_prompt_is_the_best():
    pool, vectors = ["x", "y", "z", "x"], np.eye(3)[[0, 1, 2, 0]]
    clips = np.array([[3, 1, 2], [1, 3, 2], [1, 2, 3], [3, 2, 1], [1, 1, 0]], float)
    prompts = ["x", "y", "x", "y", "y"]  # right, right, wrong, wrong, and as good as another
    found, (low, high) = alignment.r_precision(clips, prompts, pool, vectors)
    assert found == 2 / 5 and low < found < high
    with pytest.raises(ValueError, match="The pool has no 'w'"):
        alignment.r_precision(clips, ["w"] * 5, pool, vectors)


if __name__ == "__main__":
    np.savez_compressed(KEPT, **transformers_outputs())

"""The encoder against that of transformers, with weights that it saved: skipped where torch and it are not installed.

Its outputs for a few of them are kept in t5_outputs.npz, so that `test_small_outputs_of_transformers` needs neither.
`python tests/test_t5_transformers.py` makes the file anew.
"""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import t5_files as files

from ivideo import text

KEPT = pathlib.Path(__file__).parent / "t5_outputs.npz"
SIZES = {
    # width of attention below, at and above the width of the model, as T5 small, base and ByT5 small
    "narrow": {"vocab": 384, "dim": 48, "layers": 3, "heads": 4, "head_dim": 8, "ff": 64},
    "equal": {"vocab": 500, "dim": 64, "layers": 2, "heads": 4, "head_dim": 16, "ff": 160},
    "wide": {"vocab": 384, "dim": 32, "layers": 4, "heads": 6, "head_dim": 16, "ff": 96},
}
LENGTHS = (1, 17, 130, 512)
EVERY = 23  # tokens: those whose outputs are kept


def theirs(sizes, weights):
    """transformers' encoder with these weights."""
    import torch
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**files.huggingface_config(sizes), dropout_rate=0.0)
    model = T5EncoderModel(config).eval()
    named = {name: torch.from_numpy(value) for name, value in files.huggingface_weights(weights).items()}
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}
    return model


def their_output(model, tokens, mask):
    import torch

    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long())
    return out.last_hidden_state.numpy()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_small_outputs_of_transformers(size, length, tmp_path):
    """To 1e-4 on every token that is not padding."""
    sizes, weights = SIZES[size], files.random_weights(SIZES[size])
    tokens, mask = files.random_tokens(sizes, length=length)
    path = files.write_huggingface(tmp_path / "hf", weights, sizes)
    encoder = text.load_encoder(str(path), length=length, tokenizer=spiece(tmp_path, sizes))
    found = np.asarray(encoder.encode(tokens, mask))
    with np.load(KEPT) as kept:
        wanted = kept[f"{size} {length}"]
    np.testing.assert_allclose(found[:, ::EVERY][mask[:, ::EVERY]], wanted[mask[:, ::EVERY]], atol=1e-4)
    assert not found[~mask].any()


def spiece(folder, sizes):
    """Nothing for a vocabulary of bytes, else a sentencepiece model for it."""
    return "" if sizes["vocab"] == 384 else files.write_spiece(folder, sizes["vocab"] - 100)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_small_encoder_against_transformers(size, length, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sizes, weights = SIZES[size], files.random_weights(SIZES[size])
    model = theirs(sizes, weights)
    model.save_pretrained(tmp_path / "hf")
    tokens, mask = files.random_tokens(sizes, length=length)
    wanted = their_output(model, tokens, mask)
    for dtype in ("float32", "bfloat16"):
        encoder = text.load_encoder(str(tmp_path / "hf"), length=length, dtype=dtype, tokenizer=spiece(tmp_path, sizes))
        found = np.asarray(encoder.encode(tokens, mask))
        if dtype == "float32":
            assert np.abs(found - wanted)[mask].max() < 1e-4
        else:
            assert np.linalg.norm((found - wanted)[mask]) < 3e-2 * np.linalg.norm(wanted[mask])
    with np.load(KEPT) as kept:
        np.testing.assert_allclose(
            kept[f"{size} {length}"][mask[:, ::EVERY]], wanted[:, ::EVERY][mask[:, ::EVERY]], atol=2e-5
        )


def main():
    kept = {}
    for size, sizes in SIZES.items():
        model = theirs(sizes, files.random_weights(sizes))
        for length in LENGTHS:
            kept[f"{size} {length}"] = their_output(model, *files.random_tokens(sizes, length=length))[:, ::EVERY]
    np.savez_compressed(KEPT, **kept)
    print(f"{KEPT}: {KEPT.stat().st_size} bytes")


if __name__ == "__main__":
    main()

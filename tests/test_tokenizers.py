"""Tokenizers: bytes and sentencepiece, truncation, masks, and models that are not T5's."""

import pathlib
import pickle
import unicodedata

import numpy as np
import pytest
import sentencepiece
import t5_files as files

from ivideo import text
from ivideo.errors import UserError
from ivideo.text.tokenizers import Bytes, SentencePiece, byte_tokens


def test_small_byte_tokens():
    tokens, mask = byte_tokens(["ab", "", "é"], 5)
    np.testing.assert_array_equal(tokens, [[100, 101, 1, 0, 0], [0, 0, 0, 0, 0], [198, 172, 1, 0, 0]])
    np.testing.assert_array_equal(mask, tokens > 0)


def test_small_long_text_is_cut_with_a_warning(caplog):
    tokens, _ = byte_tokens(["abcdef"], 4)
    np.testing.assert_array_equal(tokens, [[100, 101, 102, 1]])
    assert "6 bytes" in caplog.text
    assert "truncated after 'abc'" in caplog.text
    tokens, _ = byte_tokens(["aéé"], 5)  # never in the middle of a character: 1 + 2 + 2 bytes, four fit
    np.testing.assert_array_equal(tokens, [[100, 198, 172, 1, 0]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return files.write_spiece(tmp_path_factory.mktemp("spiece"))


def test_small_sentencepiece_tokens_are_the_librarys_with_an_end(model):
    tokenizer, reference = SentencePiece.load(model, 400), sentencepiece.SentencePieceProcessor(model_file=model)
    texts = ["a red star moving left", "", "the blue circle", "zebra 7 ~"]
    tokens, mask = tokenizer(texts, 24)
    assert tokens.dtype == np.int32 and mask.dtype == bool
    for row, valid, one in zip(tokens, mask, texts, strict=True):
        ids = [*reference.encode(one), 1] if one else []
        np.testing.assert_array_equal(row, ids + [0] * (24 - len(ids)))
        np.testing.assert_array_equal(valid, np.arange(24) < len(ids))
    assert 2 in tokens[3]  # what no piece spells


def test_small_sentencepiece_normalises_unicode(model):
    """Compatible characters are one, as are all spaces: NFKC, by the model's own rules."""
    tokenizer = SentencePiece.load(model, 400)
    plain, _ = tokenizer(["a red star"], 16)
    for variant in ("\uff41 red star", "a  red\u3000star", " a red star ", "a \u24e1ed star"):
        assert unicodedata.normalize("NFKC", variant).split() == ["a", "red", "star"]
        np.testing.assert_array_equal(tokenizer([variant], 16)[0], plain)


def test_small_sentencepiece_cuts_with_a_warning(model, caplog):
    tokenizer = SentencePiece.load(model, 400)
    whole, _ = tokenizer(["a red star moving left"], 64)
    length = int((whole > 0).sum())
    cut, mask = tokenizer(["a red star moving left"], length - 1)
    np.testing.assert_array_equal(cut[0, :-1], whole[0, : length - 2])
    assert cut[0, -1] == 1 and mask.all()
    assert (
        f"has {length - 1} tokens, but the text encoder takes {length - 2}: truncated after 'a red star moving"
        in caplog.text
    )
    caplog.clear()
    tokenizer(["a red star moving left"], length)
    assert not caplog.text


def test_small_tokenizers_pickle(model):
    """Readers of data are processes of their own."""
    for tokenizer in (SentencePiece.load(model, 400), Bytes()):
        tokenizer(["a red star"], 16)
        other = pickle.loads(pickle.dumps(tokenizer))
        np.testing.assert_array_equal(other(["a red star"], 16)[0], tokenizer(["a red star"], 16)[0])
        assert other.fingerprint == tokenizer.fingerprint


def test_small_encoder_takes_the_model_in_its_directory(tmp_path, model):
    sizes = {**files.TINY, "vocab": 428}
    path = files.write_huggingface(tmp_path / "hf", files.random_weights(sizes), sizes)
    (path / "spiece.model").write_bytes(pathlib.Path(model).read_bytes())
    encoder = text.load_encoder(str(path), length=12)
    tokens, mask = encoder.tokenize(["a red star"])
    np.testing.assert_array_equal(tokens, SentencePiece.load(model, 428)(["a red star"], 12)[0])
    assert encoder.encode(tokens, mask).shape == (1, 12, sizes["dim"])


def test_small_models_that_are_not_t5s_are_refused(tmp_path, model):
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "text.model").write_text("not a model")
    for name, message in (
        ("empty", "the file is empty"),
        ("text", "is not a sentencepiece model"),
        ("none", "No such"),
    ):
        with pytest.raises(UserError, match=message):
            SentencePiece.load(str(tmp_path / f"{name}.model"), 400)
    with pytest.raises(UserError, match="has 300 pieces, pad 0 and end 1, expected .* about the 32128 rows"):
        SentencePiece.load(model, 32128)
    with pytest.raises(UserError, match="about the 200 rows"):
        SentencePiece.load(model, 200)
    other = files.write_spiece(tmp_path, pad=3, end=1, name="other.model")
    with pytest.raises(UserError, match="pad 3 and end 1, expected pad 0, end 1"):
        SentencePiece.load(other, 400)

"""Files of T5X and Hugging Face that are damaged, unsafe or of another network: the error names what is wrong."""

import os
import pickle

import numpy as np
import pytest
import t5_files as files
from malformed_text_checkpoints import MALFORMED, t5x

from configs import base
from ivideo import text
from ivideo.errors import UserError
from ivideo.text.checkpoints import open_checkpoint


@pytest.fixture(scope="module")
def weights():
    return files.random_weights(files.TINY)


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

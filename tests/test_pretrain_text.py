"""The second part of the text encoder's training: its targets, and the result in the shipped encoder."""

import numpy as np
import pytest

from configs import base
from ivideo.data import shapes
from ivideo.text import load_encoder
from ivideo.training import pretrain_text


def embed_by_hand(texts):
    """Every token has (the byte, the number of bytes of its caption, its place) for an embedding."""
    out = np.zeros((len(texts), 64, 3), np.float32)
    for row, text in zip(out, texts, strict=True):
        row[: len(text)] = [(ord(c), len(text), i) for i, c in enumerate(text)]
    return out


def test_small_composed_embeddings_are_means():
    targets = pretrain_text.composed(embed_by_hand)
    assert set(targets) == set(shapes.TRAIN)
    blue = shapes.Attributes("circle", "blue", "gray", "left")
    text, target = shapes.caption(blue), targets[blue]
    assert target.shape == (len(text) + 1, 3)
    np.testing.assert_array_equal(target[:-1, 0], [ord(c) for c in text])
    # Outside the shape's name: the mean over shapes, without the triangle, which is never blue in training
    lengths = [len(shapes.caption(blue._replace(shape=s))) for s in ("circle", "square", "star")]
    start, stop, end = pretrain_text.shape_span(blue)
    assert (text[start:stop], end) == ("circle", len(text) + 1)
    np.testing.assert_allclose(target[:start, 1], np.mean(lengths), rtol=1e-6)
    np.testing.assert_allclose(target[stop : end - 1, 1], np.mean(lengths), rtol=1e-6)
    lengths = [len(shapes.caption(blue._replace(colour=c))) for c in shapes.COLOURS]
    np.testing.assert_allclose(target[start:stop, 1], np.mean(lengths), rtol=1e-6)


def test_small_composed_batch_hides_some_shapes():
    targets = pretrain_text.composed(embed_by_hand)
    tokens, mask, wanted, weights = pretrain_text.composed_batch(np.random.default_rng(0), targets, 40, 64)
    assert tokens.shape == mask.shape == weights.shape == (40, 64)
    hidden = (weights < mask).any(1)
    assert 10 < hidden.sum() < 30
    for row in range(40):
        seen = weights[row] > 0
        # ByT5's vocabulary: a byte and three special tokens before the first of them
        wanted_bytes = wanted[row, seen, 0]
        letters = wanted_bytes > 0
        np.testing.assert_array_equal(tokens[row][seen][letters], wanted_bytes[letters] + 3)
        if hidden[row]:
            assert 4 <= (mask[row] & ~seen).sum() <= 8


def test_small_words_of_the_shipped_encoder_hardly_know_their_neighbours():
    """The colour's embedding in a held-out combination is that of the combinations it was trained on, to a tenth."""
    config = base.get_config("demo").text
    encoder = load_encoder(config)

    def colour(shape):
        attrs = shapes.Attributes(shape, "blue", "teal", "up")
        tokens, mask = encoder.tokenize([shapes.caption(attrs)])
        start = shapes.caption(attrs).index("blue")
        return np.asarray(encoder.encode(tokens, mask))[0, start : start + 4]

    seen = np.mean([colour(s) for s in ("circle", "square", "star")], axis=0)
    assert np.sum((colour("triangle") - seen) ** 2) < 0.1 * np.sum(seen**2)
    assert pytest.approx(1, abs=0.2) == np.linalg.norm(colour("circle")) / np.linalg.norm(seen)

"""Prompts and captions: how a text is normalized, wherever it comes from, and its noise."""

import jax
import numpy as np
import pytest

from configs import base
from ivideo import stages
from ivideo.errors import UserError
from ivideo.prompts import one_line, read_lines, samples
from ivideo.sampling import cascade
from ivideo.text import load_encoder
from ivideo.text.cache import read_captions

RED = "a red star moving left"
UNTIDY = [
    "\ufeff" + RED,
    f"  {RED} ",
    "a  red\tstar\nmoving left",
    "a red\r\nstar moving\u2028left\x0b",
    RED + "\ufeff",
]


def test_small_texts_are_normalised():
    assert [one_line(text) for text in UNTIDY] == [RED] * 5
    assert [one_line(text) for text in ("", "   ", "\n", "\ufeff", " \ufeff ")] == [""] * 5


def test_small_every_way_in_gives_the_same_text(tmp_path):
    """A prompts file, a captions file, the encoder that sampling and sample grids use, a video's noise."""
    path = tmp_path / "texts.txt"
    path.write_bytes(("\ufeff" + f"{RED}\r\n  {RED} \n\n \ufeff\na  red\tstar moving left").encode())
    assert list(read_lines(str(path), "--prompts_file")) == [RED] * 3
    assert read_captions(str(path)) == [RED]
    encoder = load_encoder(base.get_config("small").text)
    tokens, mask = encoder.tokenize([*UNTIDY, "  ", ""])
    for row in tokens[:5]:
        np.testing.assert_array_equal(row, tokens[0])
    assert mask[0].sum() == len(RED) + 1
    assert mask[5:].sum() == 0  # no text at all
    text, _ = cascade.embed_prompts(base.get_config("small"), UNTIDY)
    assert np.ptp(text, axis=0).max() < 1e-6
    assert [row.prompt for row in samples(UNTIDY, seed=0)] == [RED] * 5


@pytest.mark.parametrize(
    "data, message",
    [
        (b"a red star\nbroken \xff\n", "texts.txt, line 2: .*broken.* is not UTF-8"),
        ("a red star\n".encode("utf-16"), "texts.txt, line 1: .* is not UTF-8"),
        ("a red star\n".encode("utf-16-le"), "texts.txt, line 1: .* has NUL bytes: convert the file to UTF-8"),
        ("\ufeff \n".encode(), "--prompts_file=.*texts.txt has no text: write one per line"),
        (None, "--prompts_file=.*texts.txt cannot be read .No such file"),
    ],
)
def test_small_files_that_are_no_texts(data, message, tmp_path):
    if data is not None:
        (tmp_path / "texts.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_lines(str(tmp_path / "texts.txt"), "--prompts_file"))


def test_small_noise_follows_from_seed_text_and_number():
    """Not from the other lines, nor from a text's spaces; and no two videos share it."""
    some = samples(["a", "b", "a", " b "], seed=7, num_videos=2)
    assert [(row.prompt, row.number) for row in some] == [
        ("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3), ("b", 2), ("b", 3)
    ]  # fmt: skip
    assert len({row.noise for row in some}) == 8
    assert samples(["x", "b"], seed=7, num_videos=2)[2:] == some[2:4]
    assert samples(["a"], seed=7)[0] == some[0]
    assert samples(["a"], seed=8)[0].noise != some[0].noise
    # SHA-256 of "a" begins with ca978112 ca1bbdca: files say what was used, so it may never change
    assert some[1].noise == (7, 0xCA978112, 0xCA1BBDCA, 1)
    shared = samples(["a", "b", "a"], seed=7, same_noise=True)
    assert [row.noise for row in shared] == [(7, 0), (7, 0), (7, 1)]


def test_small_large_seeds_are_seeds_of_their_own():
    """jax.random.key takes the lower 32 bits alone, and none beyond 63."""
    config = base.get_config("small")
    seeds = [7, 7 + 2**32, 7 + 2**63, 2**64 - 1]
    keys = jax.random.key_data(stages.video_keys(config, [(seed, 0) for seed in seeds]))
    assert len({tuple(map(int, key)) for key in keys}) == 4
    wanted = jax.random.key_data(jax.random.fold_in(jax.random.key(7), 0))
    np.testing.assert_array_equal(keys[0], wanted)


def test_small_prompt_that_is_no_unicode_is_refused():
    with pytest.raises(UserError, match=r"the prompt 'a \\udcff star' has bytes that are not UTF-8"):
        samples(["a \udcff star"], seed=0)

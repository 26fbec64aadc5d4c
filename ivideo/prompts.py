"""Texts, as prompts and captions alike are read and normalised, and the noise that a prompt's videos start from."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

from ivideo import files
from ivideo.errors import UserError

_BOM = "\ufeff"  # what some editors write at the head of a UTF-8 file


def one_line(text: str) -> str:
    """A text as every encoder, cache and tokenizer gets it, whether it is a prompt or a training caption.

    Byte order marks are removed. Each run of spaces and line breaks becomes one space, and none is left at the ends.
    """
    return " ".join(text.replace(_BOM, "").split())


def read_lines(path: str, flag: str) -> Iterator[str]:
    """The texts of a UTF-8 file, one per line and normalised by `one_line`. Empty lines are left out.

    `path` may be in a bucket; `flag` is the flag that names it. UserError where the file cannot be read, where a line
    is not UTF-8, or where there is no text in it.
    """
    empty = True
    try:
        with files.open_read(path) as f:
            for number, line in enumerate(f, 1):
                try:
                    text = one_line(line.decode())
                except UnicodeDecodeError as e:
                    raise UserError(
                        f"{path}, line {number}: {line[:80]!r} is not UTF-8 ({e.reason}): convert it"
                    ) from e
                if "\0" in text:
                    raise UserError(f"{path}, line {number}: {line[:80]!r} has NUL bytes: convert the file to UTF-8")
                if text:
                    empty = False
                    yield text
    except OSError as e:
        raise UserError(f"{flag}={path} cannot be read ({e.strerror or e}): give a UTF-8 text file") from e
    if empty:
        raise UserError(f"{flag}={path} has no text: write one per line")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A video to make: its prompt, which of this prompt's videos it is, and what its noise follows from."""

    prompt: str
    number: int
    noise: tuple[int, ...]  # for `ivideo.stages.video_keys`


def samples(prompts: Sequence[str], *, seed: int, num_videos: int = 1, same_noise: bool = False) -> list[Sample]:
    """`num_videos` videos per prompt, in the prompts' order.

    A video's noise follows from the seed, its prompt's text, and its number among that prompt's videos, so that it is
    the same whatever other prompts are beside it. With `same_noise` the text does not count: the first videos of all
    prompts share their noise, and so do the second ones. UserError where a prompt is not valid Unicode.
    """
    made, rows = collections.Counter(), []
    for prompt in map(one_line, prompts):
        words = () if same_noise else _words(prompt)
        for _ in range(num_videos):
            number = made[prompt]
            made[prompt] += 1
            rows.append(Sample(prompt, number, (seed, *words, number)))
    return rows


def _words(prompt: str) -> tuple[int, int]:
    """64 bits of a prompt's SHA-256: few enough to be quick, too many for two prompts to have the same."""
    try:
        digest = hashlib.sha256(prompt.encode()).digest()
    except UnicodeEncodeError as e:
        raise UserError(f"the prompt {prompt!r} has bytes that are not UTF-8: type it again, or convert it") from e
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:8])

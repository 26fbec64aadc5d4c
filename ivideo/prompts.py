"""Reads and normalises prompts and captions, and determines the noise of a prompt's videos."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

from ivideo import files
from ivideo.errors import UserError

_BOM = "\ufeff"  # the byte order mark, which some editors write at the start of a UTF-8 file


def one_line(text: str) -> str:
    """Normalises a prompt or a training caption; encoders, caches and tokenizers all take texts in this form.

    It removes byte order marks, turns each run of spaces and line breaks into one space, and strips the ends.
    """
    return " ".join(text.replace(_BOM, "").split())


def read_lines(path: str, flag: str) -> Iterator[str]:
    """The texts of a UTF-8 file, one per line, normalised by `one_line`. Empty lines are skipped.

    `path` may be in a bucket. `flag` is the command-line flag of the path, for messages. UserError where the file
    cannot be read, a line is not UTF-8, or the file has no text.
    """
    empty = True
    try:
        with files.open_read(path) as f:
            for number, line in enumerate(f, 1):
                try:
                    text = one_line(line.decode())
                except UnicodeDecodeError as e:
                    raise UserError(
                        f"{path}, line {number}: {line[:80]!r} is not UTF-8 ({e.reason}): convert the file"
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
    """A video to sample: its prompt, its number among the prompt's videos, and the numbers that seed its noise."""

    prompt: str
    number: int
    noise: tuple[int, ...]  # an element of the `seeds` of `ivideo.stages.video_keys`


def samples(prompts: Sequence[str], *, seed: int, num_videos: int = 1, same_noise: bool = False) -> list[Sample]:
    """The samples of all prompts, in order: `num_videos` per prompt.

    A video's noise depends on the seed, its prompt's text and its number among that prompt's videos, and not on the
    other prompts. With `same_noise` it does not depend on the text: the first videos of all prompts share their noise,
    and so do the second ones. UserError where a prompt is not valid Unicode.
    """
    counts, rows = collections.Counter(), []
    for prompt in map(one_line, prompts):
        words = () if same_noise else _words(prompt)
        for _ in range(num_videos):
            number = counts[prompt]
            counts[prompt] += 1
            rows.append(Sample(prompt, number, (seed, *words, number)))
    return rows


def _words(prompt: str) -> tuple[int, int]:
    """64 bits of a prompt's SHA-256, as two words: quick to fold into a key, and practically free of collisions."""
    try:
        digest = hashlib.sha256(prompt.encode()).digest()
    except UnicodeEncodeError as e:
        raise UserError(f"the prompt {prompt!r} has bytes that are not UTF-8: type it again, or convert it") from e
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:8])

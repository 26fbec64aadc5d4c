"""Mixtures of sets by weight: what `config.data.dir` and `config.data.image_dir` may hold, and several sources as one.

Data workers import this module, so it does not import jax.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ivideo import files
from ivideo.values import Value

EXPECTED = "a folder, nothing for none, or several folders with a weight above 0 after each, such as films:3,web:1"


class Weighted(NamedTuple):
    """The folder of a set, and how often it is drawn from, relative to the others."""

    folder: str
    weight: float


class Part(NamedTuple):
    """A set's clips in a source, by their numbers, and the set's weight."""

    numbers: range
    weight: float


def parse(text: str) -> list[Weighted]:
    """The sets of 'FOLDER' or 'FOLDER:WEIGHT,FOLDER:WEIGHT'; [] for ''. ValueError where a weight is wrong.

    A text without a comma, or without any weight, is one folder, whatever characters it has.
    """
    pieces = [piece.strip().rpartition(":") for piece in text.split(",")]
    sets = [Weighted(folder, _weight(weight)) for folder, _, weight in pieces]
    if len(sets) == 1 or all(weight is None for _, weight in sets):
        return [Weighted(text, 1.0)] if text else []
    if not all(folder and weight and 0 < weight < math.inf for folder, weight in sets):
        raise ValueError(f"{text!r}: expected {EXPECTED}")
    return sets


def _weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def folders(text: str) -> list[str]:
    """The folders of `parse`."""
    return [folder for folder, _ in parse(text)]


def expand_home(text: str) -> str:
    """The same folders and weights with ~ replaced by the home folder."""
    return ",".join(map(files.expand_home, text.split(",")))


def _allows(text) -> bool:
    try:
        return isinstance(text, str) and text.lower() != "none" and parse(text) is not None
    except ValueError:
        return False


FOLDERS = Value(EXPECTED, _allows)


class Mixture:
    """Several sources (`ivideo.data.sources`) as one: their clips are numbered one source after the other."""

    def __init__(self, sources: Sequence, weights: Sequence[float]):
        firsts = [0, *itertools.accumulate(map(len, sources))]
        ranges = [range(*pair) for pair in itertools.pairwise(firsts)]
        self._sources = tuple(sources)
        self.parts = tuple(map(Part, ranges, weights))

    def __len__(self) -> int:
        return self.parts[-1].numbers.stop

    def _find(self, index: int):
        """The source of a clip, and the clip's number in it."""
        for source, (numbers, _) in zip(self._sources, self.parts, strict=True):
            if index in numbers:
                return source, int(index) - numbers.start
        raise IndexError(f"clip {index} of {len(self)}")

    def read(self, index: int, rng: np.random.Generator) -> dict:
        """Clip `index`, as the source that it belongs to reads it."""
        source, number = self._find(index)
        return source.read(number, rng)

    def image(self, index: int, rng: np.random.Generator) -> dict:
        """An image of clip `index`, or image `index` of sets of images."""
        source, number = self._find(index)
        return source.image(number, rng)

    def check(self, index: int) -> None:
        """VideoError if clip `index` cannot be read."""
        source, number = self._find(index)
        source.check(number)


def parts_of(source) -> tuple[Part, ...]:
    """The parts of a mixture; any other source is one part."""
    return source.parts if isinstance(source, Mixture) else (Part(range(len(source)), 1.0),)


def draw(parts: Sequence[Part], count: int, rng: np.random.Generator, *, but: int | None = None) -> list[int]:
    """Numbers of `count` different clips, but not of clip `but`. Each part is drawn from as often as its weight says.

    Every part needs `count` clips besides `but`.
    """
    weights = np.array([weight for _, weight in parts])
    drawn = []
    for (numbers, _), share in zip(parts, rng.multinomial(count, weights / weights.sum()), strict=True):
        if but in numbers:  # distinct steps of 1 … n - 1 around it reach neither itself nor another clip twice
            steps = but - numbers.start + 1 + rng.choice(len(numbers) - 1, share, replace=False)
        else:
            steps = rng.choice(len(numbers), share, replace=False)
        drawn += [numbers[step % len(numbers)] for step in steps.tolist()]
    return drawn

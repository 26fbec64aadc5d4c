"""CLIP's tokenizer: byte-pair encoding of lower-case words, from the files vocab.json and merges.txt."""

import dataclasses
import functools
import itertools
import logging
import re
import unicodedata

import numpy as np

from ivideo.errors import UserError
from ivideo.files import read_bytes, read_json
from ivideo.text.arrays import inside

START, END = "<|startoftext|>", "<|endoftext|>"
_CONTRACTIONS = re.compile(r"'(?:s|t|re|ve|m|ll|d)")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Texts to tokens [B, length] int32: start, at most length − 2 tokens, and end, which also fills the rest."""

    vocabulary: dict[str, int]
    ranks: dict[tuple[str, str], int]
    length: int

    @classmethod
    def read(cls, path: str, *, length: int, vocab: int) -> "Tokenizer":
        """Reads vocab.json and merges.txt of a directory for a network of `vocab` embeddings.

        UserError where they are damaged or do not fit the network.
        """
        vocabulary = read_json(inside(path, "vocab.json"))
        try:
            lines = read_bytes(inside(path, "merges.txt")).decode().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path}/merges.txt cannot be read ({e}): copy it again") from e
        pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        for number, pair in enumerate(pairs, 1):
            if len(pair) != 2:
                raise UserError(f"{path}/merges.txt: merge {number} has {len(pair)} parts, expected 2: copy it again")
        wanted = [START, END, *(symbol + end for symbol in _symbols().values() for end in ("", "</w>"))]
        for name in (*wanted, *("".join(pair) for pair in pairs)):
            number = vocabulary.get(name)
            if type(number) is not int or not 0 <= number < vocab:
                raise UserError(
                    f"{path}/vocab.json has {name!r} = {number!r}, expected a number from 0 to {vocab - 1}: copy the "
                    "whole directory again"
                )
        return cls(vocabulary, {pair: rank for rank, pair in enumerate(pairs)}, length)

    def __call__(self, texts: list[str]) -> np.ndarray:
        tokens = np.full((len(texts), self.length), self.vocabulary[END], np.int32)
        for row, text in zip(tokens, texts, strict=True):
            ids = [n for word in _words(text) for n in self._encode(word)]
            if len(ids) > self.length - 2:
                logging.getLogger("ivideo").warning(
                    "a text has %d tokens, but CLIP takes %d: cut after these: %s", len(ids), self.length - 2, text
                )
                ids = ids[: self.length - 2]
            row[: len(ids) + 1] = [self.vocabulary[START], *ids]
        return tokens

    def _encode(self, word: str) -> list[int]:
        symbols = [_symbols()[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            pair = min(itertools.pairwise(symbols), key=lambda pair: self.ranks.get(pair, np.inf))
            if pair not in self.ranks:
                break
            merged, n = [], 0
            while n < len(symbols):
                joined = tuple(symbols[n : n + 2]) == pair
                merged.append("".join(pair) if joined else symbols[n])
                n += 2 if joined else 1
            symbols = merged
        return [self.vocabulary[symbol] for symbol in symbols]


def _words(text: str) -> list[str]:
    """The text in lower case, as runs of letters, single digits, runs of other characters, and contractions ('s)."""
    text = " ".join(unicodedata.normalize("NFC", text).split()).lower()
    words, n = [], 0
    while n < len(text):
        if match := _CONTRACTIONS.match(text, n):
            end = match.end()
        else:
            kind, end = _kind(text[n]), n + 1
            while end < len(text) and kind != "N" and _kind(text[end]) == kind:
                end += 1
        if not text[n].isspace():
            words.append(text[n:end])
        n = end
    return words


def _kind(character: str) -> str:
    """L of a letter, N of a number, a space, or nothing of other characters."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else ""


@functools.cache
def _symbols() -> dict[int, str]:
    """The printable character that stands for each byte in the files."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}

"""Text to token ids. Section 2.2.

A tokenizer maps texts and a length to tokens [B, length] int32 and mask [B, length] bool: ids, an end token, padding. A
text that is too long is truncated, with a warning that shows where. An empty text has an empty mask, which the networks
treat as no text: the unconditional half of guidance. `fingerprint` identifies a tokenizer.
"""

import dataclasses
import functools
import hashlib
import logging

import numpy as np

from ivideo.errors import UserError
from ivideo.files import read_bytes

PAD, EOS, OFFSET = 0, 1, 3
BYTE_VOCAB = 384
EXTRA = 100  # T5's sentinels, whose ids follow those of the sentencepiece model


def byte_tokens(texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """ByT5's ids (arXiv 2105.13626): UTF-8 bytes + 3."""

    def truncate(text):
        return text.encode()[: length - 1].decode(errors="ignore")

    def ids(text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + OFFSET

    return _padded(texts, length, ids, truncate, "bytes")


@dataclasses.dataclass(frozen=True)
class Bytes:
    """The tokenizer of ByT5 and of the encoder in the package."""

    fingerprint = "bytes"

    def __call__(self, texts, length):
        return byte_tokens(texts, length)

    def decode(self, tokens) -> str:
        """The text of the ids of one text."""
        return bytes(int(token) - OFFSET for token in tokens if token >= OFFSET).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A sentencepiece model such as T5's: pad 0, end 1. The model itself normalises the text. Pickles as its bytes."""

    model: bytes

    @classmethod
    def load(cls, path: str, vocab: int) -> "SentencePiece":
        """Reads a model for an encoder of `vocab` embeddings. UserError where it is not one, or does not fit them."""
        try:
            tokenizer = cls(read_bytes(path))
            pieces = tokenizer.processor
        except (OSError, RuntimeError) as e:
            raise UserError(f"{path} is not a sentencepiece model ({e}): give T5's, spiece.model") from e
        size, pad, end = pieces.get_piece_size(), pieces.pad_id(), pieces.eos_id()
        if (pad, end) != (PAD, EOS) or not size <= vocab <= size + EXTRA + 128:
            raise UserError(
                f"{path} has {size} pieces, pad {pad} and end {end}, expected pad {PAD}, end {EOS} and, with {EXTRA} "
                f"sentinels, about the {vocab} rows of the encoder's embedding: give the encoder's own model"
            )
        return tokenizer

    @functools.cached_property
    def processor(self):
        import sentencepiece

        if not self.model:
            raise RuntimeError("the file is empty")
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.model).hexdigest()

    def decode(self, tokens) -> str:
        """The text of the ids of one text, as the model normalised it."""
        return self.processor.decode([int(token) for token in tokens if token not in (PAD, EOS)])

    def __getstate__(self):
        return {"model": self.model}

    def __setstate__(self, state):
        object.__setattr__(self, "model", state["model"])

    def __call__(self, texts, length):
        def truncate(text):
            return self.processor.decode(self.processor.encode(text)[: length - 1])

        return _padded(texts, length, lambda text: np.array(self.processor.encode(text), np.int32), truncate, "tokens")


def _padded(texts, length, ids_of, truncate, unit):
    tokens = np.full((len(texts), length), PAD, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        if not isinstance(text, str):
            raise TypeError(f"a text is {text!r} of type {type(text).__name__}: expected str")
        ids = ids_of(text)
        if not len(ids):
            continue
        if len(ids) > length - 1:
            kept = truncate(text)
            logging.getLogger("ivideo").warning(
                "the prompt has %d %s, but the text encoder takes %d: truncated after %r",
                len(ids), unit, length - 1, kept,
            )  # fmt: skip
            ids = ids_of(kept) if unit == "bytes" else ids[: length - 1]
        row[: len(ids)] = ids
        row[len(ids)] = EOS
    return tokens, tokens != PAD

"""Text to token ids. Section 2.2.

A tokenizer is called with texts and a length and returns tokens [B, length] int32 and mask [B, length] bool: ids, an
end token, padding. A text that does not fit is cut, with a warning that says where. An empty text has an empty mask: it
is what the networks see as no text at all, the unconditional half of guidance. `fingerprint` tells tokenizers apart.
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
EXTRA = 100  # ids behind a sentencepiece model's, T5's sentinels


def byte_tokens(texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes + 3, ByT5's ids (arXiv 2105.13626)."""

    def cut(text):
        return text.encode()[: length - 1].decode(errors="ignore")

    def ids(text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + OFFSET

    return _padded(texts, length, ids, cut, "bytes")


@dataclasses.dataclass(frozen=True)
class Bytes:
    """The tokenizer of ByT5 and of the encoder in the package."""

    fingerprint = "bytes"

    def __call__(self, texts, length):
        return byte_tokens(texts, length)


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A sentencepiece model, as T5's: pad 0, end 1. Normalisation is the model's own. Pickles as its bytes."""

    model: bytes

    @classmethod
    def load(cls, path: str, vocab: int) -> "SentencePiece":
        """Reads a model for an encoder of `vocab` embeddings; UserError where it is none, or of another vocabulary."""
        try:
            tokenizer = cls(read_bytes(path))
            pieces = tokenizer.processor
        except (OSError, RuntimeError) as e:
            raise UserError(f"{path} is not a sentencepiece model ({e}): give T5's, spiece.model") from e
        size, pad, end = pieces.get_piece_size(), pieces.pad_id(), pieces.eos_id()
        if (pad, end) != (PAD, EOS) or not size <= vocab <= size + EXTRA + 128:
            raise UserError(
                f"{path} has {size} pieces, pad {pad} and end {end}, expected pad {PAD}, end {EOS} and, with {EXTRA} "
                f"sentinels, about the {vocab} rows of the encoder's embedding: give the vocabulary it was trained with"
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

    def __getstate__(self):
        return {"model": self.model}

    def __setstate__(self, state):
        object.__setattr__(self, "model", state["model"])

    def __call__(self, texts, length):
        def cut(text):
            return self.processor.decode(self.processor.encode(text)[: length - 1])

        return _padded(texts, length, lambda text: np.array(self.processor.encode(text), np.int32), cut, "tokens")


def _padded(texts, length, ids_of, cut, unit):
    tokens = np.full((len(texts), length), PAD, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        if not isinstance(text, str):
            raise TypeError(f"a text is {text!r} of type {type(text).__name__}: expected str")
        ids = ids_of(text)
        if not len(ids):
            continue
        if len(ids) > length - 1:
            kept = cut(text)
            logging.getLogger("ivideo").warning(
                "the prompt has %d %s and the text encoder takes %d: cut after %r", len(ids), unit, length - 1, kept
            )
            ids = ids_of(kept) if unit == "bytes" else ids[: length - 1]
        row[: len(ids)] = ids
        row[len(ids)] = EOS
    return tokens, tokens != PAD

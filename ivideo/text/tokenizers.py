"""Text to token ids. Section 2.2."""

import logging

import numpy as np

PAD, EOS, OFFSET = 0, 1, 3
BYTE_VOCAB = 384


def byte_tokens(texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes + 3 and an end token, ByT5's ids (arXiv 2105.13626): tokens [B, length] int32, mask [B, length] bool.

    A text that does not fit is cut, with a warning that says where. An empty text has an empty mask: it is what the
    networks see as no text at all, the unconditional half of guidance.
    """
    tokens = np.full((len(texts), length), PAD, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        if not isinstance(text, str):
            raise TypeError(f"a text is {text!r} of type {type(text).__name__}: expected str")
        encoded = text.encode()
        if not encoded:
            continue
        if len(encoded) > length - 1:
            kept = encoded[: length - 1].decode(errors="ignore")
            logging.getLogger("ivideo").warning(
                "the prompt has %d bytes and the text encoder takes %d: cut after %r", len(encoded), length - 1, kept
            )
            encoded = kept.encode()
        row[: len(encoded)] = np.frombuffer(encoded, np.uint8).astype(np.int32) + OFFSET
        row[len(encoded)] = EOS
    return tokens, tokens != PAD

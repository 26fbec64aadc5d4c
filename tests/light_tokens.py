"""A tokenizer that data workers import quickly."""

import numpy as np


def tokenize(texts, length):
    """UTF-8 bytes, cut and padded."""
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        data = np.frombuffer(text.encode(), np.uint8)[:length]
        row[: len(data)] = data
    return tokens, tokens > 0

"""How well clips fit their texts by CLIP's vectors: the CLIP score and R-precision. Section 3.

N clips · F frames · P channels of CLIP's vectors, which have length 1
"""

from collections.abc import Sequence

import numpy as np

from ivideo.evaluation import bootstrap


def clip_vectors(frames: np.ndarray) -> np.ndarray:
    """The mean over frames of their vectors: [N, F, P] -> [N, P]. Its product with a text is the mean cosine."""
    return np.asarray(frames, np.float64).mean(axis=1)


def score(clips: np.ndarray, texts: np.ndarray, **options) -> tuple[float, tuple[float, float]]:
    """The CLIP score: 100 × the mean cosine of frames and their clip's text, and its bootstrap interval.

    `clips` are those of `clip_vectors`, [N, P], and `texts` [N, P] the vectors of their texts. `options` are those of
    `bootstrap.mean_interval`.
    """
    return bootstrap.mean_interval(100 * np.einsum("np,np->n", clips, np.asarray(texts, np.float64)), **options)


def r_precision(
    clips: np.ndarray, prompts: Sequence[str], pool: Sequence[str], pool_vectors: np.ndarray, **options
) -> tuple[float, tuple[float, float]]:
    """The share of clips [N, P] whose own prompt fits better than every other one of the pool, and its interval.

    `pool_vectors` [M, P] are those of the pool's texts. A text that the pool repeats counts once, and equally good
    texts count as failure. ValueError where a prompt is not in the pool.
    """
    numbers = {text: n for n, text in reversed(list(enumerate(pool)))}
    absent = [prompt for prompt in prompts if prompt not in numbers]
    if absent:
        raise ValueError(f"The pool has no {absent[0]!r}, expected every prompt to be in it.")
    kept = {text: place for place, text in enumerate(numbers)}
    similar = np.asarray(clips, np.float64) @ np.asarray(pool_vectors, np.float64)[list(numbers.values())].T
    own = np.array([kept[prompt] for prompt in prompts])
    rows = np.arange(len(own))
    best = similar[rows, own].copy()
    similar[rows, own] = -np.inf
    return bootstrap.mean_interval(best > similar.max(axis=1), **options)

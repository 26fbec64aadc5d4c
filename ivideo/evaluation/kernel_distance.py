"""Kernel distance (KID, arXiv 1801.01401): the squared maximum mean discrepancy with the kernel (x·y/D + 1)³.

Its estimate is unbiased, unlike that of a Fréchet distance, so it suits few samples. It can be below 0.
N, M samples · D dimensions of a feature · R replicates
"""

import numpy as np

from ivideo.evaluation import bootstrap

BLOCK = 1024  # rows of the kernel's matrix that are in memory at a time, and columns


def distance(first: np.ndarray, second: np.ndarray, *, block: int = BLOCK) -> float:
    """The unbiased kernel distance between features [N, D] and [M, D], in memory of block² numbers.

    ValueError where there are fewer than two of either, or where their dimensions differ.
    """
    first, second = _checked(first, second)
    ones = [np.ones((1, len(features))) for features in (first, second)]
    return float(_distances(first, second, *ones, block)[0])


def distance_interval(
    first: np.ndarray,
    second: np.ndarray,
    *,
    group: int = 1,
    replicates: int = bootstrap.REPLICATES,
    seed: int = 0,
    level: float = bootstrap.LEVEL,
    block: int = BLOCK,
) -> tuple[float, tuple[float, float]]:
    """The kernel distance, and its bootstrap interval over both sets. The kernel is computed once for all replicates.

    A replicate's pairs of a sample with itself do not count, however often it is drawn. Each `group` of features, one
    after the other, is drawn together.
    """
    first, second = _checked(first, second)
    # The first row is the estimate itself
    weights = []
    for features, number in ((first, 0), (second, 1)):
        drawn = bootstrap.counts(-(-len(features) // group), replicates=replicates, seed=(seed, number))
        drawn = drawn.repeat(group, axis=1)[:, : len(features)]
        weights.append(np.concatenate([np.ones((1, len(features))), drawn]))
    estimate, *found = _distances(first, second, *weights, block)
    return float(estimate), bootstrap.interval(estimate, found, level=level)


def _distances(first, second, first_weights, second_weights, block):
    """The distance [R] for each row of weights [R, N] and [R, M]."""
    within = [
        _mean_kernel(features, features, weights, weights, block, same=True)
        for features, weights in ((first, first_weights), (second, second_weights))
    ]
    between = _mean_kernel(first, second, first_weights, second_weights, block, same=False)
    return within[0] + within[1] - 2 * between


def _mean_kernel(x, y, x_weights, y_weights, block, *, same):
    """The weighted mean of the kernel over pairs [R]. With `same`, pairs of a sample with itself do not count."""
    total = np.zeros(len(x_weights))
    for i in range(0, len(x), block):
        for j in range(0, len(y), block):
            base = x[i : i + block] @ y[j : j + block].T / x.shape[1] + 1
            kernel = base * base * base  # numpy's power is many times slower
            if same and i == j:
                np.fill_diagonal(kernel, 0)
            total += ((x_weights[:, i : i + block] @ kernel) * y_weights[:, j : j + block]).sum(axis=1)
    pairs = x_weights.sum(axis=1) * y_weights.sum(axis=1)
    return total / (pairs - (x_weights**2).sum(axis=1) if same else pairs)


def _checked(first, second):
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"The features have shapes {first.shape} and {second.shape}, expected [N, D] and [M, D].")
    if min(len(first), len(second)) < 2:
        raise ValueError(f"There are {len(first)} and {len(second)} features, expected two or more of each.")
    return first, second

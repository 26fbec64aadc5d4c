"""Kernel distance (KID, arXiv 1801.01401): the squared maximum mean discrepancy with the kernel (x·y/D + 1)³.

Its estimate is unbiased, unlike that of a Fréchet distance, so it suits few samples. It can be below 0. Frames of one
clip are not independent, so pairs of them do not count; otherwise the estimate would be too large.
N, M samples · D dimensions of a feature · R replicates
"""

import numpy as np

from ivideo.evaluation import bootstrap

BLOCK = 1024  # rows of the kernel's matrix that are in memory at a time, and columns


def distance(first: np.ndarray, second: np.ndarray, *, group: int = 1, block: int = BLOCK) -> float:
    """The unbiased kernel distance between features [N, D] and [M, D], in memory of block² numbers.

    Each `group` of features, one after the other, is of one clip. ValueError where there are fewer than two clips of
    either, or where their dimensions differ.
    """
    first, second = _checked(first, second, group)
    ones = [np.ones((1, len(features))) for features in (first, second)]
    return float(_distances(first, second, *ones, group, block)[0])


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

    A replicate's pairs of a clip with itself do not count, however often it is drawn. Each `group` of features, one
    after the other, is of one clip, and drawn together.
    """
    first, second = _checked(first, second, group)
    # The first row is the estimate itself
    weights = []
    for features, number in ((first, 0), (second, 1)):
        drawn = bootstrap.counts(-(-len(features) // group), replicates=replicates, seed=(seed, number))
        drawn = drawn.repeat(group, axis=1)[:, : len(features)]
        weights.append(np.concatenate([np.ones((1, len(features))), drawn]))
    estimate, *found = _distances(first, second, *weights, group, block)
    # A replicate of few clips may draw the same one every time, and then it has no pair
    found = [value for value in found if np.isfinite(value)] or [estimate]
    return float(estimate), bootstrap.interval(estimate, found, level=level)


def _distances(first, second, first_weights, second_weights, group, block):
    """The distance [R] for each row of weights [R, N] and [R, M]."""
    within = [
        _mean_kernel(features, features, weights, weights, block, group=group)
        for features, weights in ((first, first_weights), (second, second_weights))
    ]
    between = _mean_kernel(first, second, first_weights, second_weights, block)
    return within[0] + within[1] - 2 * between


def _mean_kernel(x, y, x_weights, y_weights, block, *, group=0):
    """The weighted mean of the kernel over pairs [R]. With `group`, pairs within a group of samples do not count."""
    total = np.zeros(len(x_weights))
    for i in range(0, len(x), block):
        for j in range(0, len(y), block):
            base = x[i : i + block] @ y[j : j + block].T / x.shape[1] + 1
            kernel = base * base * base  # numpy's power is many times slower
            if group:
                row, column = np.ogrid[i : i + kernel.shape[0], j : j + kernel.shape[1]]
                kernel[row // group == column // group] = 0
            total += ((x_weights[:, i : i + block] @ kernel) * y_weights[:, j : j + block]).sum(axis=1)
    pairs = x_weights.sum(axis=1) * y_weights.sum(axis=1)
    if group:
        of_groups = np.add.reduceat(x_weights, np.arange(0, len(x), group), axis=1)
        pairs -= (of_groups**2).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return total / pairs


def _checked(first, second, group):
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"The features have shapes {first.shape} and {second.shape}, expected [N, D] and [M, D].")
    if min(len(first), len(second)) <= group:
        clips = "" if group == 1 else f" of clips with {group} features each"
        raise ValueError(f"There are {len(first)} and {len(second)} features{clips}, expected two or more of each.")
    return first, second

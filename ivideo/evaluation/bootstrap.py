"""Bootstrap intervals: how much a measure would vary with other samples of the same number."""

import numpy as np

REPLICATES = 100
LEVEL = 0.95


def counts(samples: int, *, replicates: int = REPLICATES, seed: int = 0) -> np.ndarray:
    """How often each sample is drawn in each replicate, with replacement: [replicates, samples] int64."""
    return np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), size=replicates)


def quantiles(values: np.ndarray, *, level: float = LEVEL, method: str = "linear") -> tuple[float, float]:
    """The bounds that have `level` of the values between them; `method` is that of `np.quantile`."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method=method)
    return float(low), float(high)


def interval(estimate: float, replicates: np.ndarray, *, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a distance, from its values in bootstrap replicates.

    The replicates are shifted so that their mean is the estimate. A Fréchet distance grows when there are fewer
    different samples, and a replicate has about 63% of them, so its own quantiles would lie above the estimate.
    """
    replicates = np.asarray(replicates, np.float64)
    low, high = quantiles(replicates - replicates.mean(), level=level)
    return float(estimate + low), float(estimate + high)


def mean_interval(
    values, *, replicates: int = REPLICATES, seed: int = 0, level: float = LEVEL
) -> tuple[float, tuple[float, float]]:
    """The mean of a value per sample, and its interval, which is within the values. ValueError where there are none."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("There are no values, expected one or more.")
    means = counts(len(values), replicates=replicates, seed=seed) @ values / len(values)
    return float(values.mean()), quantiles(means, level=level)

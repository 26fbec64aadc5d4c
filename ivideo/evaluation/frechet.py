"""Fréchet distance between Gaussians that are fitted to features: FVD of clips, FID of frames.

Statistics are gathered batch by batch, merged, and kept in a file with the protocol that they belong to.
N samples · D dimensions of a feature
"""

import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np

from ivideo.errors import UserError
from ivideo.evaluation import bootstrap
from ivideo.files import atomic_write, open_read

_ARRAYS = ("count", "mean", "scatter")
SUFFIX = ".npz"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Count, mean [D] and scatter [D, D] of features, float64, and the protocol that they belong to.

    The scatter is the sum of the outer products of the deviations from the mean. `protocol` says what the features are
    of: the network, the digest of its weights, frames, size and so on, as values of JSON.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray
    protocol: Mapping = dataclasses.field(default_factory=dict)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance [D, D]. ValueError where there are fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"{self.count} samples have no covariance, expected two or more.")
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of everything in the statistics, in hexadecimal."""
        digest = hashlib.sha256(json.dumps([self.count, self.protocol], sort_keys=True).encode())
        for array in (self.mean, self.scatter):
            digest.update(np.ascontiguousarray(array, "<f8").tobytes())
        return digest.hexdigest()


def measure(features: np.ndarray, protocol: Mapping | None = None, *, counts: np.ndarray | None = None) -> Statistics:
    """The statistics of features [N, D]; `counts` [N] says how often each is drawn, by default once."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"The features have shape {features.shape}, expected one or more rows.")
    if not np.isfinite(features).all():
        raise ValueError("Some features are not finite.")
    weights = np.ones(len(features)) if counts is None else np.asarray(counts, np.float64)
    mean = weights @ features / weights.sum()
    deviations = (features - mean) * np.sqrt(weights)[:, None]
    return Statistics(int(weights.sum()), mean, deviations.T @ deviations, dict(protocol or {}))


def merge(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of the samples of all parts together. UserError where their protocols differ."""
    first, *others = parts
    count, mean, scatter = first.count, first.mean, first.scatter
    for other in others:
        check_same_protocol(first, other)
        total = count + other.count
        gap = other.mean - mean
        scatter = scatter + other.scatter + np.outer(gap, gap) * (count * other.count / total)
        mean = mean + gap * (other.count / total)
        count = total
    return Statistics(count, mean, scatter, first.protocol)


def distance(first: Statistics, second: Statistics) -> float:
    """The Fréchet distance |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½). UserError where the protocols differ."""
    check_same_protocol(first, second)
    gap = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    # With Σ = FFᵀ the last trace is the sum of the singular values of F₁ᵀF₂. This is accurate where Σ₁Σ₂ is singular:
    # there, roots of eigenvalues would turn an error of 1e-16 into one of 1e-8 per dimension
    product = _factor(first.covariance).T @ _factor(second.covariance)
    return float(gap @ gap + traces - 2 * np.linalg.svd(product, compute_uv=False).sum())


def distance_interval(
    features: np.ndarray,
    reference: Statistics,
    *,
    replicates: int = bootstrap.REPLICATES,
    seed: int = 0,
    level: float = bootstrap.LEVEL,
) -> tuple[float, tuple[float, float]]:
    """The distance of features [N, D] from a reference, and its bootstrap interval over the features.

    The reference is taken as exact. Each replicate takes one decomposition of a D×D matrix and one of a product.
    """

    def of(counts=None):
        return distance(measure(features, reference.protocol, counts=counts), reference)

    estimate = of()
    found = [of(counts) for counts in bootstrap.counts(len(features), replicates=replicates, seed=seed)]
    return estimate, bootstrap.interval(estimate, found, level=level)


def check_same_protocol(first: Statistics, second: Statistics) -> None:
    """UserError where two statistics cannot be compared. It names the first part of the protocols that differs."""
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"statistics of {len(first.mean)} and {len(second.mean)} dimensions cannot be compared: measure both with "
            "the same network"
        )
    for name in sorted(first.protocol.keys() | second.protocol.keys()):
        ours, theirs = first.protocol.get(name, "absent"), second.protocol.get(name, "absent")
        if ours != theirs:
            raise UserError(
                f"statistics of different protocols cannot be compared: {name} is {ours} in one and {theirs} in the "
                "other; measure both in the same way"
            )


def save(path: str, statistics: Statistics) -> None:
    """Writes statistics to an .npz file, atomically."""
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez(
            f,
            count=np.int64(statistics.count),
            mean=statistics.mean,
            scatter=statistics.scatter,
            protocol=np.str_(json.dumps(dict(statistics.protocol), sort_keys=True)),
        )


def load(path: str) -> Statistics:
    """Reads statistics that `save` wrote. UserError where the file is missing, damaged or of another kind."""
    try:
        with open_read(path) as f, np.load(f, allow_pickle=False) as stored:
            missing = [name for name in (*_ARRAYS, "protocol") if name not in stored]
            if missing:
                raise UserError(
                    f"{path} has no {missing[0]} (it holds {', '.join(stored.files[:5]) or 'nothing'}): expected "
                    "statistics that this package wrote; measure the reference's videos again"
                )
            arrays = {name: np.asarray(stored[name], np.float64) for name in _ARRAYS}
            protocol = json.loads(str(stored["protocol"]))
    except UserError:
        raise
    except (OSError, ValueError, TypeError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{path} is not a complete {SUFFIX} file of statistics ({reason}): copy it again") from e
    shapes = {name: array.shape for name, array in arrays.items()}
    dims = shapes["mean"]
    good = isinstance(protocol, dict) and shapes == {"count": (), "mean": dims, "scatter": (*dims, *dims)}
    if not good or len(dims) != 1 or not all(np.isfinite(array).all() for array in arrays.values()):
        raise UserError(f"{path} holds arrays of {shapes}, expected finite statistics of one network: copy it again")
    return Statistics(int(arrays["count"]), arrays["mean"], arrays["scatter"], protocol)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F [D, rank] with FFᵀ = Σ. Eigenvalues that rounding cannot tell from zero are zero."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, kept] * np.sqrt(values[kept])

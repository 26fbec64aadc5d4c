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

_ARRAYS = ("count", "mean", "scatter", "sample")
SUFFIX = ".npz"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Count, mean [D] and scatter [D, D] of features, float64, and the protocol that they belong to.

    The scatter is the sum of the outer products of the deviations from the mean. `protocol` says what the features are
    of: the network, the digest of its weights, frames, size and so on, as values of JSON. `sample` [M, D] float32 has
    some of the features, for measures that need them. `about` says which clips they are of; unlike the protocol it may
    differ between statistics that are compared.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray
    protocol: Mapping = dataclasses.field(default_factory=dict)
    sample: np.ndarray | None = None
    about: Mapping = dataclasses.field(default_factory=dict)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance [D, D]. ValueError where there are fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"{self.count} samples have no covariance, expected two or more.")
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """F [D, rank] with FFᵀ = Σ, the covariance. Eigenvalues that rounding cannot tell from zero are zero."""
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
        return vectors[:, kept] * np.sqrt(values[kept])

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of count, mean, scatter and protocol, in hexadecimal."""
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
    return float(gap @ gap + traces - 2 * np.linalg.svd(first.factor.T @ second.factor, compute_uv=False).sum())


def distance_interval(
    features: np.ndarray,
    reference: Statistics,
    *,
    group: int = 1,
    replicates: int = bootstrap.REPLICATES,
    seed: int = 0,
    level: float = bootstrap.LEVEL,
) -> tuple[float, tuple[float, float]]:
    """The distance of features [N, D] from a reference, and its bootstrap interval over the features.

    Each `group` of features, one after the other, is drawn together: the frames of a clip are not independent. The
    reference is taken as exact.
    """
    features = np.asarray(features, np.float64)
    estimate = distance(measure(features, reference.protocol), reference)
    drawn = bootstrap.counts(len(features) // group, replicates=replicates, seed=seed).repeat(group, axis=1)
    found = [_quick_distance(measure(features, counts=counts), reference) for counts in drawn]
    low, high = bootstrap.interval(estimate, found, level=level)
    return estimate, (max(low, 0.0), high)


def _quick_distance(first: Statistics, second: Statistics) -> float:
    """`distance` with one decomposition, accurate to 1e-8 of the scale per dimension: enough for an interval."""
    gap = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(second.factor.T @ first.covariance @ second.factor), 0))
    return float(gap @ gap + traces - 2 * roots.sum())


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


def save(path: str, statistics: Mapping[str, Statistics]) -> None:
    """Writes statistics by name, such as fvd and fid, to an .npz file, atomically."""
    arrays = {}
    for name, found in statistics.items():
        sample = np.zeros((0, len(found.mean)), np.float32) if found.sample is None else found.sample
        arrays |= {
            f"{name}/count": np.int64(found.count),
            f"{name}/mean": found.mean,
            f"{name}/scatter": found.scatter,
            f"{name}/sample": sample,
            f"{name}/protocol": np.str_(json.dumps(dict(found.protocol), sort_keys=True)),
            f"{name}/about": np.str_(json.dumps(dict(found.about), sort_keys=True)),
        }
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, **arrays)


def load(path: str) -> dict[str, Statistics]:
    """Reads the statistics that `save` wrote. UserError where the file is missing, damaged or of another kind."""
    try:
        with open_read(path) as f, np.load(f, allow_pickle=False) as stored:
            names = sorted({name.partition("/")[0] for name in stored if "/" in name})
            wanted = [f"{name}/{part}" for name in names for part in (*_ARRAYS, "protocol")] or ["fvd/mean"]
            if missing := [name for name in wanted if name not in stored]:
                raise UserError(
                    f"{path} has no {missing[0]} (it holds {', '.join(stored.files[:5]) or 'nothing'}): expected "
                    "statistics that this package wrote; measure the reference's videos again"
                )
            return {name: _read(path, stored, name) for name in names}
    except UserError:
        raise
    except (OSError, ValueError, TypeError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{path} is not a complete {SUFFIX} file of statistics ({reason}): copy it again") from e


def _read(path, stored, name):
    arrays = {part: np.asarray(stored[f"{name}/{part}"], np.float64) for part in _ARRAYS}
    protocol = json.loads(str(stored[f"{name}/protocol"]))
    about = json.loads(str(stored.get(f"{name}/about", "{}")))
    shapes = {part: array.shape for part, array in arrays.items()}
    dims, rows = shapes["mean"], shapes["sample"][:1]
    good = shapes == {"count": (), "mean": dims, "scatter": (*dims, *dims), "sample": (*rows, *dims)}
    finite = all(np.isfinite(array).all() for array in arrays.values())
    if not good or not finite or len(dims) != 1 or not isinstance(protocol, dict) or not isinstance(about, dict):
        raise UserError(f"{path} holds arrays of {shapes}, expected finite statistics of one network: copy it again")
    sample = arrays["sample"].astype(np.float32) if rows[0] else None
    return Statistics(int(arrays["count"]), arrays["mean"], arrays["scatter"], protocol, sample, about)

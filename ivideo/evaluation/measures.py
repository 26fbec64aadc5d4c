"""From what was computed of every clip to the measures of a set, each with its bootstrap interval.

N clips · F frames · D dimensions of a feature · P channels of CLIP's vectors
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ivideo.data.video_io import evenly
from ivideo.evaluation import alignment, bootstrap, frechet, kernel_distance
from ivideo.evaluation.networks import clip

_TEXTS = 64  # texts in CLIP at a time
# Measures of single clips, by their names in the values
_TITLES = {
    "flicker": "flicker",
    "warping": "warping error",
    "drift": "drift",
    "clip_distance": "CLIP distance of neighbouring frames",
    "follows": "follows its caption",
}


def texts(reader: clip.Reader | None, captions: Sequence[str | None]) -> dict[str, np.ndarray] | None:
    """CLIP's vectors of the different captions, by caption; None without CLIP, or where a clip has no caption."""
    if reader is None or any(caption is None for caption in captions):
        return None
    different = list(dict.fromkeys(captions))
    # Equal batches, so that the network is compiled once
    padded = different + different[-1:] * (-len(different) % _TEXTS)
    vectors = [reader.texts(padded[begin : begin + _TEXTS]) for begin in range(0, len(padded), _TEXTS)]
    return dict(zip(different, np.concatenate(vectors), strict=False))


def all_of(
    values: Mapping[str, np.ndarray],
    reference: Mapping[str, frechet.Statistics] | None,
    captions: Sequence[str | None],
    vectors: Mapping[str, np.ndarray] | None,
    *,
    replicates: int,
    kernel_samples: int,
) -> dict[str, dict]:
    """All measures that `values` (`judges.Judges.judge`, of all samples) allow.

    `reference` has the statistics of the reference, and `vectors` those of the captions (`texts`), where there are any.
    Returns per measure its value, the bounds low and high of its interval, the number of samples, and which is better.
    """
    found, options, reference = {}, {"replicates": replicates}, reference or {}
    if "i3d" in values and "fvd" in reference:
        features = values["i3d"]
        found["FVD"] = _row(frechet.distance_interval(features, reference["fvd"], **options), len(features))
    if "inception" in values and "fid" in reference:
        features, real = values["inception"], reference["fid"]
        group, dims = features.shape[1:]
        flat = features.reshape(-1, dims)
        found["FID"] = _row(frechet.distance_interval(flat, real, group=group, **options), len(flat))
        if real.sample is not None:
            some = features[evenly(len(features), max(2, kernel_samples // group))].reshape(-1, dims)
            result = kernel_distance.distance_interval(some, real.sample, group=group, **options)
            found["KID"] = _row(result, len(some))
    if "clip" in values and vectors is not None:
        clips, count = alignment.clip_vectors(values["clip"]), len(captions)
        result = alignment.score(clips, np.stack([vectors[caption] for caption in captions]), **options)
        found["CLIP score"] = _row(result, count, "higher")
        if (pool := list(vectors))[1:]:
            result = alignment.r_precision(clips, captions, pool, np.stack(list(vectors.values())), **options)
            found[f"R-precision, of {len(pool)} prompts"] = _row(result, count, "higher")
    return found | means(values, replicates=replicates)


def means(values: Mapping[str, np.ndarray], *, replicates: int) -> dict[str, dict]:
    """Per measure of single clips its mean over the clips that have it, as `all_of`."""
    found = {}
    for name, title in _TITLES.items():
        column = values.get(name, np.zeros(0))
        known = column[~np.isnan(column)]
        if len(known):
            better = "higher" if name == "follows" else "lower"
            found[title] = _row(bootstrap.mean_interval(known, replicates=replicates), len(known), better)
    return found


def fewer_clips(values: Mapping[str, np.ndarray], reference: Mapping[str, frechet.Statistics] | None) -> dict:
    """FVD of an eighth, a quarter, half and all of the clips, evenly chosen: how it falls with their number."""
    if "i3d" not in values or "fvd" not in (reference or {}):
        return {}
    real, count = reference["fvd"], len(values["i3d"])
    counts = [count // part for part in (8, 4, 2, 1) if count // part > 1]
    chosen = {n: values["i3d"][evenly(count, n)] for n in counts}
    return {str(n): frechet.distance(frechet.measure(some, real.protocol), real) for n, some in chosen.items()}


def _row(result, samples, better="lower"):
    value, (low, high) = result
    return {"value": value, "low": low, "high": high, "samples": samples, "better": better}

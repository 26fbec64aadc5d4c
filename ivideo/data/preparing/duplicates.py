"""Finds near-duplicates by their perceptual hashes, without comparing every pair of files."""

import collections
import itertools
from collections.abc import Iterator

import numpy as np

HASH_BITS = 192  # of a clip: three frames of 64


def duplicates(rows: list[dict], bits: int) -> dict[int, int]:
    """The near-duplicates among rows, each with the number of the row that is kept in its place.

    Two files are duplicates if their hashes differ in at most `bits` of 192 bits, or in the same share of shorter ones:
    otherwise images, whose hashes have 64, would be close by chance. -1 finds none. Of such files the one with the most
    pixels is kept, then the one with the most frames, the most bytes, and the first one.
    """
    if bits < 0 or not rows:
        return {}
    data = bytes.fromhex("".join(row["hash"] for row in rows))
    hashes = np.frombuffer(data, np.uint8).reshape(len(rows), -1)
    limit = bits * 8 * hashes.shape[1] // HASH_BITS
    ranks = [(row["bytes"], row.get("frames", 0), row["height"] * row["width"]) for row in rows]
    order = np.lexsort(-np.array(ranks).T)  # the best first; the order of equal ones is kept
    # Copies with the same hash, of which there may be many, are compared once
    values, firsts, groups = np.unique(hashes[order], axis=0, return_index=True, return_inverse=True)
    earlier = collections.defaultdict(list)  # the close hashes that files before the first one with a hash have
    for a, b in _close_pairs(values, limit):
        low, high = (a, b) if firsts[a] < firsts[b] else (b, a)
        earlier[high].append(low)
    kept_for = np.arange(len(values))  # of each hash, the hash whose file is kept
    for value in sorted(earlier, key=firsts.__getitem__):
        kept = [other for other in earlier[value] if kept_for[other] == other]
        if kept:
            kept_for[value] = min(kept, key=firsts.__getitem__)
    stand_ins = order[firsts[kept_for[groups.ravel()]]]
    return {int(number): int(other) for number, other in zip(order, stand_ins, strict=True) if number != other}


def _close_pairs(values: np.ndarray, limit: int) -> set[tuple[int, int]]:
    """The pairs of hashes, uint8 [N,B], that differ in at most `limit` bits."""
    words, pairs = np.ascontiguousarray(values).view(np.uint64), set()
    # If at most `limit` bits differ, then at least one of limit + 1 parts is equal
    for part in _parts(values, limit + 1):
        order = np.argsort(part, kind="stable")
        part = part[order]
        place = np.arange(len(part))  # those whose neighbour at a distance has the same part
        for distance in range(1, len(part)):
            place = place[: np.searchsorted(place, len(part) - distance)]
            place = place[part[place + distance] == part[place]]
            if not len(place):
                break
            a, b = order[place], order[place + distance]
            close = np.bitwise_count(words[a] ^ words[b]).sum(axis=1) <= limit
            pairs.update(zip(a[close].tolist(), b[close].tolist(), strict=True))
    return pairs


def _parts(values: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """The bits of hashes, uint8 [N,B], divided into `count` parts of about equal length; each [N] as numbers."""
    size = 8 * values.shape[1]
    for start, end in itertools.pairwise(size * k // count for k in range(count + 1)):
        inside = np.unpackbits(values[:, start // 8 : -(-end // 8)], axis=1)[:, start % 8 :][:, : end - start]
        # With up to 64 bits; the first ones of longer parts are enough to find the pairs
        yield inside[:, :64] @ (1 << np.arange(min(64, end - start), dtype=np.uint64))

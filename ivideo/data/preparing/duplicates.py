"""Finds near-duplicates by their perceptual hashes, in time about proportional to the number of files."""

import collections
import itertools

HASH_BITS = 192  # of a clip: three frames of 64


def duplicates(rows: list[dict], bits: int) -> dict[int, int]:
    """The near-duplicates among rows, each with the number of the row that is kept in its place.

    Two files are duplicates if their hashes differ in at most `bits` of 192 bits, or in the same share of shorter ones:
    otherwise images, whose hashes have 64, would be close by chance. -1 finds none. Of such files the one with the most
    pixels is kept, then the one with the most frames, the most bytes, and the first one.
    """
    if bits < 0 or not rows:
        return {}
    bits = bits * 4 * len(rows[0]["hash"]) // HASH_BITS
    ranks = [(-row["height"] * row["width"], -row.get("frames", 0), -row["bytes"]) for row in rows]
    found, kept_by_part = {}, collections.defaultdict(list)
    for number in sorted(range(len(rows)), key=lambda i: (ranks[i], i)):
        value, size = int(rows[number]["hash"], 16), 4 * len(rows[number]["hash"])
        # If at most `bits` bits differ, then at least one of bits + 1 parts is equal
        keys = [(k, part) for k, part in enumerate(_parts(value, size, bits + 1))]
        candidates = {other: hash_ for key in keys for other, hash_ in kept_by_part[key]}
        close = [other for other, hash_ in candidates.items() if (hash_ ^ value).bit_count() <= bits]
        if close:
            found[number] = min(close)
            continue
        for key in keys:
            kept_by_part[key].append((number, value))
    return found


def _parts(value: int, size: int, count: int) -> list[int]:
    """The bits of a number of `size` bits, divided into `count` parts of about equal length."""
    edges = [size * k // count for k in range(count + 1)]
    return [value >> start & ((1 << end - start) - 1) for start, end in itertools.pairwise(edges)]

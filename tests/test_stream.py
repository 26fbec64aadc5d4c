"""One stream of batches: the same for any number of workers and processes, and through a stop and resume."""

import collections
import hashlib
import json

import numpy as np
import pytest
from light_tokens import tokenize

from ivideo.data import mixtures, pipeline, sources

EPOCHS, CLIPS, BATCH = 3, 24, 8
SIZE = dict(frames=4, height=8, width=8, crop=sources.Crop(2, 4, 4))
PAIRS = [[sources.ShapesSource(num_clips=count, seed=seed, **SIZE) for seed, count in enumerate((16, 8))] for _ in "ab"]
VIDEOS, IMAGES = (mixtures.Mixture(pair, weights) for pair, weights in zip(PAIRS, ((2, 1), (1, 3)), strict=True))


def iterator(**options):
    return pipeline.make_iterator(
        VIDEOS, images=IMAGES, batch_size=BATCH, seed=3, num_images=2, tokenize=tokenize, text_length=60, **options
    )


def digest(batches):
    """A hash of all arrays of a stream, with their names, shapes and types."""
    found = hashlib.sha256()
    for batch in batches:
        for name, array in sorted(batch.items()):
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def taken(batches, count=EPOCHS * CLIPS // BATCH):
    return [next(batches) for _ in range(count)]


def joined(readers):
    """The batches that processes read together, each its own parts."""
    parts = [taken(iterator(reader=k, readers=readers)) for k in range(len(readers))]
    order = np.argsort([number for mine in readers for number in mine])  # of the parts, as they follow one another
    whole = []
    for batches in zip(*parts, strict=True):
        pieces = {}
        for key in batches[0]:
            rows = np.concatenate([batch[key] for batch in batches])
            rows = rows.reshape(len(order), -1, *rows.shape[1:])
            pieces[key] = rows[order].reshape(-1, *rows.shape[2:])
        whole.append(pieces)
    return whole


def test_one_stream_for_any_number_of_workers_and_processes_and_through_a_restart():
    """Of a mixture of videos and one of images; stopped inside the second epoch, and continued by two processes."""
    wanted, states = digest(taken(iterator())), set()
    for workers in (1, 2, 4):
        batches = iterator(num_workers=workers)
        begun = taken(batches, 4)
        states.add(json.dumps(batches.get_state()))
        assert digest([*begun, *taken(batches, EPOCHS * CLIPS // BATCH - 4)]) == wanted, f"{workers} workers"
        batches.close()
    for readers in (((0,), (1,)), ((0,), (1,), (2,), (3,)), ((0, 3), (1, 2))):
        assert digest(joined(readers)) == wanted, f"processes with the parts {readers}"
    (state,) = states
    parts = [iterator(reader=k, readers=((0,), (1,))) for k in range(2)]
    for part in parts:
        part.set_state(json.loads(state))
    halves = [taken(part, EPOCHS * CLIPS // BATCH - 4) for part in parts]
    rest = [
        {key: np.concatenate([half[key] for half in pair]) for key in pair[0]} for pair in zip(*halves, strict=True)
    ]
    assert digest([*begun, *rest]) == wanted


def test_small_the_digest_sees_every_change():
    batches = taken(iterator(), 2)
    wanted = digest(batches)
    assert digest(batches[::-1]) != wanted and digest(taken(iterator(), 2)) == wanted
    for key in batches[0]:
        changed = [{**batches[0], key: batches[0][key].copy()}, batches[1]]
        changed[0][key].flat[-1] ^= 1
        assert digest(changed) != wanted, key


class Numbered(sources.ShapesSource):
    """Every clip shows its number."""

    def read(self, index, rng):
        return {"video": np.full((1, 2, 2, 3), index, np.uint8), "caption": "x"}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_small_no_example_is_lost_or_comes_twice_in_an_epoch(processes):
    """Also where batches do not divide the epoch, so that a batch has clips of two epochs."""
    source = Numbered(num_clips=20, seed=0, frames=1, height=2, width=2)
    readers = tuple((k,) for k in range(processes))
    options = dict(batch_size=BATCH, seed=0, tokenize=tokenize, text_length=4, num_threads=0, readers=readers)
    each = [pipeline.make_iterator(source, reader=k, **options) for k in range(processes)]
    stream = [int(n) for _ in range(10) for part in each for n in next(part)["video"][:, 0, 0, 0, 0]]
    counts = [collections.Counter(stream[first : first + 20]) for first in range(0, 80, 20)]
    assert all(count == dict.fromkeys(range(20), 1) for count in counts)

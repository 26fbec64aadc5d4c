"""Mixtures of sets by weight: what the config may say, and the clips and images that training then reads."""

import collections
import pickle

import numpy as np
import pytest
from test_checks import change

from configs import base
from ivideo import checks
from ivideo.data import mixtures, pipeline, shapes_set, sources
from ivideo.errors import UserError
from ivideo.training import loop


class Numbers:
    """Clips and images of which every pixel is `first` plus the number of the clip."""

    def __init__(self, first, count):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def read(self, index, rng):
        assert 0 <= index < self.count
        return {"video": np.full((2, 2, 2, 3), self.first + index, np.uint8), "caption": "x"}

    def image(self, index, rng):
        return {"image": self.read(index, rng)["video"][0], "caption": "x"}

    def check(self, index):
        pass


def mixture(*sizes, weights):
    firsts = np.cumsum([0, *sizes[:-1]])
    return mixtures.Mixture([Numbers(*pair) for pair in zip(firsts, sizes, strict=True)], weights)


def tokenize(texts, length):
    return np.ones((len(texts), length), np.int32), np.ones((len(texts), length), bool)


def iterator(source, **options):
    options = {"batch_size": 4, "seed": 0, "num_threads": 0, "tokenize": tokenize, "text_length": 1, **options}
    return pipeline.make_iterator(source, **options)


def numbers(batches, count, name="video"):
    return [int(x) for _ in range(count) for x in next(batches)[name][..., 0, 0, 0].reshape(4, -1)[:, 0]]


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        ("", []),
        ("films", [("films", 1)]),
        ("a, b", [("a, b", 1)]),  # a folder's name may have a comma
        ("runs:2024", [("runs:2024", 1)]),  # or a colon
        ("films:3,gs://web/x:0.5", [("films", 3), ("gs://web/x", 0.5)]),
        ("a:1,b:1e2,c:2", [("a", 1), ("b", 100), ("c", 2)]),
    ],
)
def test_small_the_config_names_one_folder_or_several_with_weights(text, sets):
    assert mixtures.parse(text) == sets
    checks.check(change(base.get_config("small"), "data.dir", text))


@pytest.mark.parametrize("key", ["data.dir", "data.image_dir"])
@pytest.mark.parametrize("text", ["a:1,b", "a:0,b:1", "a:-1,b:1", "a:nan,b:1", "a:inf,b:1", "a:1,:2", "a:1,", "None"])
def test_small_wrong_weights_are_an_error(key, text):
    config = change(base.get_config("small"), key, text)
    with pytest.raises(UserError, match=f"config.{key} = '{text}': expected a folder, .* such as films:3,web:1"):
        checks.check(config)


def test_small_training_measures_against_one_set_alone():
    config = base.get_config("small")
    config.update_from_flattened_dict({"data.dir": "a:1,b:2", "train.evaluate_every": 5})
    with pytest.raises(UserError, match="config.train.evaluate_every = 5: expected 0 with several sets"):
        checks.check(config)


def test_small_clips_are_drawn_by_weight_and_each_set_has_epochs_of_its_own():
    """In any stretch the shares are those of the weights to within one; no clip comes twice in its set's epoch."""
    found = numbers(iterator(mixture(6, 8, 5, weights=(1, 0.5, 2.5))), 20)
    sets = [0 if n < 6 else 1 if n < 14 else 2 for n in found]
    for length in (4, 8, 30, 80):
        counts = collections.Counter(sets[:length])
        for k, share in enumerate((0.25, 0.125, 0.625)):
            assert abs(counts[k] - share * length) <= 1, (length, k)
    for k, size in enumerate((6, 8, 5)):
        of_set = [n for n, of in zip(found, sets, strict=True) if of == k]
        epochs = [of_set[i : i + size] for i in range(0, len(of_set) - size + 1, size)]
        assert len(epochs) >= 1 and all(len(set(epoch)) == size for epoch in epochs)
        assert len(epochs) == 1 or epochs[0] != epochs[1]


def test_small_packed_images_are_drawn_by_weight():
    images, rng = mixture(40, 4, 200, weights=(3, 1, 4)), np.random.default_rng(0)
    drawn = np.array([mixtures.draw(images.parts, 4, rng) for _ in range(2000)])
    assert all(len(set(row)) == 4 for row in drawn.tolist()) and set(drawn.ravel()) == set(range(244))
    shares = [((drawn >= low) & (drawn < high)).mean() for low, high in ((0, 40), (40, 44), (44, 244))]
    np.testing.assert_allclose(shares, [3 / 8, 1 / 8, 4 / 8], atol=0.02)
    batch = next(iterator(Numbers(250, 5), images=images, num_images=4))
    assert set(batch["images"][..., 0, 0, 0].ravel()) <= set(range(244)) and (batch["video"] >= 250).all()


def test_small_packed_frames_of_a_mixture_are_of_other_clips():
    source, rng = mixture(3, 4, weights=(1, 1)), np.random.default_rng(0)
    drawn = {clip: [mixtures.draw(source.parts, 2, rng, but=clip) for _ in range(100)] for clip in range(7)}
    for clip, pairs in drawn.items():
        assert all(len(set(pair)) == 2 for pair in pairs)
        assert {number for pair in pairs for number in pair} == set(range(7)) - {clip}
    batches = iterator(source, num_images=2)
    for _ in range(3):
        batch = next(batches)
        for video, images in zip(batch["video"][:, 0, 0, 0, 0], batch["images"][..., 0, 0, 0], strict=True):
            assert len({int(video), *images.tolist()}) == 3


@pytest.mark.parametrize("readers", [((0,), (1,)), ((0, 3), (1, 2))])
def test_small_a_mixture_resumes_exactly_and_is_shared_by_processes(readers):
    source, images = mixture(6, 30, weights=(1, 2)), mixture(5, 7, weights=(2, 1))
    options = dict(images=images, num_images=2)
    whole = iterator(pickle.loads(pickle.dumps(source)), **options)
    wanted = [next(whole) for _ in range(8)]
    fresh = iterator(source, **options)
    fresh.set_state({**fresh.get_state(), "global_next_index": 12})
    for batch in wanted[3:]:
        found = next(fresh)
        assert all((found[key] == batch[key]).all() for key in batch)
    parts = sum(map(len, readers))
    for reader, mine in enumerate(readers):
        part = iterator(source, reader=reader, readers=readers, **options)
        for batch in wanted:
            found = next(part)
            for key in batch:
                rows = batch[key].reshape(parts, 4 // parts, *batch[key].shape[1:])[list(mine)]
                np.testing.assert_array_equal(found[key].reshape(rows.shape), rows)


def test_small_every_set_needs_as_many_images_as_are_packed():
    with pytest.raises(UserError, match="num_images is 3 with a source of 3 clips, expected 0 to 2"):
        iterator(mixture(9, 3, weights=(1, 1)), num_images=3)
    with pytest.raises(UserError, match="num_images is 5 with a set of 4 images"):
        iterator(Numbers(0, 9), images=mixture(9, 4, weights=(1, 1)), num_images=5)


def test_small_a_stage_reads_a_mixture_of_prepared_sets(tmp_path):
    """The folders of a set are checked before anything else; the error names the one that is not there."""
    folders = [
        shapes_set.prepare_shapes(
            tmp_path / f"{k}", num_train=2 + k, num_held_out=1, frames=4, height=8, width=8, seed=k
        )
        for k in range(2)
    ]
    config = base.get_config("small")
    options = {"data.source": "tfds", "data.dir": f"{folders[0]}:1,{folders[1]}:3", "data.num_images": 1}
    config.update_from_flattened_dict(options)
    source = loop.data_source(config)
    assert len(source) == 5 and [weight for _, weight in source.parts] == [1, 3]
    for number in range(5):
        alone = sources.TFDSSource(folders[number >= 2], frames=4, height=8, width=8, fps=3)
        rngs = [np.random.default_rng(0) for _ in range(2)]
        found, wanted = source.read(number, rngs[0]), alone.read(number - 2 * (number >= 2), rngs[1])
        assert (found["video"] == wanted["video"]).all() and found["caption"] == wanted["caption"]
    with config.unlocked():
        config.data.dir = f"{folders[0]}:1,{tmp_path}/none:3"
    with pytest.raises(UserError, match=f"data_dir is '{tmp_path}/none', expected a folder with dataset_info.json"):
        loop.data_source(config)
    config.data.dir = f"{folders[0]},{folders[1]}"
    with pytest.raises(UserError, match="several folders have a weight after each"):
        loop.data_source(config)

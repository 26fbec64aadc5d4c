"""Sources and batches: contents against the renderer, order, sharding and resuming."""

import collections
import json
import pickle
import socket

import grain
import jax
import numpy as np
import pytest
from light_tokens import tokenize

from configs import base
from ivideo.data import pipeline, resizing, shapes, shapes_set, sources, video_io
from ivideo.errors import UserError
from ivideo.text import load_encoder
from ivideo.text.tokenizers import byte_tokens
from ivideo.training import loop
from ivideo.training.step import batch_shapes, prepare

SIZE = dict(frames=4, height=8, width=12)
ARRAYS = ("video", "tokens", "token_mask", "images", "image_tokens", "image_token_mask")


def read(source, index, seed=0):
    return source.read(index, np.random.default_rng(seed))


def text_of(tokens):
    return bytes(tokens[tokens > 0].tolist()).decode()


def make_source(num_clips=48, seed=0, **size):
    return sources.ShapesSource(num_clips=num_clips, seed=seed, **{**SIZE, **size})


def make_iterator(source, batch_size=4, **options):
    options = {"seed": 0, "tokenize": tokenize, "text_length": 64, "num_threads": 0, **options}
    return pipeline.make_iterator(source, batch_size=batch_size, **options)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_small_shapes_source_is_the_renderer():
    source = make_source(num_clips=864, seed=3)
    captions = collections.Counter(read(source, i)["caption"] for i in range(864))
    assert set(captions.values()) == {2} and len(captions) == 432
    assert not any(shapes.held_out(shapes.parse_caption(c)) for c in captions)
    for i in (0, 500):
        attrs, seed = source.clip(i)
        np.testing.assert_array_equal(read(source, i)["video"], shapes.render(attrs, seed, **SIZE))
        assert read(source, i)["caption"] == shapes.caption(attrs)
    # The same caption again is another clip, and so is another source's.
    assert np.abs(read(source, 0)["video"] - read(source, 432)["video"]).max() > 0.1
    assert np.abs(read(source, 0)["video"] - read(make_source(num_clips=864, seed=4), 0)["video"]).max() > 0.1
    image = source.image(5, np.random.default_rng(0))
    assert min(np.abs(image["image"] - frame).max() for frame in read(source, 5)["video"]) == 0
    assert image["caption"] == read(source, 5)["caption"]
    with pytest.raises(IndexError, match="clip 864"):
        read(source, 864)


def test_small_make_source_and_its_errors(tmp_path):
    source = sources.make_source("shapes", num_clips=96, split="held_out", **SIZE)
    assert collections.Counter(read(source, i)["caption"] for i in range(96)) == {
        shapes.caption(a): 2 for a in shapes.HELD_OUT
    }
    with pytest.raises(ValueError, match="the source is 'folder', expected 'shapes' or 'tfds'"):
        sources.make_source("folder", **SIZE)
    with pytest.raises(ValueError, match="split is 'test', expected one of train, held_out"):
        sources.make_source("shapes", num_clips=1, split="test", **SIZE)
    with pytest.raises(ValueError, match="num_clips is 0"):
        sources.make_source("shapes", **SIZE)
    with pytest.raises(ValueError, match=r"expected a folder with dataset_info\.json: prepare"):
        sources.make_source("tfds", data_dir=str(tmp_path), **SIZE)


def test_small_batch_contents():
    source = make_source()
    batch = next(make_iterator(source, num_images=3))
    wanted = {
        "video": ((4, 4, 8, 12, 3), np.uint8),
        "tokens": ((4, 64), np.int32),
        "token_mask": ((4, 64), bool),
        "images": ((4, 3, 8, 12, 3), np.uint8),
        "image_tokens": ((4, 3, 64), np.int32),
        "image_token_mask": ((4, 3, 64), bool),
    }
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (s, np.dtype(t)) for k, (s, t) in wanted.items()}
    clips = {read(source, i)["caption"]: video_io.to_uint8(read(source, i)["video"]) for i in range(len(source))}
    assert len(clips) == 48
    for b in range(4):
        caption = text_of(batch["tokens"][b])
        np.testing.assert_array_equal(batch["video"][b], clips[caption])
        assert batch["token_mask"][b].sum() == len(caption)
        others = [text_of(t) for t in batch["image_tokens"][b]]
        assert len({caption, *others}) == 4  # of clips that differ, and none of the video itself
        for image, other in zip(batch["images"][b], others, strict=True):
            assert any((image == frame).all() for frame in clips[other])
    assert set(next(make_iterator(source))) == set(ARRAYS[:3])


def test_small_an_epoch_shows_every_clip_once_in_another_order():
    source = make_source()
    iterator = make_iterator(source, batch_size=6)
    epochs = [[text_of(t) for _ in range(8) for t in next(iterator)["tokens"]] for _ in range(2)]
    everything = [read(source, i)["caption"] for i in range(48)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(everything)
    assert epochs[0] != epochs[1] and epochs[0] != everything
    other = make_iterator(source, batch_size=6, seed=1)
    assert [text_of(t) for _ in range(8) for t in next(other)["tokens"]] != epochs[0]
    plain = make_iterator(source, batch_size=6, shuffle=False)
    assert [text_of(t) for _ in range(8) for t in next(plain)["tokens"]] == everything


@pytest.mark.parametrize("threads", [0, 2])
def test_small_state_resumes_exactly(threads):
    source = make_source()
    iterator = make_iterator(source, num_images=2, num_threads=threads)
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = [next(iterator) for _ in range(15)]  # beyond the end of the epoch
    fresh = make_iterator(source, num_images=2, num_threads=threads)
    fresh.set_state(state)
    for batch in wanted:
        assert_same(next(fresh), batch)
    iterator.set_state(state)
    assert_same(next(iterator), wanted[0])


def test_small_grain_finds_the_data_set_resumable():
    dataset = pipeline.make_dataset(make_source(6), seed=0, num_images=2, tokenize=tokenize, text_length=16)
    grain.experimental.assert_equal_output_after_checkpoint(dataset[:8].to_iter_dataset())


def test_small_orbax_saves_and_restores_the_state(tmp_path):
    import orbax.checkpoint as ocp

    source = make_source()
    iterator = make_iterator(source, num_images=1)
    next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        wanted = next(iterator)
        restored = make_iterator(source, num_images=1)
        manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    assert_same(next(restored), wanted)
    # Saved by one of four processes, restored by one alone.
    (tmp_path / "1" / "data" / "process_0-of-1.json").rename(tmp_path / "1" / "data" / "process_2-of-4.json")
    restored = make_iterator(source, num_images=1)
    pipeline.load_state(restored, tmp_path / "1" / "data")
    assert_same(next(restored), wanted)
    with pytest.raises(FileNotFoundError, match=r"no process_\*.json"):
        pipeline.read_state(tmp_path)


@pytest.mark.parametrize("readers", [((0,), (1,), (2,), (3,)), ((0, 1), (2, 3)), ((0, 3), (1, 2))], ids=str)
def test_small_processes_share_the_global_batch(readers):
    """Whichever parts of it each has: together they read the batch that one alone reads."""
    source = make_source()
    whole = make_iterator(source, batch_size=8, num_images=2)
    wanted = [next(whole) for _ in range(2)]
    for reader, parts in enumerate(readers):
        iterator = make_iterator(source, batch_size=8, num_images=2, reader=reader, readers=readers)
        for step in range(2):
            found = next(iterator)
            for key in ARRAYS:
                rows = wanted[step][key].reshape(4, 2, *wanted[step][key].shape[1:])[list(parts)]
                np.testing.assert_array_equal(found[key], rows.reshape(-1, *rows.shape[2:]))
        assert iterator.get_state() == whole.get_state()
    with pytest.raises(ValueError, match="batch_size is 6 in 4 parts, expected a positive multiple of 4"):
        make_iterator(source, batch_size=6, readers=readers)


def test_small_workers_make_the_same_batches():
    source = make_source(12)
    plain = make_iterator(source, num_images=1)
    workers = make_iterator(source, num_images=1, num_workers=1, num_threads=2)
    for _ in range(3):
        assert_same(next(workers), next(plain))
    workers.close()


def test_small_wrong_arguments_are_named():
    source = make_source(4)
    for options, message in (
        (dict(batch_size=0), "batch_size is 0"),
        (dict(num_images=4), "num_images is 4 with a source of 4 clips, expected 0 to 3"),
        (dict(num_images=-1), "num_images is -1"),
        (dict(text_length=0), "text_length is 0"),
        (dict(num_workers=-1), "num_workers is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_iterator(source, **options)
    with pytest.raises(ValueError, match="0 clips"):
        make_iterator([])
    bad = make_iterator(source, tokenize=lambda texts, length: tokenize(texts, length + 1))
    with pytest.raises(ValueError, match=r"tokens \(1, 65\)"):
        next(bad)


def test_small_resizing_is_that_of_jax():
    rng = np.random.default_rng(0)
    video = rng.integers(256, size=(2, 48, 80, 3), dtype=np.uint8)
    for height, width in ((12, 20), (96, 160), (17, 29)):
        crop = video
        if (height, width) == (17, 29):  # 47 x 80 of the 48 x 80 pixels have this ratio
            crop = video[:, :47]
        wanted = jax.image.resize(np.float32(crop), (2, height, width, 3), "linear", antialias=True)
        found = resizing.resize_video(video, height=height, width=width)
        assert found.dtype == np.uint8
        np.testing.assert_allclose(found, wanted, atol=0.5 + 2e-3)  # levels are rounded
        for rows, columns in ((slice(3, 9), slice(5, 20)), (slice(0, 1), slice(width - 1, width))):
            part = resizing.resize_video(video, height=height, width=width, rows=rows, columns=columns)
            np.testing.assert_array_equal(part, found[:, rows, columns])
    # A wide clip loses its sides, half each.
    wide = np.concatenate([video[:, :, :10] * 0, video, video[:, :, :10] * 0], axis=2)
    np.testing.assert_array_equal(
        resizing.resize_video(wide, height=12, width=20), resizing.resize_video(video, height=12, width=20)
    )


def test_small_the_base_trains_on_single_frames_of_its_clips():
    """With crop_frames = 1 a clip's frame is at a random time, so images show every place on the shape's path."""
    config = base.get_config("small")
    config.train.crop_frames = 1
    source = loop.data_source(config)
    config.train.crop_frames = 0
    whole = loop.data_source(config)
    frames = [
        np.flatnonzero([(read(source, i, i)["video"][0] == f).all() for f in read(whole, i)["video"]])
        for i in range(5, 200, 5)
    ]
    assert all(len(f) for f in frames) and len({f[0] for f in frames}) == config.video.frames


def test_small_crops_are_parts_of_their_clips():
    """At places that are multiples of the steps, drawn by the random generator."""
    size = dict(num_clips=20, seed=3, frames=16, height=24, width=40)
    crop = sources.Crop(4, 8, 16, space=4, time=2)
    whole, part = sources.ShapesSource(**size), sources.ShapesSource(**size, crop=crop)
    places = set()
    for i in range(20):
        place = crop.place(np.random.default_rng(i), frames=16, height=24, width=40)
        assert [s.start % step for s, step in zip(place, (2, 4, 4), strict=True)] == [0, 0, 0]
        assert read(part, i)["caption"] == read(whole, i)["caption"]
        np.testing.assert_array_equal(read(part, i, i)["video"], read(whole, i)["video"][place])
        places.add(tuple(s.start for s in place))
    assert len(places) > 10
    assert {p[0] for p in places} == {0, 2, 4, 6, 8, 10, 12}
    assert part.image(0, np.random.default_rng(0))["image"].shape == (8, 16, 3)
    with pytest.raises(UserError, match="the crop's height is 32 in a clip of 24, expected 1 to 24"):
        read(sources.ShapesSource(**size, crop=sources.Crop(4, 32, 16)), 0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two builds of one small set, with the network shut."""
    patch = pytest.MonkeyPatch()

    def refuse(*_):
        raise AssertionError("the build reached for the network")

    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket, "getaddrinfo", refuse)
    try:
        size = dict(num_train=12, num_held_out=4, frames=8, height=24, width=40, seed=1)
        yield [shapes_set.prepare_shapes(tmp_path_factory.mktemp("set"), **size) for _ in range(2)]
    finally:
        patch.undo()


def test_small_tfds_set_holds_the_rendered_clips(prepared):
    import tensorflow_datasets as tfds

    first, second = (tfds.builder_from_directory(folder) for folder in prepared)
    assert {name: split.num_examples for name, split in first.info.splits.items()} == {"train": 12, "held_out": 4}
    for split, is_held_out in (("train", False), ("held_out", True)):
        records, again = first.as_data_source(split=split), second.as_data_source(split=split)
        assert [r["video"] for r in records] == [r["video"] for r in again]
        for record in records:
            attrs = shapes.Attributes(*(record[f].decode() for f in shapes.Attributes._fields))
            assert record["caption"].decode() == shapes.caption(attrs)
            assert shapes.held_out(attrs) is is_held_out
            video, fps = video_io.read_video(record["video"])
            assert fps == video_io._rate(1.5)
            wanted = shapes.render(attrs, int(record["seed"]), frames=8, height=24, width=40)
            assert np.abs(video_io.to_float(video) - wanted).mean() < 0.05


def test_small_tfds_source_reads_what_was_prepared(prepared):
    source = sources.make_source("tfds", data_dir=prepared[0], fps=0.75, frames=4, height=12, width=20)
    assert len(source) == 12
    rendered = sources.ShapesSource(num_clips=12, seed=2, frames=4, height=12, width=20)
    clips = {read(rendered, i)["caption"]: read(rendered, i)["video"] for i in range(12)}
    for i in range(12):
        clip = read(source, i)
        assert clip["video"].dtype == np.uint8 and clip["video"].shape == (4, 12, 20, 3)
        # The renderer averages over boxes, resizing over triangles.
        assert np.abs(video_io.to_float(clip["video"]) - clips[clip["caption"]]).mean() < 0.06
    every = sources.TFDSSource(prepared[0], frames=8, height=12, width=20, fps=1.5)
    image = source.image(3, np.random.default_rng(0))
    assert sum((image["image"] == frame).all() for frame in read(every, 3)["video"]) == 1
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(source)), 5)["video"], read(source, 5)["video"])
    batch = next(make_iterator(source, num_images=2))
    assert batch["video"].shape == (4, 4, 12, 20, 3) and batch["images"].shape == (4, 2, 12, 20, 3)


def test_small_tfds_crops_are_parts_of_their_clips(prepared):
    size = dict(frames=8, height=24, width=40, fps=1.5)
    crop = sources.Crop(4, 8, 16, space=2)
    whole, part = (sources.TFDSSource(prepared[0], **size, crop=c) for c in (None, crop))
    video, starts = read(whole, 5)["video"], set()
    for seed in range(20):
        _, rows, columns = crop.place(np.random.default_rng(seed), frames=4, height=24, width=40)
        found = read(part, 5, seed)["video"]
        (start,) = [k for k in range(5) if (found == video[k : k + 4, rows, columns]).all()]
        starts.add(start)
    assert starts == set(range(5))
    assert part.image(5, np.random.default_rng(0))["image"].shape == (8, 16, 3)


@pytest.mark.parametrize("name", ["shapes", "tfds"])
def test_small_every_epoch_shows_other_parts_of_the_clips(prepared, name):
    """And the same ones for the same seed, through a restart, and whoever reads them."""
    size = dict(frames=8, height=24, width=40, crop=sources.Crop(2, 16, 24))
    source = sources.make_source(name, num_clips=12, data_dir=prepared[0], fps=1.5, **size)

    def epochs(iterator, first, last):
        if first:
            iterator.set_state({**iterator.get_state(), "global_next_index": 12 * first})
        return [[next(iterator)["video"] for _ in range(3)] for _ in range(first, last)]

    options = dict(shuffle=False, num_images=1)
    found = epochs(make_iterator(source, **options), 0, 4)
    for clip in range(12):
        of_clip = [np.concatenate(epoch)[clip] for epoch in found]
        assert len({video.tobytes() for video in of_clip}) >= 3
    np.testing.assert_array_equal(epochs(make_iterator(source, **options), 2, 4), found[2:])
    assert (epochs(make_iterator(source, seed=1, **options), 0, 1)[0][0] != found[0][0]).any()
    readers = [make_iterator(source, **options, reader=r, readers=((0,), (1,))) for r in (0, 1)]
    halves = [np.stack(epochs(iterator, 0, 2)) for iterator in readers]
    np.testing.assert_array_equal(np.concatenate(halves, axis=2), found[:2])


def test_small_the_step_takes_the_batch_as_floats():
    """uint8 on its way to the devices; there as float32 in [-1, 1], which is the drawing to half a level."""
    config = base.get_config("small")
    encoder = load_encoder(config.text)
    batch = next(loop.make_data(config, encoder))
    assert batch["video"].dtype == batch["images"].dtype == np.uint8
    made = jax.jit(lambda batch: prepare(encoder.module, encoder.params, batch))(batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), batch_shapes(config)
    )
    for key in ("video", "images"):
        np.testing.assert_allclose(made[key], video_io.to_float(batch[key]), atol=1.2e-7)
    source = loop.data_source(config)
    clips = (read(source, i) for i in range(len(source)))
    drawn = {byte_tokens([clip["caption"]], 64)[0].tobytes(): clip["video"] for clip in clips}
    wanted = [drawn[tokens.tobytes()] for tokens in batch["tokens"]]
    np.testing.assert_allclose(made["video"], wanted, atol=0.5 / 127.5 + 1e-6)


def test_small_tfds_source_names_what_is_wrong(prepared):
    size = dict(frames=4, height=12, width=20, fps=1.5)
    with pytest.raises(ValueError, match="split is 'test', expected one of"):
        sources.TFDSSource(prepared[0], "test", **size)
    with pytest.raises(ValueError, match="no feature 'text', expected one of"):
        sources.TFDSSource(prepared[0], caption_feature="text", **size)
    above = prepared[0].split("/captioned_shapes")[0]
    with pytest.raises(ValueError, match=f"did you mean {prepared[0]}"):
        sources.TFDSSource(above, **size)
    with pytest.raises(video_io.VideoError, match=r"clip 2 of 'train' in .* ends after 8 of these frames"):
        read(sources.TFDSSource(prepared[0], **{**size, "frames": 9}), 2)

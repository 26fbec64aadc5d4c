"""The text cache: its embeddings are the encoder's; interruptions, other encoders and damage."""

import contextlib
import os
import pickle
import random
import subprocess
import sys

import fake_bucket
import jax
import light_network
import numpy as np
import pytest
import t5_files as files
import test_hosts
import text_speed

from configs import base
from ivideo import text
from ivideo.data import shapes
from ivideo.errors import UserError
from ivideo.text import cache
from ivideo.training import loop, step

CAPTIONS = [shapes.caption(a) for a in shapes.TRAIN[:40]] + ["naïve ☂", "a"]
LONG = "a very long caption " * 9


@pytest.fixture
def config():
    config = base.get_config("small")
    config.text.batch = 16
    return config


def made(config, folder, captions=CAPTIONS, name="cache"):
    (folder / "captions.txt").write_text("\n".join(captions) + "\n")
    cache.encode_captions(config, str(folder / "captions.txt"), str(folder / name))
    return str(folder / name)


def contents(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


def test_small_embeddings_are_the_encoders(config, tmp_path, monkeypatch, capsys):
    """To bfloat16's last bit, in shards, for long texts and for the config's sample prompts; padding is not stored."""
    monkeypatch.setattr(cache, "PER_SHARD", 10)
    path = made(config, tmp_path, [*CAPTIONS, LONG, CAPTIONS[0], "", " a "])
    found = cache.TextCache.open(path, config.text)
    distinct = sorted({*CAPTIONS, LONG.strip(), *config.train.sample_prompts})
    assert len(found) == len(distinct)
    assert found.index["shards"] == -(-len(distinct) // 10) == len(found.index["counts"])
    encoder = text.load_encoder(config.text)
    tokens, mask = encoder.tokenize([*distinct, ""])
    wanted = np.asarray(encoder.encode(tokens, mask))
    bits, valid = found.tokenize([*distinct, ""])
    np.testing.assert_array_equal(valid, mask)
    values = np.asarray(found.encode(bits, valid))
    np.testing.assert_allclose(values, wanted, rtol=2**-8, atol=1e-5)
    assert np.abs(values - wanted).max() > 1e-4  # it is rounded
    stored = sum(os.path.getsize(os.path.join(path, f)) for f in os.listdir(path) if f.endswith("record"))
    assert mask.sum() * 128 * 2 < stored < 1.1 * mask.sum() * 128 * 2 + 65536 * found.index["shards"] * 2
    assert f"{len(distinct)} captions" in capsys.readouterr().out


def test_small_order_and_repetition_change_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PER_SHARD", 10)
    first = made(config, tmp_path, name="first")
    second = made(config, tmp_path, [*CAPTIONS[::-1], *CAPTIONS[:5]], name="second")
    assert contents(first) == contents(second)


@contextlib.contextmanager
def stopping(shards):
    """The block is interrupted before it makes another shard than this many; yields the numbers of those made."""
    write, count = cache.write_shard, []

    def counted(*args, **kwargs):
        if len(count) == shards:
            raise KeyboardInterrupt
        count.append(args[1])
        write(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "write_shard", counted)
        yield count


def test_small_stopped_between_shards_it_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PER_SHARD", 10)
    whole = contents(made(config, tmp_path, name="whole"))
    with stopping(2) as count:
        made(config, tmp_path)
    with pytest.raises(UserError, match="not a complete text cache: run the command that began it again"):
        cache.TextCache.open(str(tmp_path / "cache"), config.text)
    with pytest.raises(UserError, match="is missing, and 2 more: run the same command again"):
        cache.finish(str(tmp_path / "cache"))
    (tmp_path / "cache" / "texts-00003-of-00005.array_record.tmp0123").write_text("what a killed process has left")
    write = cache.write_shard
    monkeypatch.setattr(cache, "write_shard", lambda *a, **k: (count.append(a[1]), write(*a, **k)))
    assert contents(made(config, tmp_path)) == whole
    assert sorted(count) == list(range(5))  # none was made twice


def test_training_reads_the_cache_and_runs_no_encoder(config, tmp_path, shared_programs):
    config.data.text_cache = made(config, tmp_path, [shapes.caption(a) for a in shapes.all_attributes()])
    config.text.checkpoint = None  # the encoder is not there
    config.update_from_flattened_dict(
        {**light_network.OPTIONS, "train.steps": 2, "train.log_every": 2, "train.sample_every": 0}
    )
    state = loop.train(config, str(tmp_path / "workdir"), devices=jax.devices()[:1])
    assert int(state.step) == 2 and int(state.skipped) == 0


def test_small_batches_from_readers_in_processes(config, tmp_path):
    """A cache pickles as its path."""
    found = cache.TextCache.open(made(config, tmp_path), config.text)
    found.tokenize(["a"])
    other = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(other.tokenize(CAPTIONS)[0], found.tokenize(CAPTIONS)[0])


def test_images_are_embedded_from_the_cache_too(config, tmp_path):
    config.data.num_images = 2
    config.data.text_cache = made(config, tmp_path, [shapes.caption(a) for a in shapes.all_attributes()])
    texts = loop.load_texts(config, None)
    batch = next(loop.make_data(config, texts))
    assert batch["text"].shape == (config.train.batch_size, 64, 128)
    assert batch["image_text"].shape == (config.train.batch_size, 2, 64, 128)
    found = step.prepare(texts.module, texts.params, batch)
    config.data.text_cache = ""
    encoder = loop.load_texts(config, None)
    wanted = step.prepare(encoder.module, encoder.params, next(loop.make_data(config, encoder)))
    for name in ("text", "image_text"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=2**-8, atol=1e-5)


def test_small_caches_of_other_encoders_are_refused(config, tmp_path):
    path = made(config, tmp_path)
    weights = files.random_weights({name: config.text[name] for name in text.SIZES})
    files.save_file(weights, tmp_path / "other.safetensors")
    other = config.copy_and_resolve_references()
    other.text.checkpoint = str(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="was made by another encoder or tokenizer"):
        cache.TextCache.open(path, other.text)
    with pytest.raises(UserError, match="is a cache with another encoder or tokenizer: choose another folder"):
        made(other, tmp_path)
    with pytest.raises(UserError, match="is a cache with another set of captions: choose another folder"):
        made(config, tmp_path, CAPTIONS[1:])
    other.text.checkpoint = None  # a machine that has the cache alone
    assert len(cache.TextCache.open(path, other.text)) == len(CAPTIONS) + 4
    other.text.dim = 64
    with pytest.raises(UserError, match="has dim 128, and config.text.dim = 64"):
        cache.TextCache.open(path, other.text)


def test_small_a_caption_that_is_not_there_is_named(config, tmp_path):
    found = cache.TextCache.open(made(config, tmp_path), config.text)
    for caption in ("a purple star", "zzz", "0"):
        with pytest.raises(UserError, match=f"no embedding of '{caption}'"):
            found.tokenize(["a", caption])


def test_a_cache_in_a_bucket_is_the_same_files(config, tmp_path, monkeypatch, capsys):
    """Captions from there too; stopped, it goes on; copied to this machine, it is read."""
    monkeypatch.setattr(cache, "PER_SHARD", 10)
    wanted = contents(made(config, tmp_path))
    with fake_bucket.bucket() as objects:
        objects["captions.txt"] = (tmp_path / "captions.txt").read_bytes()
        run = ("gs://bucket/captions.txt", "gs://bucket/texts/small")
        with stopping(2):
            cache.encode_captions(config, *run)
        cache.encode_captions(config, *run)
        objects.pop("captions.txt")
        assert {name.removeprefix("texts/small/"): data for name, data in objects.items()} == wanted
        assert f"gs://bucket/texts/small: {len(CAPTIONS) + 4} captions" in capsys.readouterr().out
        with pytest.raises(UserError, match="gs://bucket/texts/small is in a bucket, .* copy it"):
            cache.TextCache.open("gs://bucket/texts/small", config.text)
        with pytest.raises(UserError, match="--out=gs://bucket/texts is a folder with other files"):
            cache.encode_captions(config, str(tmp_path / "captions.txt"), "gs://bucket/texts")


def test_small_captions_are_found_whatever_their_spaces(config, tmp_path):
    """As a data set has them: encoded in training, and in the cache, as one line."""
    found = cache.TextCache.open(made(config, tmp_path, ["  a red \t star "]), config.text)
    bits, mask = found.tokenize(["a red star", " a red\nstar\n", " "])
    assert mask[0].sum() == 11 and not mask[2].any()
    np.testing.assert_array_equal(bits[0], bits[1])

    class Source:
        def __len__(self):
            return 1

        def read(self, index, rng):
            return {"video": np.zeros((1, 2, 2, 3), np.uint8), "caption": " a red\nstar\n"}

    iterator = loop.make_iterator(
        Source(), batch_size=1, seed=0, tokenize=text.load_encoder(config.text).tokenizer, text_length=64,
    )  # fmt: skip
    wanted = text.load_encoder(config.text).tokenize(["a red star"])[0]
    np.testing.assert_array_equal(next(iterator)["tokens"], wanted)


def test_small_many_shards_are_not_open_at_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PER_SHARD", 4)
    monkeypatch.setattr(cache, "OPEN", 3)
    found = cache.TextCache.open(made(config, tmp_path), config.text)
    assert found.index["shards"] > 6
    first = found.tokenize(CAPTIONS)[0]
    assert len(found._readers) == 3
    np.testing.assert_array_equal(found.tokenize(CAPTIONS)[0], first)


def empty(path):
    path.write_bytes(b"")


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_keys(path):
    np.save(path, np.load(path)[1:])


@pytest.mark.parametrize(
    ("damage", "end", "message"),
    [
        (os.remove, "record", "00001-of-00005.array_record is missing: copy the whole cache again"),
        (os.remove, "npy", "00001-of-00005.keys.npy is missing: copy the whole cache again"),
        (empty, "record", "array_record (cannot be read|has 0 records).*: copy the whole cache again"),
        (empty, "npy", "keys.npy cannot be read .*: copy the whole cache again"),
        (half, "record", "(cannot be read|records, and).*: copy the whole cache again"),
        (other_keys, "npy", r"has \d+ records, and \d+ keys: copy the whole cache again"),
    ],
)
def test_small_shards_that_are_not_whole_are_named(damage, end, message, config, tmp_path, monkeypatch):
    """When the cache is opened, when the shard is read, and when its making is to be finished."""
    monkeypatch.setattr(cache, "PER_SHARD", 10)
    path = made(config, tmp_path)
    damage(next((tmp_path / "cache").glob(f"*-00001-of-*{end}")))
    with pytest.raises(UserError, match=message):
        cache.TextCache.open(path, config.text).tokenize(CAPTIONS)
    with pytest.raises(UserError, match=f"{message}|is missing, and 0 more|No such file.*: copy the whole cache"):
        cache.finish(path)
    whole = contents(made(config, tmp_path, name="another"))
    assert contents(made(config, tmp_path)) == whole


def test_two_processes_make_the_same_files(config, tmp_path):
    """Each some of the shards; and with folders of their own they are told."""
    captions = tmp_path / "captions.txt"
    text_speed.write_captions(captions, 9000)
    command = [sys.executable, "-m", "ivideo.main", "--mode=encode_text", "--config=configs/base.py:demo"]
    env = {**os.environ, "XLA_FLAGS": ""}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # as in test_hosts

    def run(outs):
        address = f"127.0.0.1:{test_hosts.free_port()}"
        several = [f"--coordinator={address}", "--num_processes=2"]
        ends = [[f"--captions={captions}", f"--out={tmp_path / out}"] for out in outs]
        processes = [
            subprocess.Popen([*command, *several, f"--process_id={i}", *end], cwd=test_hosts.ROOT, env=env, stderr=-1)
            for i, end in enumerate(ends)
        ]
        errors = [process.communicate(timeout=200)[1].decode() for process in processes]
        return [process.returncode for process in processes], errors

    codes, errors = run(["two", "two"])
    assert codes == [0, 0], errors
    text_speed.finished(text_speed.begin(captions, tmp_path / "one"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    codes, errors = run(["mine", "yours"])
    assert codes == [2, 2], errors
    assert all("is not the same folder for all processes: 1 of 2" in said for said in errors)
    assert not (tmp_path / "mine").exists()


BAD = [
    (b"a\nbroken \xff\xfe caption\n", "line 2: .*broken.* is not UTF-8"),
    (b"", "has no text: write one per line"),
    (b"\n \n", "has no text"),
    ("\ufeff\n".encode(), "has no text"),
    ("a red star\n".encode("utf-16-le"), "has NUL bytes: convert the file to UTF-8"),
    (None, "cannot be read .No such file"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_small_bad_captions_are_named_and_nothing_is_written(config, tmp_path, data, message):
    path = tmp_path / "captions.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        cache.encode_captions(config, str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_small_other_files_are_left_alone(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is a folder with other files"):
        made(config, tmp_path, name="out")
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


def test_small_beam_makes_the_same_cache(config, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    from ivideo.text import beam

    monkeypatch.setattr(cache, "PER_SHARD", 10)
    wanted = contents(made(config, tmp_path, name="plain"))
    shards = sum(name.endswith("record") for name in wanted)
    for part in (0, 1):
        (tmp_path / f"part{part}.txt").write_text("\n".join([*CAPTIONS[part::2], CAPTIONS[0], ""]))
    options = ["--runner=DirectRunner"]
    beam.encode_captions(config, str(tmp_path / "part*.txt"), str(tmp_path / "out"), shards=shards, options=options)
    found = contents(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(found[name] == wanted[name] for name in wanted if name.endswith("keys.npy"))
    # On one device, and there on eight: the last bit may differ
    ours, theirs = (cache.TextCache.open(str(tmp_path / name), config.text) for name in ("out", "plain"))
    texts = [*CAPTIONS, *config.train.sample_prompts]
    assert len(ours) == len(texts)
    values = [np.asarray(one.encode(*one.tokenize(texts))) for one in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=2**-7, atol=1e-5)
    with pytest.raises(UserError, match="is a cache with another number of shards and set of captions"):
        beam.encode_captions(config, str(tmp_path / "part0.txt"), str(tmp_path / "out"), shards=2, options=options)
    (tmp_path / "part2.txt").write_text("a new caption")
    with pytest.raises(Exception, match="is a cache with another set of captions: choose another folder"):
        beam.encode_captions(config, str(tmp_path / "part*.txt"), str(tmp_path / "out"), shards=shards, options=options)
    for pattern, runner, message in (
        ("part*.txt", "Nope", "Beam rejects --beam=--runner=Nope"),
        ("prat*.txt", "DirectRunner", "matches no file: give a pattern"),
    ):
        with pytest.raises(UserError, match=message):
            beam.encode_captions(config, str(tmp_path / pattern), str(tmp_path / "new"), shards=2,
                                 options=[f"--runner={runner}"])  # fmt: skip
        assert not (tmp_path / "new").exists()


def test_small_beam_works_in_a_bucket(config, tmp_path, monkeypatch):
    """Encoder and cache there; the captions' files are Beam's to read."""
    pytest.importorskip("apache_beam")
    import importlib.resources

    from ivideo.text import beam

    monkeypatch.setattr(cache, "PER_SHARD", 10)
    wanted = contents(made(config, tmp_path))
    shards = sum(name.endswith("record") for name in wanted)
    with fake_bucket.bucket() as objects:
        objects["t5/text.safetensors"] = (importlib.resources.files("ivideo") / text.SHIPPED).read_bytes()
        config.text.checkpoint = "gs://bucket/t5/text.safetensors"
        arguments = (config, str(tmp_path / "captions.txt"), "gs://bucket/texts")
        beam.encode_captions(*arguments, shards=shards, options=["--runner=DirectRunner"])
        found = {name.removeprefix("texts/"): data for name, data in objects.items() if name.startswith("texts/")}
    assert found.keys() == wanted.keys()
    assert all(found[name] == wanted[name] for name in wanted if name.endswith("keys.npy"))
    config.text.checkpoint = ""  # the same, in the package
    (tmp_path / "copied").mkdir()
    for name, data in found.items():
        (tmp_path / "copied" / name).write_bytes(data)
    assert len(cache.TextCache.open(str(tmp_path / "copied"), config.text)) == len(CAPTIONS) + 4


def test_killed_twice_it_is_the_same_file_for_file(tmp_path):
    """The command, killed without notice while it writes, and run again."""
    captions = tmp_path / "captions.txt"
    text_speed.write_captions(captions, 25_000)
    text_speed.finished(text_speed.begin(captions, tmp_path / "whole"))
    text_speed.killed(captions, tmp_path / "killed", kills=2, rng=random.Random(0))
    assert text_speed.contents(tmp_path / "killed") == text_speed.contents(tmp_path / "whole")

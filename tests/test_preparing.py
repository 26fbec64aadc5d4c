"""Mode prepare_data: what it finds, keeps and leaves out, and the set that it writes."""

import collections
import csv
import functools
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tarfile
import time

import collections_of_clips as clips
import ending_tasks
import numpy as np
import PIL.Image
import pyarrow
import pytest
import video_files as files
from pyarrow import parquet

from configs import base
from ivideo import main
from ivideo.data import check, pipeline, sources, video_io
from ivideo.data.images import read_image
from ivideo.data.preparing import duplicates, inputs, measuring, pool, prepare, records
from ivideo.data.preparing.choosing import REASONS
from ivideo.errors import UserError
from ivideo.text import cache
from ivideo.training import loop

SOME = ("empty", "half of it", "overwritten", "short", "slow", "still", "cut", "tiny", "strip", "copy", "no caption")


def here(function, tasks):
    """Runs tasks in this process."""
    return ((task, function(task)) for task in tasks)


def prepared(path, out, *, run=here, is_too_long=None, **options):
    config = base.get_config("small")
    config.update_from_flattened_dict({f"prepare.{name}": value for name, value in options.items()})
    prepare.prepare(config, str(path), str(out), run=run, is_too_long=is_too_long)
    return out


def read_set(out):
    """The records of a prepared set, by name."""
    import tensorflow_datasets as tfds

    found = tfds.builder_from_directory(str(out)).as_data_source(split="train")
    return {record["name"].decode(): record for record in found}


def quarantine(out):
    lines = (out / prepare.QUARANTINE).read_text(encoding="utf-8").splitlines()
    return {line["name"]: line["reason"] for line in map(json.loads, lines)}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of one clip of each kind and some broken ones, and what is expected of each."""
    folder = tmp_path_factory.mktemp("clips")
    return folder, clips.write_folder(folder, count=len(clips.KINDS), broken=SOME)


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    return prepared(folder[0], tmp_path_factory.mktemp("sets") / "folder")


def check_set(out, folder, expected):
    """The set has the good files, whole and as players show them, and the quarantine the others with their reasons."""
    found = read_set(out)
    assert found.keys() == {name for name, clip in expected.items() if isinstance(clip, clips.Clip)}
    assert quarantine(out) == {name: reason for name, reason in expected.items() if isinstance(reason, str)}
    for name, record in found.items():
        clip = expected[name]
        assert record["video"] == clip.data
        assert (record["frames"], record["height"], record["width"]) == (clip.frames, clip.height, clip.width), name
        video = video_io.read_video(record["video"])[0]
        assert video.shape[:3] == (clip.frames, clip.height, clip.width) and clips.is_upright(video), name


def test_every_kind_of_file_is_read_back_and_every_broken_one_named(out, folder):
    check_set(out, *folder)
    captions = {f"scene {number}" for number in range(len(clips.KINDS))}
    assert {text.decode() for record in read_set(out).values() for text in record["captions"]} == captions
    lines = (out / records.CAPTIONS).read_text(encoding="utf-8").splitlines()
    assert set(lines) == captions and len(lines) == len(captions)


def test_the_prepared_set_is_what_training_reads(out):
    config = base.get_config("small")
    config.update_from_flattened_dict({"data.source": "tfds", "data.dir": str(out)})
    source = loop.data_source(config)
    check.check_data(source)
    for index in range(len(source)):
        found = source.read(index, np.random.default_rng(0))
        assert found["video"].shape == (4, 8, 8, 3) and found["caption"].startswith("scene ")


def write_table(path, rows):
    """A table of rows (file, caption), in the form and with the column names of one of the tools that write such."""
    kind = path.suffix
    if kind in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, delimiter={".csv": ",", ".tsv": "\t"}[kind])
            writer.writerows([("path", "text", "num_frames"), *((*row, 1) for row in rows)])
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps({"file_name": n, "caption": c}) + "\n" for n, c in rows))
    elif kind == ".json":
        path.write_text(json.dumps([{"path": n, "cap": [c, "other"]} for n, c in rows]))
    else:
        parquet.write_table(pyarrow.table({"video": [n for n, _ in rows], "text": [c for _, c in rows]}), path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_small_tables_name_files_and_captions(folder, kind, tmp_path):
    """A table is read alone, or as the only one of a folder; rows of one file are its several captions."""
    (tmp_path / "videos").symlink_to(folder[0])
    wanted = {name: clip for name, clip in folder[1].items() if isinstance(clip, clips.Clip)}
    write_table(tmp_path / f"table.{kind}", [(name, f"scene {name}") for name in wanted])
    for given in (tmp_path / f"table.{kind}", tmp_path):
        items, rejected = inputs.find(str(given), "video")
        assert not rejected and [item.name for item in items] == sorted(wanted)
        for item in items:
            assert item.read() == wanted[item.name].data
            assert item.captions == (f"scene {item.name}",) + (("other",) if kind == "json" else ())


def add_to_tar(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_small_tars_are_read_at_offsets(tmp_path):
    datas = [clips.good(number, "h264").data for number in range(4)]
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05}.tar", "w") as tar:
            for k in range(2):
                add_to_tar(tar, f"{k:03}.mp4", datas[2 * shard + k])
                text = b"plain" if k else json.dumps({"caption": "of an object", "url": "x"}).encode()
                add_to_tar(tar, f"{k:03}.{'txt' if k else 'json'}", text)
    for path in (tmp_path, tmp_path / "*.tar"):
        items, rejected = inputs.find(str(path), "video")
        assert [item.read() for item in items] == datas and not rejected
        assert [item.name for item in items] == [f"{s:05}.tar/{k:03}.mp4" for s in range(2) for k in range(2)]
        assert [item.captions for item in items] == [("of an object",), ("plain",)] * 2
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[: len(datas[2]) + 2000])
    items, rejected = inputs.find(str(tmp_path / "00001.tar"), "video")
    assert [one.reason for one in rejected] == ["tar"] and items[0].read() == datas[2]


def test_small_lists_of_videos_and_prompts_belong_together_line_by_line(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(b"x")
    (tmp_path / "videos.txt").write_text("videos/b.mp4\na.mp4\nmissing.mp4\n")
    (tmp_path / "prompt.txt").write_text("first\nsecond\nthird\n")
    items, rejected = inputs.find(str(tmp_path), "video")
    assert [(item.name, item.captions) for item in items] == [("a.mp4", ("second",)), ("videos/b.mp4", ("first",))]
    assert [(one.name, one.reason) for one in rejected] == [("missing.mp4", "missing")]
    (tmp_path / "prompt.txt").write_text("first\n")
    with pytest.raises(UserError, match=r"videos.txt has 3 lines and prompt.txt has 1"):
        inputs.find(str(tmp_path), "video")


def test_small_bad_rows_of_a_table_are_listed(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    lines = ['{"path": "a.mp4", "text": "fine"}', "{", "[]", '{"text": "no file"}', '{"path": "b.mp4", "text": "x"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    items, rejected = inputs.find(str(tmp_path / "t.jsonl"), "video")
    assert [item.captions for item in items] == [("fine",)]
    assert collections.Counter(one.reason for one in rejected) == {"row": 3, "missing": 1}
    (tmp_path / "t.csv").write_text("url,words\nx,y\n")
    with pytest.raises(UserError, match="has the columns url, words: expected one of video, path,"):
        inputs.find(str(tmp_path / "t.csv"), "video")


def test_small_captions_from_labels(tmp_path):
    for label, name in (("ApplyEyeMakeup", "v_1.avi"), ("ice_dancing", "v_2.avi")):
        (tmp_path / label).mkdir()
        (tmp_path / label / name).write_bytes(b"x")
    (tmp_path / "ice_dancing" / "v_2.txt").write_text("its own")
    (tmp_path / "._v_1.avi").write_bytes(b"macOS's attributes")
    items, _ = inputs.find(str(tmp_path), "video", label_template="a person does {label}")
    assert [item.captions for item in items] == [("a person does apply eye makeup",), ("its own",)]
    items, _ = inputs.find(str(tmp_path), "video", label_template="{label} | a video of {label}")
    assert [item.captions for item in items] == [("apply eye makeup", "a video of apply eye makeup"), ("its own",)]


def test_small_captions_of_a_set_are_read_for_the_text_encoder(tmp_path):
    one_clip(tmp_path / "in")
    (tmp_path / "in" / "t.csv").write_text("path,text\na.mp4,one\na.mp4,two\n")
    out = prepared(tmp_path / "in", tmp_path / "out")
    assert cache.read_captions(str(out)) == ["one", "two"]
    (out / records.CAPTIONS).unlink()
    with pytest.raises(UserError, match="is a prepared set without captions.txt: mode prepare_data writes it"):
        cache.read_captions(str(out))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "has no videos"),
        ({"a.png": b""}, "it has images, which --config.prepare.media=image prepares"),
        ({"a.csv": b"path,text\n", "b.csv": b"path,text\nx,y\n", "c.csv": b"video,caption\nx,y\n"}, "has 2 tables"),
        (None, "does not exist"),
    ],
)
def test_small_inputs_without_files_are_refused(made, message, tmp_path):
    for name, data in (made or {}).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        inputs.find(str(tmp_path if made is not None else tmp_path / "none"), "video")


def one_clip(folder, video=None, caption="a clip"):
    folder.mkdir(exist_ok=True)
    (folder / "a.mp4").write_bytes(clips.h264(clips.texture(0) if video is None else video, 24))
    (folder / "a.txt").write_text(caption)
    return folder


def test_small_nothing_is_overwritten_and_a_finished_set_is_kept(tmp_path, capsys):
    folder, out = one_clip(tmp_path / "in"), tmp_path / "out"
    prepared(folder, out)
    before = contents(out)
    prepared(folder, out)
    assert "is finished already" in capsys.readouterr().out and contents(out) == before
    with pytest.raises(UserError, match="was begun with other limits: choose another folder"):
        prepared(folder, out, min_seconds=0.5)
    (folder / "a.txt").write_text("another caption")
    with pytest.raises(UserError, match="was begun with other files"):
        prepared(folder, out)
    with pytest.raises(UserError, match="holds something else"):
        prepared(folder, folder)


def test_small_a_set_without_files_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match=r"none of 1 videos is left: 1 caption. See .*report.html"):
        prepared(one_clip(tmp_path / "in", caption=""), tmp_path / "out")


def test_small_a_file_that_changes_in_between_is_named(tmp_path):
    folder = one_clip(tmp_path / "in")

    def run(function, tasks):
        yield from here(function, tasks)
        if function is prepare.measure:
            one_clip(folder, clips.texture(1))

    with pytest.raises(UserError, match=r"a.mp4 has changed since it was measured"):
        prepared(folder, tmp_path / "out", run=run)


def test_small_long_captions_are_left_out_by_config(tmp_path):
    (tmp_path / "in").mkdir()
    rows = [{"path": "a.mp4", "captions": ["short", "a longer one"]}]
    one_clip(tmp_path / "in")
    (tmp_path / "in" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = prepared(tmp_path / "in", tmp_path / "out", is_too_long=lambda caption: len(caption) > 6)
    assert [list(record["captions"]) for record in read_set(out).values()] == [[b"short"]]


def test_small_one_of_several_captions_is_drawn_at_each_read(tmp_path):
    one_clip(tmp_path / "in")
    (tmp_path / "in" / "t.csv").write_text("path,text\na.mp4,one\na.mp4,two\n")
    out = prepared(tmp_path / "in", tmp_path / "out")
    source = sources.TFDSSource(out, frames=4, height=8, width=8, fps=3)
    drawn = [source.read(0, np.random.default_rng(seed))["caption"] for seed in range(20)]
    assert 4 < drawn.count("one") < 16 and set(drawn) == {"one", "two"}


def test_small_black_bars_are_found_and_cropped_when_the_set_is_read(tmp_path):
    # Gray, since the colour of lossy files is coarser than their light
    video = clips.texture(0, height=40, width=64).max(axis=-1, keepdims=True).repeat(3, axis=-1)
    framed = np.pad(video, ((0, 0), (12, 12), (0, 0), (0, 0)))
    out = prepared(one_clip(tmp_path / "in", framed), tmp_path / "out")
    (record,) = read_set(out).values()
    assert record["box"].tolist() == [12, 0, 40, 64] and (record["height"], record["width"]) == (64, 64)
    options = dict(frames=1, height=40, width=64, fps=24)
    shown = sources.TFDSSource(out, **options).read(0, np.random.default_rng(0))["video"][0]
    assert min(np.abs(shown.astype(int) - frame).mean() for frame in video) < 6
    kept = prepared(tmp_path / "in", tmp_path / "kept", crop_bars=False)
    assert not next(iter(read_set(kept).values()))["box"].any()


def test_small_dark_scenes_and_thin_edges_have_no_bars():
    from ivideo.data.preparing.bars import Bars

    def box(picture):
        bars = Bars(*picture.shape[:2])
        bars.add(picture)
        return bars.box()

    lit = np.full((100, 100, 3), 90, np.uint8)
    dark = np.zeros_like(lit)
    dark[40:60, 40:60] = 200
    assert box(dark) == box(lit) == [0] * 4
    lit[:1] = 0
    assert box(lit) == [0] * 4
    lit[:, :20] = lit[:, 80:] = 16
    assert box(lit) == [0, 20, 100, 60]


def test_small_duplicates_are_those_of_comparing_all_pairs():
    rng = random.Random(0)
    hashes = [rng.getrandbits(192) for _ in range(60)]
    for value in hashes[:40]:  # copies at distances 0 to 20
        flips = rng.sample(range(192), rng.randrange(21))
        hashes.append(value ^ sum(1 << bit for bit in flips))
    rows = [
        {"hash": f"{h:048x}", "height": 1, "width": 1 + i % 3, "frames": i % 5, "bytes": 1}
        for i, h in enumerate(hashes)
    ]
    for bits in (0, 7, 16):
        order = sorted(range(100), key=lambda i: (-rows[i]["width"], -rows[i]["frames"], i))
        kept, wanted = [], set()
        for i in order:
            near = any((hashes[i] ^ hashes[j]).bit_count() <= bits for j in kept)
            wanted.add(i) if near else kept.append(i)
        found = duplicates.duplicates(rows, bits)
        assert set(found) == wanted and set(found.values()) <= set(kept)
    assert duplicates.duplicates(rows, -1) == {}


def test_recompressed_and_smaller_copies_have_close_hashes():
    bits = lambda data: int(measuring.measure_video(data)["hash"], 16)  # noqa: E731
    originals = []
    for seed in range(4):
        video = clips.texture(seed, height=144, width=256)
        half = video.reshape(30, 72, 2, 128, 2, 3).mean((2, 4)).astype(np.uint8)
        originals.append(bits(files.coded(video, options={"crf": "18"})))
        for copy in (files.coded(video, options={"crf": "35"}), files.coded(half, options={"crf": "28"})):
            assert (bits(copy) ^ originals[-1]).bit_count() <= 16
    assert min((a ^ b).bit_count() for a in originals for b in originals if a != b) > 40


def test_a_task_that_ends_its_process_is_reported_and_the_others_are_done():
    ended = {3: pool.Ended(1), 5: pool.Ended(-signal.SIGALRM)}
    found = dict(pool.run(ending_tasks.crash_or_hang, list(range(8)), processes=2))
    assert found == {k: 10 * k for k in range(8)} | ended
    assert (ended[3].timed_out, ended[5].timed_out) == (False, True)


def test_an_error_in_a_process_of_its_own_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(pool._alone(ending_tasks.divide, [0], processes=1))


@pytest.mark.parametrize(("code", "reason"), [(-signal.SIGSEGV, "crashed"), (-signal.SIGALRM, "timeout")])
def test_small_files_that_crash_the_decoder_are_left_out(tmp_path, code, reason):
    """One of a task's files does; the task's others are measured one by one."""
    folder = one_clip(tmp_path / "in")
    (folder / "b.mp4").write_bytes(b"crash")
    (folder / "b.txt").write_text("crashes")

    def run(function, tasks):
        for task in tasks:
            crashes = function is prepare.measure and any(item.name == "b.mp4" for _, item in task.items)
            yield task, pool.Ended(code) if crashes else function(task)

    out = prepared(folder, tmp_path / "out", run=run)
    assert read_set(out).keys() == {"a.mp4"} and quarantine(out) == {"b.mp4": reason}


def test_a_file_that_takes_too_long_is_left_out(tmp_path):
    """Its process is ended while the decoder works, and the file is in the report, without a picture."""
    folder, out = one_clip(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(UserError, match="none of 1 videos is left: 1 timeout"):
        prepared(folder, out, run=functools.partial(pool.run, processes=1), timeout=0.001)
    assert quarantine(out) == {"a.mp4": "timeout"}
    assert "not read after 0.001 seconds (config.prepare.timeout)" in (out / prepare.QUARANTINE).read_text()
    assert "<img" not in (out / prepare.REPORT).read_text(encoding="utf-8")


def test_small_a_pipe_is_not_waited_for(tmp_path):
    """Reading one that nothing writes to takes forever."""
    folder = one_clip(tmp_path / "in")
    os.mkfifo(folder / "b.mp4")
    (folder / "b.txt").write_text("a pipe")
    out = prepared(folder, tmp_path / "out")
    assert read_set(out).keys() == {"a.mp4"} and quarantine(out) == {"b.mp4": "unreadable"}


def test_small_an_interrupted_preparation_continues(tmp_path, monkeypatch):
    """Whatever was written when it stopped, the result is the same, byte for byte."""
    monkeypatch.setattr(prepare, "PER_TASK", 2)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.mp4").write_bytes(clips.good(number, "h264").data)
        (folder / f"{number}.txt").write_text(f"clip {number}")
    whole = contents(prepared(folder, tmp_path / "whole"))
    measured = []

    class Stop(Exception):
        pass

    def stopping(function, tasks):
        for count, task in enumerate(tasks):
            if count == 1:
                raise Stop
            measured.append(task)
            yield task, function(task)

    out = tmp_path / "out"
    for _ in range(8):
        try:
            prepared(folder, out, run=stopping)
            break
        except Stop:
            assert not (out / records.INFO).exists()
    paths = [task.path for task in measured]
    assert contents(out) == whole and len(paths) == len(set(paths)) == 4  # three of measures, one shard


def test_small_the_report_shows_the_set_and_ten_of_each_reason(out, folder):
    page = (out / prepare.REPORT).read_text(encoding="utf-8")
    assert f"<h1>{len(clips.KINDS)} videos, {len(SOME)} left out</h1>" in page
    for reason in set(quarantine(out).values()):
        assert f"Left out: {reason}, {REASONS[reason]}" in page
    assert page.count("<svg") == 7 and page.count("<img") >= len(clips.KINDS)
    for name in quarantine(out):
        assert name in page


def test_small_a_video_is_divided_at_its_cuts(tmp_path):
    """Each shot that is long enough becomes a clip with the same frames at the same times."""
    parts = [clips.texture(0, count=30), 255 - clips.texture(1, count=12), clips.texture(2, count=41)]
    folder = one_clip(tmp_path / "in", np.concatenate(parts))
    assert quarantine_of_failure(folder, tmp_path / "whole") == {"a.mp4": "jump"}
    out = prepared(folder, tmp_path / "out", split_shots=True)
    assert quarantine(out) == {"a.mp4#00001": "short"}
    found = read_set(out)
    assert found.keys() == {"a.mp4#00000", "a.mp4#00002"}
    for name, part in (("a.mp4#00000", parts[0]), ("a.mp4#00002", parts[2])):
        video, rate = video_io.read_video(found[name]["video"])
        assert (len(video), rate) == (len(part), 24) and np.abs(video.astype(int) - part).mean() < 6
        assert found[name]["seconds"] == pytest.approx(len(part) / 24, abs=1e-3)
        assert list(found[name]["captions"]) == [b"a clip"]
    assert not (out / prepare.WORK).exists()
    assert contents(prepared(folder, tmp_path / "again", split_shots=True)) == contents(out)


def quarantine_of_failure(folder, out):
    with pytest.raises(UserError, match="none of 1 videos is left"):
        prepared(folder, out)
    return quarantine(out)


def jpeg(seed):
    return measuring.thumbnail(clips.texture(seed, count=1)[0], height=48)


def test_small_images_are_prepared_and_packed_behind_videos(tmp_path):
    """Damaged ones are left out, those turned by their EXIF data are upright, and none is a frame of a video."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(jpeg(50 + number))
    image = PIL.Image.fromarray(np.rot90(clips.texture(56, count=1)[0]))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter to the right
    image.save(folder / "6.png", exif=exif)
    (folder / "7.jpg").write_bytes(jpeg(57)[:600])
    (folder / "8.jpg").write_bytes(jpeg(50))
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"image {path.stem}")
    images = prepared(folder, tmp_path / "image_set", media="image")
    assert read_set(images).keys() == {*(f"{k}.jpg" for k in range(1, 6)), "0.jpg", "6.png"}
    assert quarantine(images) == {"7.jpg": "unreadable", "8.jpg": "duplicate"}
    record = read_set(images)["6.png"]
    assert (record["height"], record["width"]) == (48, 64)
    assert clips.is_upright(read_image(record["image"])[None])

    source = sources.ImageSource(images, height=24, width=32, crop=sources.Crop(4, 16, 16))
    found = source.image(0, np.random.default_rng(0))
    assert found["image"].shape == (16, 16, 3) and found["caption"] == "image 0"
    clip_set = prepared(one_clip(tmp_path / "in"), tmp_path / "clip_set")
    config = base.get_config("small")
    config.update_from_flattened_dict(
        {"data.source": "tfds", "data.dir": str(clip_set), "data.image_dir": str(images), "data.num_images": 4}
    )
    source = loop.data_source(config)
    dataset = pipeline.make_dataset(
        source, images=loop.image_source(config), seed=0, num_images=4, tokenize=lambda texts, length: tokens(texts),
        text_length=1,
    )  # fmt: skip
    drawn = [dataset[k] for k in range(6)]
    numbers = np.array([element["image_tokens"][:, 0] for element in drawn])
    assert set(numbers.ravel()) == set(range(7)) and all(len(set(row)) == 4 for row in numbers)
    assert all(element["tokens"] == -1 and element["images"].shape == (4, 8, 8, 3) for element in drawn)


def tokens(texts):
    """The number of an image, from its caption; -1 for a clip."""
    numbers = [int(text.split()[1]) if text.startswith("image") else -1 for text in texts]
    return np.array(numbers)[:, None], np.ones((len(texts), 1), bool)


def test_small_an_unreadable_image_is_replaced_and_named(tmp_path, caplog):
    class Clips:
        def __len__(self):
            return 1

        def read(self, index, rng):
            return {"video": np.zeros((1, 2, 2, 3), np.uint8), "caption": "x"}

    class Images:
        def __len__(self):
            return 3

        def image(self, index, rng):
            self.check(index)
            return {"image": np.full((2, 2, 3), index, np.uint8), "caption": "x"}

        def check(self, index):
            if index == 1:
                raise video_io.VideoError("image 1 is damaged.")

    options = dict(tokenize=lambda texts, length: tokens(texts), text_length=1, images=Images(), num_images=2)
    batches = pipeline.make_iterator(Clips(), batch_size=4, seed=0, max_unreadable=1, num_threads=0, **options)
    assert set(np.unique(next(batches)["images"])) == {0, 2}
    (said,) = [record.getMessage() for record in caplog.records if record.name == "ivideo"]
    assert said.startswith("image 1 is damaged. Another clip is used in its place (1 unreadable")


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory):
    """A folder of 200 clips, of which 20 are broken in different ways, the set made of it, and what is expected."""
    folder = tmp_path_factory.mktemp("many")
    expected = clips.write_folder(folder, count=180, broken=clips.BROKEN)
    return folder, prepared(folder, tmp_path_factory.mktemp("sets") / "many"), expected


def test_a_folder_of_200_clips_of_which_20_are_broken(two_hundred):
    folder, out, expected = two_hundred
    assert len(expected) == 200 and len(quarantine(out)) == 20
    check_set(out, folder, expected)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "tar"])
def test_the_same_clips_in_tables_and_tars(two_hundred, kind, tmp_path):
    """The good files and the broken ones that have a caption."""
    folder, out, expected = two_hundred
    names = [name for name in sorted(expected) if expected[name] != "caption"]
    captions = {name: (folder / name).with_suffix(".txt").read_text(encoding="utf-8").strip() for name in names}
    (tmp_path / "in").mkdir()
    if kind == "tar":
        for shard in range(3):
            with tarfile.open(tmp_path / "in" / f"{shard:05}.tar", "w") as tar:
                for number, name in list(enumerate(names))[shard::3]:
                    add_to_tar(tar, f"{number:06}{pathlib.Path(name).suffix}", (folder / name).read_bytes())
                    add_to_tar(tar, f"{number:06}.txt", captions[name].encode())
    else:
        (tmp_path / "in" / "videos").symlink_to(folder)
        write_table(tmp_path / "in" / f"t.{kind}", list(captions.items()))
    found, wanted = read_set(prepared(tmp_path / "in", tmp_path / "out")), read_set(out)
    by_file = [{r["sha256"]: list(r["captions"]) for r in records.values()} for records in (found, wanted)]
    assert by_file[0] == by_file[1]
    assert kind == "tar" or found.keys() == wanted.keys()


def test_a_stage_trains_on_a_prepared_set(two_hundred, tmp_path):
    config = base.get_config("small")
    options = {"data.source": "tfds", "data.dir": str(two_hundred[1]), "train.steps": 4, "train.checkpoint_every": 4}
    config.update_from_flattened_dict(options)
    loop.train(config, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all() and losses[-1] < 2


def command(folder, out, *more):
    return [
        "ivideo", "--config=configs/base.py:small", "--mode=prepare_data", f"--input={folder}", f"--out={out}", *more
    ]  # fmt: skip


def test_the_command_line_prepares_with_any_number_of_workers(folder, out, tmp_path, capsys, command_line):
    """The same files, byte for byte."""
    assert main.main(command(folder[0], tmp_path / "two", "--config.prepare.workers=2")) == 0
    assert contents(tmp_path / "two") == contents(out)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'two'}: {len(clips.KINDS)} videos, " in printed and f"left out {len(SOME)}: " in printed


def test_a_killed_preparation_continues(tmp_path):
    """Killed three times, at moments when something is written."""
    folder = tmp_path / "in"
    clips.write_folder(folder, count=120)
    whole = contents(prepared(folder, tmp_path / "whole", shard_megabytes=1))
    out = tmp_path / "out"
    more = ("--config.prepare.shard_megabytes=1", "--config.prepare.workers=1")
    arguments = [sys.executable, "-m", "ivideo.main", *command(folder, out, *more)[1:]]
    for kill in range(3):
        process = subprocess.Popen(arguments, cwd=pathlib.Path(__file__).parent.parent)
        while process.poll() is None and len(list((out / prepare.WORK).glob("*.jsonl"))) < 2 * kill + 1:
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert not (out / records.INFO).exists()
    subprocess.run(arguments, cwd=pathlib.Path(__file__).parent.parent, check=True)
    assert contents(out) == whole

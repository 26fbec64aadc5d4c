"""Mode prepare_data: the command, and the set and the report that it writes."""

import json
import pathlib
import tarfile

import collections_of_clips as clips
import measure_reading
import numpy as np
import pytest
from prepared_sets import add_to_tar, command, contents, here, one_clip, prepared, quarantine, read_set, write_table

from configs import base
from ivideo import main
from ivideo.data import check, sources, video_io
from ivideo.data.preparing import prepare, records
from ivideo.data.preparing.choosing import REASONS
from ivideo.data.preparing.tasks import measure
from ivideo.errors import UserError
from ivideo.training import loop

SOME = ("empty", "half of it", "overwritten", "short", "slow", "still", "cut", "tiny", "strip", "copy", "no caption")


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


def test_small_nothing_is_overwritten_and_a_finished_set_is_kept(tmp_path, capsys):
    folder, out = one_clip(tmp_path / "in"), tmp_path / "out"
    prepared(folder, out)
    before = contents(out)
    (out / prepare.WORK).mkdir()
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
        if function is measure:
            one_clip(folder, clips.texture(1))

    with pytest.raises(UserError, match=r"a.mp4 has changed since it was measured"):
        prepared(folder, tmp_path / "out", run=run)


def test_small_the_measuring_script_reads_a_clip(tmp_path):
    data = clips.good(0, "h264").data
    measure_reading.write_set(str(tmp_path), data, measure_reading.measuring.measure_video(data))
    source = sources.TFDSSource(tmp_path, frames=4, height=8, width=8, fps=3)
    measure_reading.decode_plainly(data, source, 0)
    assert len(source) == 1 and source.records[0].data == data


def test_small_the_report_shows_the_set_and_ten_of_each_reason(out, folder):
    page = (out / prepare.REPORT).read_text(encoding="utf-8")
    assert f"<h1>{len(clips.KINDS)} videos, {len(SOME)} left out</h1>" in page
    for reason in set(quarantine(out).values()):
        assert f"Left out: {reason}, {REASONS[reason]}" in page
    assert page.count("<svg") == 7 and page.count("<img") >= len(clips.KINDS)
    for name in quarantine(out):
        assert name in page


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


def test_the_command_line_prepares_with_any_number_of_workers(folder, out, tmp_path, capsys, command_line):
    """The same files, byte for byte."""
    assert main.main(command(folder[0], tmp_path / "two", "--config.prepare.workers=2")) == 0
    assert contents(tmp_path / "two") == contents(out)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'two'}: {len(clips.KINDS)} videos, " in printed and f"left out {len(SOME)}: " in printed

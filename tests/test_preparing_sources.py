"""Mode prepare_data: what it finds in folders, tables, lists and tars."""

import collections
import json
import tarfile

import collections_of_clips as clips
import pytest
from prepared_sets import add_to_tar, one_clip, prepared, write_table

from ivideo.data.preparing import inputs, records
from ivideo.errors import UserError
from ivideo.text import cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a few clips, and what is expected of each."""
    folder = tmp_path_factory.mktemp("clips")
    return folder, clips.write_folder(folder, count=6)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_small_tables_name_files_and_captions(folder, kind, tmp_path):
    """A table is read alone, or as the only one of a folder; rows of one file are its several captions."""
    (tmp_path / "videos").symlink_to(folder[0])
    wanted = folder[1]
    write_table(tmp_path / f"table.{kind}", [(name, f"scene {name}") for name in wanted])
    for given in (tmp_path / f"table.{kind}", tmp_path):
        items, rejected = inputs.find(str(given), "video")
        assert not rejected and [item.name for item in items] == sorted(wanted)
        for item in items:
            assert item.read() == wanted[item.name].data
            assert item.captions == (f"scene {item.name}",) + (("other",) if kind == "json" else ())


def test_small_rows_of_one_file_are_joined_however_its_path_is_written(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"x")
    paths = ("a.mp4", "a.mp4", "./a.mp4", "more/../a.mp4", tmp_path / "a.mp4")
    rows = zip(paths, ("one", "two", "three", "one", "four"), strict=True)
    (tmp_path / "t.csv").write_text("video,caption\n" + "".join(f"{path},{caption}\n" for path, caption in rows))
    (item,), rejected = inputs.find(str(tmp_path / "t.csv"), "video")
    assert (item.name, item.captions, rejected) == ("a.mp4", ("one", "two", "three", "four"), [])


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

"""Output files: valid names, and errors that are found before any work."""

import errno
import json
import os
import pathlib
import tempfile

import numpy as np
import pytest
from PIL import Image

from ivideo import files
from ivideo.data import encoders
from ivideo.errors import UserError
from ivideo.sampling import outputs


def test_small_kinds_of_output():
    assert outputs.output_paths("a.mp4", 1, in_folder=False) == ["a.mp4"]
    assert outputs.output_paths("A.MP4", 1, in_folder=False) == ["A.MP4"]
    assert outputs.output_paths("out.v2", 2, in_folder=True) == ["out.v2/000.mp4", "out.v2/001.mp4"]
    for out in ("a.avi", "a.mkv", "a", "mp4"):
        with pytest.raises(
            UserError, match=f"{out} ends in .*, expected .mp4, .mov, .webm or .gif: no other format can be written"
        ):
            outputs.output_paths(out, 1, in_folder=False)
    for out in ("a.mp4", "a.MP4", "a.Gif", "a.webm", "a.mov"):
        with pytest.raises(UserError, match=f"--out={out} names one file for several videos: give a folder"):
            outputs.output_paths(out, 2, in_folder=True)
    assert outputs.stage_path("out/000.MP4", "tsr1") == "out/000.tsr1.MP4"


def test_small_what_is_there_is_kept(tmp_path):
    path = str(tmp_path / "a.mp4")
    files.refuse_existing([path], overwrite=False)
    os.symlink(tmp_path / "nowhere", path)
    with pytest.raises(UserError, match=r"a.mp4 exists: choose another --out, or pass --overwrite to replace it"):
        files.refuse_existing([path], overwrite=False)
    files.refuse_existing([path], overwrite=True)
    os.remove(path)
    os.mkdir(path)
    with pytest.raises(UserError, match=r"a.mp4 is a folder: choose another --out"):
        files.refuse_existing([path], overwrite=True)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="is a file, but 2 videos need a folder"):
        outputs.output_paths(str(tmp_path / "file"), 2, in_folder=True)


def test_small_targets_are_tried_first(tmp_path, monkeypatch):
    files.prepare_folders([str(tmp_path / "new" / "deep" / ("é" * 125 + ".mp4"))])  # 254 bytes
    assert os.listdir(tmp_path / "new" / "deep") == []
    with pytest.raises(UserError, match="cannot be written .File name too long.: choose another --out"):
        files.prepare_folders([str(tmp_path / ("é" * 126 + ".mp4"))])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written .*Not a directory.*: choose another --out"):
        files.prepare_folders([str(tmp_path / "file" / "a.mp4")])
    with pytest.raises(UserError, match="/proc cannot be written to .*: choose another --out"):
        files.prepare_folders(["/proc/a.mp4"])

    def full(dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match="cannot be written to .No space left on device.: make room"):
        files.prepare_folders([str(tmp_path / "a.mp4")])


def test_small_sizes_that_cannot_be_encoded_are_found_first():
    outputs.check_encoder("a.mp4", height=8, width=8, fps=3)
    outputs.check_encoder("a.GIF", height=9, width=9, fps=3)
    with pytest.raises(UserError, match="expected even numbers"):
        outputs.check_encoder("a.MP4", height=9, width=8, fps=3)
    with pytest.raises(UserError, match="frames of 64×40000 cannot be written as H.264 .*: choose another --zoom"):
        outputs.check_encoder("a.mp4", height=64, width=40000, fps=3)


def frames_in(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == [*(f"{number:03}.png" for number in range(len(names) - 1)), "recipe.json"]
    return np.stack([np.asarray(Image.open(folder / name)) for name in names[:-1]])


@pytest.mark.parametrize("reason", ["encoder", "exists", "no folder"])
def test_small_a_video_that_cannot_be_encoded_is_kept_as_frames(reason, tmp_path, monkeypatch, caplog):
    """Beside its file, or in a folder for temporary files. What is there already is not touched."""
    video = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    path = tmp_path / "out" / "a.mp4"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if reason != "no folder":
        path.parent.mkdir()
        (tmp_path / "out" / "a.mp4.frames").mkdir()
    else:
        path.parent.write_text("a file")
    if reason == "exists":
        path.write_bytes(b"kept")
    if reason == "encoder":
        monkeypatch.setattr(encoders, "write", lambda *_: (_ for _ in ()).throw(ValueError("codec is gone")))
    folder = pathlib.Path(outputs.write(str(path), video, fps=3, metadata={"prompt": "x"}, overwrite=False))
    assert (folder.parent == path.parent and folder.name == "a.mp4.frames_1") or reason == "no folder"
    np.testing.assert_array_equal(frames_in(folder), video)
    assert json.loads((folder / "recipe.json").read_text()) == {"prompt": "x"}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{path} could not be written (") and line.endswith(f"PNG files in {folder}")
    if reason == "exists":
        assert path.read_bytes() == b"kept"


def test_small_frames_that_find_no_room_leave_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(encoders, "write", full)
    with pytest.raises(OSError, match="No space left"):
        outputs.write(str(tmp_path / "a.mp4"), np.zeros((2, 4, 4, 3), np.uint8), fps=3, metadata=None, overwrite=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

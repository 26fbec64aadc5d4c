"""Output files: valid names, and errors that are found before any work."""

import errno
import os
import tempfile

import pytest

from ivideo import files
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

"""Samples by the names that VBench reads."""

import numpy as np
import pytest

from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.evaluation import vbench


def write(folder, prompts):
    folder.mkdir(exist_ok=True)
    for n, prompt in enumerate(prompts):
        video = np.full((2, 8, 8, 3), 20 * n, np.uint8)
        video_io.write_video(folder / f"{n:03d}.mp4", video, fps=8, metadata={"prompt": prompt} if prompt else None)
    return str(folder)


def test_small_samples_are_named_by_prompt_and_number(tmp_path, capsys, caplog):
    samples = write(tmp_path / "samples", ["a cat", "a dog, running", "a cat"])
    paths = vbench.lay_out(samples, str(tmp_path / "vbench"))
    assert sorted(p.name for p in (tmp_path / "vbench").iterdir()) == [
        "a cat-0.mp4",
        "a cat-1.mp4",
        "a dog, running-0.mp4",
    ]
    assert paths[2].endswith("a cat-1.mp4")
    assert (tmp_path / "vbench" / "a cat-1.mp4").read_bytes() == (tmp_path / "samples" / "002.mp4").read_bytes()
    assert "3 videos of 2 prompts" in capsys.readouterr().out
    assert "5 videos per prompt, and here prompts have 1 to 2" in caplog.text
    with pytest.raises(UserError, match="a cat-0.mp4 exists"):
        vbench.lay_out(samples, str(tmp_path / "vbench"))
    vbench.lay_out(samples, str(tmp_path / "vbench"), prompts=["x", "y", "z"])
    assert (tmp_path / "vbench" / "y-0.mp4").exists()


def test_small_samples_that_vbench_could_not_read_are_refused(tmp_path):
    for prompts, given, message in (
        (["a cat", ""], (), r"001.mp4 does not say its prompt: give --prompts_file"),
        (["a/b"], (), r"000.mp4: the prompt 'a/b' cannot be a file's name"),
        (["long " * 60], (), r"cannot be a file's name"),
        (["a", "b"], ["a"], r"--prompts_file has 1 prompts for 2 files"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(UserError, match=message):
            vbench.lay_out(write(folder, prompts), str(tmp_path / "vbench"), prompts=given)
    (folder / "a.gif").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.gif: VBench reads .mp4 files"):
        vbench.lay_out(str(folder), str(tmp_path / "vbench"))
    assert not (tmp_path / "vbench").exists()

"""Sets of clips that are measured: damaged files are found when a folder is read, and frames are chosen."""

import numpy as np
from video_files import write_clips

from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.evaluation import clip_sets


def test_small_files_that_do_not_decode_are_found_before_anything_is_measured(tmp_path):
    """Wherever a file is damaged: it is refused when the folder is read, or decodes to its end."""
    folder, selection = tmp_path / "samples", clip_sets.Selection(24)
    samples, rng, refused = write_clips(folder, 2, frames=24), np.random.default_rng(0), 0
    # Noise, since plain colours take no bytes that could be damaged
    video = rng.uniform(-1, 1, (24, 64, 64, 3)).astype(np.float32)
    video_io.write_video(folder / "001.mp4", video, fps=3, overwrite=True)
    whole = (folder / "001.mp4").read_bytes()
    for place in np.linspace(2000, len(whole) - 4000, 12).astype(int):
        (folder / "001.mp4").write_bytes(whole[:place] + rng.bytes(60) + whole[place + 60 :])
        try:
            found = clip_sets.from_folder(samples, selection)
        except UserError as error:
            assert "001.mp4" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert [len(clip) for _, clip in found.read([0, 1])] == [24, 24]
    assert refused > 4


def test_small_frames_are_chosen_by_the_protocol(tmp_path):
    """Every second frame of a file, after its own rate or another; the middle of a wide frame."""
    video = np.zeros((9, 8, 16, 3), np.uint8) + (25 * np.arange(9, dtype=np.uint8))[:, None, None, None]
    for n in range(2):
        video_io.write_video(tmp_path / f"{n}.mp4", video, fps=4, crf=0)
    (_, clip), _ = clip_sets.from_folder(str(tmp_path), clip_sets.Selection(3, 2)).read([0, 1])
    np.testing.assert_allclose(clip[::2, 4, 8, 0], [0, 50, 100], atol=3)
    halved = clip_sets.Selection(3, 1, fps=2.0, height=8, width=8)
    ((_, clip),) = clip_sets.from_folder(str(tmp_path), halved).read([1])
    assert clip.shape == (3, 8, 8, 3) and clip.dtype == np.uint8
    np.testing.assert_allclose(clip[:, 4, 4, 0], [0, 50, 100], atol=3)

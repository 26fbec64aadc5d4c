"""Sets of clips that are measured: damaged files are found when a folder is read, and clips and frames are chosen."""

import collections

import numpy as np
import prepared_sets
from video_files import write_clips

from configs import base
from ivideo.data import shapes, video_io
from ivideo.errors import UserError
from ivideo.evaluation import clip_sets
from ivideo.training import pretrain_text


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


def test_small_any_number_of_clips_is_like_the_whole_set(tmp_path):
    """Fewer clips than there are captions, or files, have all kinds: not the first kinds in alphabetical order."""
    config, selection = base.get_config("small"), clip_sets.Selection(4)
    some = clip_sets.from_source(config, clip_sets.SHAPES, selection, clips=120).captions
    shown = [shapes.parse_caption(caption) for caption in some]
    assert len(set(some)) == 120
    for kinds, values in zip(zip(*shown, strict=True), pretrain_text.CHOICES, strict=True):
        counts = collections.Counter(kinds)
        assert set(counts) == set(values)
        # A fair draw: within four standard deviations of a binomial distribution
        share = 1 / len(values)
        assert all(abs(count - 120 * share) < 4 * (120 * share * (1 - share)) ** 0.5 for count in counts.values())
    every = clip_sets.from_source(config, clip_sets.SHAPES, selection, clips=480).captions
    assert every[:120] == some and len(set(every)) == 480

    write_clips(tmp_path / "files", 9, frames=4)
    prompts = [f"prompt {n}" for n in range(9)]
    found = clip_sets.from_folder(str(tmp_path / "files"), selection, clips=3, prompts=prompts)
    assert found.captions == ["prompt 0", "prompt 4", "prompt 8"] and found.about["clips"].startswith("3 of 9 files")
    digests = clip_sets.from_folder(str(tmp_path / "files"), selection).identities
    assert [i.split()[0] for i in found.identities] == [digests[n].split()[0] for n in (0, 4, 8)]


def test_small_clips_of_a_prepared_set_are_chosen_evenly(tmp_path):
    """Clips and captions are those of the same records, also where the set's captions are asked for alone."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for n in range(9):
        video = shapes.render(shapes.TRAIN[40 * n], n, frames=16, height=16, width=16)
        video_io.write_video(folder / f"{n}.mp4", video, fps=3)
        (folder / f"{n}.txt").write_text(f"number {n}")
    out = str(prepared_sets.prepared(folder, tmp_path / "set", min_motion=0.0, duplicate_bits=-1))
    config, selection = base.get_config("small"), clip_sets.Selection(4)
    every, some = (clip_sets.from_source(config, out, selection, clips=clips) for clips in (0, 3))
    assert len(every) == 9 and some.identities == [every.identities[n] for n in (0, 4, 8)]
    captions = clip_sets.captions_of(config, out, 9)
    assert clip_sets.captions_of(config, out, 3) == [captions[n] for n in (0, 4, 8)]
    whole = [clip for _, clip in every.read(range(9))]
    for (number, clip), n, wanted in zip(some.read([0, 1, 2]), (0, 1, 2), (0, 4, 8), strict=True):
        assert number == n
        np.testing.assert_array_equal(clip, whole[wanted])

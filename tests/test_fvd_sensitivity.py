"""launch/fvd_sensitivity.py: the changes, the halves, the distances, and going on after a stop."""

import json

import fvd_sensitivity
import jax.numpy as jnp
import launch_scripts
import numpy as np
import pytest

from ivideo.data import video_io
from ivideo.evaluation import frechet
from ivideo.evaluation.networks import stored

CHANGES = fvd_sensitivity.CHANGES


def test_small_changes_are_what_they_say():
    rng = np.random.default_rng(0)
    clip = rng.uniform(-0.5, 0.5, (16, 40, 48, 3)).astype(np.float32)
    changed = {name: change(clip, np.random.default_rng(1)) for name, change in CHANGES.items()}
    assert all(found.shape == clip.shape for found in changed.values())
    np.testing.assert_array_equal(changed["none"], clip)
    order = [int(np.abs(clip - frame).max(axis=(1, 2, 3)).argmin()) for frame in changed["frames shuffled"]]
    assert sorted(order) == list(range(16)) != order
    np.testing.assert_array_equal(changed["frames shuffled"], clip[order])
    assert (changed["first frame repeated"] == clip[0]).all()
    for level in (5, 15, 40):
        added = (changed[f"noise of {level} of 255"] - clip) * 127.5
        assert abs(added.mean()) < 0.01 * level + 0.2 and added.std() == pytest.approx(level, rel=0.03)
    np.testing.assert_array_equal(changed["other colours (RGB as GBR)"], clip[..., [1, 2, 0]])


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_small_blur_spreads_a_point_within_its_frame(pixels):
    clip = np.zeros((3, 65, 65, 3))
    clip[1, 32, 32] = 1
    found = CHANGES[f"blur of {pixels} px"](clip, None)
    assert not found[[0, 2]].any()
    rows = found[1].sum(axis=1)[:, 0]
    assert rows.sum() == pytest.approx(1)
    assert np.sqrt(rows @ (np.arange(65) - 32) ** 2) == pytest.approx(pixels, rel=0.02)


def test_small_halves_have_no_clip_in_common():
    first, second = fvd_sensitivity.halves(list(range(11)))
    assert len(first) == len(second) == 5
    assert len({*first, *second}) == 10
    assert (first, second) == fvd_sensitivity.halves(list(range(11)))


def test_small_files_are_cut_one_part_after_the_other(tmp_path):
    for name, frames in (("a", 35), ("b", 16), ("c", 15)):
        video_io.write_video(tmp_path / f"{name}.mp4", np.zeros((frames, 16, 16, 3), np.float32), fps=8)
    found = fvd_sensitivity.clips_of_files(str(tmp_path))
    assert [clip.shape for clip in found] == [(16, 16, 16, 3)] * 3


@pytest.fixture
def features(monkeypatch):
    """In place of I3D: the mean colours of three frames. Returns the numbers of clips that it saw."""
    seen, network = [], fvd_sensitivity.i3d

    def means(params, clips):
        seen.append(len(clips))
        return jnp.asarray(clips)[:, ::6].mean(axis=(2, 3)).reshape(len(clips), -1)

    monkeypatch.setattr(network, "features", means)
    monkeypatch.setattr(network, "read", lambda path: stored.Weights(None, "3" * 64))
    return seen


def test_small_every_change_is_measured_once(features, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fvd_sensitivity, "CHANGES", {name: CHANGES[name] for name in ("none", "blur of 4 px")})
    arguments = [str(tmp_path / "out"), "--i3d=FILE", "--clips=3"]
    fvd_sensitivity.main(arguments)
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert said == (tmp_path / "out" / "sensitivity.md").read_text()
    assert [row["change"] for row in found["rows"]] == ["none", "blur of 4 px"] and found["clips"] == 3
    changed, reference = fvd_sensitivity.halves(fvd_sensitivity.clips_of_shapes(6))
    assert len(np.unique([clip.mean() for clip in changed + reference])) == 6
    for row in found["rows"]:
        ours = fvd_sensitivity.features(stored.Weights(None, ""), changed, CHANGES[row["change"]])
        theirs = fvd_sensitivity.features(stored.Weights(None, ""), reference, CHANGES["none"])
        expected = frechet.distance(frechet.measure(ours), frechet.measure(theirs))
        assert row["fvd"] == pytest.approx(expected, rel=1e-9)
        assert row["low"] <= row["fvd"] * 1.5 and row["low"] < row["high"]
    assert f"{found['rows'][1]['fvd']:.1f}" in said
    # After a stop before the second row, only that and the reference are measured
    found["rows"] = found["rows"][:1]
    (tmp_path / "out" / "sensitivity.json").write_text(json.dumps(found))
    features.clear()
    fvd_sensitivity.main(arguments)
    assert capsys.readouterr().out == said and len(features) == 2
    features.clear()
    fvd_sensitivity.main(arguments)
    assert capsys.readouterr().out == said and not features


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clips=1"], "--clips=1: expected 2 or more"),
        (["--clips=4"], "expected {'of': 'shapes', 'clips': 4"),
        (["--videos={tmp}/none"], "none cannot be read"),
        (["--videos={tmp}/short"], "short has too few frames"),
    ],
)
def test_small_mistakes_are_said_before_anything_is_measured(features, tmp_path, capsys, arguments, said):
    (tmp_path / "short").mkdir()
    video_io.write_video(tmp_path / "short" / "a.mp4", np.zeros((40, 16, 16, 3), np.float32), fps=8)
    found = {"of": "shapes", "clips": 3, "weights": "3" * 64, "rows": []}
    (tmp_path / "sensitivity.json").write_text(json.dumps(found))
    arguments = [str(tmp_path), "--i3d=FILE", *(argument.format(tmp=tmp_path) for argument in arguments)]
    assert said in launch_scripts.refusal(fvd_sensitivity, arguments, capsys)
    assert not features

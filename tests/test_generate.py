"""From a prompt to a file: what is in it, what it depends on, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from ivideo import cascade, generate, stages
from ivideo.data import shapes, video_io
from ivideo.errors import UserError
from ivideo.metrics import prompt_following

PROMPTS = ["a red star moving left on a teal background", "a blue circle standing still on a gray background", ""]


@pytest.fixture(scope="module")
def stage():
    """A small stage whose every layer counts, without training."""
    config = base.get_config("small")
    config.sample.weight = 2.0
    rng = np.random.default_rng(1)
    return config, jax.tree.map(
        lambda p: (0.15 * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config)
    )


def test_small_video_depends_on_its_seed_and_prompt_alone(stage):
    """In a batch of three, of two and alone: the same video. Another seed or prompt: another."""
    config, params = stage
    seeds = [(7, 0), (7, 0), (7, 0)]
    three = cascade.sample_stage(config, params, PROMPTS, seeds=seeds)
    assert three.shape == (3, 4, 8, 8, 3)
    assert np.abs(three).max() <= 1
    alone = cascade.sample_stage(config, params, PROMPTS[1:2], seeds=seeds[:1])
    np.testing.assert_allclose(alone[0], three[1], atol=1e-4)
    config = config.copy_and_resolve_references()
    config.sample.batch = 2  # the last chunk is filled up
    np.testing.assert_allclose(cascade.sample_stage(config, params, PROMPTS, seeds=seeds), three, atol=1e-4)
    other = cascade.sample_stage(config, params, PROMPTS, seeds=[(8, 0), (7, 1), (7, 0)])
    assert np.abs(other - three).reshape(3, -1).max(1)[:2].min() > 0.05
    assert np.abs(three[0] - three[1]).max() > 1e-3  # same noise, other text


def test_small_guidance_is_the_affine_combination(stage):
    """One step of DDIM from pure noise with w = 2 is 3 of the conditional less 2 of the unconditional prediction."""
    config, params = stage
    config = config.copy_and_resolve_references()
    config.sample.steps, config.sample.sampler, config.sample.threshold = 1, "ddim", "none"
    keys = jax.random.split(jax.random.key(0), 2)
    text = jax.random.normal(jax.random.key(2), (2, config.text.length, config.text.dim))
    mask = np.ones((2, config.text.length), bool)
    model = stages.build_model(config)
    z = stages.samplers.initial_noise(keys, stages.video_shape(config))
    start = jnp.full(2, stages.logsnr_fn(config)(1.0))
    apply = jax.jit(lambda m: model.apply({"params": params}, z, start, text, m))
    with_text, without = (apply(m) for m in (mask, ~mask))
    wanted = np.clip(-(3 * with_text - 2 * without), -1, 1)  # at t = 1 the video is -v, to 1e-4
    got = stages.sample(config, model, params, text, mask, keys)
    np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_small_shifted_schedule_and_its_inverse(stage):
    config, _ = stage
    assert config.diffusion.logsnr_shift == -2.5
    assert (config.diffusion.logsnr_min, config.diffusion.logsnr_max) == (-20, 5)
    times = np.linspace(0.01, 0.99, 20)
    logsnr = stages.logsnr_fn(config)(times)
    first, last = np.arctan(np.exp([-5 / 2, 20 / 2]))
    np.testing.assert_allclose(logsnr, -2 * np.log(np.tan(first + times * (last - first))) - 2.5, atol=0.01)
    np.testing.assert_allclose(stages.time_fn(config)(logsnr), times, atol=1e-5)


def test_small_files_carry_what_made_them(stage, tmp_path, monkeypatch):
    config, params = stage
    monkeypatch.setattr(cascade, "load_weights", lambda *_: params)
    paths = generate.generate(config, PROMPTS[:2], str(tmp_path / "out"), seed=3, num_videos=2, zoom=2)
    assert [p.rsplit("/", 1)[1] for p in paths] == ["000.mp4", "001.mp4", "002.mp4", "003.mp4"]
    metadata = video_io.read_metadata(paths[2])
    assert (metadata["prompt"], metadata["seed"], metadata["number"]) == (PROMPTS[1], "3", "0")
    assert json.loads(metadata["config"])["stage"] == "base"
    assert metadata["ivideo_version"] == generate.config_metadata(config)["ivideo_version"]
    frames, fps = video_io.read_video(paths[0])
    assert (frames.shape, fps) == ((4, 16, 16, 3), 3)
    with pytest.raises(UserError, match=r"000.mp4 exists: choose another --out, or pass --overwrite"):
        generate.generate(config, PROMPTS[:2], str(tmp_path / "out"), seed=4, num_videos=2)
    one = str(tmp_path / "one.gif")
    assert generate.generate(config, PROMPTS[:1], one, seed=3) == [one]
    assert video_io.read_metadata(one)["prompt"] == PROMPTS[0]


def test_small_output_paths_are_checked_first(tmp_path):
    def paths(out, count=1, in_folder=False, overwrite=False):
        return generate.output_paths(str(tmp_path / out), count, in_folder=in_folder, overwrite=overwrite)

    with pytest.raises(UserError, match="must end in .mp4 or .gif"):
        paths("a.avi")
    with pytest.raises(UserError, match="names one file for several videos: give a folder"):
        paths("a.mp4", 2, in_folder=True)
    (tmp_path / "a.mp4").write_bytes(b"kept")
    with pytest.raises(UserError, match="exists: choose another --out"):
        paths("a.mp4")
    assert paths("a.mp4", overwrite=True) == [str(tmp_path / "a.mp4")]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="is a file, but 2 videos need a folder"):
        paths("file", 2, in_folder=True)


def test_small_values_that_are_not_finite_are_never_written(stage, tmp_path, monkeypatch):
    config, params = stage
    broken = jax.tree.map(lambda p: p * np.nan, params)
    monkeypatch.setattr(cascade, "load_weights", lambda *_: broken)
    with pytest.raises(FloatingPointError, match="stage base made values that are not finite for 'a red star"):
        generate.generate(config, PROMPTS[:1], str(tmp_path / "out.mp4"))
    assert list(tmp_path.iterdir()) == []


def test_small_progress_bar_is_for_terminals(stage, capsys):
    config, params = stage
    cascade.sample_stage(config, params, PROMPTS[:1], seeds=[(0, 0)])
    assert capsys.readouterr().err == ""


def test_small_weights_without_a_folder_are_the_demo_alone(tmp_path):
    config = base.get_config("small")
    with pytest.raises(UserError, match="--workdir is missing: .* demo variant alone, not for base:small"):
        cascade.load_weights(config, None)
    with pytest.raises(UserError, match="has no checkpoints: give the folder"):
        cascade.load_weights(config, str(tmp_path))


def test_small_shipped_base_follows_its_captions():
    """Background, colour and motion of a caption from training and of a held-out one, at half the config's steps."""
    config = base.get_config("demo")
    config.sample.steps = 16
    params = cascade.load_weights(config, None)
    attributes = [
        shapes.Attributes("circle", "green", "teal", "right"),
        shapes.Attributes("triangle", "blue", "black", "up"),
    ]
    assert [shapes.held_out(a) for a in attributes] == [False, True]
    prompts = [shapes.caption(a) for a in attributes]
    videos = cascade.sample_stage(config, params, prompts, seeds=[(0, 0), (0, 1)])
    for video, attrs in zip(videos, attributes, strict=True):
        right = prompt_following.score(video, attrs)
        assert all(right[name] for name in prompt_following.COARSE), (attrs, right)

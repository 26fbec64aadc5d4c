"""Prompts to video files: their content, what it depends on, and which requests are refused."""

import os
import re

import jax
import jax.numpy as jnp
import light_network
import numpy as np
import pytest

from configs import base
from ivideo import recipe, stages
from ivideo.data import shapes, video_io
from ivideo.errors import UserError
from ivideo.evaluation import prompt_following
from ivideo.sampling import cascade, generate
from ivideo.training import trained
from ivideo.weights import config_metadata, file_identity, load_params, save_params

pytestmark = pytest.mark.usefixtures("shared_programs")

PROMPTS = ["a red star moving left on a teal background", "a blue circle standing still on a gray background", ""]


def small_stage(**changes):
    """A small stage whose every layer counts, without training."""
    config = base.get_config("small")
    config.update_from_flattened_dict({"sample.weight": 2.0, **changes})
    rng = np.random.default_rng(1)
    return config, jax.tree.map(
        lambda p: (0.15 * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config)
    )


@pytest.fixture
def stage():
    return small_stage()


@pytest.fixture
def exported(tmp_path):
    """A stage of a light network, its weights in a file."""
    config, params = small_stage(**light_network.OPTIONS)
    path = str(tmp_path / "base.safetensors")
    save_params(path, params, metadata=config_metadata(config), dtype=np.float32)
    return config, path


def test_video_depends_on_its_seed_and_prompt_alone(stage):
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
    got = jax.jit(lambda keys: stages.sample(config, model, params, text, mask, keys))(keys)
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


def test_small_files_carry_what_made_them(exported, tmp_path):
    config, path = exported
    options = {"weights_path": path, "seed": 3}
    paths = generate.generate(config, PROMPTS[:2], str(tmp_path / "out"), num_videos=2, zoom=2, **options)
    assert [p.rsplit("/", 1)[1] for p in paths] == ["000.mp4", "001.mp4", "002.mp4", "003.mp4"]
    metadata = video_io.read_metadata(paths[2])
    assert (metadata["prompt"], metadata["seed"], metadata["number"]) == (PROMPTS[1], 3, 0)
    assert (metadata["noise"], metadata["stages"], metadata["zoom"]) == ("of the prompt", "base", 2)
    assert (metadata["weights"], metadata["batch"]) == ({"base": file_identity(path)}, {"base": 4})
    assert (metadata["config"], metadata["phases"]) == ("base:small", {})
    before, after = recipe.flat(base.get_config("small")), recipe.flat(config)
    assert metadata["changes"] == {key: value for key, value in after.items() if before[key] != value}
    assert metadata["changes"]["sample.weight"] == 2.0 and "model.temporal" in metadata["changes"]
    assert metadata["ivideo_version"] == config_metadata(config)["ivideo_version"]
    frames, fps = video_io.read_video(paths[0])
    assert (frames.shape, fps) == ((4, 16, 16, 3), 3)
    with pytest.raises(UserError, match=r"000.mp4 exists: choose another --out, or pass --overwrite"):
        generate.generate(config, PROMPTS[:2], str(tmp_path / "out"), num_videos=2, **options)
    one = str(tmp_path / "one.gif")
    assert generate.generate(config, PROMPTS[:1], one, **options) == [one]
    assert video_io.read_metadata(one)["prompt"] == PROMPTS[0]


@pytest.mark.parametrize(
    ("value", "what"), [(jnp.nan, "values that are not finite"), (0.25, "a video of one colour")], ids=["nan", "colour"]
)
def test_small_worthless_video_costs_no_other(exported, tmp_path, monkeypatch, value, what):
    """It is left out, the others are written, and the error at the end names its stage, weights and prompt."""
    config, path = exported
    sampled = stages.sample

    def sample(config, model, params, text, mask, keys, **options):
        video = sampled(config, model, params, text, mask, keys, **options)
        return video.at[0].set(jnp.where(mask[0].any(), video[0], value))  # of the empty prompt

    monkeypatch.setattr(stages, "sample", sample)
    config.sample.batch = 1
    expected = re.escape(f"stage base ({path}) made {what} for '': nothing was written for it; ")
    with pytest.raises(FloatingPointError, match=expected):
        generate.generate(config, ["", *PROMPTS[:2]], str(tmp_path / "out"), weights_path=path)
    assert sorted(os.listdir(tmp_path / "out")) == ["001.mp4", "002.mp4"]


def frames(folder):
    """Every video in a folder, by its name."""
    return {name: video_io.read_video(folder / name)[0] for name in sorted(os.listdir(folder))}


def test_the_same_command_makes_what_is_missing(exported, tmp_path, caplog, capsys):
    """Bit for bit as an undisturbed one, from whatever is there; nothing that is there is touched."""
    config, path = exported
    config.sample.batch, config.sample.group = 2, 4
    prompts = [f"{colour} circle" for colour in "abcdefg"]

    def run(out, prompts=prompts, **options):
        generate.generate(config, prompts, str(tmp_path / out), weights_path=path, in_folder=True, **options)

    run("whole")
    run("parts", prompts[:3])
    kept = (tmp_path / "parts" / "001.mp4").stat().st_mtime_ns
    os.remove(tmp_path / "parts" / "002.mp4")
    capsys.readouterr()
    with caplog.at_level("INFO", logger="ivideo"):
        run("parts", resume=True)
    assert "2 of 7 videos are there already" in caplog.text
    assert capsys.readouterr().out.split() == [str(tmp_path / "parts" / f"{i:03}.mp4") for i in range(2, 7)]
    assert (tmp_path / "parts" / "001.mp4").stat().st_mtime_ns == kept
    wanted, found = frames(tmp_path / "whole"), frames(tmp_path / "parts")
    assert list(wanted) == list(found)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
    assert len({video.tobytes() for video in wanted.values()}) == 7


def test_small_files_of_something_else_are_not_taken_for_ours(exported, tmp_path):
    """What differs is named, before anything is made."""
    config, path = exported

    def run(prompts=PROMPTS[:2], config=config, weights=path, **options):
        generate.generate(config, prompts, str(tmp_path / "out"), weights_path=weights, resume=True, in_folder=True,
                          **options)  # fmt: skip

    run()
    run()  # nothing is missing
    with pytest.raises(UserError, match=r"000.mp4 was made with seed 0, and this command has 5"):
        run(seed=5)
    with pytest.raises(UserError, match=r"000.mp4 was made with prompt 'a red star .*', and this command has 'a blue"):
        run(PROMPTS[1::-1])
    with pytest.raises(UserError, match=r"000.mp4 was made with noise 'of the prompt', and this command has 'shared'"):
        run(same_noise=True)
    other = config.copy_and_resolve_references()
    other.sample.steps = 5
    with pytest.raises(UserError, match=r"made with config.sample.steps = 4 of stage base, and this command has 5"):
        run(config=other)
    other.sample.steps, other.sample.batch = 4, 5  # how many at a time is no difference
    run(config=other)
    weights = str(tmp_path / "other.safetensors")
    params = jax.tree.map(lambda p: p + 0.1, load_params(path))
    save_params(weights, params, metadata=config_metadata(config), dtype=np.float32)
    with pytest.raises(UserError, match=r"000.mp4 was made with weights of base '"):
        run(weights=weights)
    file = tmp_path / "out" / "001.mp4"
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(UserError, match=r"001.mp4 is not whole.*: delete it"):
        run()
    video_io.write_video(file, np.zeros((4, 8, 8, 3), np.float32), fps=3, overwrite=True)
    with pytest.raises(UserError, match=r"001.mp4 was made without a record of its prompt"):
        run()
    with pytest.raises(UserError, match="--resume keeps .* and --overwrite replaces"):
        run(overwrite=True)


def test_small_prompts_have_noise_of_their_own(exported, tmp_path):
    """That of a line does not depend on the other lines; with same_noise all begin alike."""
    config, path = exported

    def run(out, prompts, **options):
        generate.generate(config, prompts, str(tmp_path / out), weights_path=path, in_folder=True, **options)
        return list(frames(tmp_path / out).values())

    a, b, again = run("all", [PROMPTS[0], PROMPTS[1], "  a red star\nmoving left on a  teal background "])
    assert np.abs(a.astype(int) - again).max() > 4  # the same prompt, its second video
    (alone,) = run("alone", [PROMPTS[1]])
    assert np.abs(alone.astype(int) - b).max() <= 2  # in a batch of one: rounding
    shared, first = run("shared", [PROMPTS[1], PROMPTS[0]], same_noise=True), run("first", PROMPTS[:1], same_noise=True)
    assert np.abs(shared[1].astype(int) - first[0]).max() <= 2


def test_small_progress_bar_is_for_terminals(capsys):
    config, params = small_stage(**light_network.OPTIONS)
    cascade.sample_stage(config, params, PROMPTS[:1], seeds=[(0, 0)])
    assert capsys.readouterr().err == ""


def test_small_weights_without_a_folder_are_the_demo_alone(tmp_path):
    config = base.get_config("small")
    with pytest.raises(UserError, match="--workdir is missing: .* demo variant only, not for base:small"):
        trained.load(config, None)
    with pytest.raises(UserError, match="has no checkpoints: give the folder"):
        trained.load(config, str(tmp_path))


def test_shipped_base_follows_its_captions():
    """Background, colour and motion of a caption from training and of a held-out one, at half the config's steps."""
    config = base.get_config("demo")
    config.sample.steps = 16
    params = trained.load(config, None)
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


def test_small_a_video_that_cannot_be_encoded_costs_no_other(exported, tmp_path, monkeypatch, capsys):
    config, path = exported
    write = video_io.write_video

    def failing(target, *args, **options):
        if target.endswith("000.mp4"):
            raise ValueError("the encoder fails")
        write(target, *args, **options)

    monkeypatch.setattr(video_io, "write_video", failing)
    with pytest.raises(
        UserError, match="1 of the videos could not be encoded: their frames are PNG files in .*000.mp4.frames"
    ):
        generate.generate(config, PROMPTS[:2], str(tmp_path / "out"), weights_path=path)
    assert sorted(os.listdir(tmp_path / "out")) == ["000.mp4.frames", "001.mp4"]
    assert os.listdir(tmp_path / "out" / "000.mp4.frames")[0].endswith((".png", ".json"))


def test_small_filters_stop_a_prompt_before_any_work_and_a_video_before_it_is_written(exported, tmp_path, monkeypatch):
    config, path = exported
    (tmp_path / "words.txt").write_text("circle\n")
    (tmp_path / "judge.py").write_text(
        "def judge(video, prompt):\n    return video.dtype == 'uint8' and 'red' in prompt\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"weights_path": path, "in_folder": True}
    with pytest.raises(UserError, match="has 'circle', which --blocked_words="):
        generate.generate(
            config, PROMPTS[:2], str(tmp_path / "out"), blocked_words=str(tmp_path / "words.txt"), **options
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--video_filter=judge:judge refused 1 of the videos: they are not written"):
        generate.generate(config, PROMPTS[:2], str(tmp_path / "out"), video_filter="judge:judge", **options)
    assert os.listdir(tmp_path / "out") == ["000.mp4"]

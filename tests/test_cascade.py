"""The seven stages: their published sizes, how they fit together, and sampling with the small cascade."""

import importlib.resources
import os
import wave

import jax
import jax.numpy as jnp
import light_network
import numpy as np
import pytest

from configs import cascade as cascade_config
from ivideo import checks, stages
from ivideo.data import shapes, video_io
from ivideo.diffusion import augment
from ivideo.errors import UserError
from ivideo.evaluation import evaluate, prompt_following
from ivideo.planning import describe
from ivideo.sampling import cascade, generate
from ivideo.training import trained
from ivideo.training.loop import make_data

pytestmark = pytest.mark.usefixtures("shared_programs")

# The paper's table: parameters, frames × height × width, frames a second, attention in space, the layer in time.
PAPER = {
    "base": (5.6e9, (16, 24, 40), 3, True, "attention"),
    "tsr1": (1.7e9, (32, 24, 40), 6, True, "convolution"),
    "ssr1": (1.4e9, (32, 48, 80), 6, True, "convolution"),
    "ssr2": (1.2e9, (32, 192, 320), 6, True, "convolution"),
    "tsr2": (780e6, (64, 192, 320), 12, False, "convolution"),
    "tsr3": (630e6, (128, 192, 320), 24, False, "convolution"),
    "ssr3": (340e6, (128, 768, 1280), 24, False, "convolution"),
}
PROMPTS = ["a red star moving left on a teal background", "a blue circle standing still on a gray background"]


def random_params(config, seed=1):
    """Every layer awake, without training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: (0.1 * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config))


@pytest.fixture
def small(monkeypatch):
    config = cascade_config.get_config("small")
    monkeypatch.setattr(trained, "load", lambda config, source, **_: random_params(config))
    monkeypatch.setattr(trained, "check", lambda config, source: "random")
    return config


@pytest.fixture
def light(small):
    """The small cascade with light networks."""
    for name in small.order:
        small.stages[name].update_from_flattened_dict(light_network.OPTIONS)
    return small


def test_paper_stages_have_the_published_sizes():
    config = cascade_config.get_config("paper")
    assert list(config.order) == list(PAPER)
    for name, (parameters, size, fps, attention, temporal) in PAPER.items():
        stage = config.stages[name]
        count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(stages.param_shapes(stage)))
        assert abs(count / parameters - 1) < 0.02, f"{name}: {count / 1e9:.3f}B"
        assert stages.video_shape(stage) == (*size, 3)
        assert stage.video.fps == fps
        assert any(stage.model.spatial_attention) == attention
        assert stage.model.cross_attention[-1], name  # all stages read the text
        assert set(stage.model.temporal) == {temporal}


def test_paper_cascade_chains():
    """Traced from noise to 128 × 768 × 1280: each stage takes what the one before it makes; every clip lasts 16/3 s."""
    low = None
    for config in cascade.select(cascade_config.get_config("paper")):
        model = stages.build_model(config)
        text = jax.ShapeDtypeStruct((1, config.text.length, config.text.dim), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, config.text.length), bool)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        given = {} if low is None else {"low_res": low}
        low = jax.eval_shape(
            lambda params, text, mask, keys, given, config=config, model=model: stages.sample(
                config, model, params, text, mask, keys, **given
            ),
            stages.param_shapes(config), text, mask, keys, given,
        )  # fmt: skip
        assert low.shape == (1, *PAPER[config.stage][1], 3)
        assert config.video.frames / config.video.fps == 16 / 3


@pytest.mark.parametrize("variant", ["paper", "demo", "small"])
def test_small_stages_agree_with_their_neighbours(variant):
    for config in cascade.select(cascade_config.get_config(variant)):
        checks.check(config)
    config = cascade_config.get_config(variant)
    config.stages.ssr2.cond.height *= 2
    with pytest.raises(UserError, match=r"ssr1 is .* but the input of ssr2 is .* must equal config.stages.ssr1.video"):
        cascade.select(config)


def test_small_part_of_the_cascade_is_chosen():
    config = cascade_config.get_config("small")
    assert [c.stage for c in cascade.select(config, "ssr2", "tsr3")] == ["ssr2", "tsr2", "tsr3"]
    assert [c.stage for c in cascade.select(config.stages.ssr1)] == ["ssr1"]
    with pytest.raises(UserError, match="stage 'ssr4' is unknown: choose from base, tsr1"):
        cascade.select(config, "ssr4")
    with pytest.raises(UserError, match="--from_stage=ssr2 comes after --to_stage=tsr1"):
        cascade.select(config, "ssr2", "tsr1")
    with pytest.raises(UserError, match="but the config has only ssr1"):
        cascade.select(config.stages.ssr1, "ssr1")


def test_text_becomes_a_video_through_all_stages(small, tmp_path):
    """From a sentence to the last stage's file, the stages' own beside it."""
    out = tmp_path / "out"
    paths = generate.generate(small, PROMPTS, str(out), seed=3, in_folder=True, save_stages=True)
    frames, fps = video_io.read_video(paths[0])
    assert (frames.shape, fps) == ((32, 64, 64, 3), 24)
    for name in small.order[:-1]:
        stage = small.stages[name]
        size = stages.video_shape(stage)
        if min(size[1:3]) >= 16:
            frames, fps = video_io.read_video(out / f"001.{name}.mp4")
            assert (frames.shape, fps) == (size, stage.video.fps)


def test_cascade_goes_a_group_at_a_time(light, tmp_path, monkeypatch):
    """A stage's weights are loaded once for each group; files of a group are there before the next begins."""
    loads = []

    def load(config, source, **_):
        loads.append((config.stage, len(os.listdir(tmp_path / "out"))))
        return random_params(config)

    monkeypatch.setattr(trained, "load", load)
    light.sample.group = 2
    for name in light.order:
        light.stages[name].sample.batch = 2
        light.stages[name].sample.steps = 1
    prompts = [*PROMPTS, "a green star"]
    options = {"from_stage": "base", "to_stage": "ssr1", "in_folder": True, "save_stages": True}
    generate.generate(light, prompts, str(tmp_path / "out"), **options)
    assert loads == [("base", 0), ("tsr1", 2), ("ssr1", 4), ("base", 6), ("tsr1", 7), ("ssr1", 8)]
    wanted = {path.name: video_io.read_video(path)[0] for path in (tmp_path / "out").iterdir()}
    assert len(wanted) == 9
    (tmp_path / "out" / "001.mp4").unlink()
    (tmp_path / "out" / "002.base.mp4").unlink()
    loads.clear()
    generate.generate(light, prompts, str(tmp_path / "out"), resume=True, **options)
    assert [name for name, _ in loads] == ["base", "tsr1", "ssr1", "base"]  # of the second group the base alone
    for path in (tmp_path / "out").iterdir():
        np.testing.assert_array_equal(video_io.read_video(path)[0], wanted[path.name])


def test_enlarged_video_does_not_depend_on_its_batch(small):
    """Its own seed, text and input alone: noise, and the noise on the input too, are drawn by the video."""
    config, params = small.stages.ssr1, random_params(small.stages.ssr1)
    low = np.random.default_rng(2).uniform(-1, 1, (2, 8, 8, 8, 3)).astype(np.float32)
    seeds = [(3, 0), (3, 1)]
    both = cascade.sample_stage(config, params, PROMPTS, seeds=seeds, low_res=low)
    alone = cascade.sample_stage(config, params, PROMPTS[1:], seeds=seeds[1:], low_res=low[1:])
    np.testing.assert_allclose(alone[0], both[1], atol=1e-4)
    other = cascade.sample_stage(config, params, PROMPTS, seeds=[(3, 1), (4, 1)], low_res=low)
    assert np.abs(other - both).reshape(2, -1).max(1).min() > 0.05


def test_given_video_is_blurred_as_the_config_says(light):
    """Blurred while sampling is blurred before it."""
    config, params = light.stages.ssr1, random_params(light.stages.ssr1)
    low = np.random.default_rng(2).uniform(-1, 1, (1, 8, 8, 8, 3)).astype(np.float32)
    options = {"seeds": [(3, 0)]}
    before = cascade.sample_stage(config, params, PROMPTS[:1], low_res=augment.blur(low, jnp.array([1.5])), **options)
    config.sample.augmentation_blur = 1.5
    np.testing.assert_allclose(
        cascade.sample_stage(config, params, PROMPTS[:1], low_res=low, **options), before, atol=1e-4
    )


def test_video_of_the_user_is_enlarged(light, tmp_path, caplog):
    """ssr1 is given 8 frames of 8 × 8 at 6 a second; the clip has 30 of 48 × 64 at 20."""
    rng = np.random.default_rng(0)
    clip = tmp_path / "clip.mp4"
    video_io.write_video(clip, rng.uniform(-1, 1, (30, 48, 64, 3)).astype(np.float32), fps=20)
    with caplog.at_level("INFO", logger="ivideo"):
        paths = generate.generate(
            light, PROMPTS[:1], str(tmp_path / "new.mp4"), from_stage="ssr1", to_stage="ssr2", input_path=str(clip)
        )
    assert (
        "is 48×64 at 20 fps: its first 1.33 seconds are resampled to 8 frames of 8×8 at 6 fps for ssr1" in caplog.text
    )
    frames, fps = video_io.read_video(paths[0])
    assert (frames.shape, fps) == ((8, 32, 32, 3), 6)


def test_small_inputs_that_cannot_be(small, tmp_path):
    def run(clip, **options):
        generate.generate(small, PROMPTS[:1], str(tmp_path / "new.mp4"), input_path=clip, **options)

    missing = str(tmp_path / "none.mp4")
    with pytest.raises(UserError, match="stage base starts from noise; begin with --from_stage=tsr1"):
        run(missing)
    with pytest.raises(UserError, match=r"none.mp4"):
        run(missing, from_stage="ssr1")
    with pytest.raises(UserError, match="stage ssr1 upsamples a video of 8×8: pass one with --input"):
        run(None, from_stage="ssr1")
    for name, data in (("corrupt.mp4", b"\0\0\0\x18ftypmp42 not a video"), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            run(str(tmp_path / name), from_stage="ssr1")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with pytest.raises(UserError, match=r"sound.wav has audio streams and no video"):
        run(str(tmp_path / "sound.wav"), from_stage="ssr1")
    video_io.write_video(tmp_path / "one.gif", np.zeros((1, 32, 32, 3), np.float32), fps=6)
    with pytest.raises(UserError, match=r"one.gif ends after 1 of these frames, expected a video of 8 frames"):
        run(str(tmp_path / "one.gif"), from_stage="ssr1")
    assert not (tmp_path / "new.mp4").exists()


def test_stage_trained_on_crops_works_at_other_sizes():
    """The last stage is fully convolutional: its batches are crops, and it enlarges any size its strides divide."""
    config = cascade_config.get_config("small").stages.ssr3
    encoder = cascade.load_encoder(config.text)
    batch = next(make_data(config, encoder))
    assert batch["video"].shape[1:] == (config.train.crop_frames, config.train.crop_height, config.train.crop_width, 3)
    assert batch["video"].shape[1:] != stages.video_shape(config)
    for low in ((1, 3, 12, 20, 3), (1, 5, 8, 8, 3)):
        video = cascade.sample_stage(
            config, random_params(config), PROMPTS[:1], seeds=[(0, 0)], low_res=np.zeros(low, np.float32)
        )
        assert video.shape == (1, low[1], 2 * low[2], 2 * low[3], 3)


def test_windows_are_sampled_without_seams():
    """In windows: the same noise, and nearly the same video where the network is local."""
    config = cascade_config.get_config("small").stages.ssr3
    low = np.random.default_rng(0).uniform(-1, 1, (1, 4, 32, 32, 3)).astype(np.float32)
    params = random_params(config)
    options = {"seeds": [(0, 0)], "low_res": low}
    whole = cascade.sample_stage(config, params, PROMPTS[:1], **options)
    config.sample.window, config.sample.overlap = (0, 32, 64), (0, 16, 0)
    parts = cascade.sample_stage(config, params, PROMPTS[:1], **options)
    assert parts.shape == whole.shape
    assert np.abs(parts - whole).mean() < 0.25 * np.abs(whole - whole.mean()).mean()


def test_small_evaluation_of_the_cascade(light, capsys, monkeypatch):
    """Of true clips, whose backgrounds go from black to a little brighter, and of the base's true clips with grain."""

    def true_clips(configs, texts, *, seeds, wanted, **_):
        assert wanted == {name: {*range(6)} for name in light.order}
        for config, grain in ((configs[0], 3.0), (configs[-1], 0.0)):
            for row, (text, (_, n)) in enumerate(zip(texts, seeds, strict=True)):
                clip = shapes.render(shapes.parse_caption(text), n, frames=config.video.frames, height=96, width=160)
                noise = grain / 127.5 * np.random.default_rng(n).normal(size=clip.shape)
                yield config, row, clip + noise + np.linspace(0, 2 / 127.5, len(clip))[:, None, None, None]

    monkeypatch.setattr(cascade, "run", true_clips)
    found = evaluate.evaluate(light, clips=6)
    table, rows = found["table"], found["clips"]
    for group in ("seen", "held_out"):
        assert (table[group]["clips"], table[group]["all"]) == (3, 1.0)
    np.testing.assert_allclose(table["largest_drift"], 2, atol=1e-3)
    assert [(row["number"], row["stage"]) for row in rows] == [(n, s) for n in range(6) for s in ("base", "ssr3")]
    base, last = table["stages"]["base"], table["stages"]["ssr3"]
    assert last == table["correct"] and last["clips"] == 6
    assert last["ideal_iou"] > 0.995 and last["grain"] < 0.01
    assert base["grain"] == pytest.approx(3, abs=0.05)
    assert last["drift"] == pytest.approx(2, abs=1e-3) and base["drift"] == pytest.approx(2, abs=0.2)
    held_out = [row for row in rows if row["held_out"] and row["stage"] == "ssr3"]
    kind = prompt_following.held_out_kind(shapes.parse_caption(held_out[0]["caption"]))
    assert table[kind]["all"] == 1.0
    out = capsys.readouterr().out
    assert "| held-out | 3 | 100.0% ± 0.0 |" in out
    assert f"| {kind} | {table[kind]['clips']} | 100.0%" in out
    assert "| base | 6 | 100.0% ± 0.0 | 100.0% ± 0.0 | 0.9" in out
    assert "| ssr3, correct clips | 6 |" in out
    assert "first to last frame: 2.0 of 255" in out


def test_small_describe_names_what_a_stage_is_given():
    found = describe.facts(cascade_config.get_config("paper").stages.tsr2)
    assert found["input"] == {"kind": "video", "frames": 32, "height": 192, "width": 320, "fps": 6, "channels": 3}
    assert found["output"] == {"frames": 64, "height": 192, "width": 320}


def test_evaluation_of_a_super_resolution_stage(light, capsys):
    """What it is compared with is the trivial way back, measured here again."""
    config = light.stages.tsr2
    found = evaluate.evaluate(config, clips=3)
    assert [shapes.held_out(shapes.parse_caption(row["caption"])) for row in found["clips"]] == [True] * 3
    frames, height, width, _ = stages.video_shape(config)
    errors = []
    for number, row in enumerate(found["clips"]):
        attributes = shapes.parse_caption(row["caption"])
        truth = shapes.render(attributes, number, frames=frames, height=height, width=width)
        errors.append(np.mean((truth[::2].repeat(2, axis=0) - truth) ** 2))
        assert (row["trivial"] == np.inf) == (attributes.motion == "still")
        assert {"ideal_iou", "steady_iou", "grain"} <= {*row}
    np.testing.assert_allclose(found["table"]["trivial"], 10 * np.log10(4 / np.mean(errors)), rtol=1e-4)
    assert "| tsr2 | 3 | " in capsys.readouterr().out


def test_shipped_weights_fit_their_configs():
    """All stages and the text encoder, under 40 MB, each of the network its config describes."""
    config = cascade_config.get_config("demo")
    folder = importlib.resources.files("ivideo") / "demo" / "weights"
    files = {p.name.removesuffix(".safetensors"): p for p in folder.iterdir()}
    assert {*files} == {"text", *config.order}
    assert sum(p.stat().st_size for p in files.values()) < 40e6
    for name in config.order:
        stage = config.stages[name]
        shapes = jax.tree.map(lambda s: s.shape, stages.param_shapes(stage))
        assert jax.tree.map(jnp.shape, trained.load(stage, None)) == shapes


@pytest.mark.parametrize("name, gain", [("tsr1", 3), ("ssr1", 3)])
def test_shipped_stage_is_better_than_the_trivial_way(name, gain):
    """By decibels on held-out captions; the later stages, which take longer, are measured by --mode=evaluate."""
    config = cascade_config.STAGES[name].get_config("demo")  # in a cascade its settings are for what a stage made
    table = evaluate.super_resolution(config, clips=2, seed=5)["table"]
    assert table["stage"] > table["trivial"] + gain


def test_small_defects_of_videos_and_the_weights_that_made_them():
    """A clip that differs by one 8-bit level in one channel has no defect."""
    clip = np.full((2, 4, 4, 3), -1.0, np.float32)
    assert cascade.defect(clip) == cascade.ONE_COLOUR
    assert cascade.defect(clip + np.float32([0, 0.5, 1])) == cascade.ONE_COLOUR
    clip[1, 2, 3, 1] += 2 / 255
    assert cascade.defect(clip) is None
    clip[0, 0, 0, 0] = np.inf
    assert cascade.defect(clip) == cascade.NOT_FINITE
    sources, identities = {"base": "runs/base", "ssr1": "a.safetensors"}, {"base": "step 400, saved 1a2b", "ssr1": "ff"}
    assert [cascade._weights(stage, sources, identities) for stage in ("base", "ssr1", "ssr2")] == [
        " (step 400 of runs/base)",
        " (a.safetensors)",
        "",
    ]

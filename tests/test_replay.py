"""Recipes in video files: what they hold, and videos that are sampled again from them."""

import json

import light_cascade
import ml_collections
import numpy as np
import pytest
from shared_programs import random_params

from configs import base, cascade
from ivideo import __version__, main, recipe, stages
from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.sampling import generate, recipes
from ivideo.sampling.replay import replay
from ivideo.weights import config_metadata, save_params

pytestmark = pytest.mark.usefixtures("shared_programs")
PROMPT = "a red star moving left on a teal background"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A light cascade, and a folder with weights of its first stages."""
    folder = tmp_path_factory.mktemp("weights")
    return light_cascade.save(folder, "base", "tsr1", "ssr1", steps=2, batch=3), str(folder)


def make(exported, out, **options):
    config, weights = exported
    return generate.generate(config, [PROMPT, "", PROMPT], str(out), weights_path=weights, **options)


def test_small_a_video_is_made_again_bit_for_bit(exported, tmp_path, capsys):
    """The second video of a prompt, of a batch of three, enlarged."""
    paths = make(exported, tmp_path / "out", to_stage="base", seed=2**63, zoom=2)
    capsys.readouterr()
    again = str(tmp_path / "again.mp4")
    result = replay(paths[2], weights_path=exported[1], out=again)
    assert result == {"equal": True, "different": 0.0, "largest": 0, "psnr": None}
    assert capsys.readouterr().out == f"{paths[2]}: the same 4 frames of 8×8, bit for bit\n"
    assert recipes.read(paths[2])["number"] == 1
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "out" / "002.mp4").read_bytes()


def test_videos_of_two_stages_and_gifs_are_made_again(exported, tmp_path):
    paths = make(exported, tmp_path / "out", to_stage="tsr1", save_stages=True)
    assert replay(paths[1], weights_path=exported[1])["equal"]
    assert replay(str(tmp_path / "out" / "000.base.mp4"), weights_path=exported[1])["equal"]
    config, weights = exported
    (gif,) = generate.generate(config.stages.base, [PROMPT], str(tmp_path / "a.gif"), same_noise=True,
                               weights_path=f"{weights}/base.safetensors")  # fmt: skip
    assert replay(gif, weights_path=f"{weights}/base.safetensors")["equal"]


def test_videos_of_other_batches_devices_and_meshes(exported, tmp_path):
    """However a video was made, the same device kind makes it again: to the bit on the same mesh, else to rounding."""
    config, weights = exported
    variants = {
        "batch": {"batch": 1},
        "devices": {"batch": 8},
        "mesh": {"batch": 2, "mesh.frames": 2, "mesh.height": 2},
    }
    for name, changes in variants.items():
        made = config.copy_and_resolve_references()
        made.stages.base.sample.update_from_flattened_dict(changes)
        prompts = [PROMPT] * made.stages.base.sample.batch
        (path, *_) = generate.generate(made.stages.base, prompts, str(tmp_path / name), in_folder=True,
                                       weights_path=f"{weights}/base.safetensors")  # fmt: skip
        result = replay(path, weights_path=f"{weights}/base.safetensors")
        assert result["equal"] or (result["largest"] <= 1 and result["different"] < 1e-3), (name, result)


def test_a_clip_is_needed_again(exported, tmp_path):
    clip, other = str(tmp_path / "clip.mp4"), str(tmp_path / "other.mp4")
    rng = np.random.default_rng(0)
    for path in (clip, other):
        video_io.write_video(path, rng.uniform(-1, 1, (8, 8, 8, 3)), fps=6)
    config, weights = exported
    one = {"weights_path": f"{weights}/ssr1.safetensors"}
    (path,) = generate.generate(config.stages.ssr1, [PROMPT], str(tmp_path / "up.mp4"), input_path=clip, **one)
    assert replay(path, clip=clip, **one)["equal"]
    with pytest.raises(UserError, match="up.mp4 was made from a clip: give that file with --clip"):
        replay(path, **one)
    with pytest.raises(UserError, match="other.mp4 is another file than the one that .*up.mp4 was made from"):
        replay(path, clip=other, **one)


def test_small_what_cannot_be_made_again_is_named(exported, tmp_path):
    path, *_ = make(exported, tmp_path / "out", to_stage="base")
    weights = exported[1]
    other = tmp_path / "base.safetensors"
    save_params(str(other), random_params(exported[0].stages.base, seed=3), dtype=np.float32,
                metadata=config_metadata(exported[0].stages.base))  # fmt: skip
    with pytest.raises(UserError, match="000.mp4 was made with weights .* of stage base, and these are "):
        replay(path, weights_path=str(other))
    with pytest.raises(UserError, match="--clip=x.mp4: .*000.mp4 was made from its prompt alone"):
        replay(path, weights_path=weights, clip="x.mp4")
    with pytest.raises(UserError, match=r"000.mp4 exists: choose another --out, or pass --overwrite"):
        replay(path, weights_path=weights, out=path)
    found = recipes.read(path)
    frames, fps = video_io.read_video(path)

    def edited(**changes):
        edited_path = str(tmp_path / "edited.mp4")
        metadata = {key: value for key, value in (found | changes).items() if value is not None}
        video_io.write_video(edited_path, frames, fps=fps, metadata=metadata, overwrite=True)
        return edited_path

    with pytest.raises(UserError, match=r"edited.mp4 has no recipe \(batch is missing\)"):
        replay(edited(batch=None), weights_path=weights)
    for changes in ({"changes": {}}, {"config": "cascade:huge"}, {"changes": {"stages.base.sample.pace": 3}}):
        with pytest.raises(UserError, match=f"of version {__version__} .*install that version"):
            replay(edited(**changes), weights_path=weights)
    result = replay(edited(frames="0" * 32), weights_path=weights)
    assert not result["equal"] and result["largest"] <= 40  # the file was encoded twice
    assert 25 < result["psnr"] < 80


def test_small_difference_is_in_decibels(exported, tmp_path, capsys):
    path, *_ = make(exported, tmp_path / "out", to_stage="base")
    found = recipes.read(path)
    brighter = str(tmp_path / "brighter.gif")
    video_io.write_video(brighter, np.zeros((4, 8, 8, 3), np.uint8), fps=3, metadata=found | {"frames": "0" * 32})
    with pytest.MonkeyPatch.context() as patch:
        made = np.full((4, 8, 8, 3), 51 / 127.5 - 1, np.float32)
        patch.setattr("ivideo.sampling.cascade.run", lambda *_, **__: (video for video in [(None, 0, made)]))
        result = replay(brighter, weights_path=exported[1])
    assert result == {"equal": False, "different": 1.0, "largest": 51, "psnr": pytest.approx(20 * np.log10(5))}
    assert "100.00% of the values of its 4 frames of 8×8 differ, by at most 51 of 255 (PSNR 14.0 dB)" in (
        capsys.readouterr().out
    )


def configs_of(config):
    return list(config.stages.values()) if "stages" in config else [config]


@pytest.mark.parametrize("variant", ["small", "demo", "paper"])
def test_small_recipes_give_the_config_back(variant):
    """As JSON: of a stage and of cascades, with students and with changed values."""
    mixed = stages.distilled(cascade.get_config(variant), only=["base", "ssr2"])
    changed = cascade.get_config(variant)
    ssr1 = changed.stages.ssr1
    ssr1.sample.steps, ssr1.model.channels = 3, (4,) * len(ssr1.model.channels)
    own = base.get_config(variant).copy_and_resolve_references()
    with own.unlocked():
        own.variant = "mine"
    for config in (base.get_config(variant), cascade.get_config(variant), mixed, changed, own):
        configs = configs_of(config)
        found = recipes.settings(config, configs)
        found |= {"stages": " ".join(c.stage for c in configs), "ivideo_version": "0"}
        again = recipes.config_from(json.loads(json.dumps(found)))
        for before in configs:
            after = again.stages[before.stage] if "stages" in again else again
            assert recipe.video_settings(before) == recipe.video_settings(after)
            assert before.model.channels == after.model.channels and type(after.model.channels) is tuple
    assert recipes.settings(mixed, configs_of(mixed))["changes"] == {}
    assert recipes.settings(changed, configs_of(changed))["changes"].keys() == {
        "stages.ssr1.sample.steps", "stages.ssr1.model.channels"
    }  # fmt: skip


def test_small_recipe_of_stages_that_the_package_does_not_have():
    config = base.get_config("small").copy_and_resolve_references()
    with config.unlocked():
        config.stage, config.extra = "ssr9", ml_collections.ConfigDict({"values": ((1, 2), 3)})
    found = recipes.settings(config, [config]) | {"stages": "ssr9", "ivideo_version": "0"}
    assert found["config"] == ""
    again = recipes.config_from(json.loads(json.dumps(found)))
    assert again.extra["values"] == ((1, 2), 3) and recipe.flat(again) == recipe.flat(config)


def test_small_recipe_is_shown(exported, tmp_path, capsys, command_line):
    path, *_ = make(exported, tmp_path / "out", to_stage="base")
    capsys.readouterr()
    assert main.main(["ivideo", "--mode=show", f"--input={path}"]) == 0
    lines = {line[:24].rstrip(): line[24:] for line in capsys.readouterr().out.splitlines()}
    assert (lines["prompt"], lines["batch.base"], lines["config"]) == (PROMPT, "3", "cascade:small")
    assert recipes.show(path, as_json=True) == json.loads(capsys.readouterr().out) == recipes.read(path)


def test_small_recipe_is_left_out_if_asked(exported, tmp_path):
    path, *_ = make(exported, tmp_path / "out", to_stage="base", with_recipe=False)
    assert video_io.read_metadata(path) == {}
    with pytest.raises(UserError, match="000.mp4 has no recipe .*--metadata=none"):
        replay(path)
    with pytest.raises(UserError, match="--resume compares the recipes .* --metadata=none leaves them out"):
        make(exported, tmp_path / "out", to_stage="base", with_recipe=False, resume=True)

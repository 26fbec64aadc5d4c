"""Invalid values for every key of every config: a one-line UserError names the key."""

import functools
import math

import jax
import pytest
from test_structure import leaves

from configs import base, cascade, ssr1
from ivideo import checks, stages
from ivideo.errors import UserError
from ivideo.planning import describe

BAD = ("abc", 0, -1, math.nan, math.inf, None, ())
# What a stage's config may hold of these values, by the end of the key's name
ALLOWED = {
    "abc": {
        "stage",
        "variant",
        "checkpoint",
        "tokenizer",
        "dir",
        "split",
        "text_cache",
        "start",
        "i3d",
        "inception",
        "clip",
        "label_template",
        "caption_feature",
        "image_dir",
    },
    0: {
        *(
            "seed",
            "learning_rate",
            "scan_unroll",
            "logsnr_min",
            "logsnr_max",
            "logsnr_shift",
            "num_clips",
            "workers",
            "max_unreadable",
        ),
        *("num_images", "max_skipped", "spike", "max_rollbacks", "hang_seconds", "warmup", "ema", "text_dropout"),
        *("augmentation_min", "augmentation_blur", "crop_frames", "crop_height", "crop_width", "image_weight"),
        *(
            "sample_every",
            "evaluate_every",
            "gamma",
            "weight",
            "high_weight",
            "low_weight",
            "constant_share",
            "w_min",
            "w_max",
        ),
        *(
            "agreement_every",
            "min_seconds",
            "min_fps",
            "min_scale",
            "max_cropped",
            "min_motion",
            "duplicate_bits",
            "gop",
            "timeout",
        ),
    },
    -1: {"duplicate_bits", "logsnr_min", "logsnr_max", "logsnr_shift", "augmentation_min", "mesh.data"},
    None: {"checkpoint"},
}


def change(config, key, value):
    """Sets a value whatever its type, as a config file may."""
    *groups, name = key.split(".")
    with config.unlocked(), config.ignore_type():
        functools.reduce(lambda node, group: node[group], groups, config)[name] = value
    return config


@pytest.mark.parametrize("stage", [base, ssr1])
def test_small_every_key_refuses_what_cannot_work(stage):
    good = stage.get_config("small")
    accepted = []
    for key in leaves(good):
        before = functools.reduce(lambda node, name: node[name], key.split("."), good)
        for value in BAD:
            change(good, key, value)
            try:
                checks.check(good)
            except UserError as e:
                assert "\n" not in str(e) and "config." in str(e), (key, value, e)
            else:
                if value != before and not (key.startswith("cond.") and not before):
                    assert any(key == name or key.endswith("." + name) for name in ALLOWED.get(value, ())), (key, value)
                    accepted.append((key, value))
        change(good, key, before)
    checks.check(good)
    # What is allowed can be traced
    for key, value in accepted:
        if key.startswith(("model.", "text.")) and value == 0:
            assert describe.facts(change(stage.get_config("small"), key, value))["parameters"] > 0


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.channels", (7,), "config.model.head_dim = 8 does not divide the 7 channels"),
        ("model.head_dim", 7, "config.model.head_dim = 7 does not divide the 8 channels"),
        ("model.channels", (8, 8), "config.model.blocks = (1,) has 1 entries, but model.channels has 2"),
        ("cond.height", 3, "config.cond.height = 3: stage base makes videos from noise"),
        ("train.crop_height", 4, "config.train.crop_height = 4: stage base makes videos from noise"),
        ("train.crop_frames", 17, "config.train.crop_frames = 17: expected up to 4, or 0 for all"),
        ("train.warmup", -5, "config.train.warmup = -5: expected a whole number, 0 or more"),
        ("train.learning_rate", math.nan, "config.train.learning_rate = nan: expected a number, 0 or more"),
        ("train.start", "None", "config.train.start = 'None': expected a path, or nothing after the = for none"),
        ("train.sample_prompts", "a star", "config.train.sample_prompts = 'a star': expected one or more values"),
        ("sample.window", (4, 8), "config.sample.window = (4, 8): expected 3 values"),
        ("train.mesh.fsdp", -1, "config.train.mesh has -1 more than once"),
        ("diffusion.logsnr_min", 5.0, "config.diffusion.logsnr_min = 5.0: expected less than"),
    ],
)
def test_small_values_that_do_not_go_together_are_named(key, value, said):
    with pytest.raises(UserError) as e:
        checks.check(change(base.get_config("small"), key, value))
    assert said in str(e.value)


def test_small_channels_without_attention_need_no_heads():
    config = base.get_config("small")
    config.model.channels = (7,)
    config.model.spatial_attention = config.model.cross_attention = (False,)
    config.model.temporal = ("convolution",)
    checks.check(config)
    assert jax.tree.leaves(stages.param_shapes(config))


def test_small_missing_and_unknown_keys_are_named():
    config = base.get_config("small")
    with config.unlocked():
        del config.sample.high_weight
    with pytest.raises(UserError, match=r"config\.sample\.high_weight is missing: compare your config"):
        checks.check(config)
    config = base.get_config("small")
    with config.unlocked():
        config.train.batchsize = 3
    with pytest.raises(UserError, match=r"train\.batchsize is a key that nothing reads: did you mean config\.train\.b"):
        checks.check(config)
    with pytest.raises(UserError, match=r"config\.train = 3: expected the keys mesh, .*"):
        checks.check(change(base.get_config("small"), "train", 3))


def test_small_a_stage_of_the_cascade_is_named():
    config = cascade.get_config("small")
    checks.check(config)
    with pytest.raises(UserError, match=r"config\.stages\.ssr2\.sample\.steps = 0: expected a whole number, 1 or more"):
        checks.check(change(config, "stages.ssr2.sample.steps", 0))
    with pytest.raises(UserError, match=r"config\.stages\.ssr2 = 3: expected the keys stage, variant, .*"):
        checks.check(change(cascade.get_config("small"), "stages.ssr2", 3))
    for order in ((), ("base", "ssr9"), "base", None):
        with pytest.raises(UserError, match=r"config\.order = .*: expected one or more values"):
            checks.check(change(cascade.get_config("small"), "order", order))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.guidance_input", True, "config.model.guidance_input = True of config.phase = '': distilled networks"),
        ("phase", "8", "config.model.guidance_input = False of config.phase = '8': distilled networks"),
        ("distill.end_steps", 7, "config.distill.end_steps = 7, config.distill.teacher_steps = 16: Halving 16 steps"),
        ("distill.end_steps", 32, "config.distill.end_steps = 32, config.distill.teacher_steps = 16: Halving 16"),
        ("distill.w_min", 5.0, "config.distill.w_min = 5.0, config.distill.w_max = 4.0: expected w_min up to w_max"),
        ("distill.w_max", 20.0, "w_max up to config.model.max_guidance = 16.0"),
    ],
)
def test_small_wrong_recipes_of_distillation_are_named(key, value, said):
    with pytest.raises(UserError) as e:
        checks.check(change(base.get_config("small"), key, value))
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("phase", "key", "value", "said"),
    [
        ("4", "sample.sampler", "distilled", "the student of phase 4 is for 'ddim' in 4 steps"),
        ("4", "sample.steps", 2, "config.sample.steps = 2: the student of phase 4 is for 'ddim' in 4 steps"),
        ("2_stochastic", "sample.sampler", "ddim", "the student of phase 2_stochastic is for 'distilled' in 2 steps"),
        ("guidance", "sample.sampler", "distilled", "the student of phase guidance is for 'ddim'"),
        ("4", "sample.weight", 5.0, "config.sample.weight = 5.0: expected a guidance weight that students are trained"),
        ("4", "sample.guidance", "oscillating", "config.sample.high_weight = 15.0: expected a guidance weight"),
    ],
)
def test_small_a_student_is_sampled_as_it_was_made_to_be(phase, key, value, said):
    good = stages.distilled(base.get_config("small"), phase)
    checks.check(good)
    with pytest.raises(UserError) as e:
        checks.check(change(good, key, value))
    assert said in str(e.value)


def test_small_the_student_of_guidance_is_sampled_as_the_original():
    for key, value in (("sample.sampler", "ancestral"), ("sample.steps", 12)):
        checks.check(change(stages.distilled(base.get_config("small"), "guidance"), key, value))


def test_small_only_originals_are_trained():
    checks.check_original(base.get_config("small"))
    with pytest.raises(UserError, match=r"config\.phase = '2_stochastic': .* choose the variant without _distilled"):
        checks.check_original(stages.distilled(base.get_config("small")))


@pytest.mark.parametrize("variant", ["paper", "demo", "small"])
@pytest.mark.parametrize("stage", cascade.STAGES)
def test_small_constant_guidance_is_the_papers_wherever_oscillation_is_not(stage, variant):
    """Section 2.6.2: a weight of 15 oscillates with 1, up to 48 × 80 pixels; 6 is constant."""
    sample = cascade.STAGES[stage].get_config(variant).sample
    assert (sample.high_weight, sample.low_weight) == (15.0, 1.0)
    if variant == "paper":
        assert sample.weight == 6.0
        assert (sample.guidance == "oscillating") == (stage in ("base", "tsr1", "ssr1"))


def test_small_a_constant_weight_and_an_oscillating_one_are_two_keys(monkeypatch):
    """What each kind of guidance is given: `weight`, or `high_weight` and `low_weight`."""
    weights = []
    monkeypatch.setattr(stages.guidance, "classifier_free", lambda with_text, without, weight: weights.append(weight))
    config = base.get_config()
    for kind in ("constant", "oscillating"):
        config.sample.guidance = kind
        stages.guided_denoiser(config, None, None, None, jax.numpy.ones((1, 4), bool))
    constant, oscillating = weights
    assert constant == 6.0
    logsnr = stages.logsnr_fn(config)(1 - jax.numpy.arange(28) / config.sample.steps)
    assert oscillating(logsnr).tolist() == [15.0] * 26 + [1.0, 15.0]

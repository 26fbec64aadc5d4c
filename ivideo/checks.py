"""What the values of a stage's config must be, so that a mistake is one line before anything is compiled or written."""

import dataclasses
import difflib
import functools
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ivideo import files, stages
from ivideo.devices import sharding
from ivideo.diffusion import conditioning
from ivideo.diffusion.process import LOSS_KINDS
from ivideo.errors import UserError
from ivideo.models.blocks import TEMPORAL
from ivideo.models.unet import PREDICTIONS


@dataclasses.dataclass(frozen=True)
class Value:
    """What a key's value must be: `expected` says it to a reader, `allows` tells whether a value is so."""

    expected: str
    allows: Callable[[Any], bool]


def whole(least: int, most: int | None = None) -> Value:
    """A whole number from `least` to `most`, or of any size above `least`."""

    def allows(value):
        integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return integer and least <= value and (most is None or value <= most)

    return Value(f"a whole number, {least} or more" if most is None else f"a whole number, {least} to {most}", allows)


def number(expected: str, allows: Callable[[float], bool] = lambda value: True) -> Value:
    """A finite number that also satisfies `allows`."""

    def finite(value):
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)

    return Value(expected, lambda value: finite(value) and allows(value))


def choice(*options: str) -> Value:
    """One of some words."""
    return Value(f"one of {', '.join(options)}", lambda value: value in options)


def several(item: Value, count: int | None = None) -> Value:
    """A tuple or list of values of one kind: `count` of them, or one or more."""

    def allows(values):
        if not isinstance(values, tuple | list) or not values or count not in (None, len(values)):
            return False
        return all(map(item.allows, values))

    return Value(f"{count or 'one or more'} values with commas between them, each {item.expected}", allows)


SWITCH = Value("True or False", lambda value: isinstance(value, bool))
NAME = Value("a name", lambda value: isinstance(value, str) and value.strip() != "")
TEXT = Value("a text", lambda value: isinstance(value, str))
# "None" on a command line is meant as no path. A file of that name can be given as ./None
PATH = Value(
    "a path, or nothing after the = for none", lambda value: isinstance(value, str) and value.lower() != "none"
)
PATH_OR_NONE = Value(PATH.expected, lambda value: value is None or PATH.allows(value))
SIZE, COUNT, SEED = whole(1), whole(0), whole(0, 2**32 - 2)  # a seed and the next one are 32 bits
ANY, NOT_NEGATIVE = number("a number"), number("a number, 0 or more", lambda value: value >= 0)
POSITIVE = number("a number above 0", lambda value: value > 0)
SHARE = number("a share from 0 to 1", lambda value: 0 <= value <= 1)
PERCENT = number("a number above 0, up to 100", lambda value: 0 < value <= 100)
SPIKE = number("0 for none, or a number above 1", lambda value: value == 0 or value > 1)
DEVICES = Value(
    "a whole number, 1 or more, or -1 for all devices that are left", lambda value: value == -1 or SIZE.allows(value)
)
DTYPE = choice("float32", "bfloat16")
MESH = dict.fromkeys(sharding.AXES, DEVICES)
CLIP = {"frames": SIZE, "height": SIZE, "width": SIZE, "fps": SIZE}

KEYS = {
    "stage": NAME,
    "variant": NAME,
    "seed": SEED,
    "video": CLIP,
    "cond": {**dict.fromkeys(CLIP, COUNT), "fill": choice(*conditioning.FILLS)},
    "model": {
        "channels": several(SIZE),
        "blocks": several(SIZE),
        "strides": several(SIZE),
        "spatial_attention": several(SWITCH),
        "cross_attention": several(SWITCH),
        "temporal": several(choice(*TEMPORAL)),
        "head_dim": SIZE,
        "max_distance": SIZE,
        "frame_positions": SWITCH,
        "prediction": choice(*PREDICTIONS),
        "data_std": POSITIVE,
        "guidance_input": SWITCH,
        "max_guidance": POSITIVE,
        "remat": choice("none", "dots", "full"),
        "scan_unroll": COUNT,
        "dtype": DTYPE,
    },
    "text": {
        "checkpoint": PATH_OR_NONE,
        "tokenizer": PATH,
        "length": SIZE,
        "dtype": DTYPE,
        "mesh": MESH,
        "batch": SIZE,
        **dict.fromkeys(("vocab", "dim", "layers", "heads", "head_dim", "ff"), SIZE),
    },
    "diffusion": {"logsnr_min": ANY, "logsnr_max": ANY, "logsnr_shift": ANY, "loss": choice(*LOSS_KINDS)},
    "data": {
        "source": choice("shapes", "tfds"),
        "dir": PATH,
        "split": NAME,
        "num_clips": COUNT,
        "text_cache": PATH,
        "workers": COUNT,
        "max_unreadable": COUNT,
        "num_images": COUNT,
    },
    "train": {
        "mesh": MESH,
        "max_skipped": COUNT,
        "spike": SPIKE,
        "max_rollbacks": COUNT,
        "hang_seconds": NOT_NEGATIVE,
        "batch_size": SIZE,
        "accumulate": SIZE,
        "steps": SIZE,
        "start": PATH,
        "optimizer": choice("adam", "adafactor"),
        "learning_rate": NOT_NEGATIVE,
        "warmup": COUNT,
        "decay": choice("constant", "cosine"),
        "clip": POSITIVE,
        "ema": SHARE,
        "text_dropout": SHARE,
        "augmentation_min": ANY,
        "augmentation_blur": NOT_NEGATIVE,
        "crop_frames": COUNT,
        "crop_height": COUNT,
        "crop_width": COUNT,
        "image_weight": NOT_NEGATIVE,
        "log_every": SIZE,
        "checkpoint_every": SIZE,
        "keep": SIZE,
        "sample_every": COUNT,
        "sample_prompts": several(TEXT),
    },
    "sample": {
        "mesh": MESH,
        "sampler": choice("ddim", "ancestral", "distilled"),
        "steps": SIZE,
        "batch": SIZE,
        "group": SIZE,
        "augmentation_snr": POSITIVE,
        "augmentation_blur": NOT_NEGATIVE,
        "window": several(COUNT, 3),
        "overlap": several(COUNT, 3),
        "gamma": SHARE,
        "guidance": choice("constant", "oscillating"),
        "weight": NOT_NEGATIVE,
        "high_weight": NOT_NEGATIVE,
        "low_weight": NOT_NEGATIVE,
        "constant_share": SHARE,
        "threshold": choice("none", "static", "dynamic"),
        "percentile": PERCENT,
    },
}


def check(config) -> None:
    """UserError for the first value of a stage's or the cascade's config that cannot work.

    It names the key as it is set on the command line. Nothing is compiled, allocated or written. Raises it too where a
    key is missing, or is one that nothing reads.
    """
    if "stages" not in config:
        return _check_stage(config)
    order = several(choice(*config.stages))
    any_stages = Value("stages", lambda value: True)
    whole_cascade = {
        "stage": NAME, "variant": NAME, "order": order, "sample": {"group": SIZE}, "stages": any_stages,
    }  # fmt: skip
    _check_keys(config, whole_cascade, "config")
    for name, stage in config.stages.items():
        try:
            _check_stage(stage)
        except UserError as e:
            raise UserError(re.sub(r"\bconfig(?=\.| = )", f"config.stages.{name}", str(e))) from e


def check_runs(config) -> None:
    """UserError where a stage or the cascade can be described and compiled, but neither trained nor sampled yet."""
    for stage in config.stages.values() if "stages" in config else [config]:
        if stage.model.guidance_input:
            raise UserError(
                f"config.model.guidance_input = True of stage {stage.stage}: nothing trains or samples a network that "
                "is told its guidance weight yet; expected False"
            )


def expand_home(config) -> None:
    """Replaces ~ at the head of every path in a stage's or the cascade's config by the home folder."""
    for stage in config.stages.values() if "stages" in config else [config]:
        for group, keys in KEYS.items():
            for name in keys if isinstance(keys, dict) else ():
                if keys[name] in (PATH, PATH_OR_NONE) and isinstance(stage.get(group, {}).get(name), str):
                    stage[group][name] = files.expand_home(stage[group][name])


def _check_stage(config) -> None:
    _check_keys(config, KEYS, "config")
    for group in ("train", "sample", "text"):
        if list(config[group].mesh.values()).count(-1) > 1:
            raise UserError(f"config.{group}.mesh has -1 more than once: one axis alone can take all that are left")
    if config.diffusion.logsnr_min >= config.diffusion.logsnr_max:
        raise UserError(
            f"config.diffusion.logsnr_min = {config.diffusion.logsnr_min}: expected less than "
            f"config.diffusion.logsnr_max = {config.diffusion.logsnr_max}"
        )
    _check_training(config)
    if config.cond.frames:
        _check_conditioning(config)
    else:
        _check_without_conditioning(config)
    _check_network(config)
    _check_windows(config)


def _check_keys(node, keys: dict, where: str) -> None:
    """UserError where a part of a config lacks a key, has one that nothing reads, or has a wrong value."""
    if not hasattr(node, "items"):
        raise UserError(f"{where} = {node!r}: expected the keys {', '.join(keys)}, such as --{where}.KEY=…")
    for name, wanted in keys.items():
        if name not in node:
            raise UserError(f"{where}.{name} is missing: compare your config with the one in configs/")
        value, inside = node[name], f"{where}.{name}"
        if isinstance(wanted, dict):
            _check_keys(value, wanted, inside)
        elif not wanted.allows(value):
            raise UserError(f"{inside} = {value!r}: expected {wanted.expected}")
    for name in node:
        if name not in keys:
            close = difflib.get_close_matches(name, keys, n=1)
            advice = f"did you mean {where}.{close[0]}?" if close else f"the keys are {', '.join(keys)}"
            raise UserError(f"{where}.{name} is a key that nothing reads: {advice}")


def _check_training(config) -> None:
    t = config.train
    if t.batch_size % t.accumulate:
        raise UserError(
            f"config.train.batch_size = {t.batch_size} cannot be split into config.train.accumulate = {t.accumulate} "
            "equal parts: choose a multiple"
        )


def _check_network(config) -> None:
    model = config.model
    try:
        for height, width in {(config.video.height, config.video.width), stages.training_shape(config)[1:3]}:
            stages.build_model(config).check(height, width)
    except ValueError as e:
        raise UserError(f"config.{e}" if str(e).startswith("model.") else str(e)) from e
    if model.channels[0] < 4:
        raise UserError(f"config.model.channels = {tuple(model.channels)}: expected 4 or more at the first level")
    attention = zip(model.channels, model.spatial_attention, model.cross_attention, model.temporal, strict=True)
    for channels, *spatial_and_text, temporal in attention:
        if (any(spatial_and_text) or temporal == "attention") and channels % model.head_dim:
            raise UserError(
                f"config.model.head_dim = {model.head_dim} does not divide the {channels} channels of a level with "
                f"attention (config.model.channels = {tuple(model.channels)}): choose a divisor"
            )


def _check_windows(config) -> None:
    window, overlap = tuple(config.sample.window), tuple(config.sample.overlap)
    if not config.cond.frames:
        if any(window):
            raise UserError(
                f"config.sample.window = {window}: stage {config.stage} makes its videos whole, expected 0,0,0"
            )
        return
    time, space = stages.window_multiple(config)
    for size, lap, unit in zip(window, overlap, (time, space, space), strict=True):
        if size % unit:
            raise UserError(
                f"config.sample.window = {window}: {size} is no multiple of {unit}. Frames must be a multiple of "
                f"{time}, height and width of {space}; 0 stands for all of the clip"
            )
        if 0 < size <= lap:
            raise UserError(
                f"config.sample.overlap = {overlap} of config.sample.window = {window}: expected less than the window"
            )


def _check_without_conditioning(config) -> None:
    """Of a stage that makes videos from noise."""
    zero = ("cond.height", "cond.width", "cond.fps", "train.crop_frames", "train.crop_height", "train.crop_width")
    for key in zero:
        if value := _value(config, key):
            raise UserError(
                f"config.{key} = {value!r}: stage {config.stage} makes videos from noise (config.cond.frames = 0), "
                f"expected {type(value)(0)}"
            )


def _value(config, key: str):
    return functools.reduce(lambda node, name: node[name], key.split("."), config)


def _check_conditioning(config) -> None:
    """Of a stage that enlarges a video."""
    if config.train.sample_every:
        raise UserError(
            f"config.train.sample_every = {config.train.sample_every}: stage {config.stage} makes nothing from "
            "prompts alone, expected 0"
        )

    if config.cond.fps < 1:
        raise UserError(f"config.cond.fps = {config.cond.fps}: expected frames a second, 1 or more")
    for axis in ("frames", "height", "width"):
        given, made, trained = config.cond[axis], config.video[axis], config.train[f"crop_{axis}"]
        if given < 1 or made % given:
            raise UserError(f"config.cond.{axis} = {given} does not divide config.video.{axis} = {made}: choose a part")
        if trained > made or trained % (made // given):
            raise UserError(
                f"config.train.crop_{axis} = {trained}: expected a multiple of {made // given}, up to {made}, or 0"
            )
    if config.video.height * config.cond.width != config.video.width * config.cond.height:
        raise UserError(
            f"frames of {config.cond.height}×{config.cond.width} cannot become {config.video.height}×"
            f"{config.video.width}: config.cond must have the aspect ratio of config.video"
        )
    if config.cond.fill == "blank" and config.model.data_std != 1:
        raise UserError(
            f"config.model.data_std = {config.model.data_std} counts on frames like those given: with config.cond.fill "
            "= 'blank' it must be 1"
        )
    if not config.train.augmentation_min < np.log(config.sample.augmentation_snr) < config.diffusion.logsnr_max:
        raise UserError(
            f"config.sample.augmentation_snr = {config.sample.augmentation_snr}: expected a ratio whose logarithm is "
            f"among the levels trained on, {config.train.augmentation_min} to {config.diffusion.logsnr_max}"
        )
    if not 0 <= config.sample.augmentation_blur <= config.train.augmentation_blur:
        raise UserError(
            f"config.sample.augmentation_blur = {config.sample.augmentation_blur}: expected pixels from 0 to those "
            f"trained on, config.train.augmentation_blur = {config.train.augmentation_blur}"
        )

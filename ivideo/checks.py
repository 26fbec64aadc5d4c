"""Validates configs, so that a mistake is reported in one line, before anything is compiled or written."""

import difflib
import functools
import re

import numpy as np

from ivideo import files, recipe, stages
from ivideo.data import mixtures
from ivideo.data.preparing import keys as preparing_keys
from ivideo.devices import sharding
from ivideo.diffusion import conditioning
from ivideo.diffusion.process import LOSS_KINDS
from ivideo.errors import UserError
from ivideo.models.blocks import TEMPORAL
from ivideo.models.unet import PREDICTIONS
from ivideo.values import Value, choice, number, several, whole

SWITCH = Value("True or False", lambda value: isinstance(value, bool))
NAME = Value("a name", lambda value: isinstance(value, str) and value.strip() != "")
TEXT = Value("a text", lambda value: isinstance(value, str))
# On a command line, "None" is usually meant as no path, so it is refused. A file of that name can be given as ./None
PATH = Value(
    "a path, or nothing after the = for none", lambda value: isinstance(value, str) and value.lower() != "none"
)
PATH_OR_NONE = Value(PATH.expected, lambda value: value is None or PATH.allows(value))
PATHS = (PATH, PATH_OR_NONE, mixtures.FOLDERS)
SIZE, COUNT, SEED = whole(1), whole(0), whole(0, 2**32 - 2)  # both a seed and seed + 1 have to fit 32 bits
ANY, NOT_NEGATIVE = number("a number"), number("a number, 0 or more", lambda value: value >= 0)
POSITIVE = number("a number above 0", lambda value: value > 0)
SHARE = number("a share from 0 to 1", lambda value: 0 <= value <= 1)
PERCENT = number("a number above 0, up to 100", lambda value: 0 < value <= 100)
SPIKE = number("0 for none, or a number above 1", lambda value: value == 0 or value > 1)
DEVICES = Value(
    "a whole number, 1 or more, or -1 for all remaining devices", lambda value: value == -1 or SIZE.allows(value)
)
DTYPE = choice("float32", "bfloat16")
MESH = dict.fromkeys(sharding.AXES, DEVICES)
CLIP = {"frames": SIZE, "height": SIZE, "width": SIZE, "fps": SIZE}


def _is_phase(value) -> bool:
    return isinstance(value, str) and (not value or stages.PHASE.fullmatch(value) is not None)


KEYS = {
    "stage": NAME,
    "variant": NAME,
    "phase": Value("'' of an original, or a phase of distillation such as '8_stochastic'", _is_phase),
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
        "dir": mixtures.FOLDERS,
        "image_dir": mixtures.FOLDERS,
        "split": NAME,
        "num_clips": COUNT,
        "text_cache": PATH,
        "workers": COUNT,
        "max_unreadable": COUNT,
        "num_images": COUNT,
    },
    "prepare": preparing_keys.KEYS,
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
        **dict.fromkeys(("sample_every", "evaluate_every"), COUNT),
        "sample_prompts": several(TEXT),
    },
    "distill": {
        **dict.fromkeys(
            ("teacher_steps", "end_steps", "guidance_updates", "round_updates", "late_round_updates"), SIZE
        ),
        "stochastic": SWITCH,
        "agreement_every": COUNT,
        "learning_rate": NOT_NEGATIVE,
        "clip": POSITIVE,
        "loss": choice(*LOSS_KINDS),
        "w_min": NOT_NEGATIVE,
        "w_max": NOT_NEGATIVE,
        "teacher_dtype": DTYPE,
    },
    "evaluate": {
        **dict.fromkeys(("i3d", "inception", "clip"), PATH),
        **dict.fromkeys(("clips", "frames", "replicates"), whole(2)),
        **dict.fromkeys(("stride", "size", "image_frames", "kernel_samples", "batch"), SIZE),
        **dict.fromkeys(("reference_clips", "height", "width"), COUNT),
        "fps": NOT_NEGATIVE,
        "antialias": SWITCH,
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
        "alternate_every": SIZE,
        "threshold": choice("none", "static", "dynamic"),
        "percentile": PERCENT,
    },
}


def check(config) -> None:
    """UserError for the first invalid value in a stage's or the cascade's config, and for missing or unknown keys.

    It names the key as it is set on the command line. Nothing is compiled, allocated or written.
    """
    if "stages" not in config:
        return _check_stage(config)
    order = several(choice(*config.stages))
    any_stages = Value("stages", lambda value: True)
    cascade_keys = {
        "stage": NAME, "variant": NAME, "order": order, "sample": {"group": SIZE}, "stages": any_stages,
        "evaluate": KEYS["evaluate"],
    }  # fmt: skip
    _check_keys(config, cascade_keys, "config")
    for name, stage in config.stages.items():
        try:
            _check_stage(stage)
        except UserError as e:
            raise UserError(re.sub(r"\bconfig(?=\.| = )", f"config.stages.{name}", str(e))) from e


def check_original(config) -> None:
    """UserError where a stage's config is a distilled network's: only original networks are trained and distilled."""
    if config.phase:
        raise UserError(
            f"config.phase = {config.phase!r}: the config is a distilled network's, expected the original's; choose "
            "the variant without _distilled (mode distill trains the students)"
        )


def expand_home(config) -> None:
    """Replaces ~ at the start of every path in a stage's or the cascade's config by the home folder."""
    for stage in [config, *config.get("stages", {}).values()]:
        for group, keys in KEYS.items():
            for name in keys if isinstance(keys, dict) else ():
                if keys[name] in PATHS and isinstance(stage.get(group, {}).get(name), str):
                    expand = mixtures.expand_home if keys[name] is mixtures.FOLDERS else files.expand_home
                    stage[group][name] = expand(stage[group][name])


def _check_stage(config) -> None:
    _check_keys(config, KEYS, "config")
    for group in ("train", "sample", "text"):
        if list(config[group].mesh.values()).count(-1) > 1:
            raise UserError(f"config.{group}.mesh has -1 more than once: only one axis can take all remaining devices")
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
    _check_distillation(config)
    _check_student(config)


def _check_keys(node, keys: dict, where: str) -> None:
    """UserError where a group of a config, named `where`, lacks a key, has an unknown one, or has an invalid value."""
    if not hasattr(node, "items"):
        raise UserError(f"{where} = {node!r}: expected the keys {', '.join(keys)}, such as --{where}.KEY=…")
    for name, constraint in keys.items():
        if name not in node:
            raise UserError(f"{where}.{name} is missing: compare your config with the one in configs/")
        value, key = node[name], f"{where}.{name}"
        if isinstance(constraint, dict):
            _check_keys(value, constraint, key)
        elif not constraint.allows(value):
            raise UserError(f"{key} = {value!r}: expected {constraint.expected}")
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
    if t.evaluate_every and len(mixtures.folders(config.data.dir)) > 1:
        raise UserError(
            f"config.train.evaluate_every = {t.evaluate_every}: expected 0 with several sets in config.data.dir"
        )


def _check_distillation(config) -> None:
    d = config.distill
    try:
        stages.phases(config)
    except ValueError as e:
        raise UserError(
            f"config.distill.end_steps = {d.end_steps}, config.distill.teacher_steps = {d.teacher_steps}: {e}"
        ) from e
    if not d.w_min <= d.w_max <= config.model.max_guidance:
        raise UserError(
            f"config.distill.w_min = {d.w_min}, config.distill.w_max = {d.w_max}: expected w_min up to "
            f"w_max, and w_max up to config.model.max_guidance = {config.model.max_guidance}"
        )


def _check_student(config) -> None:
    """Checks that the values that `config.phase` determines agree with it, for distilled and original networks."""
    sample, advice = config.sample, "choose a variant, such as --config=FILE:demo or --config=FILE:demo_distilled"
    if config.model.guidance_input != bool(config.phase):
        raise UserError(
            f"config.model.guidance_input = {config.model.guidance_input} of config.phase = {config.phase!r}: "
            f"distilled networks alone take the guidance weight as an input; {advice}"
        )
    if not config.phase:
        return
    kind, steps = stages.student(config, config.phase)
    if kind == "guidance":  # like the original: any number of steps, any sampler but the one that jumps over two steps
        wrong = sample.sampler == stages.SAMPLERS["stochastic"]
    else:
        wrong = (sample.sampler, sample.steps) != (stages.SAMPLERS[kind], steps)
    if wrong:
        raise UserError(
            f"config.sample.sampler = {sample.sampler!r}, config.sample.steps = {sample.steps}: the student of phase "
            f"{config.phase} is for {stages.SAMPLERS[kind]!r} in {steps} steps; for another student choose its "
            "variant, such as --config=FILE:demo_distilled_16"
        )
    for key, weight in recipe.guidance_weights(config).items():
        if not config.distill.w_min <= weight <= config.distill.w_max:
            raise UserError(
                f"config.sample.{key} = {weight}: expected a guidance weight that students are trained with, "
                f"config.distill.w_min = {config.distill.w_min} to config.distill.w_max = {config.distill.w_max}"
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
                f"config.sample.window = {window}: stage {config.stage} does not sample in windows, expected 0,0,0"
            )
        return
    time, space = stages.window_multiple(config)
    for size, lap, unit in zip(window, overlap, (time, space, space), strict=True):
        if size % unit:
            raise UserError(
                f"config.sample.window = {window}: {size} is not a multiple of {unit}. Frames must be a multiple of "
                f"{time}, height and width of {space}; 0 stands for the clip's size"
            )
        if 0 < size <= lap:
            raise UserError(
                f"config.sample.overlap = {overlap} of config.sample.window = {window}: expected less than the window"
            )


def _check_without_conditioning(config) -> None:
    """Checks a stage without conditioning, which generates videos from noise."""
    zero = ("cond.height", "cond.width", "cond.fps", "train.crop_height", "train.crop_width")
    for key in zero:
        if value := _value(config, key):
            raise UserError(
                f"config.{key} = {value!r}: stage {config.stage} makes videos from noise (config.cond.frames = 0), "
                f"expected {type(value)(0)}"
            )
    if config.train.crop_frames > config.video.frames:
        raise UserError(
            f"config.train.crop_frames = {config.train.crop_frames}: expected up to {config.video.frames}, or 0 for all"
        )


def _value(config, key: str):
    return functools.reduce(lambda node, name: node[name], key.split("."), config)


def _check_conditioning(config) -> None:
    """Checks a super-resolution stage."""
    for key in ("train.sample_every", "train.evaluate_every"):
        if value := _value(config, key):
            raise UserError(
                f"config.{key} = {value}: stage {config.stage} cannot sample from prompts alone, expected 0"
            )
    if config.cond.fps < 1:
        raise UserError(f"config.cond.fps = {config.cond.fps}: expected 1 or more frames per second")
    for axis in ("frames", "height", "width"):
        low_res, output, crop = config.cond[axis], config.video[axis], config.train[f"crop_{axis}"]
        if low_res < 1 or output % low_res:
            raise UserError(
                f"config.cond.{axis} = {low_res} does not divide config.video.{axis} = {output}: choose a divisor"
            )
        if crop > output or crop % (output // low_res):
            raise UserError(
                f"config.train.crop_{axis} = {crop}: expected a multiple of {output // low_res}, up to {output}, or 0"
            )
    if config.video.height * config.cond.width != config.video.width * config.cond.height:
        raise UserError(
            f"frames of {config.cond.height}×{config.cond.width} cannot be upsampled to {config.video.height}×"
            f"{config.video.width}: config.cond must have the aspect ratio of config.video"
        )
    if config.cond.fill == "blank" and config.model.data_std != 1:
        raise UserError(
            f"config.model.data_std = {config.model.data_std} is about the upsampled low-resolution clip: with "
            "config.cond.fill = 'blank', which inserts blank frames in it, data_std must be 1"
        )
    if not config.train.augmentation_min < np.log(config.sample.augmentation_snr) < config.diffusion.logsnr_max:
        raise UserError(
            f"config.sample.augmentation_snr = {config.sample.augmentation_snr}: expected a ratio whose logarithm is "
            f"in the range of training, {config.train.augmentation_min} to {config.diffusion.logsnr_max}"
        )
    if not 0 <= config.sample.augmentation_blur <= config.train.augmentation_blur:
        raise UserError(
            f"config.sample.augmentation_blur = {config.sample.augmentation_blur}: expected pixels from 0 to the "
            f"largest of training, config.train.augmentation_blur = {config.train.augmentation_blur}"
        )

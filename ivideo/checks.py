"""What the values of a stage's config must be, so that a mistake is one line before anything is compiled or written."""

import functools

import numpy as np

from ivideo import conditioning, stages
from ivideo.diffusion import LOSS_KINDS
from ivideo.errors import UserError

CHOICES = {
    "cond.fill": conditioning.FILLS,
    "diffusion.loss": LOSS_KINDS,
    "model.remat": ("none", "dots", "full"),
    "model.dtype": ("float32", "bfloat16"),
    "data.source": ("shapes", "tfds"),
    "train.optimizer": ("adam", "adafactor"),
    "train.decay": ("constant", "cosine"),
    "sample.sampler": ("ddim", "ancestral", "distilled"),
    "sample.guidance": ("constant", "oscillating"),
    "sample.threshold": ("none", "static", "dynamic"),
    "text.dtype": ("float32", "bfloat16"),
}
POSITIVE = (
    "video.frames", "video.height", "video.width", "video.fps", "train.batch_size", "train.accumulate", "train.steps",
    "train.log_every", "train.checkpoint_every", "train.keep", "sample.steps", "sample.batch", "text.length",
    "text.batch",
)  # fmt: skip
NOT_NEGATIVE = ("train.max_skipped", "train.spike", "train.max_rollbacks", "train.hang_seconds", "data.workers")
SHARES = ("train.text_dropout", "train.ema", "sample.gamma", "sample.constant_share")


def check(config) -> None:
    """UserError for the first value of a config that cannot work, before anything is compiled or written."""

    def get(key):
        return functools.reduce(lambda node, name: node[name], key.split("."), config)

    for key, choices in CHOICES.items():
        if get(key) not in choices:
            raise UserError(f"config.{key} = {get(key)!r}: choose one of {', '.join(choices)}")
    for key in POSITIVE:
        if get(key) < 1:
            raise UserError(f"config.{key} = {get(key)}: expected 1 or more")
    for key in NOT_NEGATIVE:
        if get(key) < 0:
            raise UserError(f"config.{key} = {get(key)}: expected 0 or more")
    for key in SHARES:
        if not 0 <= get(key) <= 1:
            raise UserError(f"config.{key} = {get(key)}: expected a share from 0 to 1")
    if config.train.batch_size % config.train.accumulate:
        raise UserError(
            f"config.train.batch_size = {config.train.batch_size} cannot be split into config.train.accumulate = "
            f"{config.train.accumulate} equal parts: choose a multiple"
        )
    if config.cond.frames:
        _check_conditioning(config)
        if config.train.sample_every:
            raise UserError(
                f"config.train.sample_every = {config.train.sample_every}: stage {config.stage} makes nothing from "
                "prompts alone, expected 0"
            )
    try:
        for height, width in {(config.video.height, config.video.width), stages.training_shape(config)[1:3]}:
            stages.build_model(config).check(height, width)
    except ValueError as e:
        raise UserError(str(e)) from e


def _check_conditioning(config) -> None:
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
    wanted = 4 if config.cond.fill == "blank" else 3
    if config.model.cond_channels != wanted:
        raise UserError(
            f"config.model.cond_channels = {config.model.cond_channels}: expected {wanted} with config.cond.fill = "
            f"{config.cond.fill!r}"
        )

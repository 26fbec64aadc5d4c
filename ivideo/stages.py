"""From a stage's config to its parts: the network, its inputs, its denoiser, its sampler. Sections 2.1, 2.3, 2.6.

The only place, with `train`, that reads a config: what it calls takes explicit arguments.
B batch · T frames · H, W height, width · C channels · L text tokens · D text channels
"""

import functools

import jax
import jax.numpy as jnp

from ivideo import guidance, samplers
from ivideo.diffusion import LOSS_KINDS
from ivideo.errors import UserError
from ivideo.models.unet import VideoUNet
from ivideo.schedules import cosine_logsnr, cosine_time

CHOICES = {
    "diffusion.loss": LOSS_KINDS,
    "model.remat": ("none", "dots", "full"),
    "model.dtype": ("float32", "bfloat16"),
    "data.source": ("shapes", "tfds"),
    "train.optimizer": ("adam", "adafactor"),
    "train.decay": ("constant", "cosine"),
    "sample.sampler": ("ddim", "ancestral", "distilled"),
    "sample.guidance": ("constant", "oscillating"),
    "sample.threshold": ("none", "static", "dynamic"),
}
POSITIVE = (
    "video.frames", "video.height", "video.width", "video.fps", "train.batch_size", "train.accumulate", "train.steps",
    "train.log_every", "train.checkpoint_every", "train.keep", "sample.steps", "sample.batch", "text.length",
)  # fmt: skip
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
    for key in SHARES:
        if not 0 <= get(key) <= 1:
            raise UserError(f"config.{key} = {get(key)}: expected a share from 0 to 1")
    if config.train.batch_size % config.train.accumulate:
        raise UserError(
            f"config.train.batch_size = {config.train.batch_size} cannot be split into config.train.accumulate = "
            f"{config.train.accumulate} equal parts: choose a multiple"
        )
    try:
        build_model(config).check(config.video.height, config.video.width)
    except ValueError as e:
        raise UserError(str(e)) from e


def build_model(config) -> VideoUNet:
    """The stage's network."""
    fields = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in config.model.items()}
    return VideoUNet(**{**fields, "dtype": jnp.dtype(config.model.dtype)})


def video_shape(config) -> tuple[int, int, int, int]:
    """[T, H, W, 3] of what the stage makes."""
    return (config.video.frames, config.video.height, config.video.width, 3)


def model_inputs(config, batch: int) -> tuple[tuple, dict]:
    """Shapes of the network's arguments for a batch of videos, to trace it without memory: positional, by keyword."""

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    frames, height, width, channels = video_shape(config)
    text = (array(config.text.length, config.text.dim), array(config.text.length, dtype=bool))
    optional = {}
    if config.model.cond_channels:
        optional["cond"] = array(frames, height, width, config.model.cond_channels)
    if config.model.augmentation:
        optional["aug_logsnr"] = array()
    if config.model.guidance_input:
        optional["guidance_weight"] = array()
    return (array(frames, height, width, channels), array(), *text), optional


def param_shapes(config):
    """The tree of the network's parameters as shapes; nothing is allocated."""
    args, optional = model_inputs(config, 1)
    model = build_model(config)
    return jax.eval_shape(lambda key, *a, **k: model.init(key, *a, **k), jax.random.key(0), *args, **optional)["params"]


def init_params(config, key):
    """The network's initial parameters, float32."""
    args, optional = model_inputs(config, 1)
    args, optional = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (args, optional))
    return build_model(config).init(key, *args, **optional)["params"]


def logsnr_fn(config):
    """The stage's schedule, time -> log-SNR: the cosine schedule, shifted as the config asks."""
    return lambda time: cosine_logsnr(time, **_ends(config)) + config.diffusion.logsnr_shift


def time_fn(config):
    """The inverse of the stage's schedule, log-SNR -> time."""
    return lambda logsnr: cosine_time(logsnr - config.diffusion.logsnr_shift, **_ends(config))


def denoiser(model, params, text, text_mask, **conditioning):
    """The stage's v_fn(z, logsnr) -> v, closed over its parameters and conditioning."""

    def v_fn(z, logsnr):
        return model.apply({"params": params}, z, logsnr, text, text_mask, **conditioning)

    return v_fn


def guided_denoiser(config, model, params, text, text_mask, **conditioning):
    """The denoiser with the config's guidance: constant, or oscillating from step to step."""
    weight = config.sample.weight
    if config.sample.guidance == "oscillating":
        weight = guidance.oscillating_weight(
            num_steps=config.sample.steps,
            high=config.sample.weight,
            low=config.sample.low_weight,
            constant_steps=round(config.sample.constant_share * config.sample.steps),
            time_fn=time_fn(config),
        )
    with_text = denoiser(model, params, text, text_mask, **conditioning)
    without = denoiser(model, params, text, jnp.zeros_like(text_mask), **conditioning)
    return guidance.classifier_free(with_text, without, weight)


def sample(config, model, params, text, text_mask, keys, *, on_step=None, **conditioning):
    """Videos [B, T, H, W, 3] in [-1, 1] for embedded texts [B, L, D], mask [B, L], from keys [B], one a video.

    A video depends on its own key and text alone, not on the batch it is sampled in.
    """
    v_fn = guided_denoiser(config, model, params, text, text_mask, **conditioning)
    z = samplers.initial_noise(keys, video_shape(config))
    options = {
        "num_steps": config.sample.steps,
        "threshold": _threshold(config),
        "logsnr_fn": logsnr_fn(config),
        "on_step": on_step,
    }
    if config.sample.sampler == "ddim":
        video = samplers.ddim(v_fn, z, **options)
    elif config.sample.sampler == "ancestral":
        video = samplers.ancestral(v_fn, z, keys, gamma=config.sample.gamma, **options)
    else:
        video = samplers.distilled(v_fn, z, keys, **options)
    return jnp.clip(video, -1, 1)


def _threshold(config):
    return {
        "none": None,
        "static": guidance.static_threshold,
        "dynamic": functools.partial(guidance.dynamic_threshold, percentile=config.sample.percentile),
    }[config.sample.threshold]


def _ends(config):
    return {"logsnr_min": config.diffusion.logsnr_min, "logsnr_max": config.diffusion.logsnr_max}

"""Builds a stage's network, inputs, denoiser and sampler from its config. Sections 2.1 to 2.3, 2.6.

This module and training read configs; the functions that they call take explicit arguments.
B batch · T frames · H, W height, width · C channels · L text tokens · D text channels
"""

import functools
import math
import re
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from ivideo.devices import sharding
from ivideo.diffusion import augment, conditioning, distill, guidance, samplers
from ivideo.diffusion.schedules import cosine_logsnr, cosine_time
from ivideo.diffusion.windows import windowed
from ivideo.errors import UserError
from ivideo.models.unet import VideoUNet

# The kinds of student, and the sampler that each kind is trained for (Section 2.7)
SAMPLERS = {"guidance": "ddim", "deterministic": "ddim", "stochastic": "distilled"}
PHASE = re.compile(r"guidance|([1-9]\d*)(_stochastic)?")

# Folded into a video's key for the noise on its conditioning video. No sampler step has this number
_AUGMENTATION = np.uint32(2**32 - 2)


def build_model(config) -> VideoUNet:
    """The stage's network."""
    fields = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in config.model.items()}
    return VideoUNet(**{**fields, "conditioned": config.cond.frames > 0, "dtype": jnp.dtype(config.model.dtype)})


def phases(config) -> list[str]:
    """The names of the phases of a stage's distillation, in order: guidance, 128, 64, ..., 8, 8_stochastic.

    ValueError where halving `config.distill.teacher_steps` does not lead to `config.distill.end_steps`.
    """
    steps = [str(count) for count in distill.rounds(config.distill.teacher_steps, config.distill.end_steps)]
    return ["guidance", *steps, *([f"{config.distill.end_steps}_stochastic"] if config.distill.stochastic else [])]


def student(config, phase: str) -> tuple[str, int]:
    """The student that a phase of distillation makes: its kind (`SAMPLERS`), and the number of steps that it is for.

    UserError where no phase has this name.
    """
    found = PHASE.fullmatch(phase)
    if not found:
        raise UserError(
            f"phase {phase!r} of distillation is unknown: expected guidance, a number of steps such as 8, or "
            "8_stochastic"
        )
    if phase == "guidance":
        return phase, config.distill.teacher_steps
    return ("stochastic" if found[2] else "deterministic"), int(found[1])


def distilled(config, phase: str = "", *, only: Sequence[str] = ()):
    """The config of a student that is distilled from the stage, or from the stages of a cascade.

    It differs from the original's config in the phase, in the guidance weight as an input of the network, and in the
    sampler and the number of steps that the student is for. `phase` defaults to the last of `phases`, and `only`, the
    names of the cascade's stages to distil, to all of them.
    """
    config = config.copy_and_resolve_references()
    chosen = [config.stages[name] for name in only or config.stages] if "stages" in config else [config]
    for stage in chosen:
        stage.phase = phase or phases(stage)[-1]
        kind, stage.sample.steps = student(stage, stage.phase)
        stage.sample.sampler = SAMPLERS[kind]
        stage.model.guidance_input = True
    return config


def video_shape(config) -> tuple[int, int, int, int]:
    """The shape of the stage's output, (T, H, W, 3)."""
    return (config.video.frames, config.video.height, config.video.width, 3)


def training_shape(config) -> tuple[int, int, int, int]:
    """The shape of the stage's training clips, (T, H, W, 3): that of its output, or of crops of it."""
    t = config.train
    crop = (t.crop_frames, t.crop_height, t.crop_width)
    return tuple(size or full_size for size, full_size in zip((*crop, 0), video_shape(config), strict=True))


def factors(config) -> dict[str, int]:
    """The factors in `space` and `time` by which a super-resolution stage upsamples its low-resolution clip."""
    return {"space": config.video.height // config.cond.height, "time": config.video.frames // config.cond.frames}


def cond_channels(config) -> int:
    """Channels of the network's conditioning video: RGB, and the mask of blank frames; 0 without conditioning."""
    if not config.cond.frames:
        return 0
    return 4 if config.cond.fill == "blank" else 3


def window_multiple(config) -> tuple[int, int]:
    """The (time, space) that positions and sizes of sampling windows are multiples of.

    So a window covers whole frames and pixels of the low-resolution clip, as training crops do.
    """
    sizes = factors(config)
    return sizes["time"], math.lcm(sizes["space"], math.prod(config.model.strides))


def model_inputs(config, batch: int) -> tuple[tuple, dict]:
    """Shapes of the network's arguments for a batch of videos, to trace it without memory: (positional, keyword)."""

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    frames, height, width, channels = video_shape(config)
    text = (array(config.text.length, config.text.dim), array(config.text.length, dtype=bool))
    optional = {}
    if config.cond.frames:
        optional["cond"] = array(frames, height, width, cond_channels(config))
        optional["aug_logsnr"] = array()
    if config.model.guidance_input:
        optional["guidance_weight"] = array()
    return (array(frames, height, width, channels), array(), *text), optional


def param_shapes(config):
    """The tree of shapes of the network's parameters. Nothing is allocated."""
    args, optional = model_inputs(config, 1)
    found = _param_shapes(build_model(config), args, tuple(optional.items()))
    return jax.tree.map(lambda shape: shape, found)  # a tree that the caller may change


@functools.lru_cache(maxsize=64)  # tracing a network takes a second, and a command asks several times
def _param_shapes(model, args, optional):
    def init(key, args, optional):
        return model.init(key, *args, **optional)["params"]

    return jax.eval_shape(init, jax.random.key(0), args, dict(optional))


def init_params(config, key):
    """The network's initial parameters, float32."""
    args, optional = model_inputs(config, 1)
    args, optional = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (args, optional))
    return build_model(config).init(key, *args, **optional)["params"]


def logsnr_fn(config):
    """The stage's schedule, time -> log-SNR: the cosine schedule plus the config's shift."""
    return lambda time: cosine_logsnr(time, **_range(config)) + config.diffusion.logsnr_shift


def time_fn(config):
    """The inverse of the stage's schedule, log-SNR -> time."""
    return lambda logsnr: cosine_time(logsnr - config.diffusion.logsnr_shift, **_range(config))


def denoiser(model, params, text, text_mask, **conditioning):
    """The stage's v_fn(z, logsnr) -> v, closed over its parameters and conditioning."""

    def v_fn(z, logsnr):
        return model.apply({"params": params}, z, logsnr, text, text_mask, **conditioning)

    return v_fn


def guidance_weight(config):
    """The config's guidance weight: a number, or for oscillating guidance a function logsnr [B] -> w [B]."""
    if config.sample.guidance == "constant":
        return config.sample.weight
    return guidance.oscillating_weight(
        num_steps=config.sample.steps,
        high=config.sample.high_weight,
        low=config.sample.low_weight,
        constant_steps=round(config.sample.constant_share * config.sample.steps),
        every=config.sample.alternate_every,
        time_fn=time_fn(config),
    )


def evaluations(config) -> int:
    """How often sampling evaluates the network for a video: once per step, or twice with classifier-free guidance."""
    guided = config.sample.guidance == "oscillating" or config.sample.weight != 0
    return config.sample.steps * (2 if guided and not config.model.guidance_input else 1)


def guided_denoiser(config, model, params, text, text_mask, **conditioning):
    """The denoiser with the config's guidance: constant, or oscillating from step to step.

    A distilled network takes the weight as an input and is evaluated once; others are evaluated with and without text.
    """
    weight = guidance_weight(config)
    if config.model.guidance_input:

        def v_fn(z, logsnr):
            w = weight(logsnr) if callable(weight) else jnp.full(logsnr.shape, weight, jnp.float32)
            return denoiser(model, params, text, text_mask, guidance_weight=w, **conditioning)(z, logsnr)

        return v_fn
    with_text = denoiser(model, params, text, text_mask, **conditioning)
    without = denoiser(model, params, text, jnp.zeros_like(text_mask), **conditioning)
    return guidance.classifier_free(with_text, without, weight)


def conditioning_video(config, low_res, key, logsnr, *, time: int | None = None):
    """The network's `cond` [B, T, H, W, C]: low-resolution clips [B, t, h, w, 3] with noise of logsnr [B], upsampled.

    `key` is one key, or keys [B]. `time` replaces the config's factor in time: 1 for packed images.
    """
    sizes = factors(config) if time is None else {**factors(config), "time": time}
    # Rows are not split where they are resized, since each row of the result is a sum over several rows of the clip
    rows = "height" if sizes["space"] == 1 else None
    noisy = sharding.constrain(augment.augment(key, low_res, logsnr), "batch", "frames", rows)
    return sharding.constrain(conditioning.enlarge(noisy, **sizes, fill=config.cond.fill), *sharding.VIDEO)


def video_keys(config, seeds):
    """Keys [B] for sampling, one for each tuple (seed, number, …) of `seeds`. Every super-resolution stage has its own.

    Each number is from 0 to 2³² - 1, and the seed from 0 to 2⁶⁴ - 1.
    """

    def key(seed, *numbers):
        high, low = divmod(seed, 2**32)
        numbers = (high, *numbers) if high else numbers
        return functools.reduce(jax.random.fold_in, map(np.uint32, numbers), jax.random.key(np.uint32(low)))

    keys = jnp.stack([key(*numbers) for numbers in seeds])
    if not config.cond.frames:
        return keys
    stage = np.uint32(zlib.crc32(config.stage.encode()))
    return jax.vmap(lambda key: jax.random.fold_in(key, stage))(keys)


def sample(
    config, model, params, text, text_mask, keys, *, low_res=None, on_step=None, should_stop=None, **conditioning
):
    """Samples videos [B, T, H, W, 3] in [-1, 1] for embedded texts [B, L, D], mask [B, L] and keys [B], one per video.

    A super-resolution stage needs `low_res`, clips [B, t, h, w, 3] of any size that its network supports. A video
    depends only on its own key, text and clip, not on its batch.

    `on_step`: None, or a function called on the host after each step with the number of completed steps.
    `should_stop`: None, or a function called on the host before each step. From where it returns True on, the network
    is not evaluated, and the result is worthless.
    """
    shape = video_shape(config)
    if low_res is None:
        v_fn = guided_denoiser(config, model, params, text, text_mask, **conditioning)
    else:
        aug_logsnr = augment.sampling_logsnr(config.sample.augmentation_snr, low_res.shape[0])
        noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, _AUGMENTATION))(keys)
        if config.sample.augmentation_blur:
            low_res = augment.blur(low_res, jnp.full(low_res.shape[:1], config.sample.augmentation_blur))
        cond = conditioning_video(config, low_res, noise_keys, aug_logsnr)
        shape = (*cond.shape[1:4], 3)

        def denoise(z, cond, logsnr):
            inputs = {"cond": cond, "aug_logsnr": aug_logsnr, **conditioning}
            return guided_denoiser(config, model, params, text, text_mask, **inputs)(z, logsnr)

        denoise = windowed(
            denoise,
            window=config.sample.window,
            overlap=config.sample.overlap,
            multiple=window_multiple(config),
        )

        def v_fn(z, logsnr):
            return denoise(z, cond, logsnr)

    if should_stop is not None:
        v_fn = _stoppable(v_fn, should_stop)
    z = sharding.constrain(samplers.initial_noise(keys, shape), *sharding.VIDEO)
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


def _stoppable(v_fn, should_stop):
    """`v_fn`, which returns zeros without evaluating the network where the host's `should_stop` returns True.

    A callback cannot end a program that runs: jax may crash where a callback raises an error.
    """

    def evaluated(z, logsnr):
        now = z[(0,) * z.ndim]  # the callback waits for the step before
        stop = io_callback(lambda _: np.bool_(should_stop()), jax.ShapeDtypeStruct((), np.bool_), now)
        return jax.lax.cond(stop, lambda: jnp.zeros(z.shape, jnp.float32), lambda: v_fn(z, logsnr))

    return evaluated


def _threshold(config):
    return {
        "none": None,
        "static": guidance.static_threshold,
        "dynamic": functools.partial(guidance.dynamic_threshold, percentile=config.sample.percentile),
    }[config.sample.threshold]


def _range(config):
    return {"logsnr_min": config.diffusion.logsnr_min, "logsnr_max": config.diffusion.logsnr_max}

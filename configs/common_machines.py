"""The values that stages share which train on less than a pod: on a few cores, on one accelerator, or in a test."""

import ml_collections

from configs import common


def on_one_machine(config: ml_collections.ConfigDict) -> None:
    """Sets float32 and the captioned shapes, for training on a processor with a few cores."""
    config.model.remat = "none"
    config.model.scan_unroll = 0
    config.model.dtype = "float32"
    config.text = common.shipped_text()
    config.data.source = "shapes"
    config.data.num_clips = 432_000
    config.data.workers = 0
    config.data.num_images = 0
    config.train.mesh.data, config.train.mesh.fsdp = -1, 1
    config.train.batch_size = 8
    config.train.warmup = 100
    config.train.ema = 0.995
    config.train.decay = "cosine"
    config.train.log_every = 10
    config.train.checkpoint_every = 100
    config.train.keep = 2
    config.train.sample_every = 0
    config.distill.teacher_steps = 64
    config.distill.guidance_updates, config.distill.round_updates, config.distill.late_round_updates = 2000, 1000, 2000
    config.distill.learning_rate = 3e-4
    config.distill.w_max = 4.0
    config.distill.agreement_every = 500
    config.distill.teacher_dtype = "float32"
    config.sample.guidance = "constant"
    config.sample.threshold = "static"


def refining_on_one_machine(config: ml_collections.ConfigDict) -> None:
    """As on_one_machine, for super-resolution: samples in one step, since the low-resolution clip determines most."""
    on_one_machine(config)
    config.diffusion.logsnr_shift = 2.0
    config.diffusion.logsnr_max = 14.0
    config.diffusion.loss = config.distill.loss = "x"
    config.sample.sampler = "ddim"
    config.sample.steps = 1
    config.sample.weight = 0.0


def on_one_chip(config: ml_collections.ConfigDict) -> None:
    """As on_one_machine, for training on one accelerator with 16 GB, such as the TPU v5e of a free notebook.

    bfloat16, several times the demo's networks, and the paper's sampling with guidance.
    """
    on_one_machine(config)
    config.model.dtype = config.distill.teacher_dtype = "bfloat16"
    config.model.remat = "full"
    config.model.scan_unroll = 1
    config.train.batch_size = 32
    config.train.accumulate = 2
    config.train.steps = 20_000
    config.train.warmup = 500
    config.train.learning_rate = 2e-4
    config.train.ema = 0.999
    config.train.checkpoint_every = 500
    config.sample.steps = 64
    config.sample.weight = 2.0


def shrunk(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Reduces a demo stage to its coarsest level's layers, for tests that compile and train in seconds."""
    config.model.channels = (8,)
    config.model.blocks = (1,)
    config.model.strides = (2,)
    for layer in ("spatial_attention", "cross_attention", "temporal"):
        config.model[layer] = config.model[layer][-1:]
    config.model.head_dim = 8
    config.data.num_clips = 432
    config.data.num_images = 2
    config.train.batch_size = 8
    config.train.steps = 12
    config.train.warmup = 4
    config.train.log_every = 1
    config.train.checkpoint_every = 4
    config.distill.teacher_steps, config.distill.end_steps = 16, 2
    config.distill.guidance_updates = config.distill.round_updates = 6
    config.distill.late_round_updates = 8
    config.distill.agreement_every = 4
    config.distill.learning_rate = 1e-3
    config.sample.steps = 4
    for axis in ("frames", "height", "width"):
        if config.train[f"crop_{axis}"]:
            config.train[f"crop_{axis}"] = config.video[axis] // 2
    return config

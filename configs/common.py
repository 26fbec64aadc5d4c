"""What the stages share. A stage's file says only what differs."""

import ml_collections

PLACEHOLDER = ml_collections.config_dict.placeholder

# The cascade (Section 2.2): what each stage makes, as (frames, height, width, frames a second). Every stage spans the
# same 16/3 s, and is conditioned on what the stage before it makes. Its super-resolution is in time or in space.
CASCADE = {
    "paper": {
        "base": (16, 24, 40, 3),
        "tsr1": (32, 24, 40, 6),
        "ssr1": (32, 48, 80, 6),
        "ssr2": (32, 192, 320, 6),
        "tsr2": (64, 192, 320, 12),
        "tsr3": (128, 192, 320, 24),
        "ssr3": (128, 768, 1280, 24),
    },
    "demo": {
        "base": (16, 12, 20, 3),
        "tsr1": (32, 12, 20, 6),
        "ssr1": (32, 24, 40, 6),
        "ssr2": (32, 96, 160, 6),
        "tsr2": (64, 96, 160, 12),
        "tsr3": (128, 96, 160, 24),
        "ssr3": (128, 192, 320, 24),
    },
    "small": {
        "base": (4, 8, 8, 3),
        "tsr1": (8, 8, 8, 6),
        "ssr1": (8, 16, 16, 6),
        "ssr2": (8, 32, 32, 6),
        "tsr2": (16, 32, 32, 12),
        "tsr3": (32, 32, 32, 24),
        "ssr3": (32, 64, 64, 24),
    },
}


def stage(name: str, variant: str) -> ml_collections.ConfigDict:
    """The config of a stage of the cascade, with the paper's training recipe; its network is still to be described."""
    stages = list(CASCADE[variant])
    before = stages[stages.index(name) - 1] if name != stages[0] else None

    config = ml_collections.ConfigDict()
    config.stage = name
    config.variant = variant
    # What the network is: '' as trained, or the phase of distillation that made it (Section 2.7): 'guidance', '8',
    # '8_stochastic'. A variant with _distilled sets it, and all that follows from it (ivideo.stages.distilled)
    config.phase = ""
    config.seed = 0  # of initialisation, noise and data order in training; --seed is the sampler's

    config.video = _size(*CASCADE[variant][name])  # what the stage makes
    config.cond = _size(*(CASCADE[variant][before] if before else (0, 0, 0, 0)))  # what it is given; base: nothing
    config.cond.fill = "repeat"  # the frames between those given: 'repeat' them, or 'blank' with a mask channel

    config.model = (
        ml_collections.ConfigDict()
    )  # the fields of ivideo.models.unet.VideoUNet; one entry a level, finest first
    config.model.head_dim = 64  # channels a head, as Imagen
    config.model.max_distance = 64  # frames; relative positions further apart share one

    config.model.frame_positions = (
        False  # whether a frame is told its place in the clip; attention's are relative either way
    )
    config.model.prediction = "v"  # what the last layer stands for: 'v', or 'eps' to compare (Section 2.4)
    config.model.data_std = 1.0  # of the data given its conditioning; 1 leaves all of v to the network
    config.model.guidance_input = False  # whether the network is told the guidance weight (distilled models)
    config.model.max_guidance = 16.0  # the largest guidance weight a distilled model is asked for
    config.model.remat = "full"  # what the backward pass recomputes: 'none', 'dots' (all but products), 'full'
    config.model.scan_unroll = (
        1  # blocks of a level laid out at a time; 0: all, for CPUs, whose convolutions crawl in loops
    )
    config.model.dtype = "bfloat16"  # of activations: 'bfloat16' or 'float32'; parameters are float32

    config.text = t5_xxl()

    config.diffusion = ml_collections.ConfigDict()
    config.diffusion.logsnr_min = -20.0  # the cosine schedule's ends, as Video Diffusion Models
    config.diffusion.logsnr_max = 20.0
    # Added to the schedule: below 0 for clips whose many frames or pixels tell the same (arXiv 2301.11093)
    config.diffusion.logsnr_shift = 0.0
    config.diffusion.loss = "v"  # 'v', 'eps' (as Section 2.1 prints it), 'x', 'truncated_snr'

    config.data = ml_collections.ConfigDict()
    config.data.source = (
        "tfds"  # 'tfds': a prepared data set in data.dir; 'shapes': the captioned shapes, drawn as needed
    )
    config.data.dir = ""  # folder of the prepared data set, with its version
    config.data.split = "train"
    config.data.num_clips = 0  # shapes: how many different clips
    config.data.text_cache = ""  # folder of embeddings made by mode encode_text; empty: the encoder runs in training
    # Clips that cannot be read and are left out, with a warning each, before a run stops; each process counts its own
    config.data.max_unreadable = 100
    config.data.workers = 8  # processes that prepare data; 0: threads of this one
    config.data.num_images = 8  # independent images packed behind each video (Section 2.6); the paper prints no number

    config.train = ml_collections.ConfigDict()
    config.train.mesh = mesh(fsdp=-1)
    config.train.max_skipped = 100  # updates of a run left out since their gradient was not finite, before it stops
    config.train.spike = 0.0  # mean losses so many times the usual take the run back to its checkpoint; 0: none do
    config.train.max_rollbacks = 3  # such rollbacks before the run stops
    config.train.hang_seconds = 1800.0  # that one step or checkpoint may take before the run leaves; 0: any
    config.train.batch_size = 2048  # videos a step over all devices, as Imagen; Imagen Video prints none
    config.train.accumulate = 1  # parts a batch is split into, whose gradients are averaged
    config.train.steps = 1_000_000
    config.train.start = ""  # safetensors file of weights to begin with, of the same network; empty: none
    config.train.optimizer = "adam"  # 'adam' or 'adafactor'
    config.train.learning_rate = 1e-4  # follows the step, counting also those whose update was left out
    config.train.warmup = 10_000  # steps
    config.train.decay = "constant"  # after warm-up: 'constant', or 'cosine' to zero
    config.train.clip = 1.0  # largest global norm of a gradient
    config.train.ema = 0.9999
    config.train.text_dropout = 0.1  # share of texts left out, for guidance; one draw for each video and packed image
    config.train.augmentation_min = -20.0  # log-SNR of the strongest noise on the conditioning video (Section 2.5)
    # Largest deviation in pixels of a random blur on it, as Cascaded Diffusion Models; the paper names noise alone
    config.train.augmentation_blur = 0.0
    config.train.crop_frames = 0  # frames of the clips trained on; 0: as many as the stage makes
    config.train.crop_height = 0  # pixels of the random crops trained on; 0: the whole frame
    config.train.crop_width = 0
    config.train.image_weight = 1.0  # a packed image's weight in the loss, against a video frame's
    config.train.log_every = 100  # steps
    config.train.checkpoint_every = 1000  # steps
    config.train.keep = 3  # checkpoints
    config.train.sample_every = 0 if before else 5000  # steps between sample grids of the base in TensorBoard; 0: none
    config.train.sample_prompts = (
        "a red star moving right on a teal background",
        "a blue circle moving up on a black background",
        "a yellow square standing still on a brown background",
        "a green triangle moving left on a gray background",
    )

    config.distill = distillation(steps=128 if before else 256)

    config.sample = ml_collections.ConfigDict()
    config.sample.mesh = mesh(data=-1)
    config.sample.sampler = "ancestral"  # 'ddim', 'ancestral', 'distilled'
    config.sample.steps = 128 if before else 256
    config.sample.batch = 8  # videos made at a time
    config.sample.group = 32  # prompts embedded before their videos are made; a cascade's own value counts there
    config.sample.augmentation_snr = 3.0  # signal to noise of the conditioning video; "such as 3 or 5" (Section 2.5)
    config.sample.augmentation_blur = 0.0  # pixels of a Gaussian's deviation, on it before the noise
    # Frames, height, width of the windows a large clip is made in; 0: all of it. Multiples of the stage's factor in
    # time, and in space of its factor and its network's strides
    config.sample.window = (0, 0, 0)
    config.sample.overlap = (0, 0, 0)  # of neighbouring windows
    config.sample.gamma = 0.3  # of the ancestral sampler, as Video Diffusion Models
    oscillating = name in ("base", "tsr1", "ssr1")  # beyond 48 × 80 pixels it adds artifacts (Section 2.6.2)
    config.sample.guidance = "oscillating" if oscillating else "constant"
    config.sample.weight = 6.0  # w of 'constant' guidance; 0 is none
    config.sample.high_weight = 15.0  # w that 'oscillating' guidance starts with, and alternates with the low one
    config.sample.low_weight = 1.0
    config.sample.constant_share = 0.1  # share of steps before the oscillation; the paper prints none
    config.sample.alternate_every = 1  # steps that each weight then lasts, low first
    config.sample.threshold = "dynamic"  # of the predicted video: 'none', 'static', 'dynamic'
    config.sample.percentile = 99.5  # of 'dynamic', as Imagen
    config.distill.w_max = 16.0 if oscillating else 8.0
    return config


def distillation(steps: int) -> ml_collections.ConfigDict:
    """The recipe of progressive distillation (Section 2.7), from `steps` sampling steps.

    Batch, meshes, data, crops, noise on the conditioning video and dropped texts are those of `train`. Every phase has
    a fresh Adam, a learning rate that falls linearly to 0, no warm-up and no average of the parameters (arXiv
    2202.00512).
    """
    distill = ml_collections.ConfigDict()
    distill.teacher_steps = steps  # of the original: the paper's 256 of the base, 128 of super-resolution
    distill.end_steps = 8  # of the last student, the paper's 8 of every stage; teacher_steps over a power of 2
    # Whether a last phase adapts the student to the stochastic sampler, as in the paper. False: it is sampled by 'ddim'
    distill.stochastic = True
    # Updates of the first phase, which puts guidance into the network; neither paper prints a number
    distill.guidance_updates = 50_000
    distill.round_updates = 50_000  # of a phase that halves the steps, as arXiv 2202.00512
    distill.late_round_updates = 100_000  # of phases to 2 steps and to 1, as arXiv 2202.00512
    distill.learning_rate = 1e-4  # at first; arXiv 2202.00512 has 1e-4 with batches of 2048, 5e-5 with 128
    distill.clip = 1.0  # largest global norm of a gradient, as arXiv 2202.00512
    distill.loss = "truncated_snr"  # arXiv 2202.00512 has this and 'v' (SNR + 1); 'x' and 'eps' as in training
    # Guidance weights are drawn from U[w_min, w_max] (arXiv 2210.03142, with [0, 4]). Samples can ask for these alone
    distill.w_min = 0.0
    distill.w_max = 8.0
    distill.teacher_dtype = "bfloat16"  # of the teacher's parameters: 'bfloat16' or 'float32'
    return distill


def _size(frames: int, height: int, width: int, fps: int) -> ml_collections.ConfigDict:
    size = ml_collections.ConfigDict()
    size.frames = frames
    size.height = height  # pixels
    size.width = width  # pixels
    size.fps = fps  # frames a second
    return size


def mesh(**sizes: int) -> ml_collections.ConfigDict:
    """Devices per mesh axis (ivideo.devices.sharding); -1 takes all that are left. The product is the device count."""
    mesh = ml_collections.ConfigDict()
    mesh.data = sizes.get("data", 1)  # copies of the parameters, each with a part of the batch
    mesh.fsdp = sizes.get("fsdp", 1)  # parts of the batch, and of parameters, their average and optimizer state
    mesh.tensor = sizes.get("tensor", 1)  # parts of heads and inner channels
    mesh.frames = sizes.get("frames", 1)  # parts of a video's frames
    mesh.height = sizes.get("height", 1)  # parts of a frame's rows
    return mesh


def t5_xxl() -> ml_collections.ConfigDict:
    """The paper's text encoder, T5-XXL. Its weights are not in the package: `checkpoint` says where they are."""
    text = ml_collections.ConfigDict()
    text.checkpoint = PLACEHOLDER(str)  # T5X or Hugging Face directory, or safetensors file; empty: the package's
    text.tokenizer = ""  # sentencepiece model; empty: spiece.model in that directory, or bytes where it has 384 ids
    text.length = 256  # tokens
    text.dtype = "bfloat16"  # of parameters and arithmetic: 'bfloat16' or 'float32'
    text.mesh = mesh(data=-1)  # of mode encode_text, over each process's devices: a copy on every one
    text.batch = 256  # texts encoded at a time, by mode encode_text
    text.vocab, text.dim, text.layers, text.heads, text.head_dim, text.ff = 32128, 4096, 24, 64, 64, 10240
    return text


def shipped_text() -> ml_collections.ConfigDict:
    """The small byte encoder in the package, which knows the captioned shapes."""
    text = ml_collections.ConfigDict()
    text.checkpoint = ""
    text.tokenizer = ""
    text.length = 64  # bytes and an end token
    text.dtype = "float32"
    text.mesh = mesh(data=-1)
    text.batch = 64
    text.vocab, text.dim, text.layers, text.heads, text.head_dim, text.ff = 384, 128, 3, 4, 32, 256
    return text


def on_one_machine(config: ml_collections.ConfigDict) -> None:
    """Float32 on the captioned shapes, for a processor with a few cores."""
    config.model.remat = "none"
    config.model.scan_unroll = 0
    config.model.dtype = "float32"
    config.text = shipped_text()
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
    config.distill.teacher_dtype = "float32"
    config.sample.guidance = "constant"
    config.sample.threshold = "static"


def refining_on_one_machine(config: ml_collections.ConfigDict) -> None:
    """As on_one_machine, for a super-resolution: one step from the video that is given, which tells nearly all."""
    on_one_machine(config)
    config.diffusion.logsnr_shift = 2.0
    config.diffusion.logsnr_max = 14.0
    config.diffusion.loss = config.distill.loss = "x"
    config.sample.sampler = "ddim"
    config.sample.steps = 1
    config.sample.weight = 0.0


def shrunk(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A demo stage as one level with the layers of its coarsest, to compile and train in seconds, for tests."""
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
    config.distill.learning_rate = 1e-3
    config.sample.steps = 4
    for axis in ("frames", "height", "width"):
        if config.train[f"crop_{axis}"]:
            config.train[f"crop_{axis}"] = config.video[axis] // 2
    return config


def variant(name: str, **variants) -> ml_collections.ConfigDict:
    """The config that the function of this name makes, in which from now on only keys that exist can be set."""
    if name not in variants:
        raise unknown_variant(name, variants)
    return variants[name]().lock()


def unknown_variant(variant: str, choices) -> ValueError:
    """The error of a stage file asked for a variant that it does not have."""
    return ValueError(
        f"variant {variant!r} is unknown: choose from {', '.join(choices)}, as in --config=FILE:{next(iter(choices))}"
    )

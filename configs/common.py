"""What the stages share. A stage's file says only what differs."""

import ml_collections

PLACEHOLDER = ml_collections.config_dict.placeholder


def stage(name: str, variant: str, *, frames: int, height: int, width: int, fps: int) -> ml_collections.ConfigDict:
    """The config of a stage that makes frames × height × width at fps, with the paper's training recipe."""
    config = ml_collections.ConfigDict()
    config.stage = name
    config.variant = variant
    config.seed = 0  # of initialisation, noise and data order in training; --seed is the sampler's

    config.video = ml_collections.ConfigDict()  # what the stage makes
    config.video.frames = frames
    config.video.height = height  # pixels
    config.video.width = width  # pixels
    config.video.fps = fps  # frames a second

    config.model = (
        ml_collections.ConfigDict()
    )  # the fields of ivideo.models.unet.VideoUNet; one entry a level, finest first
    config.model.head_dim = 64  # channels a head, as Imagen
    config.model.max_distance = 64  # frames; relative positions further apart share one
    config.model.cond_channels = 0  # channels of the conditioning video; 0: none
    config.model.augmentation = False  # whether the network is told the noise put on the conditioning video
    config.model.frame_positions = (
        False  # whether a frame is told its place in the clip; attention's are relative either way
    )
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
    config.data.workers = 8  # processes that prepare data; 0: threads of this one
    config.data.num_images = 8  # independent images packed behind each video (Section 2.6); the paper prints no number

    config.train = ml_collections.ConfigDict()
    config.train.batch_size = 2048  # videos a step over all devices, as Imagen; Imagen Video prints none
    config.train.accumulate = 1  # parts a batch is split into, whose gradients are averaged
    config.train.steps = 1_000_000
    config.train.optimizer = "adam"  # 'adam' or 'adafactor'
    config.train.learning_rate = 1e-4
    config.train.warmup = 10_000  # steps
    config.train.decay = "constant"  # after warm-up: 'constant', or 'cosine' to zero
    config.train.clip = 1.0  # largest global norm of a gradient
    config.train.ema = 0.9999
    config.train.text_dropout = 0.1  # share of texts left out, for guidance
    config.train.image_weight = 1.0  # a packed image's weight in the loss, against a video frame's
    config.train.log_every = 100  # steps
    config.train.checkpoint_every = 1000  # steps
    config.train.keep = 3  # checkpoints
    config.train.sample_every = 5000  # steps between sample grids in TensorBoard; 0: none
    config.train.sample_prompts = (
        "a red star moving right on a teal background",
        "a blue circle moving up on a black background",
        "a yellow square standing still on a brown background",
        "a green triangle moving left on a gray background",
    )

    config.sample = ml_collections.ConfigDict()
    config.sample.sampler = "ancestral"  # 'ddim', 'ancestral', 'distilled'
    config.sample.steps = 256
    config.sample.batch = 8  # videos made at a time
    config.sample.gamma = 0.3  # of the ancestral sampler, as Video Diffusion Models
    config.sample.guidance = "oscillating"  # 'constant' or 'oscillating' (Section 2.6.2)
    config.sample.weight = 15.0  # w; 'oscillating' alternates it with the low weight
    config.sample.low_weight = 1.0
    config.sample.constant_share = 0.1  # share of steps before the oscillation; the paper prints none
    config.sample.threshold = "dynamic"  # of the predicted video: 'none', 'static', 'dynamic'
    config.sample.percentile = 99.5  # of 'dynamic', as Imagen
    return config


def t5_xxl() -> ml_collections.ConfigDict:
    """The paper's text encoder. Its weights are given as a safetensors file."""
    text = ml_collections.ConfigDict()
    text.checkpoint = PLACEHOLDER(str)  # safetensors file of the encoder; empty string: the one in the package
    text.length = 256  # tokens
    text.vocab, text.dim, text.layers, text.heads, text.head_dim, text.ff = 32128, 4096, 24, 64, 64, 10240
    return text


def shipped_text() -> ml_collections.ConfigDict:
    """The small byte encoder in the package, which knows the captioned shapes."""
    text = ml_collections.ConfigDict()
    text.checkpoint = ""
    text.length = 64  # bytes and an end token
    text.vocab, text.dim, text.layers, text.heads, text.head_dim, text.ff = 384, 128, 3, 4, 32, 256
    return text


def locked(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config, in which from now on only keys that exist can be set."""
    return config.lock()


def unknown_variant(variant: str, choices) -> ValueError:
    """The error of a stage file asked for a variant that it does not have."""
    return ValueError(
        f"variant {variant!r} is unknown: choose from {', '.join(choices)}, as in --config=FILE:{next(iter(choices))}"
    )

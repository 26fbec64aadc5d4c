"""The flags of the command line. `ivideo.modes` says which mode reads which; `ivideo.main` alone reads their values."""

import sys

from absl import flags

from ivideo.arguments import PATH
from ivideo.modes import MODES

# Flags that may differ between the processes of one run. The config is compared by its values
PER_PROCESS = (
    "config", "coordinator", "process_id", "workdir", "teacher", "out", "captions", "prompts_file", "input",
    "blocked_words", "clip", "compile_cache", "reference", "samples", "vbench",
)  # fmt: skip

flags.DEFINE_string(
    "config", None, "Config file, with an optional variant: configs/base.py or configs/base.py:demo. If a relative "
    "path does not exist, the package's own file is used.",
    allow_override=True,
)  # fmt: skip
flags.DEFINE_enum("mode", "train", list(MODES), "What to do. --help lists the modes.")
flags.DEFINE(
    PATH, "workdir", None, "Folder of a training run: checkpoints, metrics.jsonl, TensorBoard logs. Without it, "
    "sampling uses the weights in the package (variant demo).",
)  # fmt: skip
flags.DEFINE(
    PATH, "weights", None, "Weights written by mode export, instead of --workdir: a .safetensors file for one stage, "
    "or a folder of STAGE.safetensors. In mode train, a new run starts from them.",
)  # fmt: skip
flags.DEFINE(
    PATH, "teacher", None, "What mode distill distils: the folder of a stage's training run, or a .safetensors file of "
    "its weights."
)  # fmt: skip
flags.DEFINE_string("prompt", None, 'The text prompt. --prompt="" samples without text.')
flags.DEFINE(
    PATH, "prompts_file", None, "A UTF-8 file with one prompt per line. --out is then a folder of 000.mp4, 001.mp4, …"
)
flags.DEFINE(
    PATH,
    "out",
    None,
    "The file to write: .mp4, .mov, .webm or .gif in mode sample, .safetensors in export and train_text, .json in "
    "evaluate and compile. For several videos, in encode_text, prepare_data and show_data, and in evaluate with "
    "--reference or --samples, a folder.",
)
flags.DEFINE(
    PATH, "captions", None, "Mode encode_text: a UTF-8 file with one caption per line, or the folder of a prepared set."
)
flags.DEFINE_multi_string(
    "beam",
    None,
    "Run mode encode_text or prepare_data with Apache Beam. One flag per Beam option, such as "
    "--beam=--runner=DirectRunner.",
)
flags.DEFINE_integer("shards", 256, "Number of files in the cache that --beam writes.", lower_bound=1)
flags.DEFINE_integer(
    "seed", 0, "Seed of the sampling noise. The same seed and prompt give the same video.", lower_bound=0,
    upper_bound=2**64 - 1,
)  # fmt: skip
flags.DEFINE_integer("num_videos", 1, "Videos per prompt. With more than one, --out is a folder.", lower_bound=1)
flags.DEFINE_bool("same_noise", False, "Start all prompts from the same noise, to compare them.")
flags.DEFINE(
    PATH, "blocked_words", None, "A UTF-8 file of words, one per line, that no prompt of modes sample and serve may "
    "have; 'package' for the list in the package.",
)  # fmt: skip
flags.DEFINE_string(
    "video_filter", None, "MODULE:FUNCTION of a video and its prompt; modes sample and serve write the videos for "
    "which it returns True.",
)  # fmt: skip
flags.DEFINE_bool(
    "resume", False, "Mode sample: keep the videos that an earlier run of the same command wrote, and make the missing "
    "ones.",
)  # fmt: skip
flags.DEFINE(
    PATH, "input", None, "A video file: in mode sample the one that the first stage upsamples, which needs a "
    "super-resolution stage; in modes replay and show one that this program made. In mode prepare_data: a folder, a "
    "table, a .tar file or a quoted pattern of them, or tfds:NAME for a set of TensorFlow Datasets.",
)  # fmt: skip
flags.DEFINE(PATH, "clip", None, "In mode replay: the file that was the --input when the video was made.")
flags.DEFINE_enum(
    "metadata", "recipe", ("recipe", "none"), "What mode sample stores in a video file: how it was made, or nothing."
)
flags.DEFINE_integer("port", 7860, "Port of the page of mode serve.", lower_bound=1, upper_bound=65535)
flags.DEFINE_bool(
    "share", False, "Mode serve: also open the page to everyone who has a link, through a server of Gradio's."
)
flags.DEFINE_string("from_stage", None, "With configs/cascade.py: the first stage to run. After base it needs --input.")
flags.DEFINE_string("to_stage", None, "With configs/cascade.py: the last stage to run.")
flags.DEFINE_bool("save_stages", False, "Also write each stage's output, next to --out: out.base.mp4, out.tsr1.mp4, …")
flags.DEFINE_integer(
    "zoom", 1, "Enlarge each pixel of a video this many times, to look at small stages.", lower_bound=1
)
flags.DEFINE_bool("overwrite", False, "Replace the file at --out.")
flags.DEFINE_bool(
    "json", False, "Print JSON instead of a table (modes describe, benchmark, evaluate, compile, goodput)."
)
flags.DEFINE_string("topology", None, "TPU slice for mode compile, such as v5e:4x4 or v5p:4x4x4.")
flags.DEFINE_enum(
    "what",
    "train",
    ("train", "distill", "distill-guidance", "distill-round", "sample", "text"),
    "Program for mode compile: a training step, a distillation step (of the first phase and of a later one, or one of "
    "the two), a sampling step, or the text encoder.",
)
flags.DEFINE_float(
    "effort",
    -1.0,
    "Optimization effort of mode compile: -1 takes minutes, 0 is the default of programs that run on TPUs.",
)
flags.DEFINE_string(
    "profile_steps",
    None,
    "First and last step to profile in modes train and distill, such as 10,15; read WORKDIR/profile with xprof. Mode "
    "distill profiles the phase that runs first, in WORKDIR/PHASE/profile.",
)
flags.DEFINE(
    PATH, "compile_cache", None, "Folder that keeps compiled programs for the next run; default ~/.cache/ivideo, empty "
    "for none. The environment variable JAX_COMPILATION_CACHE_DIR overrides it.",
)  # fmt: skip
flags.DEFINE_bool(
    "distributed", False, "Run as one of several processes on a TPU slice, GKE or Slurm, which supply the addresses."
)
flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of the first of several processes on other machines; with --num_processes and --process_id.",
)
flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
flags.DEFINE_integer(
    "clips", None, "Number of clips that mode evaluate measures: by default 96, of the base and the cascade half with "
    "held-out captions; with --reference or --samples config.evaluate.clips.",
    lower_bound=2,
)  # fmt: skip
flags.DEFINE(
    PATH, "reference", None, "Mode evaluate: clips that samples are measured against. A folder of video files, the "
    "folder of a prepared set, 'shapes', or the reference.npz of an earlier run.",
)  # fmt: skip
flags.DEFINE(PATH, "samples", None, "Mode evaluate: a folder of video files to measure, instead of new samples.")
flags.DEFINE(
    PATH, "vbench", None, "Mode evaluate: a folder to copy the files of --samples to by the names that VBench reads. "
    "Nothing is measured.",
)  # fmt: skip


def own() -> list[flags.Flag]:
    """The flags of this package."""
    return flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])

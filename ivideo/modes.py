"""The modes of the command line: what each does, and the flags that it reads."""

from typing import NamedTuple


class Mode(NamedTuple):
    summary: str
    flags: tuple[str, ...]  # of its own; every mode also reads COMMON
    config: bool = True  # whether it needs --config


COMMON = (
    "mode", "compile_cache", "distributed", "coordinator", "num_processes", "process_id",
)  # fmt: skip
_WEIGHTS = ("workdir", "weights")
_RESULT = ("out", "json", "overwrite")

MODES = {
    "train": Mode(
        "train a stage in --workdir; run the same command again to continue from the newest checkpoint",
        (*_WEIGHTS, "profile_steps"),
    ),
    "distill": Mode(
        "distil the stage trained in --teacher to 8 sampling steps, in --workdir; repeating the command continues",
        ("teacher", "workdir", "profile_steps"),
    ),
    "sample": Mode(
        "make videos for --prompt or --prompts_file and write them to --out",
        (
            "prompt", "prompts_file", "out", *_WEIGHTS, "seed", "num_videos", "same_noise", "input", "from_stage",
            "to_stage", "save_stages", "zoom", "metadata", "blocked_words", "video_filter", "resume", "overwrite",
        ),
    ),
    "replay": Mode(
        "sample the video in the file --input again from the recipe in it, and print how equal the two are",
        ("input", "clip", *_WEIGHTS, *_RESULT),
        config=False,
    ),
    "show": Mode("print the recipe in the video file --input", ("input", "json"), config=False),
    "serve": Mode(
        "open a web page on this machine that makes videos from prompts, step by step, and upsamples your own",
        ("port", "share", *_WEIGHTS, "from_stage", "to_stage", "blocked_words", "video_filter"),
    ),
    "evaluate": Mode(
        "measure how well samples follow their captions, or a super-resolution stage's PSNR; with --reference or "
        "--samples FVD, FID, KID, CLIP score, R-precision and what time does",
        (*_WEIGHTS, "reference", "samples", "vbench", "prompts_file", "clips", "seed", "to_stage", *_RESULT),
    ),
    "export": Mode(
        "write the averaged weights of the run in --workdir to --out, a safetensors file",
        ("workdir", "out", "overwrite"),
    ),
    "encode_text": Mode(
        "embed the captions in --captions once and cache them in the folder --out, for training",
        ("captions", "out", "beam", "shards"),
    ),
    "train_text": Mode("train the demo's small text encoder and write it to --out", ("out", "overwrite")),
    "compile": Mode(
        "compile a stage for a TPU slice (--topology) without one; print memory, FLOPs, communication, a roofline",
        ("topology", "what", "effort", *_RESULT),
    ),
    "prepare_data": Mode(
        "make a data set in --out from captioned videos or images (--input): a folder, a table, tars, or tfds:NAME",
        ("input", "out", "beam"),
    ),
    "show_data": Mode(
        "write what the network sees of the first training clips to the folder --out: videos, captions and a sheet",
        ("out", "overwrite"),
    ),
    "check_data": Mode("read every clip of the data set as training would, and list the unreadable ones", ()),
    "goodput": Mode(
        "print how the training run in --workdir spent its time", ("config", "workdir", "json"), config=False
    ),
    "doctor": Mode(
        "print what is installed, what this machine has, and whether --config fits it", ("config", "json"), config=False
    ),
    "completion": Mode(
        "print a script for bash or zsh that completes modes, flags and config keys", (), config=False
    ),
    "describe": Mode("print a stage's parameters, sizes, FLOPs and layers; allocates nothing", ("json",)),
    "benchmark": Mode(
        "time a stage's forward pass, training step and guided sampling step on this machine", ("json",)
    ),
}  # fmt: skip


def overview() -> str:
    """A line for each mode, for the help."""
    width = max(map(len, MODES)) + 2
    lines = "\n".join(f"{name:{width}}{mode.summary}" for name, mode in MODES.items())
    return f"The modes:\n\n{lines}\n\n--help --mode=NAME lists a mode's flags, --helpfull those of all libraries too."


def read_by(mode: str) -> tuple[str, ...]:
    """The flags that the mode reads."""
    return (*(("config",) if MODES[mode].config else ()), *MODES[mode].flags, *COMMON)


def unread(mode: str, given: list[str]) -> list[str]:
    """The flags among `given` that the mode does not read."""
    return [name for name in given if name not in read_by(mode)]

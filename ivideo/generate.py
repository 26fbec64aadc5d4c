"""From prompts to video files. Sections 2.2 and 2.6."""

import itertools
import logging
import os

import jax
import numpy as np

from ivideo import cascade
from ivideo.data import video_io
from ivideo.data.sources import resize_video
from ivideo.errors import UserError
from ivideo.export import config_metadata, save_params

log = logging.getLogger("ivideo")


def generate(
    config,
    prompts: list[str],
    out: str,
    *,
    workdir: str | None = None,
    seed: int = 0,
    num_videos: int = 1,
    in_folder: bool = False,
    zoom: int = 1,
    overwrite: bool = False,
    first: str | None = None,
    last: str | None = None,
    clip: str | None = None,
    save_stages: bool = False,
) -> list[str]:
    """Writes `num_videos` videos a prompt; returns their paths.

    `config` is of a stage or of the cascade, of which `first` and `last` choose a part; `clip` is a video file that the
    first stage enlarges. `out` is a file, or with `in_folder` or several videos a folder of 000.mp4, 001.mp4, … in the
    prompts' order; `save_stages` writes what every stage makes besides, as 000.base.mp4. Each file's metadata holds
    prompt, seed, config and version. `zoom` enlarges every pixel, for looking at small stages.
    UserError, before anything is compiled, where `out` exists and `overwrite` is not set, and on what `cascade.select`
    and `read_clip` refuse.
    """
    configs = cascade.select(config, first, last)
    rows = [(prompt, (seed, number)) for prompt in prompts for number in range(num_videos)]
    paths = output_paths(out, len(rows), in_folder=in_folder or num_videos > 1, overwrite=overwrite)
    if save_stages:
        for stage in configs[:-1]:
            _refuse_existing([stage_path(path, stage) for path in paths], overwrite)
    low = None
    if clip is not None:
        low = np.repeat(read_clip(clip, configs[0])[None], len(rows), axis=0)

    def write(stage, videos, paths):
        if jax.process_index():
            return  # every process has all videos; the first one writes them
        for path, video, (prompt, (_, number)) in zip(paths, videos, rows, strict=True):
            metadata = config_metadata(config, prompt=prompt, seed=str(seed), number=str(number))
            video = video.repeat(zoom, axis=1).repeat(zoom, axis=2)
            video_io.write_video(path, video, fps=stage.video.fps, metadata=metadata, overwrite=overwrite)
            print(path, flush=True)

    def on_stage(stage, videos):
        if save_stages and stage is not configs[-1]:
            write(stage, videos, [stage_path(path, stage) for path in paths])

    os.makedirs(os.path.dirname(os.path.abspath(paths[0])), exist_ok=True)
    texts, seeds = zip(*rows, strict=True)
    videos = cascade.run(configs, texts, seeds=seeds, workdir=workdir, low=low, on_stage=on_stage)
    write(configs[-1], videos, paths)
    return paths


def read_clip(path: str, config) -> np.ndarray:
    """A video file as what a super-resolution stage is given: [t, h, w, 3] in [-1, 1].

    Frames are taken at the stage's rate from the clip's beginning, cut to the stage's aspect ratio about their middle
    and resized, one at a time: the rest of the file is not read. What had to change is logged. UserError where the
    stage takes no input, or the clip is unreadable or too short.
    """
    size = config.cond
    if not size.frames:
        raise UserError(f"--input={path}: stage {config.stage} makes videos from noise; begin with --from_stage=tsr1")
    frames = video_io.iter_frames(path, frames=size.frames, fps=config.cond.fps)
    first = next(frames)
    rate = video_io.read_rate(path)
    if first.shape[:2] != (size.height, size.width) or rate != config.cond.fps:
        log.info(
            "%s: %d×%d at %g a second; its first %.3g seconds are resampled to %d frames of %d×%d at %d for %s",
            path, *first.shape[:2], float(rate), size.frames / config.cond.fps,
            size.frames, size.height, size.width, config.cond.fps, config.stage,
        )  # fmt: skip
    return resize_video(itertools.chain([first], frames), height=size.height, width=size.width)


def stage_path(path: str, stage) -> str:
    """Where a stage's video is written beside the last one's."""
    root, extension = os.path.splitext(path)
    return f"{root}.{stage.stage}{extension}"


def output_paths(out: str, count: int, *, in_folder: bool, overwrite: bool) -> list[str]:
    """The files that `count` videos go to; UserError where one is there already or `out` is not of the right kind."""
    extension = os.path.splitext(out)[1].lower()
    if in_folder:
        if extension in video_io.EXTENSIONS:
            raise UserError(f"--out={out} names one file for several videos: give a folder")
        paths = [os.path.join(out, f"{i:03}.mp4") for i in range(count)]
        if os.path.isfile(out):
            raise UserError(f"--out={out} is a file, but {count} videos need a folder: choose another")
    else:
        if extension not in video_io.EXTENSIONS:
            raise UserError(f"--out={out} must end in {' or '.join(video_io.EXTENSIONS)}")
        paths = [out]
    _refuse_existing(paths, overwrite)
    return paths


def _refuse_existing(paths: list[str], overwrite: bool) -> None:
    existing = [p for p in paths if os.path.exists(p)]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists: choose another --out, or pass --overwrite to replace it")


def export(config, workdir: str, out: str, *, overwrite=False) -> None:
    """Writes the averaged parameters of a training run as bfloat16 safetensors, with the config beside them."""
    if not out.endswith(".safetensors"):
        raise UserError(f"--out={out} must end in .safetensors")
    params = cascade.load_weights(config, workdir)
    save_params(out, params, metadata=config_metadata(config), overwrite=overwrite)
    print(out)

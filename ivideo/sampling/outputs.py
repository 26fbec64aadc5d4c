"""The video files that sampling writes: their names, the checks before any work, and which exist already."""

import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ivideo import recipe
from ivideo.data import encoders, video_io
from ivideo.errors import UserError
from ivideo.files import write_json
from ivideo.sampling import recipes

log = logging.getLogger("ivideo")
VIDEO_SUFFIXES = (*video_io.EXTENSIONS, ".m4v", ".mkv", ".avi")  # a folder named like this is a user's mistake
PROBE_CRF = 18  # quality of the test frame in `check_encoder`


def output_paths(out: str, count: int, *, in_folder: bool) -> list[str]:
    """The paths of `count` videos. UserError if `out` should be a folder and names a file, or the reverse."""
    suffix = os.path.splitext(out)[1].lower()
    if in_folder:
        if suffix in VIDEO_SUFFIXES:
            raise UserError(f"--out={out} names one file for several videos: give a folder")
        if os.path.isfile(out):
            raise UserError(f"--out={out} is a file, but {count} videos need a folder: choose another")
        return [os.path.join(out, f"{i:03}.mp4") for i in range(count)]
    video_io.extension(out)
    return [out]


def stage_path(path: str, stage: str) -> str:
    """The path of a stage's own output, next to the video of the last stage."""
    root, extension = os.path.splitext(path)
    return f"{root}.{stage}{extension}"


def check_encoder(path: str, *, height: int, width: int, fps: int) -> None:
    """UserError if the format of this file cannot hold videos of this size."""
    frame, suffix = np.zeros((1, height, width, 3), np.uint8), video_io.extension(path)
    encoders.check(suffix, frame, crf=PROBE_CRF)
    try:
        if encoders.FORMATS[suffix]["codec"] == "libx264":
            video_io.encode(frame, fps=fps)
    except Exception as e:  # FFmpeg raises many types
        raise UserError(f"frames of {height}×{width} cannot be written as H.264 ({e}): choose another --zoom") from e


def is_finished(path: str, wanted: dict, configs: Sequence) -> bool:
    """Whether the video at `path` is complete and was made by the recipe `wanted`. False if there is no file.

    `configs`: the stages that make the video, whose last one gives its number of frames. UserError if the file is
    damaged, or was made with other settings; the message names the first difference.
    """
    if not os.path.lexists(path):
        return False
    advice = "move it away, or choose another --out"
    try:
        whole, count = video_io.read_metadata(path), video_io.count_frames(path)
    except video_io.VideoError as e:
        raise UserError(f"--resume: {path} is not whole ({e}): delete it") from e
    if count != (frames := configs[-1].video.frames):
        raise UserError(f"--resume: {path} is not whole, with {count} of {frames} frames: delete it")
    found, wanted = recipes.identity(whole), recipes.identity(wanted)
    for key, value in wanted.items():
        if found.get(key) == value:
            continue
        in_file = f"with {key} {found[key]!r}" if key in found else f"without a record of its {key}"
        raise UserError(f"--resume: {path} was made {in_file}, and this command has {value!r}: {advice}")
    if whole["config_digest"] == recipes.digest(configs):
        return True
    config_then = recipes.config_from(whole)
    for config in configs:
        stage_config = config_then.get("stages", {config.stage: config_then})[config.stage]
        for key, was, now in recipe.video_differences(stage_config, config):
            raise UserError(
                f"--resume: {path} was made with config.{key} = {was!r} of stage {config.stage}, and this command has "
                f"{now!r}: {advice}"
            )
    return True


def write(path: str, video: np.ndarray, *, fps: int, metadata: dict | None, overwrite: bool) -> str:
    """Writes a sampled video to `path`, or where that fails its frames to a folder. Returns what was written.

    The folder has 000.png, 001.png, … and the metadata in recipe.json. It is `path`.frames, or where that cannot be
    written either, a folder for temporary files. A sample may have taken hours, so nothing but a lack of any room loses
    it. OSError in that case.
    """
    try:
        video_io.write_video(path, video, fps=fps, metadata=metadata, overwrite=overwrite)
        return path
    except Exception as e:  # FFmpeg raises many types
        reason = e
    try:
        folder = _write_frames(f"{path}.frames", video, metadata)
    except OSError:
        folder = _write_frames(os.path.join(tempfile.mkdtemp(prefix="ivideo_"), "frames"), video, metadata)
    log.warning("%s could not be written (%s): its frames are the PNG files in %s", path, reason, folder)
    return folder


def _write_frames(folder: str, video: np.ndarray, metadata: dict | None) -> str:
    """Writes a video's frames to a new folder of this name, with a number at its end if the name is taken."""
    names = itertools.chain([folder], (f"{folder}_{number}" for number in itertools.count(1)))
    folder = next(name for name in names if not os.path.lexists(name))
    temporary = f"{folder}.tmp{os.getpid()}"
    os.makedirs(temporary)
    try:
        for number, frame in enumerate(video_io.to_uint8(video)):
            Image.fromarray(frame).save(os.path.join(temporary, f"{number:03}.png"))
        write_json(os.path.join(temporary, "recipe.json"), metadata or {})
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def print_line(line: str) -> None:
    """Prints a line. The program continues if stdout is closed, as after `| head` or a lost ssh connection."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

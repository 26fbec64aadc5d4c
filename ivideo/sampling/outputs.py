"""The files that videos are written to: their names, what is checked before any work, which are there already."""

import errno
import json
import os
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from ivideo import recipe
from ivideo.data import encoders, video_io
from ivideo.errors import UserError

VIDEO_SUFFIXES = (*video_io.EXTENSIONS, ".m4v", ".mkv", ".avi")  # a folder of such a name is a mistake
PROBE = 2**20  # bytes that a folder must have room for


def paths_of(out: str, count: int, *, in_folder: bool) -> list[str]:
    """The files that `count` videos go to. UserError where `out` is not of the right kind."""
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
    """Where a stage's video is written beside the last stage's."""
    root, extension = os.path.splitext(path)
    return f"{root}.{stage}{extension}"


def prepare(paths: list[str]) -> None:
    """Makes the files' folders, and finds by a temporary file in each that there is room for more.

    UserError where a name is too long, or a folder cannot be made or written to.
    """
    for path in paths:
        try:
            os.lstat(path)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise UserError(f"{path} cannot be written ({e.strerror}): choose another --out") from e
    for folder in {os.path.dirname(os.path.realpath(path)) for path in paths}:  # of a link, where it points to
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as f:
                f.write(bytes(PROBE))
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            advice = "make room" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another --out"
            raise UserError(f"{folder} cannot be written to ({e.strerror}): {advice}") from e


def check_encoder(path: str, *, height: int, width: int, fps: int) -> None:
    """UserError where videos of this size cannot be written to this kind of file."""
    frame, suffix = np.zeros((1, height, width, 3), np.uint8), video_io.extension(path)
    encoders.check(suffix, frame, crf=18)
    try:
        if encoders.FORMATS[suffix]["codec"] == "libx264":
            video_io.encode(frame, fps=fps)
    except Exception as e:  # whatever FFmpeg says
        raise UserError(f"frames of {height}×{width} cannot be written as H.264 ({e}): choose another --zoom") from e


def is_finished(path: str, made: dict[str, str], configs: Sequence) -> bool:
    """Whether a whole video is at `path` that was made as the metadata `made` says; False where there is none.

    `configs` are of the stages that make it; its frames must be as many as the last one makes. UserError that names
    what differs, or what is wrong with the file.
    """
    if not os.path.lexists(path):
        return False
    advice = "move it away, or choose another --out"
    try:
        found, count = video_io.read_metadata(path), video_io.count_frames(path)
    except video_io.VideoError as e:
        raise UserError(f"--resume: {path} is not whole ({e}): delete it") from e
    if count != (frames := configs[-1].video.frames):
        raise UserError(f"--resume: {path} is not whole, with {count} of {frames} frames: delete it")
    for key in made:
        if key in ("config", "ivideo_version") or found.get(key) == made[key]:
            continue
        there = f"with {key} {found[key]!r}" if key in found else f"without a record of its {key}"
        raise UserError(f"--resume: {path} was made {there}, and this command has {made[key]!r}: {advice}")
    there = json.loads(found["config"])
    for config in configs:
        for key, was, now in recipe.video_differences(there.get("stages", {config.stage: there})[config.stage], config):
            raise UserError(
                f"--resume: {path} was made with config.{key} = {was!r} of stage {config.stage}, and this command has "
                f"{now!r}: {advice}"
            )
    return True


def say(line: str) -> None:
    """Prints a line. Where nobody reads any more, as behind `| head` or a lost ssh, the work goes on."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

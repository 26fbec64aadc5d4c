"""Lays samples out as VBench (arXiv 2311.17982) reads them: one folder of files PROMPT-NUMBER.mp4."""

import collections
import logging
import os
import shutil
from collections.abc import Sequence

from ivideo import files
from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.evaluation import clip_sets
from ivideo.prompts import one_line

log = logging.getLogger("ivideo")

SAMPLES = 5  # videos per prompt that VBench's numbers are of
_LONGEST = 255  # bytes of a file's name


def lay_out(samples: str, folder: str, *, prompts: Sequence[str] = (), overwrite: bool = False) -> list[str]:
    """Copies the .mp4 files of `samples` to `folder` by the names that VBench expects, and returns their paths.

    A file's prompt is the one in its metadata, or the one of its number in `prompts`. UserError, before anything is
    written, where a file has no prompt, a prompt cannot be a file's name, or a file exists.
    """
    names, counts, targets = clip_sets.video_names(samples), collections.Counter(), []
    if prompts and len(prompts) != len(names):
        raise UserError(f"--prompts_file has {len(prompts)} prompts for {len(names)} files: give one per file")
    for number, name in enumerate(names):
        path = os.path.join(samples, name)
        if os.path.splitext(name)[1].lower() != ".mp4":
            raise UserError(f"{path}: VBench reads .mp4 files; sample to a folder of these")
        prompt = one_line(prompts[number] if prompts else video_io.read_metadata(path).get("prompt", ""))
        target = f"{prompt}-{counts[prompt]}.mp4"
        if not prompt:
            raise UserError(f"{path} does not say its prompt: give --prompts_file, with a prompt per file")
        if "/" in prompt or len(target.encode()) > _LONGEST:
            raise UserError(f"{path}: the prompt {prompt[:80]!r} cannot be a file's name: VBench needs it to be one")
        counts[prompt] += 1
        targets.append(os.path.join(folder, target))
    files.refuse_existing(targets, overwrite=overwrite)
    files.prepare_folders(targets)
    for name, target in zip(names, targets, strict=True):
        with files.atomic_write(target) as temporary:
            shutil.copyfile(os.path.join(samples, name), temporary)
    if set(counts.values()) != {SAMPLES}:
        log.warning(
            "VBench's numbers are of %d videos per prompt, and here prompts have %d to %d: sample with --num_videos=%d",
            SAMPLES, min(counts.values()), max(counts.values()), SAMPLES,
        )  # fmt: skip
    print(f"{len(targets)} videos of {len(counts)} prompts in {folder}: vbench evaluate --videos_path {folder} "
          "--dimension DIMENSION")  # fmt: skip
    return targets

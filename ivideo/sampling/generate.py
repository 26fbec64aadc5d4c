"""From prompts to video files. Sections 2.2 and 2.6."""

import hashlib
import itertools
import json
import logging

import jax
import numpy as np

from ivideo.data import video_io
from ivideo.data.sources import resize_video
from ivideo.devices import agreeing
from ivideo.errors import UserError
from ivideo.files import refuse_existing
from ivideo.prompts import samples
from ivideo.sampling import cascade, outputs
from ivideo.sampling.interrupts import Interrupted
from ivideo.training import trained
from ivideo.weights import SUFFIX, config_metadata, save_params

log = logging.getLogger("ivideo")


def generate(
    config,
    prompts: list[str],
    out: str,
    *,
    workdir: str | None = None,
    weights_path: str | None = None,
    seed: int = 0,
    num_videos: int = 1,
    same_noise: bool = False,
    in_folder: bool = False,
    zoom: int = 1,
    overwrite: bool = False,
    resume: bool = False,
    first: str | None = None,
    last: str | None = None,
    clip: str | None = None,
    save_stages: bool = False,
) -> list[str]:
    """Writes `num_videos` videos per prompt, each as soon as it is made; returns their paths.

    `config` is of a stage or of the cascade, of which `first` and `last` choose a part; `clip` is a video file that the
    first stage enlarges. Weights come from `workdir`, `weights_path` or the package (`trained.find`). `out` is a file,
    or with `in_folder` or several videos a folder of 000.mp4, 001.mp4, … in the prompts' order; `save_stages` writes
    what every stage makes besides, as 000.base.mp4. `zoom` enlarges every pixel, for looking at small stages.
    Each file's metadata holds what it was made with: prompt, seed, number, whether the noise follows from the prompt
    (`prompts.samples`, `same_noise`), stages, weights, config, version. With `resume` the files that are there already
    are kept, if they are whole and were made with the same.
    UserError, before anything is compiled or written, where a file exists and neither `overwrite` nor `resume` is set,
    where a file that is there is of something else, where one cannot be written, where the weights of a stage are
    missing or of another network, and on what `cascade.select` and `read_clip` refuse.
    """
    if resume and overwrite:
        raise UserError("--resume keeps the files that are there and --overwrite replaces them: give one of them")
    configs = cascade.select(config, first, last)
    rows = samples(prompts, seed=seed, num_videos=num_videos, same_noise=same_noise)
    names = outputs.paths_of(out, len(rows), in_folder=in_folder or len(rows) > 1)
    files = {configs[-1].stage: names}
    if save_stages:
        files |= {c.stage: [outputs.stage_path(path, c.stage) for path in names] for c in configs[:-1]}
    for stage in configs:
        if stage.stage in files:
            height, width = stage.video.height * zoom, stage.video.width * zoom
            outputs.check_encoder(names[0], height=height, width=width, fps=stage.video.fps)
    sources = trained.find(configs, workdir=workdir, weights=weights_path)
    identities = {stage.stage: trained.check(stage, sources[stage.stage]) for stage in configs}
    low, source = None, {}
    if clip is not None:
        low = np.broadcast_to(read_clip(clip, configs[0]), (len(rows), *_given_shape(configs[0])))
        source = {"input": _digest(clip)}
    cascade.check_input(configs[0], given=low is not None)

    def metadata(stage, row):
        done = configs[: configs.index(stage) + 1]
        return config_metadata(
            config,
            prompt=rows[row].prompt,
            seed=str(seed),
            number=str(rows[row].number),
            noise="shared" if same_noise else "of the prompt",
            stages=" ".join(c.stage for c in done),
            zoom=str(zoom),
            **{f"weights of {c.stage}": identities[c.stage] for c in done},
            **source,
        )

    def missing():
        """The rows of each stage whose files are to be written: looked up by the first process alone, which writes."""
        found = {c.stage: list(range(len(rows))) for c in configs if c.stage in files}
        if resume:
            for number, stage in enumerate(configs, 1):
                if paths := files.get(stage.stage):
                    there = [outputs.is_finished(p, metadata(stage, n), configs[:number]) for n, p in enumerate(paths)]
                    found[stage.stage] = [row for row, finished in enumerate(there) if not finished]
        else:
            hint = ", or --resume to keep it and make what is missing"
            refuse_existing([p for some in files.values() for p in some], overwrite=overwrite, hint=hint)
        outputs.prepare([files[name][row] for name, some in found.items() for row in some])
        return found

    wanted = {name: set(some) for name, some in agreeing.from_first_process(missing).items()}
    count = left = len(wanted[configs[-1].stage])
    if resume:
        log.info("%d of %d videos are there already", len(rows) - count, len(rows))
    made = cascade.run(
        configs, [row.prompt for row in rows], seeds=[row.noise for row in rows], sources=sources,
        identities=identities, low=low,
        group=config.sample.group, wanted=wanted,
    )  # fmt: skip
    try:
        for stage, row, video in made:
            if jax.process_index() == 0:  # every process has all videos
                path, video = files[stage.stage][row], video.repeat(zoom, axis=1).repeat(zoom, axis=2)
                options = {"fps": stage.video.fps, "metadata": metadata(stage, row), "overwrite": overwrite}
                video_io.write_video(path, video, **options)
                left -= stage is configs[-1]
                outputs.say(path)
            del video  # its batch would stay in memory while the next one is made
    except Interrupted as e:
        done = f"{len(rows) - left} of {len(rows)} videos are written" if len(rows) > 1 else "nothing was written"
        again = "the same command with --resume makes the others"
        raise Interrupted(e.number, f"interrupted: {done}; {again}" if len(rows) > 1 else f"interrupted: {done}") from e
    return names


def _given_shape(config):
    return (config.cond.frames, config.cond.height, config.cond.width, 3)


def _digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:32]


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


def export(config, workdir: str, out: str, *, overwrite=False) -> None:
    """Writes the averaged parameters of a training run as bfloat16 safetensors, with the run's own config.

    UserError, before any weights are read, where `out` exists or cannot be written, or where the run has no checkpoint
    or is of another network than `config`.
    """
    if not out.endswith(SUFFIX):
        raise UserError(f"--out={out} must end in {SUFFIX}")
    trained.check(config, workdir)
    refuse_existing([out], overwrite=overwrite)
    outputs.prepare([out])
    params = cascade.load_weights(config, workdir)
    metadata = config_metadata(config)
    if (kept := trained.config_beside(workdir)) is not None:
        metadata["config"] = json.dumps(kept, sort_keys=True)
    save_params(out, params, metadata=metadata, overwrite=overwrite)
    print(out)

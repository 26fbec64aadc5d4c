"""Writes video files for text prompts. Sections 2.2 and 2.6."""

import itertools
import logging

import jax
import numpy as np

from ivideo.data import video_io
from ivideo.data.resizing import resize_video
from ivideo.devices import agreeing
from ivideo.errors import UserError
from ivideo.files import digest, prepare_folders, refuse_existing
from ivideo.prompts import samples
from ivideo.sampling import cascade, filters, outputs, recipes
from ivideo.sampling.interrupts import Interrupted
from ivideo.training import trained

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
    from_stage: str | None = None,
    to_stage: str | None = None,
    input_path: str | None = None,
    save_stages: bool = False,
    with_recipe: bool = True,
    blocked_words: str | None = None,
    video_filter: str | None = None,
) -> list[str]:
    """Samples `num_videos` videos per prompt and writes each one as soon as it is finished. Returns their paths.

    `config`: a stage's config, or the cascade's, of which the stages from `from_stage` to `to_stage` run.
    `workdir`, `weights_path`: where the weights are (`trained.find`); without both, the weights in the package.
    `out`: a file; for several videos, or with `in_folder`, a folder of 000.mp4, 001.mp4, … in the order of the prompts.
    `input_path`: a video file that the first stage upsamples.
    `save_stages`: also write the output of each earlier stage, as 000.base.mp4.
    `zoom`: enlarge each pixel this many times, to look at small stages.
    `same_noise`: all prompts start from the same noise (`prompts.samples`).
    `resume`: keep the files that exist, if they are complete and were made with the same settings.
    `with_recipe`: store in each file how it was made (`recipes`), from which `replay` makes it again.
    `blocked_words`, `video_filter`: filters of prompts and videos (`filters`). A refused video is not written, with a
    UserError at the end.
    A video that cannot be encoded is written as PNG frames (`outputs.write`), with a UserError at the end.
    UserError before anything is compiled or written if a file exists and neither `overwrite` nor `resume` is set, if an
    existing file was made with other settings, if an output cannot be written, if a stage's weights are missing or
    belong to another network, and if `cascade.select` or `read_clip` raise it.
    """
    if resume and overwrite:
        raise UserError("--resume keeps the files that exist and --overwrite replaces them: give one of them")
    if resume and not with_recipe:
        raise UserError("--resume compares the recipes in the files that exist, and --metadata=none leaves them out")
    if blocked_words is not None:
        filters.check_prompts(prompts, blocked_words)
    allows = None if video_filter is None else filters.load_video_filter(video_filter)
    configs = cascade.select(config, from_stage, to_stage)
    rows = samples(prompts, seed=seed, num_videos=num_videos, same_noise=same_noise)
    paths = outputs.output_paths(out, len(rows), in_folder=in_folder or len(rows) > 1)
    files = {configs[-1].stage: paths}
    if save_stages:
        files |= {c.stage: [outputs.stage_path(path, c.stage) for path in paths] for c in configs[:-1]}
    for stage in configs:
        if stage.stage in files:
            height, width = stage.video.height * zoom, stage.video.width * zoom
            outputs.check_encoder(paths[0], height=height, width=width, fps=stage.video.fps)
    sources = trained.find(configs, workdir=workdir, weights=weights_path)
    identities = {stage.stage: trained.check(stage, sources[stage.stage]) for stage in configs}
    low_res, input_metadata = None, {}
    if input_path is not None:
        low_res = np.broadcast_to(read_clip(input_path, configs[0]), (len(rows), *_input_shape(configs[0])))
        input_metadata = {"input": digest(input_path)[:32]}
    cascade.check_input(configs[0], has_input=low_res is not None)

    batch = {stage.stage: min(stage.sample.batch, len(rows)) for stage in configs}
    # The same for all videos of a stage, and it takes as long as writing a small one
    settings = {
        stage.stage: recipes.settings(config, configs[:number])
        for number, stage in enumerate(configs, 1)
        if stage.stage in files
    }

    def recipe_of(stage, row):
        found = recipes.of_video(
            configs[: configs.index(stage) + 1], rows[row], seed=seed, same_noise=same_noise, zoom=zoom,
            weights=identities, batch=batch,
        )  # fmt: skip
        return found | settings[stage.stage] | input_metadata

    def missing():
        """Per stage, the rows whose files have to be written. Only the first process looks: it writes the files."""
        found = {c.stage: list(range(len(rows))) for c in configs if c.stage in files}
        if resume:
            for number, stage in enumerate(configs, 1):
                finished = [
                    outputs.is_finished(path, recipe_of(stage, row), configs[:number])
                    for row, path in enumerate(files.get(stage.stage, []))
                ]
                if finished:
                    found[stage.stage] = [row for row, is_finished in enumerate(finished) if not is_finished]
        else:
            hint = ", or --resume to keep it and make the missing ones"
            refuse_existing([path for stage_files in files.values() for path in stage_files], overwrite=overwrite,
                            hint=hint)  # fmt: skip
        prepare_folders([files[name][row] for name, missing_rows in found.items() for row in missing_rows])
        return found

    wanted = {name: set(missing_rows) for name, missing_rows in agreeing.from_first_process(missing).items()}
    remaining = len(wanted[configs[-1].stage])
    if resume:
        log.info("%d of %d videos are there already", len(rows) - remaining, len(rows))
    sampled = cascade.run(
        configs, [row.prompt for row in rows], seeds=[row.noise for row in rows], sources=sources,
        identities=identities, low_res=low_res, group=config.sample.group, wanted=wanted,
    )  # fmt: skip
    as_frames, refused = [], 0
    try:
        for stage, row, video in sampled:
            if jax.process_index() == 0:  # every process has all videos; one writes them
                if allows is not None and not allows(video_io.to_uint8(video), rows[row].prompt):
                    refused += 1
                    continue
                path, metadata = files[stage.stage][row], None
                if with_recipe:
                    metadata = recipe_of(stage, row) | {"frames": recipes.frames_digest(video)}
                video = video_io.zoomed(video, zoom)
                written = outputs.write(path, video, fps=stage.video.fps, metadata=metadata, overwrite=overwrite)
                if written != path:
                    as_frames.append(written)
                remaining -= stage is configs[-1]
                outputs.print_line(written)
            del video  # it would keep its whole batch in memory while the next one is sampled
    except Interrupted as e:
        if len(rows) == 1:
            raise Interrupted(e.number, "interrupted: nothing was written") from e
        raise Interrupted(
            e.number,
            f"interrupted: {len(rows) - remaining} of {len(rows)} videos are written; the same command with --resume "
            "makes the others",
        ) from e
    if refused:
        raise UserError(f"--video_filter={video_filter} refused {refused} of the videos: they are not written")
    if as_frames:
        raise UserError(
            f"{len(as_frames)} of the videos could not be encoded: their frames are PNG files in {as_frames[0]}, …"
        )
    return paths


def _input_shape(config):
    return (config.cond.frames, config.cond.height, config.cond.width, 3)


def read_clip(path: str, config) -> np.ndarray:
    """Reads a video file as the input of a super-resolution stage: [t, h, w, 3] in [-1, 1].

    The clip is resampled to the stage's frame rate from its beginning, cropped about its centre to the stage's aspect
    ratio, and resized. Frames are read one at a time, and none after the last that is needed. The log says what
    changed. UserError if the stage takes no input, or if the file is unreadable or too short.
    """
    size, fps = config.cond, config.cond.fps
    if not size.frames:
        raise UserError(f"--input={path}: stage {config.stage} starts from noise; begin with --from_stage=tsr1")
    frames = video_io.iter_frames(path, frames=size.frames, fps=fps)
    first = next(frames)
    rate = video_io.read_rate(path)
    if first.shape[:2] != (size.height, size.width) or rate != fps:
        log.info(
            "%s is %d×%d at %g fps: its first %.3g seconds are resampled to %d frames of %d×%d at %d fps for %s",
            path, *first.shape[:2], float(rate), size.frames / fps,
            size.frames, size.height, size.width, fps, config.stage,
        )  # fmt: skip
    return video_io.to_float(resize_video(itertools.chain([first], frames), height=size.height, width=size.width))

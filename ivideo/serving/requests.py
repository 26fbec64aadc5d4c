"""What a visitor of the page may ask for: its limits, and the videos that answer it."""

import dataclasses
import os
import re
import shutil
import time
import uuid
from collections.abc import Sequence

import numpy as np

from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.files import digest
from ivideo.prompts import Sample, one_line, samples
from ivideo.sampling import filters, recipes
from ivideo.sampling.generate import read_clip
from ivideo.serving.jobs import Job, Remaining
from ivideo.serving.resident import COMPILING, ResidentCascade

MAX_PROMPT = 1000  # characters
MAX_VIDEOS = 4  # of a row of first videos
MAX_PIXELS = 4096 * 2304  # of a frame of an uploaded clip
MAX_UPLOAD = 200  # MB
MAX_SEED = 2**53 - 1  # a browser's numbers are exact up to here
KEPT = 3600  # seconds that videos are kept
VIDEO_FOLDER = "video_"  # how the name of a video's folder begins
PREVIEW_WIDTH = 320  # pixels: smaller videos are enlarged by whole numbers up to this width


@dataclasses.dataclass(frozen=True)
class First:
    """A row of videos of the cascade's first stage, all of one prompt, from which one goes on.

    Without those that the filter of videos refused.
    """

    stage: object  # the config of the stage that made them
    seed: int
    rows: list[Sample]  # the prompt, number and noise of each
    videos: np.ndarray  # [N, T, H, W, 3] in [-1, 1]


class Studio:
    """Makes the videos of a cascade that visitors ask for, in `folder`.

    `blocked_words`, `video_filter`: as in `generate`.
    """

    def __init__(self, cascade: ResidentCascade, folder: str, *, blocked_words=None, video_filter=None):
        self.cascade, self.folder = cascade, folder
        self._find_blocked = None if blocked_words is None else filters.load_blocked_words(blocked_words)
        self._allows = None if video_filter is None else filters.load_video_filter(video_filter)

    @property
    def starts_from_text(self) -> bool:
        """Whether the first stage is the base, which takes no clip."""
        return not self.cascade.configs[0].cond.frames

    @property
    def enlarging(self) -> list:
        """The stages that take a clip."""
        return [stage for stage in self.cascade.configs if stage.cond.frames]

    def steps(self) -> list[int]:
        """The numbers of sampling steps of the first stage that can be chosen."""
        stage = self.cascade.configs[0]
        if stage.phase not in ("", "guidance"):
            return [stage.sample.steps]
        return sorted({stage.sample.steps, max(1, stage.sample.steps // 2), max(1, stage.sample.steps // 4)})

    def first(self, job: Job, prompt: str, seed: int, count: int, guidance: float | None, steps: int) -> First:
        """The first stage's videos for a prompt. `guidance`: a constant weight, None for the config's guidance."""
        prompt, seed = self._checked(prompt, seed)
        if not 1 <= count <= MAX_VIDEOS:
            raise UserError(f"{count} videos were asked for, expected 1 to {MAX_VIDEOS}")
        stage = self.cascade.configs[0].copy_and_resolve_references()
        if steps not in self.steps():
            raise UserError(f"{steps} steps were asked for, expected one of {', '.join(map(str, self.steps()))}")
        stage.sample.steps = steps
        if guidance is not None:
            low, high = self.cascade.guidance_range
            if not low <= guidance <= high:
                raise UserError(f"a guidance of {guidance} was asked for, expected {low:g} to {high:g}")
            stage.sample.guidance, stage.sample.weight = "constant", float(guidance)
        rows = samples([prompt], seed=seed, num_videos=count)
        videos = self._sample(job, [stage], rows, MAX_VIDEOS, None)
        kept = self._allowed(rows, videos)
        return First(stage, seed, [rows[number] for number in kept], videos[kept])

    def write_first(self, first: First, number: int) -> str:
        """Writes one of the first videos with its recipe, enlarged so that it can be looked at. Returns its path."""
        return self._write([first.stage], first.videos[number], first.rows[number], first.seed)

    def upsampled(self, job: Job, first: First, number: int) -> str:
        """The path of the last stage's video, with its recipe, that grows out of one of the first videos."""
        rest, row = self.cascade.configs[1:], first.rows[number]
        return self._write([first.stage, *rest], self._grown(job, rest, row, first.videos[number]), row, first.seed)

    def enlarged(self, job: Job, path: str, prompt: str, seed: int, from_stage: str) -> str:
        """The path of the last stage's video, with its recipe, that grows out of a visitor's clip from a stage on."""
        prompt, seed = self._checked(prompt, seed)
        stages = self._from(from_stage)
        check_size(path)
        clip = read_clip(path, stages[0])
        (row,) = samples([prompt], seed=seed)
        return self._write(stages, self._grown(job, stages, row, clip), row, seed, input=digest(path)[:32])

    def _from(self, name: str) -> list:
        names = [stage.stage for stage in self.enlarging]
        if name not in names:
            raise UserError(f"stage {name!r} takes no clip: choose one of {', '.join(names)}")
        return self.enlarging[names.index(name) :]

    def _checked(self, prompt: str, seed) -> tuple[str, int]:
        if len(prompt) > MAX_PROMPT:
            raise UserError(f"the prompt has {len(prompt)} characters, expected at most {MAX_PROMPT}: shorten it")
        prompt = one_line(prompt.replace("\0", ""))
        if self._find_blocked is not None and self._find_blocked(prompt):
            raise UserError("the prompt has a word that this page does not allow: change the prompt")
        if seed is None:
            raise UserError(f"the seed is empty, expected a whole number from 0 to {MAX_SEED}")
        if not 0 <= seed <= MAX_SEED or seed != int(seed):
            raise UserError(f"the seed is {seed}, expected a whole number from 0 to {MAX_SEED}")
        return prompt, int(seed)

    def _sample(self, job, stages, rows, size, clips):
        """The last one's videos of stages that follow one another, [N, T, H, W, 3]."""
        prompts, seeds = [row.prompt for row in rows], [row.noise for row in rows]
        remaining = Remaining([self.cascade.seconds(stage, size) for stage in stages])
        for number, stage in enumerate(stages, 1):
            name = f"{stage.stage} ({number} of {len(stages)})" if len(stages) > 1 else stage.stage

            def on_step(phase, step, name=name, stage=stage):
                if phase == COMPILING:
                    known = self.cascade.seconds(stage, size) is not None
                    job.report(f"{name}: {'starting' if known else 'compiling, which happens once'}")
                    return
                left = remaining.before(step, stage.sample.steps)
                job.report(f"{name}: step {step} of {stage.sample.steps}" + (f", {left}" if left else ""))

            clips = self.cascade.sample(stage, prompts, seeds=seeds, size=size, low_res=clips, on_step=on_step)
            remaining.end()
        return clips

    def _grown(self, job, stages, row, clip):
        """The last one's video [T, H, W, 3] that grows out of a clip. UserError if the filter refuses it."""
        videos = self._sample(job, stages, [row], 1, clip[None])
        self._allowed([row], videos)
        return videos[0]

    def _allowed(self, rows, videos) -> list[int]:
        """The numbers of the videos that the filter allows. UserError if it allows none."""
        if self._allows is None:
            return list(range(len(rows)))
        kept = [n for n, row in enumerate(rows) if self._allows(video_io.to_uint8(videos[n]), row.prompt)]
        if not kept:
            refused = "the video" if len(rows) == 1 else f"all {len(rows)} videos"
            raise UserError(f"the filter of videos refused {refused}: try another prompt or seed")
        return kept

    def _write(self, stages: Sequence, video, row: Sample, seed: int, **more) -> str:
        zoom = max(1, PREVIEW_WIDTH // video.shape[2])
        size = {stage.stage: 1 if stage.cond.frames else MAX_VIDEOS for stage in stages}
        recipe = recipes.of_video(
            stages, row, seed=seed, same_noise=False, zoom=zoom, weights=self.cascade.identities, batch=size
        )
        recipe |= recipes.settings(self.cascade.config, stages) | more
        recipe["frames"] = recipes.frames_digest(video)
        self._delete_old()
        # A folder of its own for each file, so that two visitors who ask for the same get a file each
        folder = os.path.join(self.folder, VIDEO_FOLDER + uuid.uuid4().hex)
        os.mkdir(folder)
        path = os.path.join(folder, f"{slug(row.prompt)}-{seed}-{row.number}.mp4")
        try:
            video_io.write_video(path, video_io.zoomed(video, zoom), fps=stages[-1].video.fps, metadata=recipe)
        except OSError as e:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f"the server could not store the video ({e.strerror}): try again later") from e
        return path

    def _delete_old(self) -> None:
        """Deletes the videos that were written more than an hour ago. Gradio serves copies, which it deletes itself."""
        for entry in os.scandir(self.folder):
            if entry.name.startswith(VIDEO_FOLDER) and time.time() - entry.stat().st_mtime > KEPT:
                shutil.rmtree(entry.path, ignore_errors=True)


def check_size(path: str) -> None:
    """UserError if the frames of a video file have too many pixels to be decoded for a visitor."""
    height, width = video_io.read_size(path)
    if height * width > MAX_PIXELS:
        raise UserError(
            f"the clip's frames are {height}×{width}, expected at most {MAX_PIXELS / 1e6:.1f} million pixels: "
            "make it smaller"
        )


def slug(prompt: str) -> str:
    """A short file name from a prompt: its letters and digits, with a dash for all between."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "video"

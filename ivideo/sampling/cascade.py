"""Samples videos from text prompts with one stage or with a cascade of stages. Section 2.2.

N videos · T frames · H, W height, width · t, h, w size of a low-resolution clip
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import tqdm

from ivideo import stages
from ivideo.devices import sharding
from ivideo.errors import UserError
from ivideo.sampling.interrupts import run_interruptibly
from ivideo.text import TextEncoder, load_encoder
from ivideo.training import trained
from ivideo.weights import place

SIZE_KEYS = ("frames", "height", "width", "fps")
ENCODER_BATCH = 8  # prompts that the text encoder embeds at a time
NOT_FINITE, ONE_COLOUR = "values that are not finite", "a video of one colour"
_ADVICE = {
    NOT_FINITE: "try --config.model.dtype=float32 or an earlier checkpoint",
    ONE_COLOUR: "try an earlier checkpoint or a smaller config.sample.weight",
}


def is_cascade(config) -> bool:
    """Whether a config describes a cascade (configs/cascade.py) rather than one stage."""
    return "stages" in config


def select(config, from_stage: str | None = None, to_stage: str | None = None) -> list:
    """The configs of the stages to run, in order. The config of a single stage is returned in a list.

    UserError if a stage's name is unknown, if the two stages are in the wrong order, or if the output size of one stage
    differs from the input size of the next.
    """
    if not is_cascade(config):
        if from_stage or to_stage:
            raise UserError(
                f"--from_stage and --to_stage select stages of a cascade, but the config has only {config.stage}: "
                "use --config=configs/cascade.py"
            )
        return [config]
    names = list(config.order)
    for name in (from_stage, to_stage):
        if name and name not in names:
            raise UserError(f"stage {name!r} is unknown: choose from {', '.join(names)}")
    begin, end = names.index(from_stage or names[0]), names.index(to_stage or names[-1])
    if begin > end:
        raise UserError(f"--from_stage={from_stage} comes after --to_stage={to_stage}: the order is {', '.join(names)}")
    selected = [config.stages[name] for name in names[begin : end + 1]]
    for before, after in itertools.pairwise(selected):
        output_size, input_size = ({key: size[key] for key in SIZE_KEYS} for size in (before.video, after.cond))
        if output_size != input_size:
            raise UserError(
                f"the output of {before.stage} is {output_size}, but the input of {after.stage} is {input_size}: "
                f"config.stages.{after.stage}.cond must equal config.stages.{before.stage}.video"
            )
    return selected


def embed_prompts(
    config, prompts: Sequence[str], *, batch: int = ENCODER_BATCH, encoder: TextEncoder | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts' embeddings [N, L, D] float32 from a stage's text encoder, and their mask [N, L].

    The encoder embeds `batch` prompts at a time. Without `encoder` it is loaded here. It can be larger than the stages
    (T5-XXL), so its parameters are split over all devices, and freed at the end.
    """
    encoder = encoder or load_encoder(config.text, mesh=sharding.make_mesh({"fsdp": -1}))
    tokens, mask = encoder.tokenize(list(prompts))
    embeddings = []
    for begin in range(0, len(prompts), batch):
        # The last batch is padded with the last prompt: every batch has the same shape and needs one compilation
        rows = np.minimum(np.arange(begin, begin + batch), len(prompts) - 1)
        embeddings.append(sharding.to_host(encoder.encode(tokens[rows], mask[rows])))
    return np.concatenate(embeddings)[: len(prompts)], mask


class StageSampler:
    """The sampling program of one stage for batches of `size` videos, compiled once for each size of their input clips.

    The batch is split over as many devices as divide it (`sampling_mesh`). `seconds`: what the last batch took, without
    compilation. `should_stop`: as in `stages.sample`.
    """

    def __init__(self, config, size: int, *, should_stop: Callable[[], bool] | None = None):
        self.config, self.size, self.mesh = config, size, sampling_mesh(config, size)
        self._model, self._progress, self._should_stop = stages.build_model(config), None, should_stop
        self._compiled, self.seconds = {}, None  # programs by the shape of the low-resolution clips
        video = sharding.logical_sharding(self.mesh, (size, *stages.video_shape(config)), sharding.VIDEO)
        self._run = jax.jit(self._sample, out_shardings=video)

    def _sample(self, params, text, mask, keys, low_res):
        with sharding.layout(self.mesh):
            keys = jax.random.wrap_key_data(keys)
            on_step = self._advance_progress if sys.stderr.isatty() else None
            return stages.sample(
                self.config, self._model, params, text, mask, keys, low_res=low_res, on_step=on_step,
                should_stop=self._should_stop,
            )  # fmt: skip

    def _advance_progress(self, _):
        if self._progress is not None:
            self._progress.update()

    def place(self, params):
        """The parameters on the stage's mesh, in the dtype that the network computes in."""
        return place(params, self.mesh, self.config.model.dtype)

    def batches(self, params, batches, *, texts, seeds, low_res=None, label: str | None = None):
        """Yields (rows, videos [n, T, H, W, 3] in [-1, 1]) per batch; `batches` are lists of up to `size` rows.

        A row is an index into `texts` (text [N, L, D], mask [N, L]), `seeds` (see `stages.video_keys`) and `low_res`,
        the input of a super-resolution stage: an array [N, t, h, w, 3] or a dict from row to clip.
        A batch is sampled only when the caller asks for it.
        """
        text, mask = texts
        hidden, total = not sys.stderr.isatty(), self.config.sample.steps * len(batches)
        with tqdm.tqdm(total=total, desc=label or self.config.stage, unit="step", disable=hidden) as self._progress:
            for batch in batches:
                # A short batch is padded with its last row: every batch has the same shape and needs one compilation
                rows = [*batch, *[batch[-1]] * (self.size - len(batch))]
                keys = jax.random.key_data(stages.video_keys(self.config, [seeds[row] for row in rows]))
                clips = None if low_res is None else np.stack([low_res[row] for row in rows])
                inputs = sharding.inputs_to_mesh((text[rows], mask[rows], np.asarray(keys), clips), self.mesh)
                shape = np.shape(clips)
                if shape not in self._compiled:
                    self._compiled[shape] = run_interruptibly(lambda: self._run.lower(params, *inputs).compile())  # noqa: B023
                program = self._compiled[shape]
                begin = time.perf_counter()
                videos = run_interruptibly(lambda: sharding.to_host(program(params, *inputs)))  # noqa: B023
                self.seconds = time.perf_counter() - begin
                yield batch, videos[: len(batch)]
                del videos  # the next batch needs its memory
            jax.effects_barrier()


def check_input(config, *, has_input: bool) -> None:
    """UserError if a super-resolution stage has no input video, or if the base stage has one."""
    if has_input and not config.cond.frames:
        raise UserError(f"stage {config.stage} starts from noise: it takes no --input")
    if config.cond.frames and not has_input:
        raise UserError(
            f"stage {config.stage} upsamples a video of {config.cond.height}×{config.cond.width}: pass one with --input"
        )


def sample_stage(
    config,
    params,
    prompts: Sequence[str],
    *,
    seeds: Sequence[tuple[int, ...]],
    low_res=None,
    texts: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Samples one video per prompt with one stage: [N, T, H, W, 3] in [-1, 1].

    `seeds`: per prompt the numbers for `stages.video_keys`; a video's noise depends on nothing else.
    `low_res` [N, t, h, w, 3]: the input of a super-resolution stage.
    `texts`: the prompts' embeddings and mask (`embed_prompts`), if they are computed already.
    Videos are sampled `config.sample.batch` at a time, with a progress bar in a terminal.
    UserError if `low_res` is missing or not wanted; FloatingPointError if a video has a `defect`.
    """
    check_input(config, has_input=low_res is not None)
    sampler = StageSampler(config, min(config.sample.batch, len(prompts)))
    batches = _batches(range(len(prompts)), sampler.size)
    params, texts = sampler.place(params), texts or embed_prompts(config, prompts)
    videos = None
    for rows, batch in sampler.batches(params, batches, texts=texts, seeds=seeds, low_res=low_res):
        for row, video in zip(rows, batch, strict=True):
            check_video(config, prompts[row], video)
        if videos is None:  # one array for all: concatenating would copy gigabytes
            videos = np.empty((len(prompts), *batch.shape[1:]), batch.dtype)
        videos[rows[0] : rows[-1] + 1] = batch
    return videos


def _batches(rows: range, size: int) -> list[list[int]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def defect(video: np.ndarray) -> str | None:
    """NOT_FINITE, ONE_COLOUR (in all pixels of all frames of a video [T, H, W, 3]), or None for no such defect."""
    low, high = video.min(axis=(0, 1, 2)), video.max(axis=(0, 1, 2))
    if not np.isfinite([low, high]).all():
        return NOT_FINITE
    return ONE_COLOUR if (high - low).max() < 1 / 255 else None  # half a level of 8 bits


def check_video(config, prompt: str, video: np.ndarray) -> None:
    """FloatingPointError if a stage's video has a `defect`."""
    if found := defect(video):
        raise FloatingPointError(_worthless(config.stage, found, [prompt]))


def _worthless(made_by, found, prompts):
    return (
        f"stage {made_by} made {found} for {', '.join(map(repr, prompts))}: nothing was written for "
        f"{'it' if len(prompts) == 1 else 'them'}; {_ADVICE[found]}"
    )


def sampling_mesh(config, size: int):
    """The mesh of `config.sample.mesh` for batches of `size` videos.

    If the mesh's batch axes do not divide the batch, fewer devices are used. UserError if the mesh does not fit the
    devices, or if devices of another process would have no work.
    """
    mesh = sharding.make_mesh(config.sample.mesh)
    batch_parts = sharding.batch_parts(mesh)
    if size % batch_parts == 0:
        return mesh
    used = math.gcd(size, batch_parts)
    if jax.process_count() > 1:
        raise UserError(
            f"config.sample.mesh splits a batch of stage {config.stage} over {batch_parts} groups of devices of "
            f"{jax.process_count()} processes, but a batch has {size} videos: make config.sample.batch a multiple of "
            f"{batch_parts}, or split frames and rows instead (config.sample.mesh)"
        )
    sizes = {**config.sample.mesh, "data": used, "fsdp": 1}
    return sharding.make_mesh(sizes, jax.devices()[: used * (mesh.size // batch_parts)])


def run(
    configs: Sequence,
    prompts: Sequence[str],
    *,
    seeds: Sequence[tuple[int, ...]],
    sources: Mapping[str, str | None] | None = None,
    identities: Mapping[str, str] | None = None,
    low_res=None,
    group: int = 32,
    wanted: Mapping[str, set[int]] | None = None,
    on_batch: Callable[[str, int, float], None] | None = None,
    strict: bool = False,
) -> Iterator[tuple]:
    """Runs the stages in `configs` (see `select`) and yields (stage's config, row, video [T, H, W, 3]).

    `sources` and `identities`: per stage, where its weights are (`trained.find`) and which they were when the command
    began (`trained.check`). UserError if they have changed since, because their training run went on.
    `low_res` [N, t, h, w, 3]: the input of the first stage, if that is a super-resolution stage.
    `group`: this many prompts go through all stages before the next group starts. Each stage loads its weights once
    per group and frees them afterwards; a single stage loads them once. Memory thus holds one stage, one batch of its
    videos, and one group of its input clips.
    `wanted`: per stage, the rows whose videos are yielded; by default all rows of the last stage. Only the batches that
    they need are sampled. The rows in a batch do not depend on `wanted`, so a video is the same bit for bit.
    `on_batch`: called with (stage's name, videos, seconds without compilation) when a batch is sampled.
    A video with a `defect` is left out and the others are sampled. FloatingPointError at the end names its stage, the
    step of the stage's weights, and its prompt. With `strict`, for measurements, videos of one colour are yielded as
    well, and the first one that is not finite is the error.
    """
    wanted = wanted if wanted is not None else {configs[-1].stage: set(range(len(prompts)))}
    check_input(configs[0], has_input=low_res is not None)
    samplers = {config.stage: StageSampler(config, min(config.sample.batch, len(prompts))) for config in configs}
    failed, params = {}, None
    for begin in range(0, len(prompts), group):
        rows = range(begin, min(begin + group, len(prompts)))
        needed = _needed_batches(configs, rows, samplers, wanted)
        if not any(needed.values()):
            continue
        texts = _embed_per_encoder(configs, [prompts[row] for row in rows], batch=min(ENCODER_BATCH, len(prompts)))
        clips = None if low_res is None else low_res[rows.start : rows.stop]
        for number, config in enumerate(configs, 1):
            if not needed[config.stage]:
                break
            # From here on, rows count from the group's first prompt
            batches = [[row - begin for row in batch] for batch in needed[config.stage]]
            if number > 1:  # without the rows that an earlier stage failed to make
                batches = [finite for batch in batches if (finite := [row for row in batch if row in clips])]
            sampler = samplers[config.stage]
            if params is None:
                source, identity = (sources or {}).get(config.stage), (identities or {}).get(config.stage)
                params = sampler.place(trained.load(config, source, identity=identity))
            sampled = sampler.batches(
                params, batches, texts=texts[repr(config.text)], seeds=seeds[rows.start : rows.stop], low_res=clips,
                label=_label(configs, number, rows, len(prompts)),
            )  # fmt: skip
            output_clips = {}
            for batch, videos in sampled:
                if on_batch is not None:
                    on_batch(config.stage, sampler.size, sampler.seconds)
                for position, row in enumerate(batch):
                    found = defect(videos[position])
                    if found and not (strict and found == ONE_COLOUR):
                        failed.setdefault((config.stage, found), []).append(prompts[begin + row])
                        if strict:
                            raise _error(failed, sources, identities)
                        continue
                    if config is not configs[-1]:
                        output_clips[row] = videos[position]
                    if begin + row in wanted.get(config.stage, ()):
                        yield config, begin + row, videos[position]
                del videos  # the next batch needs its memory
            clips = output_clips
            if len(configs) > 1:
                params = sampled = None
    if failed:
        raise _error(failed, sources, identities)


def _error(failed, sources, identities):
    """The error for prompts by (stage, defect)."""
    errors = [
        _worthless(stage + _weights(stage, sources, identities), found, prompts)
        for (stage, found), prompts in failed.items()
    ]
    return FloatingPointError("; ".join(errors))


def _weights(stage, sources, identities):
    """Which weights a stage has, for an error: the step of its training run, or its file. Empty for the package's."""
    source, identity = (sources or {}).get(stage), (identities or {}).get(stage) or ""
    step = identity.split(",")[0] + " of " if identity.startswith("step ") else ""
    return f" ({step}{source})" if source else ""


def _needed_batches(configs, rows, samplers, wanted):
    """Per stage, the batches to sample: those with wanted rows of this stage, or with input for a later stage."""
    needed, batches = set(), {}
    for config in reversed(configs):
        needed = needed | (wanted.get(config.stage, set()) & set(rows))
        batches[config.stage] = [b for b in _batches(rows, samplers[config.stage].size) if needed.intersection(b)]
        needed = {row for batch in batches[config.stage] for row in batch}
    return batches


def _embed_per_encoder(configs, prompts, *, batch):
    """The prompts' embeddings per text encoder, by the repr of its config: stages may share an encoder."""
    by_encoder = {repr(config.text): config for config in configs}
    return {key: embed_prompts(config, prompts, batch=batch) for key, config in by_encoder.items()}


def _label(configs, number, rows, count):
    """The progress bar's label."""
    stage = f"{configs[number - 1].stage} ({number} of {len(configs)})" if len(configs) > 1 else configs[0].stage
    return stage if len(rows) == count else f"{stage}, videos {rows.start + 1} to {rows.stop} of {count}"

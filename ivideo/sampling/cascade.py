"""From texts to videos through one stage or several. Section 2.2.

N videos · T, H, W frames, height, width
"""

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ivideo import stages
from ivideo.devices import sharding
from ivideo.errors import UserError
from ivideo.sampling.interrupts import wait_for
from ivideo.text import load_encoder
from ivideo.training import trained
from ivideo.training.average import read_average
from ivideo.weights import SUFFIX, load_params

SIZE = ("frames", "height", "width", "fps")
PROMPTS_AT_ONCE = 8  # how many prompts are embedded in one call


def is_cascade(config) -> bool:
    """Whether a config is of several stages (configs/cascade.py) and not of one."""
    return "stages" in config


def select(config, first: str | None = None, last: str | None = None) -> list:
    """The configs of the stages to run, in order: all, or from `first` to `last`; of one stage's config, itself.

    UserError where a name is unknown, the order is reversed, or a stage is not given what the one before it makes.
    """
    if not is_cascade(config):
        if first or last:
            raise UserError(
                f"--from_stage and --to_stage choose among several stages, but the config is of {config.stage} alone: "
                "use --config=configs/cascade.py"
            )
        return [config]
    names = list(config.order)
    for name in (first, last):
        if name and name not in names:
            raise UserError(f"stage {name!r} is unknown: choose from {', '.join(names)}")
    begin, end = names.index(first or names[0]), names.index(last or names[-1])
    if begin > end:
        raise UserError(f"--from_stage={first} comes after --to_stage={last}: the order is {', '.join(names)}")
    chosen = [config.stages[name] for name in names[begin : end + 1]]
    for before, after in itertools.pairwise(chosen):
        made, given = ({key: size[key] for key in SIZE} for size in (before.video, after.cond))
        if made != given:
            raise UserError(
                f"{before.stage} makes {made} but {after.stage} is given {given}: "
                f"config.stages.{after.stage}.cond must be config.stages.{before.stage}.video"
            )
    return chosen


def load_weights(config, source: str | None):
    """The stage's averaged parameters.

    `source`: the folder of a training run, whose newest checkpoint is read, a safetensors file, or None for the
    package's (demo). UserError where there is none, or where it is of another model.
    """
    shapes = stages.param_shapes(config)
    if source is None or source.endswith(SUFFIX):
        return load_params(trained.packaged(config) if source is None else source, shapes)
    where = sharding.param_shardings(sharding.make_mesh({"fsdp": -1}), shapes)
    like = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    return read_average(source, like)[1]


def embedded(config, prompts: Sequence[str], *, size: int = PROMPTS_AT_ONCE) -> tuple[np.ndarray, np.ndarray]:
    """What a stage's text encoder makes of prompts: text [N, L, D] float32 and its mask [N, L].

    `size` texts are encoded at a time. The encoder, larger than the stages at the paper's size, is split over all
    devices and let go at the end.
    """
    encoder = load_encoder(config.text, mesh=sharding.make_mesh({"fsdp": -1}))
    tokens, mask = encoder.tokenize(list(prompts))
    parts = []
    for begin in range(0, len(prompts), size):
        # The last part is filled up with the last prompt: one shape, one program
        rows = np.minimum(np.arange(begin, begin + size), len(prompts) - 1)
        parts.append(sharding.to_host(encoder.encode(tokens[rows], mask[rows])))
    return np.concatenate(parts)[: len(prompts)], mask


class Sampler:
    """A stage's sampling program, compiled once for batches of `size` videos, split over the devices that divide it."""

    def __init__(self, config, size: int):
        self.config, self.size, self._mesh = config, size, sampling_mesh(config, size)
        self._model, self._bar = stages.build_model(config), None
        video = sharding.logical_sharding(self._mesh, (size, *stages.video_shape(config)), sharding.VIDEO)
        self._run = jax.jit(self._sample, out_shardings=video)

    def _sample(self, params, text, mask, keys, low):
        with sharding.layout(self._mesh):
            keys = jax.random.wrap_key_data(keys)
            tell = self._tell if sys.stderr.isatty() else None
            return stages.sample(self.config, self._model, params, text, mask, keys, low=low, on_step=tell)

    def _tell(self, _):
        if self._bar is not None:
            self._bar.update()

    def placed(self, params):
        """Parameters on the mesh, in the type that the network computes in: half the memory in bfloat16."""
        where = sharding.param_shardings(self._mesh, params)
        dtype = jnp.dtype(self.config.model.dtype)
        cast = jax.jit(lambda params: jax.tree.map(lambda p: p.astype(dtype), params), out_shardings=where)
        if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
            return cast(sharding.from_host(params, where))
        return cast(jax.device_put(params, where))

    def batches(self, params, batches, *, texts, seeds, low=None, label: str | None = None):
        """Yields (rows, their videos [n, T, H, W, 3] in [-1, 1]) for each of `batches`, lists of up to `size` rows.

        `texts` (text [N, L, D], mask [N, L]), `seeds` (`stages.video_keys`) and `low`, what a super-resolution stage is
        given, [N, t, h, w, 3] or clips by their rows, are indexed by row. A batch is made when it is asked for.
        """
        text, mask = texts
        hidden, total = not sys.stderr.isatty(), self.config.sample.steps * len(batches)
        with tqdm.tqdm(total=total, desc=label or self.config.stage, unit="step", disable=hidden) as self._bar:
            for batch in batches:
                # A batch that is not full is filled up with its last row: one shape, one compile
                rows = [*batch, *[batch[-1]] * (self.size - len(batch))]
                keys = jax.random.key_data(stages.video_keys(self.config, [seeds[row] for row in rows]))
                given = None if low is None else np.stack([low[row] for row in rows])
                given = sharding.inputs_to_mesh((text[rows], mask[rows], np.asarray(keys), given), self._mesh)
                yield batch, wait_for(lambda: sharding.to_host(self._run(params, *given)))[: len(batch)]  # noqa: B023
            jax.effects_barrier()


def check_input(config, *, given: bool) -> None:
    """UserError where a stage lacks the video that it enlarges, or is given one that it does not take."""
    if given and not config.cond.frames:
        raise UserError(f"stage {config.stage} makes videos from noise: it takes no input")
    if config.cond.frames and not given:
        raise UserError(
            f"stage {config.stage} enlarges a video of {config.cond.height}×{config.cond.width}: give it --input"
        )


def sample_stage(
    config,
    params,
    prompts: Sequence[str],
    *,
    seeds: Sequence[tuple[int, ...]],
    low=None,
    texts: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """One stage's videos [N, T, H, W, 3] in [-1, 1], one for each prompt.

    `texts`: the prompts as the stage's encoder embeds them (`embedded`), where that has been done already.
    `low` [N, t, h, w, 3]: what a super-resolution stage is given. A video's noise follows from its seed, numbers as
    `stages.video_keys` takes them, alone. Videos are made `config.sample.batch` at a time, with a progress bar where
    there is a terminal. UserError where `low` is missing or not wanted; FloatingPointError where a value is not finite.
    """
    check_input(config, given=low is not None)
    sampler = Sampler(config, min(config.sample.batch, len(prompts)))
    batches = _batches(range(len(prompts)), sampler.size)
    videos = None
    params = sampler.placed(params)
    for rows, made in sampler.batches(params, batches, texts=texts or embedded(config, prompts), seeds=seeds, low=low):
        for row, video in zip(rows, made, strict=True):
            if not np.isfinite(video).all():
                raise FloatingPointError(_not_finite(config.stage, [prompts[row]]))
        if videos is None:  # one array for all: a copy would be gigabytes
            videos = np.empty((len(prompts), *made.shape[1:]), made.dtype)
        videos[rows[0] : rows[-1] + 1] = made
    return videos


def _batches(rows: range, size: int) -> list[list[int]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def _not_finite(stage, prompts):
    return (
        f"stage {stage} made values that are not finite for {', '.join(map(repr, prompts))}: nothing was written for "
        f"{'it' if len(prompts) == 1 else 'them'}; try --config.model.dtype=float32 or an earlier checkpoint"
    )


def sampling_mesh(config, size: int):
    """The mesh of `config.sample.mesh` for `size` videos at a time; fewer devices where data does not divide these.

    UserError where the mesh does not fit the devices, or would leave devices of another process without work.
    """
    mesh = sharding.make_mesh(config.sample.mesh)
    parts = sharding.batch_parts(mesh)
    if size % parts == 0:
        return mesh
    used = math.gcd(size, parts) * (mesh.size // parts)
    if jax.process_count() > 1:
        raise UserError(
            f"{size} videos at a time of stage {config.stage} over {parts} parts of {jax.process_count()} processes' "
            f"devices: make config.sample.batch a multiple of {parts}, or split frames and rows (config.sample.mesh)"
        )
    sizes = {**config.sample.mesh, "data": math.gcd(size, parts), "fsdp": 1}
    return sharding.make_mesh(sizes, jax.devices()[:used])


def run(
    configs: Sequence,
    prompts: Sequence[str],
    *,
    seeds: Sequence[tuple[int, ...]],
    sources: Mapping[str, str | None] | None = None,
    identities: Mapping[str, str] | None = None,
    low=None,
    group: int = 32,
    wanted: Mapping[str, set[int]] | None = None,
) -> Iterator[tuple]:
    """Yields (stage's config, row, video [T, H, W, 3]) as the stages in `configs` (see `select`) make them.

    `group` prompts at a time go through all stages, each of which loads its weights from its source (`trained.find`)
    for every group, and lets them go: memory holds one stage, one batch of its videos and what it is given for a group.
    A single stage loads them once. `identities`: what `trained.check` found; UserError where a run has gone on since.
    `low` [N, t, h, w, 3] is what the first stage is given, where it enlarges. `wanted`: the rows whose videos are
    yielded, by the stage's name; all of the last stage unless given. Only batches that these need are made. Batches
    do not depend on `wanted`, so that each video is the same, bit for bit, whatever else is wanted.
    A video that is not finite is left out, and the others are made; FloatingPointError, at the end, names its prompt.
    """
    wanted = wanted if wanted is not None else {configs[-1].stage: set(range(len(prompts)))}
    check_input(configs[0], given=low is not None)
    samplers = {config.stage: Sampler(config, min(config.sample.batch, len(prompts))) for config in configs}
    failed, params = {}, None
    for begin in range(0, len(prompts), group):
        rows = range(begin, min(begin + group, len(prompts)))
        needed = _needed(configs, rows, samplers, wanted)
        if not any(needed.values()):
            continue
        texts = _texts(configs, [prompts[row] for row in rows], size=min(PROMPTS_AT_ONCE, len(prompts)))
        given = None if low is None else low[rows.start : rows.stop]
        for number, config in enumerate(configs, 1):
            if not needed[config.stage]:
                break
            batches = [[row - begin for row in batch] for batch in needed[config.stage]]
            if number > 1:
                batches = [some for batch in batches if (some := [row for row in batch if row in given])]
            sampler = samplers[config.stage]
            if params is None:
                params = sampler.placed(_load_the_same(config, sources, identities))
            made = sampler.batches(
                params, batches, texts=texts[repr(config.text)], seeds=seeds[rows.start : rows.stop], low=given,
                label=_label(configs, number, rows, len(prompts)),
            )  # fmt: skip
            kept = {}
            for batch, videos in made:
                for place, row in enumerate(batch):
                    if not np.isfinite(videos[place]).all():
                        failed.setdefault(config.stage, []).append(prompts[begin + row])
                        continue
                    if config is not configs[-1]:
                        kept[row] = videos[place]
                    if begin + row in wanted.get(config.stage, ()):
                        yield config, begin + row, videos[place]
                videos = None  # before the next batch is made
            given = kept
            if len(configs) > 1:
                params = made = None
    for stage, lost in failed.items():
        raise FloatingPointError(_not_finite(stage, lost))


def _load_the_same(config, sources, identities):
    """A stage's weights; UserError where they are not those that were found when the command began."""
    source = (sources or {}).get(config.stage)
    if identities and trained.check(config, source) != identities[config.stage]:
        raise UserError(
            f"the weights of stage {config.stage} in {source} have changed since this command began: export them with "
            "--mode=export, and give the file with --weights"
        )
    return load_weights(config, source)


def _needed(configs, rows, samplers, wanted):
    """The batches of each stage that have to be made, for the videos that are wanted of it and of the stages after."""
    needed, batches = set(), {}
    for config in reversed(configs):
        needed = needed | (wanted.get(config.stage, set()) & set(rows))
        batches[config.stage] = [b for b in _batches(rows, samplers[config.stage].size) if needed.intersection(b)]
        needed = {row for batch in batches[config.stage] for row in batch}
    return batches


def _texts(configs, prompts, *, size):
    """What the stages' encoders make of prompts, by the repr of the stage's text config."""
    by_encoder = {repr(config.text): config for config in configs}
    return {key: embedded(config, prompts, size=size) for key, config in by_encoder.items()}


def _label(configs, number, rows, count):
    """The progress bar's name."""
    stage = f"{configs[number - 1].stage} ({number} of {len(configs)})" if len(configs) > 1 else configs[0].stage
    return stage if len(rows) == count else f"{stage}, videos {rows.start + 1} to {rows.stop} of {count}"

"""From texts to videos through one stage or several. Section 2.2.

N videos · T, H, W frames, height, width
"""

import importlib.resources
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ivideo import sharding, stages
from ivideo.average import read_average
from ivideo.errors import UserError
from ivideo.export import load_params
from ivideo.text import load_encoder

SIZE = ("frames", "height", "width", "fps")
TEXTS = 8  # prompts embedded at a time


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


def load_weights(config, workdir: str | None):
    """The stage's averaged parameters: the newest checkpoint's in `workdir`, or without one the package's (demo).

    UserError where there is none, or where it is of another model.
    """
    if workdir is None:
        path = importlib.resources.files("ivideo") / "demo" / "weights" / f"{config.stage}.safetensors"
        if config.variant != "demo" or not os.path.exists(str(path)):
            raise UserError(
                f"--workdir is missing: the package has weights for the demo variant alone, not for {config.stage}:"
                f"{config.variant}; give the folder of a training run"
            )
        return load_params(str(path), stages.param_shapes(config))
    shapes = stages.param_shapes(config)
    where = sharding.of_params(sharding.make_mesh({"fsdp": -1}), shapes)
    like = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    return read_average(workdir, like)[1]


def embedded(config, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """What a stage's text encoder makes of prompts: text [N, L, D] float32 and its mask [N, L].

    The encoder, larger than the stages at the paper's size, is split over all devices and let go at the end.
    """
    encoder = load_encoder(config.text, mesh=sharding.make_mesh({"fsdp": -1}))
    tokens, mask = encoder.tokenize(list(prompts))
    parts = [range(i, min(i + TEXTS, len(prompts))) for i in range(0, len(prompts), TEXTS)]
    return np.concatenate([sharding.to_host(encoder.encode(tokens[part], mask[part])) for part in parts]), mask


def sample_stage(
    config,
    params,
    prompts: Sequence[str],
    *,
    seeds: Sequence[tuple[int, int]],
    low=None,
    texts: tuple[np.ndarray, np.ndarray] | None = None,
    label: str | None = None,
) -> np.ndarray:
    """One stage's videos [N, T, H, W, 3] in [-1, 1], one a prompt.

    `texts`: the prompts as the stage's encoder embeds them (`embedded`), where that has been done already.
    `low` [N, t, h, w, 3]: what a super-resolution stage is given. A video's noise follows from its (seed, number)
    alone. Videos are made `config.sample.batch` at a time, split over the devices where these divide it, with a
    progress bar, called `label` or by the stage's name, where there is a terminal. UserError where `low` is missing or
    not wanted; FloatingPointError where a value is not finite.
    """
    if (low is None) == (config.cond.frames > 0):
        raise UserError(
            f"stage {config.stage} makes videos from noise: it takes no input"
            if low is not None
            else f"stage {config.stage} enlarges a video of {config.cond.height}×{config.cond.width}: give it --input"
        )
    (text, text_mask), model = texts or embedded(config, prompts), stages.build_model(config)
    size = min(config.sample.batch, len(prompts))
    mesh = sampling_mesh(config, size)
    video = sharding.logical(mesh, (size, *stages.video_shape(config)), sharding.VIDEO)
    chunks = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
    with tqdm.tqdm(
        total=config.sample.steps * len(chunks),
        desc=label or config.stage,
        unit="step",
        disable=not sys.stderr.isatty(),
    ) as bar:

        def sample(params, text, mask, keys, low):
            with sharding.layout(mesh):
                keys = jax.random.wrap_key_data(keys)
                tell = None if bar.disable else lambda _: bar.update()
                return stages.sample(config, model, params, text, mask, keys, low=low, on_step=tell)

        run = jax.jit(sample, out_shardings=video)
        params = placed_params(config, params, mesh)
        videos = None
        for chunk in chunks:
            # The last chunk is filled up with its own last prompt: one shape, one compile
            rows = [*chunk, *[chunk[-1]] * (size - len(chunk))]
            keys = jax.random.key_data(stages.video_keys(config, [seeds[i] for i in rows]))
            given = None if low is None else low[np.array(rows)]
            given = (text[np.array(rows)], text_mask[np.array(rows)], np.asarray(keys), given)
            made = sharding.to_host(run(params, *sharding.on_mesh(given, mesh)))[: len(chunk)]
            _check_finite(config, made, [prompts[i] for i in chunk])
            if videos is None:  # one array for all: at the end of the cascade a copy would be gigabytes
                videos = np.empty((len(prompts), *made.shape[1:]), made.dtype)
            videos[chunk.start : chunk.stop] = made
        jax.effects_barrier()
    return videos


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


def placed_params(config, params, mesh):
    """Parameters on the mesh, in the type that the network computes in: half the memory in bfloat16."""
    dtype = jnp.dtype(config.model.dtype)
    where = sharding.of_params(mesh, params)
    cast = jax.jit(lambda params: jax.tree.map(lambda p: p.astype(dtype), params), out_shardings=where)
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
        return cast(sharding.from_host(params, where))
    return cast(jax.device_put(params, where))


def _check_finite(config, videos, prompts) -> None:
    for video, prompt in zip(videos, prompts, strict=True):
        if not np.isfinite(video).all():
            raise FloatingPointError(
                f"stage {config.stage} made values that are not finite for {prompt!r}: nothing was written; try "
                "--config.model.dtype=float32 or an earlier checkpoint"
            )


def run(
    configs: Sequence,
    prompts: Sequence[str],
    *,
    seeds: Sequence[tuple[int, int]],
    workdir: str | None = None,
    low=None,
    on_stage: Callable = lambda config, videos: None,
) -> np.ndarray:
    """The last stage's videos [N, T, H, W, 3] of the stages in `configs` (see `select`), run one after the other.

    Only one stage's weights are in memory at a time. `workdir` is the folder of a stage's training run, of several
    stages a folder of such folders by the stages' names; None takes the package's weights. `on_stage(config, videos)`
    is told what each stage made.
    """
    texts = {}
    for config in configs:
        if (key := repr(config.text)) not in texts:
            texts[key] = embedded(config, prompts)
    for number, config in enumerate(configs, 1):
        label = f"{config.stage} ({number} of {len(configs)})" if len(configs) > 1 else None
        path = os.path.join(workdir, config.stage) if workdir and len(configs) > 1 else workdir
        params = load_weights(config, path)
        low = sample_stage(config, params, prompts, seeds=seeds, low=low, texts=texts[repr(config.text)], label=label)
        on_stage(config, low)
        del params
    return low

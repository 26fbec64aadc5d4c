"""From prompts to video files with a trained stage. Sections 2.2 and 2.6."""

import functools
import importlib.resources
import os
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ivideo import sharding, stages
from ivideo.checkpoint import Checkpoints
from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.export import config_metadata, load_params, save_params
from ivideo.text import load_encoder
from ivideo.train import init_state


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
    if not os.path.isdir(os.path.join(workdir, "checkpoints")):
        raise UserError(f"--workdir={workdir} has no checkpoints: give the folder that --mode=train was run with")
    shapes = jax.eval_shape(lambda: init_state(config))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
    checkpoints = Checkpoints(workdir, keep=config.train.keep)
    restored = checkpoints.restore(like)
    checkpoints.close()
    if restored is None:
        raise UserError(
            f"--workdir={workdir} has no whole checkpoint yet: train longer than config.train.checkpoint_every"
        )
    return restored[1].ema


def sample_videos(config, params, prompts: Sequence[str], *, seeds: Sequence[tuple[int, int]]) -> np.ndarray:
    """Videos [N, T, H, W, 3] in [-1, 1], one a prompt; a video's noise follows from its (seed, number) alone.

    They are made `config.sample.batch` at a time, split over the devices where these divide it, with a progress bar
    where there is a terminal. FloatingPointError where a value is not finite.
    """
    encoder, model = load_encoder(config.text), stages.build_model(config)
    size = min(config.sample.batch, len(prompts))
    devices = jax.devices()
    mesh = sharding.make_mesh(devices if size % len(devices) == 0 else devices[:1])
    whole, split = sharding.replicated(mesh), sharding.split_batch(mesh)
    chunks = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
    with tqdm.tqdm(
        total=config.sample.steps * len(chunks), desc=config.stage, unit="step", disable=not sys.stderr.isatty()
    ) as bar:
        run = jax.jit(
            functools.partial(stages.sample, config, model, on_step=lambda _: bar.update()),
            in_shardings=(whole, split, split, split),
            out_shardings=split,
        )
        videos = []
        for chunk in chunks:
            # The last chunk is filled up with its own last prompt: one shape, one compile
            rows = [*chunk, *[chunk[-1]] * (size - len(chunk))]
            tokens, mask = encoder.tokenize([prompts[i] for i in rows])
            text = encoder.encode(jnp.asarray(tokens), jnp.asarray(mask))
            keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), n) for seed, n in (seeds[i] for i in rows)])
            videos.append(np.asarray(run(params, text, jnp.asarray(mask), keys))[: len(chunk)])
        jax.effects_barrier()
    videos = np.concatenate(videos)
    if not np.isfinite(videos).all():
        bad = int(np.flatnonzero(~np.isfinite(videos).all((1, 2, 3, 4)))[0])
        raise FloatingPointError(
            f"stage {config.stage} made values that are not finite for {prompts[bad]!r}: nothing was written; try "
            "--config.model.dtype=float32 or an earlier checkpoint"
        )
    return videos


def generate(
    config,
    prompts: list[str],
    out: str,
    *,
    workdir=None,
    seed=0,
    num_videos=1,
    in_folder=False,
    zoom=1,
    overwrite=False,
) -> list[str]:
    """Writes `num_videos` videos a prompt; returns their paths.

    `out` is a file, or with `in_folder` or several videos a folder of 000.mp4, 001.mp4, … in the prompts' order. Each
    file's metadata holds prompt, seed, config and version. `zoom` enlarges every pixel, for looking at small stages.
    UserError, before anything is compiled, where `out` exists and `overwrite` is not set.
    """
    paths = output_paths(out, len(prompts) * num_videos, in_folder=in_folder or num_videos > 1, overwrite=overwrite)
    params = load_weights(config, workdir)
    rows = [(prompt, (seed, n)) for prompt in prompts for n in range(num_videos)]
    videos = sample_videos(config, params, [p for p, _ in rows], seeds=[s for _, s in rows])
    os.makedirs(os.path.dirname(os.path.abspath(paths[0])), exist_ok=True)
    for path, video, (prompt, (_, number)) in zip(paths, videos, rows, strict=True):
        metadata = config_metadata(config, prompt=prompt, seed=str(seed), number=str(number))
        video = video.repeat(zoom, axis=1).repeat(zoom, axis=2)
        video_io.write_video(path, video, fps=config.video.fps, metadata=metadata, overwrite=overwrite)
        print(path)
    return paths


def output_paths(out: str, count: int, *, in_folder: bool, overwrite: bool) -> list[str]:
    """The files that `count` videos go to; UserError where one is there already or `out` is not of the right kind."""
    extension = os.path.splitext(out)[1]
    if in_folder:
        if extension in video_io.EXTENSIONS:
            raise UserError(f"--out={out} names one file for several videos: give a folder")
        paths = [os.path.join(out, f"{i:03}.mp4") for i in range(count)]
        if os.path.isfile(out):
            raise UserError(f"--out={out} is a file, but {count} videos need a folder: choose another")
    else:
        if extension not in video_io.EXTENSIONS:
            raise UserError(f"--out={out} must end in {' or '.join(video_io.EXTENSIONS)}")
        paths = [out]
    existing = [p for p in paths if os.path.exists(p)]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists: choose another --out, or pass --overwrite to replace it")
    return paths


def export(config, workdir: str, out: str, *, overwrite=False) -> None:
    """Writes the averaged parameters of a training run as bfloat16 safetensors, with the config beside them."""
    if not out.endswith(".safetensors"):
        raise UserError(f"--out={out} must end in .safetensors")
    save_params(out, load_weights(config, workdir), metadata=config_metadata(config), overwrite=overwrite)
    print(out)

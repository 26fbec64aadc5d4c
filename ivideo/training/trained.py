"""Where a stage's weights come from, checked before any is read: a training run, a file of mode export, the package."""

import hashlib
import importlib.resources
import json
import os
from collections.abc import Sequence

import orbax.checkpoint as ocp
from etils import epath

from ivideo import recipe, stages
from ivideo.errors import UserError
from ivideo.training.checkpoint import below, shapes_in, steps_in
from ivideo.weights import SUFFIX, check_shapes, file_identity, load_metadata, read_shapes, shapes_of


def find(configs: Sequence, *, workdir: str | None = None, weights: str | None = None) -> dict[str, str | None]:
    """Each stage's source of weights by the stage's name: a folder of a training run, a file, or None for the package.

    `workdir` is the folder of a stage's run, or of several stages a folder of such folders by the stages' names.
    `weights` is a safetensors file of one stage, or a folder of STAGE.safetensors. UserError where both are given.
    """
    if workdir and weights:
        raise UserError(f"--workdir={workdir} and --weights={weights} are both given: weights come from one of them")
    names = [config.stage for config in configs]
    if weights:
        if os.path.isdir(weights):
            return {name: os.path.join(weights, f"{name}{SUFFIX}") for name in names}
        if not weights.endswith(SUFFIX):
            raise UserError(f"--weights={weights} is neither a folder nor a {SUFFIX} file: give what mode export wrote")
        if len(names) > 1:
            raise UserError(
                f"--weights={weights} is one file, and {len(names)} stages need theirs: give a folder of "
                f"{names[0]}{SUFFIX}, {names[1]}{SUFFIX}, …"
            )
        return {names[0]: weights}
    return {name: os.path.join(workdir, name) if workdir and len(names) > 1 else workdir for name in names}


def packaged(config) -> str:
    """The file with a stage's weights in the package. UserError where there is none."""
    path = str(importlib.resources.files("ivideo") / "demo" / "weights" / f"{config.stage}{SUFFIX}")
    if config.variant != "demo" or not os.path.exists(path):
        raise UserError(
            f"--workdir is missing: the package has weights for the demo variant alone, not for {config.stage}:"
            f"{config.variant}; give the folder of a training run, or an exported file with --weights"
        )
    return path


def check(config, source: str | None, *, any_stage: bool = False) -> str:
    """Returns what tells these weights from others, without reading them.

    UserError where there are none at `source` (see `find`), or where they are of another network: the config kept
    beside them is compared first, then every leaf's shape. `any_stage` as in `recipe.check_network`.
    """
    source = packaged(config) if source is None else source
    wanted = shapes_of(stages.param_shapes(config))
    if source.endswith(SUFFIX):
        found, shapes, identity = _config_of(source), read_shapes(source), file_identity(source)
    else:
        found, shapes, identity = recipe.read_run_config(source), *_newest(source)
    if found is not None:
        recipe.check_network(source, found, config, any_stage=any_stage)
    if shapes is not None:
        check_shapes(source, shapes, wanted)
    return identity


def check_start(config) -> None:
    """As `check`, of the file that a training run begins with, which may be of another stage with the same network."""
    if not config.train.start.endswith(SUFFIX):
        raise UserError(
            f"config.train.start = {config.train.start}: expected a {SUFFIX} file, such as mode export writes"
        )
    check(config, config.train.start, any_stage=True)


def config_beside(source: str) -> dict | None:
    """The config kept beside the weights in a folder or a file, or None where there is none."""
    return _config_of(source) if source.endswith(SUFFIX) else recipe.read_run_config(source)


def _config_of(path):
    try:
        return json.loads(load_metadata(path)["config"])
    except (KeyError, ValueError):
        return None


def _newest(workdir):
    """(shapes of the newest checkpoint's averaged parameters, what tells it from others).

    No shapes where its metadata cannot be read: loading says what is wrong with it, or goes back to the one before it.
    """
    folder = epath.Path(os.path.abspath(workdir)) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"--workdir={workdir} has no checkpoints: give the folder that --mode=train was run with")
    steps = steps_in(folder.parent)
    if not steps:
        raise UserError(
            f"--workdir={workdir} has no whole checkpoint yet: train longer than config.train.checkpoint_every"
        )
    path = folder / str(max(steps))
    try:
        saved = (path / "_CHECKPOINT_METADATA").read_bytes()  # when it was saved, to the nanosecond
    except OSError:
        saved = b""
    identity = f"step {max(steps)}, saved {hashlib.sha256(saved).hexdigest()[:16]}"
    try:
        shapes = below(shapes_in(path, ocp.PyTreeCheckpointHandler()), "ema")
    except Exception:  # whatever Orbax says of damaged metadata
        return None, identity
    return shapes, identity

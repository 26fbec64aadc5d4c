"""Finds, checks, loads and exports a stage's weights.

Weights come from a training run or a distillation, from a safetensors file, or from the package (demo variant).
`find` says where they are, `check` compares them with the config without reading them, and `load` reads them.
"""

import hashlib
import importlib.resources
import json
import os
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath

from ivideo import recipe, stages
from ivideo.devices import sharding
from ivideo.errors import UserError
from ivideo.files import prepare_folders, refuse_existing
from ivideo.training import students
from ivideo.training.average import read_average
from ivideo.training.checkpoint import checkpoint_shapes, steps_in, subtree
from ivideo.weights import (
    SUFFIX,
    check_shapes,
    config_metadata,
    file_identity,
    load_metadata,
    load_params,
    read_shapes,
    save_params,
    shapes_of,
)


def find(configs: Sequence, *, workdir: str | None = None, weights: str | None = None) -> dict[str, str | None]:
    """Per stage, the source of its weights: the folder of a training run, a file, or None for the package.

    `workdir`: the folder of one stage's training run; for several stages, a folder with one such folder per stage.
    `weights`: a safetensors file for one stage, or a folder of STAGE.safetensors. UserError if both are given.
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
                f"--weights={weights} is one file, but {len(names)} stages need weights: give a folder of "
                f"{names[0]}{SUFFIX}, {names[1]}{SUFFIX}, …"
            )
        return {names[0]: weights}
    return {name: os.path.join(workdir, name) if workdir and len(names) > 1 else workdir for name in names}


def packaged(config) -> str:
    """The path of a stage's weights in the package. UserError if the package has none for this variant."""
    path = str(importlib.resources.files("ivideo") / "demo" / "weights" / f"{config.stage}{SUFFIX}")
    if config.variant != "demo" or not os.path.exists(path):
        raise UserError(
            f"--workdir is missing: the package has weights for the demo variant only, not for {config.stage}:"
            f"{config.variant}; give the folder of a training run, or an exported file with --weights"
        )
    return path


def check(config, source: str | None, *, any_stage: bool = False, flag: str = "--workdir") -> str:
    """Checks that the weights at `source` fit the config, without reading them. Returns their identity, a short text.

    UserError if there are no weights at `source` (see `find`), or if they belong to another network: the config saved
    with them is compared first, then the shape of every leaf. `any_stage` as in `recipe.check_network`. `flag` is the
    flag that names a folder, for the errors.
    """
    source = _locate(config, source)
    wanted = shapes_of(stages.param_shapes(config))
    if source.endswith(SUFFIX):
        found, shapes, identity = _file_config(source), read_shapes(source), file_identity(source)
    else:
        found, shapes, identity = recipe.read_run_config(source), *_newest_checkpoint(source, flag)
    if found is not None:
        recipe.check_network(source, found, config, any_stage=any_stage)
    if shapes is not None:
        check_shapes(source, shapes, wanted)
    return identity


def saved_config(config, source: str | None) -> dict | None:
    """The config that is saved with the weights at `source` (see `find`), or None."""
    source = _locate(config, source)
    return _file_config(source) if source.endswith(SUFFIX) else recipe.read_run_config(source)


def _locate(config, source):
    """The safetensors file or the training run that `source` means: in a distillation, the file of a student."""
    if source is None:
        return packaged(config)
    return source if source.endswith(SUFFIX) else students.locate(source, config)


def check_start(config) -> None:
    """Checks the file that a new training run starts from, `config.train.start`.

    Like `check`, but the weights may come from another stage with the same network.
    """
    if not config.train.start.endswith(SUFFIX):
        raise UserError(
            f"config.train.start = {config.train.start}: expected a {SUFFIX} file, such as mode export writes"
        )
    check(config, config.train.start, any_stage=True)


def load(config, source: str | None, *, identity: str | None = None):
    """The stage's averaged parameters, float32.

    From a training run, the newest checkpoint is read, sharded over all devices. UserError if there are no weights at
    `source` (see `find`), if they belong to another network, or if `check` now returns another `identity`.
    """
    if identity and check(config, source) != identity:
        raise UserError(
            f"the weights of stage {config.stage} in {source} have changed since this command began: export them with "
            "--mode=export, and give the file with --weights"
        )
    shapes, source = stages.param_shapes(config), _locate(config, source)
    if source.endswith(SUFFIX):
        return load_params(source, shapes)
    where = sharding.param_shardings(sharding.make_mesh({"fsdp": -1}), shapes)
    sharded = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    return read_average(source, sharded)[1]


def export(config, workdir: str, out: str, *, overwrite=False) -> None:
    """Writes a stage's weights as a bfloat16 safetensors file, with the config saved with them.

    Those of a training run are its averaged parameters, those of a distillation a student's.

    UserError before any weights are read if `out` exists or cannot be written, if the run has no checkpoint, or if its
    network differs from the config's.
    """
    if not out.endswith(SUFFIX):
        raise UserError(f"--out={out} must end in {SUFFIX}")
    check(config, workdir)
    refuse_existing([out], overwrite=overwrite)
    prepare_folders([out])
    metadata = config_metadata(config)
    if (run_config := saved_config(config, workdir)) is not None:
        metadata["config"] = json.dumps(run_config, sort_keys=True)
    save_params(out, load(config, workdir), metadata=metadata, overwrite=overwrite)
    print(out)


def _file_config(path):
    """The config in a safetensors file's metadata, or None."""
    try:
        return json.loads(load_metadata(path)["config"])
    except (KeyError, ValueError):
        return None


def _newest_checkpoint(workdir, flag):
    """(shapes of the averaged parameters in a run's newest checkpoint, the checkpoint's identity).

    The shapes are None if the checkpoint's metadata cannot be read: `load` then reports the damage, or reads the
    checkpoint before it.
    """
    folder = epath.Path(os.path.abspath(workdir)) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{flag}={workdir} has no checkpoints: give the folder that --mode=train was run with")
    steps = steps_in(folder.parent)
    if not steps:
        raise UserError(
            f"{flag}={workdir} has no whole checkpoint yet: train longer than config.train.checkpoint_every"
        )
    path = folder / str(max(steps))
    try:
        saved = (path / "_CHECKPOINT_METADATA").read_bytes()  # has the time of saving in nanoseconds
    except OSError:
        saved = b""
    identity = f"step {max(steps)}, saved {hashlib.sha256(saved).hexdigest()[:16]}"
    try:
        shapes = subtree(checkpoint_shapes(path, ocp.PyTreeCheckpointHandler()), "ema")
    except Exception:  # Orbax raises many types for damaged metadata
        return None, identity
    return shapes, identity

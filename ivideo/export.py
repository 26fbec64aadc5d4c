"""Weights as safetensors files: the form in which trained networks are shipped and read back. Section 3 ships none."""

import json
import os

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from ivideo.errors import UserError
from ivideo.files import whole


def save_params(path: str, params, *, metadata: dict[str, str], dtype=jnp.bfloat16, overwrite: bool = False):
    """Writes a tree of parameters, rounded to `dtype`, with string metadata; to a temporary name, then renamed."""
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{path} exists: choose another --out, or pass --overwrite to replace it")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    data = save({name: jnp.asarray(value, dtype) for name, value in flat.items()}, metadata=metadata)
    with whole(path) as temporary, open(temporary, "wb") as f:
        f.write(data)


def load_params(path: str, like=None):
    """Reads parameters as float32: a nested dict. With `like` (a tree of shapes), UserError where any leaf differs."""
    try:
        with safe_open(path, framework="flax") as f:
            flat = {name: np.asarray(f.get_tensor(name), np.float32) for name in f.keys()}  # noqa: SIM118
    except FileNotFoundError as e:
        raise UserError(f"no weights at {path}: expected a .safetensors file written by --mode=export") from e
    except SafetensorError as e:
        raise UserError(f"{path} is not a whole safetensors file ({e}): export or copy it again") from e
    if like is not None:
        check_shapes(path, {k: v.shape for k, v in flat.items()}, shapes_of(like))
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def load_metadata(path: str) -> dict[str, str]:
    """The strings saved beside the parameters."""
    with safe_open(path, framework="numpy") as f:
        return f.metadata() or {}


def shapes_of(tree) -> dict[str, tuple[int, ...]]:
    """Every leaf's shape by its path, a/b/c."""
    return {k: tuple(v.shape) for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def check_shapes(source: str, found: dict, wanted: dict, of: str = "model"):
    """UserError that names the first leaf in which the parameters found in `source` are of another model."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{source} is of another {of}: {name} is {found.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} in this config; use the config it was trained with, or another path"
            )


def config_metadata(config, **more: str) -> dict[str, str]:
    """What is saved beside weights and videos, so that they can be made again: config, version."""
    from ivideo import __version__

    return {"ivideo_version": __version__, "config": json.dumps(config.to_dict(), sort_keys=True), **more}

"""Reads and writes weights as safetensors files, the format in which trained networks are exported and shipped.

The paper's own weights were not released (Section 3).
"""

import contextlib
import hashlib
import json
import os

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ivideo.devices import sharding
from ivideo.errors import UserError
from ivideo.files import atomic_write, refuse_existing

SUFFIX = ".safetensors"
FLOATS = ("F32", "BF16", "F16", "F64")  # the dtypes that parameters may have, by their names in safetensors
SAMPLED = 4096  # bytes of each array that `file_identity` reads


def save_params(path: str, params, *, metadata: dict[str, str], dtype=jnp.bfloat16, overwrite: bool = False):
    """Writes a tree of parameters, rounded to `dtype`, with string metadata, atomically."""
    refuse_existing([path], overwrite=overwrite)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    # On the host: the largest networks do not fit a device
    flat = {name: np.asarray(value, dtype, order="C") for name, value in flat.items()}
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as f:
            mode = os.fstat(f.fileno()).st_mode
        save_file(flat, temporary, metadata=metadata)
        os.chmod(temporary, mode)  # safetensors would leave it readable by its owner alone


def load_params(path: str, like=None):
    """Reads parameters, a nested dict of float32 arrays.

    UserError where the file is incomplete, where a parameter is not floating-point or not finite, and, with `like` (a
    tree of shapes), where a parameter's shape differs.
    """
    shapes = read_shapes(path)
    if like is not None:
        check_shapes(path, shapes, shapes_of(like))
    flat = {}
    with _opened(path) as f:
        for name in shapes:
            flat[name] = np.asarray(f.get_tensor(name), np.float32)
            if not np.isfinite(flat[name]).all():
                raise UserError(f"{path}: {name} has values that are not finite: export an earlier checkpoint")
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def place(params, mesh, dtype):
    """The parameters, cast to `dtype` and sharded over the mesh. In bfloat16 they take half the memory of float32."""
    where, dtype = sharding.param_shardings(mesh, params), jnp.dtype(dtype)
    cast = jax.jit(lambda params: jax.tree.map(lambda p: p.astype(dtype), params), out_shardings=where)
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
        return cast(sharding.from_host(params, where))
    return cast(jax.device_put(params, where))


def read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path (a/b/c), without reading the values.

    UserError where the file is incomplete, or where a parameter is not floating-point.
    """
    with _opened(path) as f:
        leaves = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
        for name, leaf in leaves.items():
            if leaf.get_dtype() not in FLOATS:
                raise UserError(
                    f"{path}: {name} is of type {leaf.get_dtype()}, expected one of {', '.join(FLOATS)}: give weights "
                    "that are not quantized"
                )
        return {name: tuple(leaf.get_shape()) for name, leaf in leaves.items()}


def load_metadata(path: str) -> dict[str, str]:
    """The string metadata of a file of parameters."""
    with _opened(path) as f:
        return f.metadata() or {}


def file_identity(path: str) -> str:
    """A digest that identifies a file of weights: of its size, its header and the first bytes of every array."""
    digest = hashlib.sha256(str(os.path.getsize(path)).encode())
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = f.read(length)
        digest.update(header)
        for name, leaf in sorted(json.loads(header).items()):
            if name != "__metadata__":
                begin, end = leaf["data_offsets"]
                f.seek(8 + length + begin)
                digest.update(f.read(min(end - begin, SAMPLED)))
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _opened(path):
    """An open safetensors file. UserError where it is missing or incomplete."""
    if not os.path.isfile(path):
        raise UserError(f"no weights at {path}: expected a {SUFFIX} file written by --mode=export")
    try:
        with safe_open(path, framework="flax") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is not a complete safetensors file ({e}): export or copy it again") from e


def shapes_of(tree) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter in a tree, by its path (a/b/c)."""
    return {k: tuple(v.shape) for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def check_shapes(source: str, actual: dict, expected: dict, of: str = "model"):
    """UserError where the parameters in `source` do not have the expected shapes. It names the first that differs."""
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            raise UserError(
                f"{source} is of another {of}: {name} is {actual.get(name, 'absent')} there and "
                f"{expected.get(name, 'absent')} in this config; use the config it was trained with, or another path"
            )


def config_metadata(config, **more: str) -> dict[str, str]:
    """The metadata of weights and videos from which they can be reproduced: the config and this package's version."""
    from ivideo import __version__

    return {"ivideo_version": __version__, "config": json.dumps(config.to_dict(), sort_keys=True), **more}

"""Reads the arrays of published networks. A file is untrusted data: nothing in it is executed."""

import contextlib
import dataclasses
import hashlib
import os
import pickle
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from ivideo import weights
from ivideo.errors import UserError
from ivideo.text import arrays, huggingface

_ADVICE = "give the weights of {}, or copy the file again"
_FLOATS = ("float64", "float32", "float16", "bfloat16")
# What a pickle of numpy arrays names. numpy 1 wrote numpy.core, numpy 2 writes numpy._core
_PICKLED = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network's parameters, float32, and the digest of their names, shapes and values.

    The digest does not depend on the format of the file.
    """

    params: Any
    digest: str


def read_safetensors(path: str, *, help: str) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file by name. UserError, which ends with `help`, where there is no such file."""
    if not os.path.isfile(path):
        raise UserError(f"no weights at {path}: {help}")
    if not path.endswith(weights.SUFFIX):
        raise UserError(f"{path} is not a {weights.SUFFIX} file: {help}")
    return read_all(path, huggingface.read_file(path))


def read_all(path: str, stored: Mapping[str, arrays.StoredArray]) -> dict[str, np.ndarray]:
    """The values of arrays by name; those that are not floating-point, such as counters, are left out."""
    return {name: arrays.read_values(path, name, a) for name, a in stored.items() if a.dtype in _FLOATS}


def read_pickle(path: str, *, help: str) -> dict[str, np.ndarray]:
    """The arrays of a pickled tree of dicts by name (a/b/c), read without executing anything.

    UserError, which ends with `help`, where the file is missing, damaged, or holds anything else.
    """
    if not os.path.isfile(path):
        raise UserError(f"no weights at {path}: {help}")
    try:
        with open(path, "rb") as f:
            tree = _ArraysOnly(f).load()
    except UserError as e:
        raise UserError(f"{path} {e}: {help}") from e
    except Exception as e:  # damaged bytes can raise anything
        raise UserError(f"{path} is not a complete pickle of arrays ({_one_line(e)}): {help}") from e
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, expected a dict of arrays: {help}")
    flat = {"/".join(map(str, name)): value for name, value in flax.traverse_util.flatten_dict(tree).items()}
    for name, value in flat.items():
        if not isinstance(value, np.ndarray) or value.dtype.name not in _FLOATS:
            raise UserError(f"{path}: {name} is not an array of floating-point numbers: {help}")
    return flat


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _PICKLED:
            raise UserError(f"names {module}.{name}, and only arrays of numpy are read from a pickle")
        return _PICKLED[module, name]


def checked(path: str, flat: Mapping[str, np.ndarray], module, *inputs, of: str) -> Weights:
    """Parameters by name (a/b/c) as the tree of a module that takes inputs of these shapes; `of` names the network.

    UserError where a parameter is missing, unknown, of another shape or not finite.
    """
    expected = weights.shapes_of(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    digest = hashlib.sha256()
    for name in sorted(expected.keys() | flat.keys()):
        shape = np.shape(flat[name]) if name in flat else "absent"
        if shape != expected.get(name):
            raise UserError(
                f"{path} is not a complete {of}: {name} is {shape}, expected "
                f"{expected.get(name, 'no such parameter')}; {_ADVICE.format(of)}"
            )
        if not np.isfinite(flat[name]).all():
            raise UserError(f"{path}: {name} has values that are not finite: copy the file again")
        digest.update(f"{name} {shape}".encode())
        digest.update(np.ascontiguousarray(flat[name], "<f4").tobytes())
    tree = flax.traverse_util.unflatten_dict({k: np.asarray(v, np.float32) for k, v in flat.items()}, sep="/")
    return Weights(tree, digest.hexdigest())


@contextlib.contextmanager
def naming(path: str, *, of: str):
    """Turns a ValueError in the block, about the arrays of `path`, into a UserError. `of` names the network."""
    try:
        yield
    except ValueError as e:
        raise UserError(f"{path} is not a complete {of}: {e}; {_ADVICE.format(of)}") from e


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

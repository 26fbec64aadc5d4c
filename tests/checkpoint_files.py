"""Checkpoints of a small state, and ways to damage them, for tests."""

import os
import shutil

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.data.pipeline import make_iterator
from ivideo.data.sources import ShapesSource
from ivideo.text.tokenizers import byte_tokens
from ivideo.training.checkpoint import Checkpoints


@flax.struct.dataclass
class State:
    """As a training state, with what a checkpoint looks at."""

    step: jax.Array
    params: dict
    ema: dict
    opt_state: tuple


def state_of(step, *, width=64, seed=0):
    """Numbers that do not compress: of the files written, the largest holds them."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    params = {"layer": {"kernel": jax.random.normal(key, (width, 64)), "bias": jnp.arange(3.0) + step}}
    average = jax.tree.map(lambda p: p / 2, params)
    return State(jnp.int32(step), params, average, ({"m": jnp.ones(5) * step}, ()))


def like(width=64):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: state_of(0, width=width))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def iterator():
    source = ShapesSource(num_clips=432, seed=0, frames=1, height=4, width=4)
    return make_iterator(source, batch_size=2, seed=0, tokenize=byte_tokens, text_length=8)


def iterator_at(step):
    data = iterator()
    for _ in range(step):
        next(data)
    return data


def save_run(workdir):
    """Checkpoints of steps 1, 2, 3, of which two are kept."""
    data = iterator()
    checkpoints = Checkpoints(workdir, keep=2)
    for step in (1, 2, 3):
        next(data)
        checkpoints.save(step, state_of(step), data)
    checkpoints.close()


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


# What becomes of checkpoint 3, given its folder


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def empty_file(file):
    file.write_bytes(b"")


def scribble(file):
    file.write_bytes(b"\xff{not json")


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def become_folder(file):
    file.unlink()
    file.mkdir()


def become_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def lose_all(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def become_the_one_before(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("2"), folder)


def lock(file):
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root reads every file")


def add_a_file(folder):
    (folder / "state" / "notes.txt").write_text("mine")


def of(name, damage):
    """The damage, done to one file or folder of the checkpoint."""
    return lambda folder: damage(folder / name)


def big(damage):
    return lambda folder: damage(largest(folder))


DATA = "data/process_0-of-1.json"
# name: the damage, what the digests say of it, and what is said without them: None where Orbax sees nothing wrong
DAMAGES = {
    "cut": (big(cut), r"ocdbt.process_0/d/\w+ has changed", "Error reading"),
    "flipped": (big(flip), r"ocdbt.process_0/d/\w+ has changed", None),
    "zeros": (big(zero), r"ocdbt.process_0/d/\w+ has changed", "Error reading"),
    "emptied": (big(empty_file), r"ocdbt.process_0/d/\w+ has changed", "Error reading"),
    "gone": (big(remove), r"ocdbt.process_0/d/\w+ is missing", "Error reading"),
    "file-is-folder": (big(become_folder), r"ocdbt.process_0/d/\w+ is missing", "Error reading"),
    "unreadable": (big(lock), "cannot be read: .*Permission", "ermission"),
    "extra-file": (add_a_file, "notes.txt was not there", None),
    "empty-folder": (lose_all, "_CHECKPOINT_METADATA is missing", "FileNotFoundError"),
    "is-a-file": (become_file, "it is a file", "it is a file"),
    "is-step-2": (become_the_one_before, "has changed", "it holds step 2"),
    "no-state": (of("state", remove), "state/.* is missing", "FileNotFoundError"),
    "data-gone": (of(DATA, remove), f"{DATA} is missing", "has no process_"),
    "data-garbage": (of(DATA, scribble), f"{DATA} has changed", "UnicodeDecodeError"),
    "data-emptied": (of(DATA, empty_file), f"{DATA} has changed", "JSONDecodeError"),
    "tree-gone": (of("state/_METADATA", remove), "state/_METADATA is missing", "_METADATA"),
    "tree-garbage": (of("state/_METADATA", scribble), "state/_METADATA has changed", "Error"),
    "manifest-gone": (of("state/manifest.ocdbt", remove), "state/manifest.ocdbt is missing", "Error"),
    "manifest-flipped": (of("state/manifest.ocdbt", flip), "state/manifest.ocdbt has changed", "manifest.ocdbt"),
    "step-metadata-gone": (of("_CHECKPOINT_METADATA", remove), "_CHECKPOINT_METADATA is missing", None),
    "step-metadata-garbage": (of("_CHECKPOINT_METADATA", scribble), "_CHECKPOINT_METADATA has changed", None),
}


def contents(path):
    """What there is, and whether it has been touched."""
    stats = {p.relative_to(path): p.lstat() for p in [path, *path.rglob("*")]}
    return {name: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

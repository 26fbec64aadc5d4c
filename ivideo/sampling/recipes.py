"""The recipe that a video file carries: what it was made with. From it the video can be sampled again.

A recipe is a dict of JSON values in the file's metadata. It has the prompt and its seed, number and kind of noise; the
stages that ran, their weights and how many videos each sampled at a time; the versions and the device; a digest of the
frames; and the config, as what differs from a variant in the package.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from ivideo import __version__, config_files, recipe, stages
from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.prompts import Sample

IDENTITY = ("prompt", "seed", "number", "noise", "stages", "zoom", "input")


def settings(config, configs: Sequence) -> dict:
    """The config's part of a recipe. `configs`: those of the stages that run, which `config` is or contains.

    "config" names a variant in the package, "phases" has the phase of each distilled stage, and "changes" the values
    that differ from the variant (or from its student) and change a video. Where the package has no config for these
    stages, the name is empty and the changes are all values.
    """
    phases = {stage.stage: stage.phase for stage in configs if stage.phase}
    for name in (f"{config.stage}:{config.variant}", f"{config.stage}:paper"):
        try:
            base = _student(_packaged(name), phases)
            bases = [base.stages[stage.stage] if "stages" in config else base for stage in configs]
        except (UserError, KeyError, AttributeError):
            continue
        changes = {}
        for stage, base in zip(configs, bases, strict=True):
            prefix, before = f"stages.{stage.stage}." if "stages" in config else "", recipe.flat(base)
            values = recipe.video_settings(stage)
            changes |= {prefix + key: value for key, value in values.items() if before.get(key, ...) != value}
        break
    else:
        name, changes = "", recipe.flat(config)
    return {"config": name, "phases": phases, "changes": changes, "config_digest": digest(configs)}


def config_from(found: dict):
    """The config of a recipe. UserError where the package's variant has changed since the recipe was written."""
    try:
        config = (
            _student(_packaged(found["config"]), found["phases"]) if found["config"] else ml_collections.ConfigDict()
        )
        with config.unlocked():
            for key, value in found["changes"].items():
                _set(config, key.split("."), value)
        names = found["stages"].split()
        configs = [config.stages[name] for name in names] if "stages" in config else [config]
    except (KeyError, AttributeError, TypeError, ValueError, UserError) as e:
        raise _other_version(found, config_files.one_line(e)) from e
    if digest(configs) != found["config_digest"]:
        raise _other_version(found, f"the variant {found['config']} has other values")
    return config


def digest(configs: Sequence) -> str:
    """A digest of all values that change a video, of the stages that run."""
    values = [recipe.video_settings(config) for config in configs]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def frames_digest(video: np.ndarray) -> str:
    """A digest of a video's frames as they are before encoding, uint8."""
    frames = np.ascontiguousarray(video_io.to_uint8(video))
    return hashlib.sha256(repr(frames.shape).encode() + frames.tobytes()).hexdigest()[:32]


def of_video(configs: Sequence, row: Sample, *, seed: int, same_noise: bool, zoom: int, weights, batch) -> dict:
    """The recipe of a video, without its `settings`, its input and its frames.

    `configs`: the stages that make it. `weights` and `batch`: per stage, the identity of its weights, and the number of
    videos that it samples at a time.
    """
    return {
        "ivideo_version": __version__,
        "jax_version": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "prompt": row.prompt,
        "seed": seed,
        "number": row.number,
        "noise": "shared" if same_noise else "of the prompt",
        "stages": " ".join(stage.stage for stage in configs),
        "zoom": zoom,
        "weights": {stage.stage: weights[stage.stage] for stage in configs},
        "batch": {stage.stage: batch[stage.stage] for stage in configs},
    }


def identity(found: dict) -> dict:
    """The entries of a recipe that identify a video, by name. Together with the config they decide its content."""
    weights = found.get("weights", {})
    return {key: found[key] for key in IDENTITY if key in found} | {
        f"weights of {name}": weights[name] for name in weights
    }


def read(path: str) -> dict:
    """The recipe in a video file. UserError where it has none."""
    found = video_io.read_metadata(path)
    needed = {*IDENTITY, "weights", "batch", "config", "phases", "changes", "config_digest"} - {"input"}
    if missing := sorted(needed - found.keys()):
        raise UserError(
            f"{path} has no recipe ({missing[0]} is missing): it was made by another program or with --metadata=none, "
            "or a program that edited it removed the recipe"
        )
    return found


def show(path: str, *, as_json: bool = False) -> dict:
    """Prints the recipe in a video file, one entry per line or as JSON, and returns it."""
    found = read(path)
    if as_json:
        print(json.dumps(found, indent=1))
        return found
    for key, value in found.items():
        entries = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
        for name, entry in entries.items():
            print(f"{name:24}{json.dumps(entry) if isinstance(entry, list) else entry}")
    return found


@functools.cache
def _packaged(name: str):
    file, _, variant = name.partition(":")
    return config_files.load_config(f"{os.path.join(config_files.package_configs(), file)}.py:{variant}")


def _student(config, phases: dict):
    """A copy of the config in which the stages in `phases` are their students."""
    config = config.copy_and_resolve_references()
    if "stages" not in config:
        return stages.distilled(config, phases[config.stage]) if phases else config
    for name, phase in phases.items():
        config.stages[name] = stages.distilled(config.stages[name], phase)
    return config


def _set(config, names: list[str], value):
    """Sets a value by its names from the outside in. JSON has lists where configs have tuples."""
    *groups, last = names
    for name in groups:
        if name not in config:
            config[name] = ml_collections.ConfigDict()
        config = config[name]
    config[last] = _tuples(value)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _other_version(found, reason: str) -> UserError:
    return UserError(
        f"the recipe is of version {found['ivideo_version']} of this program ({reason}), and this is {__version__}: "
        "install that version to make the video again"
    )

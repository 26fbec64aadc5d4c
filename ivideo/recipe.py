"""Compares a config with the recipe of weights or videos: the config that was saved with them."""

import json
import logging
import os

import jax

from ivideo import files
from ivideo.errors import UserError

log = logging.getLogger("ivideo")

RUN_CONFIG = "config.json"  # in a training run's folder: its resolved config
# Keys, and groups of keys, which end in a dot
NETWORK = (
    "stage", "model.", "cond.fill", "text.vocab", "text.dim", "text.layers", "text.heads", "text.head_dim", "text.ff",
)  # fmt: skip
SCHEDULE = ("diffusion.logsnr_min", "diffusion.logsnr_max", "diffusion.logsnr_shift")
VIDEO = ("stage", "video.", "cond.", "model.", "diffusion.", "sample.", "text.")
# How results are computed: these keys do not change a network, and change a video only by rounding
_COMPUTING = (
    "model.remat", "model.scan_unroll", "sample.batch", "sample.group", "sample.mesh.", "text.mesh.", "text.batch",
)  # fmt: skip


def flat(config) -> dict:
    """A config's values by dotted keys (a.b.c), as JSON represents them. It is a ConfigDict, or a dict from JSON."""

    def leaves(node, prefix):
        for name, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    plain = config if isinstance(config, dict) else json.loads(json.dumps(config.to_dict()))
    return dict(leaves(plain, ""))


def differences(saved, config, keys=("",)) -> list[tuple]:
    """(key, saved value, the config's value) for each of `keys`, and each key in a group of `keys`, that differs.

    A key that only one side has comes from another version of this program, and is not compared.
    """
    saved, current = flat(saved), flat(config)
    groups = tuple(key for key in keys if key.endswith(".") or not key)
    compared = [key for key in current if key in keys or (groups and key.startswith(groups))]
    return [(key, saved[key], current[key]) for key in compared if key in saved and saved[key] != current[key]]


def network_differences(saved, config) -> list[tuple]:
    """The differences that change the network or the meaning of its weights."""
    ignored = ("model.dtype", *_COMPUTING)
    return [(key, *values) for key, *values in differences(saved, config, NETWORK) if key not in ignored]


def video_differences(saved, config) -> list[tuple]:
    """The differences that change a video."""
    return [(key, *values) for key, *values in differences(saved, config, VIDEO) if _changes_videos(key)]


def video_settings(config) -> dict:
    """A stage's values that change its videos, by their dotted keys."""
    return {key: value for key, value in flat(config).items() if _changes_videos(key)}


def _changes_videos(key: str) -> bool:
    groups, ignored = ([k for k in keys if k.endswith(".")] for keys in (VIDEO, _COMPUTING))
    wanted = key in VIDEO or key.startswith(tuple(groups))
    return wanted and key not in _COMPUTING and not key.startswith(tuple(ignored))


def check_network(source: str, saved, config, *, any_stage: bool = False) -> None:
    """UserError where the config saved with weights has another network, or is another phase of distillation.

    It names the first key that differs. `source` names the weights in the message. With `any_stage` they may be another
    stage's with the same network.
    """
    check_student(source, saved, config)
    different = [item for item in network_differences(saved, config) if item[0] != "stage" or not any_stage]
    for key, theirs, ours in sorted(different, key=lambda item: item[0] != "stage"):  # the stage explains the others
        raise UserError(
            f"{source} is of another network: config.{key} is {theirs!r} there and {ours!r} in this config; use the "
            "config it was trained with, or other weights"
        )


def check_student(source: str, found, config) -> None:
    """UserError where the weights at `source` are of another phase of distillation than the config, or of none.

    `found`: the config beside them, a dict. A student is made for one sampler in one number of steps.
    """
    there, here = found.get("phase", ""), config.phase
    if there == here:
        if here:
            _check_use(source, found, config)
        return
    of = [f"phase {phase} of distillation" if phase else "an original network" for phase in (there, here)]
    suffix = f"_distilled_{there}" if there else ""
    raise UserError(
        f"{source} is of {of[0]}, and the config of {of[1]}: choose the variant --config=FILE:"
        f"{config.variant}{suffix}, or other weights"
    )


def guidance_weights(config) -> dict[str, float]:
    """The guidance weights that a stage samples with, by their keys in config.sample."""
    keys = ("weight",) if config.sample.guidance == "constant" else ("high_weight", "low_weight")
    return {key: config.sample[key] for key in keys}


def guidance_range(config, saved: dict | None) -> tuple[float, float]:
    """The least and the largest guidance weight of a stage. A student's are those that it was distilled for.

    `saved`: the config beside its weights; without one, or without these values there, the config's own count.
    """
    if not config.phase:
        return 0.0, config.model.max_guidance
    found = (saved or {}).get("distill", {})
    return found.get("w_min", config.distill.w_min), found.get("w_max", config.distill.w_max)


def _check_use(source, found, config):
    """UserError if a student is used with a schedule or a guidance weight that it was not distilled for."""
    for key, there, here in differences(found, config, SCHEDULE):
        raise UserError(
            f"{source} was distilled with config.{key} = {there!r}, and it is {here!r} in this config: a student needs "
            "the schedule that it was distilled with"
        )
    low, high = guidance_range(config, found)
    for key, weight in guidance_weights(config).items():
        if not low <= weight <= high:
            raise UserError(
                f"config.sample.{key} = {weight}: {source} was distilled for guidance weights from {low} "
                f"to {high}; choose one of these"
            )


def read_run_config(workdir: str) -> dict | None:
    """The resolved config of a training run's most recent start, or None. UserError where the file is damaged."""
    path = os.path.join(workdir, RUN_CONFIG)
    return files.read_json(path) if os.path.exists(path) else None


def save_run_config(config, workdir: str) -> None:
    """Writes a run's resolved config to its folder, and logs each key that differs from the previous start's.

    UserError, before any file is changed, where the run has checkpoints of another network. All processes call this
    function; process 0 writes.
    """
    before = read_run_config(workdir)
    if before is not None:
        if _has_checkpoints(workdir):
            check_network(f"the run in {workdir}", before, config)
        if jax.process_index() == 0:
            for key, previous, current in differences(before, config):
                log.warning("config.%s is %r now, and was %r at the previous start of this run", key, current, previous)
    if jax.process_index() == 0:
        os.makedirs(workdir, exist_ok=True)
        files.write_json(os.path.join(workdir, RUN_CONFIG), config.to_dict())


def _has_checkpoints(workdir):
    folder = os.path.join(workdir, "checkpoints")
    return os.path.isdir(folder) and any(name.isdecimal() for name in os.listdir(folder))

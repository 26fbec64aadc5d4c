"""What weights and videos were made with, as it is kept beside them, and how that differs from a config."""

import json
import logging
import os

import jax

from ivideo import files
from ivideo.errors import UserError

log = logging.getLogger("ivideo")

RUN_CONFIG = "config.json"  # in a training run's folder: its resolved config
# Keys, or beginnings of keys that end in a dot
NETWORK = (
    "stage", "model.", "cond.fill", "text.vocab", "text.dim", "text.layers", "text.heads", "text.head_dim", "text.ff",
)  # fmt: skip
VIDEO = ("stage", "video.", "cond.", "model.", "diffusion.", "sample.", "text.")
# How it is computed, which changes a network not at all, and a video by rounding alone
_COMPUTING = (
    "model.remat", "model.scan_unroll", "sample.batch", "sample.group", "sample.mesh.", "text.mesh.", "text.batch",
)  # fmt: skip


def flat(config) -> dict:
    """A config's values by their keys, a.b.c, as they come back from JSON. `config` is a ConfigDict or such a dict."""

    def leaves(node, prefix):
        for name, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    plain = config if isinstance(config, dict) else json.loads(json.dumps(config.to_dict()))
    return dict(leaves(plain, ""))


def differences(found, config, keys=("",)) -> list[tuple]:
    """(key, value found, the config's value) of the keys that begin as one of `keys` and differ.

    A key that one side lacks is of another version of this program, and not compared.
    """
    found, wanted = flat(found), flat(config)
    begin = tuple(key for key in keys if key.endswith(".") or not key)
    chosen = [key for key in wanted if key in keys or (begin and key.startswith(begin))]
    return [(key, found[key], wanted[key]) for key in chosen if key in found and found[key] != wanted[key]]


def network_differences(found, config) -> list[tuple]:
    """The differences that make another network, or weights of another meaning."""
    ignored = ("model.dtype", *_COMPUTING)
    return [(key, *values) for key, *values in differences(found, config, NETWORK) if key not in ignored]


def video_differences(found, config) -> list[tuple]:
    """The differences that make another video."""
    ignored = tuple(key for key in _COMPUTING if key.endswith("."))
    different = differences(found, config, VIDEO)
    return [(key, *values) for key, *values in different if key not in _COMPUTING and not key.startswith(ignored)]


def check_network(source: str, found, config, *, any_stage: bool = False) -> None:
    """UserError that names the first key in which the config `found` beside weights is of another network or student.

    `source` says which weights these are. With `any_stage` they may be of another stage with the same network.
    """
    check_student(source, found, config)
    different = [item for item in network_differences(found, config) if item[0] != "stage" or not any_stage]
    for key, there, here in sorted(different, key=lambda item: item[0] != "stage"):  # it says most
        raise UserError(
            f"{source} is of another network: config.{key} is {there!r} there and {here!r} in this config; use the "
            "config it was trained with, or other weights"
        )


def check_student(source: str, found, config) -> None:
    """UserError where the weights at `source` are of another phase of distillation than the config, or of none.

    `found`: the config beside them, a dict. A student is made for one sampler in one number of steps.
    """
    there, here = found.get("phase", ""), config.phase
    if there == here:
        return
    of = [f"phase {phase} of distillation" if phase else "an original network" for phase in (there, here)]
    suffix = f"_distilled_{there}" if there else ""
    raise UserError(
        f"{source} is of {of[0]}, and the config of {of[1]}: choose the variant --config=FILE:"
        f"{config.variant}{suffix}, or other weights"
    )


def read_run_config(workdir: str) -> dict | None:
    """The config that the newest start of a training run resolved to, or None. UserError where it is damaged."""
    path = os.path.join(workdir, RUN_CONFIG)
    return files.read_json(path) if os.path.exists(path) else None


def save_run_config(config, workdir: str) -> None:
    """Writes a run's resolved config to its folder, and logs each key in which it differs from the last start's.

    UserError where the run has checkpoints of another network: no file is changed then. All processes call this; the
    first one writes.
    """
    before = read_run_config(workdir)
    if before is not None:
        if _has_checkpoints(workdir):
            check_network(f"the run in {workdir}", before, config)
        if jax.process_index() == 0:
            for key, there, here in differences(before, config):
                log.warning("config.%s is %r now, and was %r when this run started last", key, here, there)
    if jax.process_index() == 0:
        os.makedirs(workdir, exist_ok=True)
        files.write_json(os.path.join(workdir, RUN_CONFIG), config.to_dict())


def _has_checkpoints(workdir):
    folder = os.path.join(workdir, "checkpoints")
    return os.path.isdir(folder) and any(name.isdecimal() for name in os.listdir(folder))

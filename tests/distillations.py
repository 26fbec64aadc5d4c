"""What the tests of distillation share: a network that compiles quickly, its teacher, and its distillation."""

import json

import jax
import light_network
import numpy as np

from configs import base, ssr2
from ivideo import stages
from ivideo.training import phases, students
from ivideo.weights import config_metadata, load_params, save_params

STAGES = {"base": base, "ssr2": ssr2}


def tiny_config(stage: str = "base", **changes):
    """A network without attention, distilled from 8 steps to 2 in four phases of four updates."""
    config = STAGES[stage].get_config("small")
    config.update_from_flattened_dict(
        {
            **light_network.OPTIONS, "model.channels": (4,), "model.head_dim": 4, "data.num_images": 0,
            "train.batch_size": 8, "train.checkpoint_every": 2, "distill.teacher_steps": 8, "distill.end_steps": 2,
            "distill.guidance_updates": 4, "distill.round_updates": 4, "distill.late_round_updates": 4,
            "distill.agreement_every": 2, **changes,
        }
    )  # fmt: skip
    return config


def random_params(config, seed: int = 0) -> dict:
    """Parameters in which nothing is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config))


def save_teacher(config, path: str, seed: int = 0) -> str:
    """Writes random weights of a network."""
    save_params(path, random_params(config, seed), metadata=config_metadata(config), dtype=np.float32)
    return path


def distill(config, teacher, workdir, **options) -> str:
    """The distillation, on one device."""
    return phases.distill(config, str(teacher), str(workdir), devices=jax.devices()[:1], **options)


def rows(workdir) -> list[dict]:
    """The lines of distill.jsonl."""
    return [json.loads(line) for line in (workdir / "distill.jsonl").read_text().splitlines()]


def weights(workdir, config) -> dict[str, dict]:
    """The parameters of the finished phases by their names."""
    return {phase: load_params(students.weights_path(str(workdir), phase)) for phase in stages.phases(config)}


def assert_same_end(one, other, config) -> None:
    """All phases of two distillations ended with the same bits, losses and agreements."""
    jax.tree.map(np.testing.assert_array_equal, weights(one, config), weights(other, config))
    assert [told(row) for row in rows(one)] == [told(row) for row in rows(other)]


def told(row: dict) -> dict:
    """A row without what depends on the machine's speed."""
    return {name: value for name, value in row.items() if "seconds" not in name}

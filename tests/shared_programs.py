"""Lets the training runs of a process share their programs, which take longer to trace than to run a few steps."""

import jax
import numpy as np

from ivideo.devices import sharding
from ivideo.training import loop

# Keys that the loop reads and the programs do not
LOOP_KEYS = (
    "spike", "max_rollbacks", "max_skipped", "keep", "checkpoint_every", "log_every", "hang_seconds", "sample_every",
)  # fmt: skip
_programs = {}


def install(patch) -> None:
    """Makes `loop.train` take the programs of an earlier run, if it has one of an equal config on the same devices."""
    embedder = loop._text_embedder
    patch.setattr(loop, "Training", Training)
    patch.setattr(
        loop,
        "_text_embedder",
        lambda encoder, mesh: _once(("embed", encoder.fingerprint, mesh), lambda: embedder(encoder, mesh)),
    )


class Training(loop.Training):
    """The task of training, with the programs of an earlier run."""

    def shapes(self):
        return self._once("shapes", super().shapes)

    def initial_state(self, shardings):
        if self.config.train.start:
            return super().initial_state(shardings)
        state = super().initial_state
        found = self._once("state", lambda: jax.tree.map(sharding.to_host, state(shardings)))
        return sharding.from_host(jax.tree.map(np.copy, found), shardings)  # copies, since the step donates its state

    def compile_step(self, shardings):
        step = super().compile_step
        return self._once("step", lambda: step(shardings))

    def _once(self, name, make):
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            for key in LOOP_KEYS:
                del config.train[key]
        return _once((name, config.to_json_best_effort(sort_keys=True), self.mesh), make)


def _once(key, make):
    if key not in _programs:
        _programs[key] = make()
    return _programs[key]

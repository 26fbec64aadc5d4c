"""Lets the runs of a process share their programs, which take longer to trace and compile than to run."""

import jax
import numpy as np

from ivideo import stages
from ivideo.devices import sharding
from ivideo.sampling import cascade
from ivideo.training import loop
from ivideo.training.step import init_state

# Keys that the loop reads and the programs do not
LOOP_KEYS = (
    "spike", "max_rollbacks", "max_skipped", "keep", "checkpoint_every", "log_every", "hang_seconds", "sample_every",
)  # fmt: skip
_programs = {}


def install(patch) -> None:
    """Makes training and sampling take the programs of an earlier run with an equal config on the same devices."""
    preparer, sampler = loop._batch_preparer, cascade.StageSampler
    patch.setattr(loop, "Training", Training)
    patch.setattr(
        loop,
        "_batch_preparer",
        lambda encoder, mesh: _once(("prepare", encoder.fingerprint, mesh), lambda: preparer(encoder, mesh)),
    )

    def shared_sampler(config, size):
        config = config.copy_and_resolve_references()  # a test may change its own
        return _once(("sampler", _text(config), size, stages.sample), lambda: sampler(config, size))

    patch.setattr(cascade, "StageSampler", shared_sampler)


def random_params(config, *, scale: float = 0.1, seed: int = 1) -> dict:
    """Parameters of a network in which nothing is zero, as if it had been trained."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config))


class Training(loop.Training):
    """The task of training, with the programs of an earlier run."""

    def shapes(self):
        return self._once("shapes", super().shapes)

    def initial_state(self, shardings):
        """Parameters from the file, or random ones from numpy: jax's initialisers take longest to compile."""
        if self.config.train.start:
            return super().initial_state(shardings)
        params = sharding.from_host(random_params(self.config), shardings.params)
        init = self._once(
            "init", lambda: jax.jit(lambda params: init_state(self.config, params), out_shardings=shardings)
        )
        return init(params)

    def compile_step(self, shardings):
        step = super().compile_step
        return self._once("step", lambda: step(shardings))

    def _once(self, name, make):
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            for key in LOOP_KEYS:
                del config.train[key]
        return _once((name, _text(config), self.mesh), make)


def _text(config) -> str:
    return config.to_json_best_effort(sort_keys=True)


def _once(key, make):
    if key not in _programs:
        _programs[key] = make()
    return _programs[key]

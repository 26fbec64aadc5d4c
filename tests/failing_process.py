"""One of two processes that train a tiny model. The second one fails in the given WAY.

python tests/failing_process.py HOST:PORT PROCESS WORKDIR WAY
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import flags

from configs import base
from ivideo import files, main
from ivideo.data.video_io import sample_frames
from ivideo.devices import hosts, joining
from ivideo.errors import UserError
from ivideo.text import cache
from ivideo.training import loop, step

FAILS_AT = 4  # the batch, from 1


def make_train_step(config, mesh):
    """Sums over the videos of all processes, so that every process has to take part."""

    def step(state, batch):
        loss = jnp.square(batch["video"]).mean()
        metrics = {"loss": loss, "grad_norm": loss, "skipped": 0.0, "learning_rate": 0.0}
        return state.replace(step=state.step + 1), jax.tree.map(jnp.float32, metrics)

    return step


def user_error():
    raise UserError("wrong input")


def caption():
    """Asks an empty text cache for a caption."""
    with tempfile.TemporaryDirectory() as folder:
        plan = {"version": cache.VERSION, "fingerprint": "", "shards": 1, "captions": "", "dim": 128, "length": 64}
        files.write_json(f"{folder}/{cache.PLAN}", plan)
        cache.write_shard(folder, 0, 1, [], None, batch=1)
        cache.finish(folder)
        cache.TextCache(folder).tokenize(["a cat"])


def clip():
    sample_frames(b"no video", frames=2)


def bug():
    raise KeyError("a bug")


def device_memory():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")


def host_memory():
    raise MemoryError("Unable to allocate 1 GiB")


def disk():
    raise OSError(28, "No space left on device", "/mnt/runs/checkpoint")


def worker():
    """Kills this process's data workers. Grain notices it when it next waits for them."""
    for child in multiprocessing.active_children():
        child.kill()


def non_finite():
    raise FloatingPointError("loss is nan at step 4")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


class Failing:
    """This process's data. It fails once."""

    failed = False

    def __init__(self, iterator, fail):
        self._iterator, self._fail, self._count = iterator, fail, 0

    def get_state(self):
        return self._iterator.get_state()

    def set_state(self, state):
        self._iterator.set_state(state)

    def __next__(self):
        self._count += 1
        if self._count == FAILS_AT and not Failing.failed:
            Failing.failed = True
            print(f"fails at {time.time()}", flush=True)
            self._fail()
        time.sleep(0.1)
        return next(self._iterator)


def run(address, process, workdir, way, fails):
    """Trains until the failure or a stop signal."""
    config = base.get_config("small")
    config.train.steps, config.train.checkpoint_every, config.train.hang_seconds = 10_000, 10_000, 600.0
    config.train.mesh.data, config.train.mesh.fsdp = -1, 1
    config.data.workers = int(way == "worker")
    loop.make_train_step = make_train_step
    loop.prepare = lambda module, params, batch, mesh: batch
    loop.init_state = lambda config, params: step.init_state(config, {"scale": jnp.zeros(8)})
    loop.state_shapes = lambda config: jax.eval_shape(lambda: loop.init_state(config, None))
    make_data, save = loop.make_data, loop.Checkpoints.save
    loop.Checkpoints.restore = lambda *args: None
    if process == fails:
        loop.make_data = lambda *args, **options: Failing(make_data(*args, **options), globals()[way])
        loop.Checkpoints.save = lambda self, step, state, iterator: save(self, step, state, iterator._iterator)
    joining.join(address, 2, process)
    with hosts.exiting_together():
        loop.train(config, workdir)


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    main.run = lambda: run(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
    main.parse = lambda argv, about: None
    sys.exit(main.main())

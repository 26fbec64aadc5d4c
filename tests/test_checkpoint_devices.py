"""Checkpoints on several devices and processes: each restores its part, and all agree on what is damaged."""

import json
import logging
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from checkpoint_files import assert_same, flip, iterator, largest, like, names, state_of, zero
from jax.sharding import NamedSharding, PartitionSpec

from ivideo.training.average import read_average
from ivideo.training.checkpoint import Checkpoints

# Orbax warns of its other reads when one fails
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = pathlib.Path(__file__).parent.parent


def placed(count, *, rows=True):
    """Shardings of the state over `count` devices. The kernel is split along its rows or columns."""
    mesh = jax.make_mesh((count,), ("x",), devices=jax.devices()[:count])
    split = PartitionSpec("x") if rows else PartitionSpec(None, "x")
    kernel = like().params["layer"]["kernel"].shape
    return jax.tree.map(lambda s: NamedSharding(mesh, split if s.shape == kernel else PartitionSpec()), like())


def shapes_at(shardings):
    return jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), like(), shardings)


@pytest.mark.parametrize(("count", "rows"), [(8, True), (8, False), (2, True), (2, False), (1, True)])
def test_small_state_of_eight_devices_is_restored_on_other_numbers(tmp_path, count, rows):
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = jax.device_put(state_of(5), placed(8))
    assert len(state.params["layer"]["kernel"].sharding.device_set) == 8
    checkpoints.save(5, state, iterator())
    checkpoints.close()
    wanted = placed(count, rows=rows)
    step, found = Checkpoints(tmp_path, keep=2).restore(shapes_at(wanted), iterator())
    assert step == 5
    assert_same(found, state_of(5))
    assert jax.tree.map(lambda x: x.sharding, found) == wanted
    shards = found.params["layer"]["kernel"].addressable_shards
    assert {s.data.shape for s in shards} == {(64 // count, 64) if rows else (64, 64 // count)}


def outcome(step, checkpoints, damaged, position=None):
    return {"step": step, "kept": checkpoints, "damaged": damaged, "clips": int(position or 2 * step)}


def process(index, port, workdir):
    """One of the two processes. It saves, restores after several kinds of damage, and prints the results."""
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    from absl import flags
    from jax.experimental import multihost_utils

    flags.FLAGS.mark_as_parsed()
    logging.basicConfig(level=logging.WARNING)
    workdir, wanted = pathlib.Path(workdir), placed(jax.device_count())
    newest = workdir / "checkpoints" / "3"

    def state_at(step):
        return jax.tree.map(
            lambda x, w: jax.make_array_from_callback(x.shape, w, lambda at: x[at]),
            jax.tree.map(np.asarray, state_of(step)),
            wanted,
        )

    def save(steps, data):
        checkpoints = Checkpoints(workdir, keep=2)
        for step in steps:
            next(data)
            checkpoints.save(step, state_at(step), data)
        checkpoints.close()

    def restore_after(damage):
        multihost_utils.sync_global_devices("before")
        if index == "0":
            damage()
        multihost_utils.sync_global_devices("after")
        data = iterator()
        checkpoints = Checkpoints(workdir, keep=2)
        step, state = checkpoints.restore(shapes_at(wanted), data)
        checkpoints.close()
        whole = state_of(step)
        jax.tree.map(
            lambda x, w: [np.testing.assert_array_equal(s.data, w[s.index]) for s in x.addressable_shards], state, whole
        )
        assert names(workdir / "digests") == [f"{name}.json" for name in names(workdir / "checkpoints")]
        position = data.get_state()["global_next_index"]
        return outcome(step, names(workdir / "checkpoints"), names(workdir / "damaged"), position), data

    def read_after(damage):
        multihost_utils.sync_global_devices("before")
        if index == "0":
            damage()
        multihost_utils.sync_global_devices("after")
        step, average = read_average(str(workdir), shapes_at(wanted).ema)
        jax.tree.map(
            lambda x, w: [np.testing.assert_array_equal(s.data, w[s.index]) for s in x.addressable_shards],
            average, state_of(step).ema,
        )  # fmt: skip
        return outcome(step, names(workdir / "checkpoints"), names(workdir / "damaged"))

    def without_digests():
        (workdir / "digests" / f"{newest.name}.json").unlink()
        zero(largest(newest / "state" / "ocdbt.process_1"))  # which process 1 alone reads

    save((1, 2, 3), iterator())
    found = {}
    found["whole"], _ = restore_after(lambda: None)
    found["flipped"], data = restore_after(lambda: flip(largest(newest)))
    save((3,), data)
    found["alone"], data = restore_after(without_digests)
    save((3, 4), data)
    found["last"], _ = restore_after(lambda: None)
    newest = workdir / "checkpoints" / "4"
    found["average"] = read_after(lambda: None)
    found["average-alone"] = read_after(without_digests)
    print(json.dumps(found))


def test_two_processes_agree(tmp_path):
    """They agree on damage that only one of them notices, and a damaged checkpoint is moved once."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(i), str(port), str(tmp_path)],
            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        (first, log), (second, other) = (p.communicate(timeout=300) for p in processes)
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], log[-3000:] + other[-3000:]
    found = json.loads(first.splitlines()[-1])
    assert found == json.loads(second.splitlines()[-1])
    assert found == {
        "whole": outcome(3, ["2", "3"], []),
        "flipped": outcome(2, ["2"], ["3"]),
        "alone": outcome(2, ["2"], ["3", "3_"]),
        "last": outcome(4, ["3", "4"], ["3", "3_"]),
        "average": outcome(4, ["3", "4"], ["3", "3_"]),
        "average-alone": outcome(3, ["3", "4"], ["3", "3_"]),
    }
    assert log.count("checkpoint 3 is damaged") == 2
    assert other.count("checkpoint 3 is damaged") == 0


if __name__ == "__main__":
    process(*sys.argv[1:])

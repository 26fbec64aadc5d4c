"""Checkpoints: what is saved comes back bit for bit, damage is found, named and survived."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.checkpoint import Checkpoints
from ivideo.data.pipeline import make_iterator
from ivideo.data.sources import ShapesSource
from ivideo.errors import UserError
from ivideo.text.tokenizers import byte_tokens
from ivideo.train import TrainState


def state_of(step, width=3):
    params = {"layer": {"kernel": jnp.arange(width * 4, dtype=jnp.float32).reshape(width, 4) + step}}
    return TrainState(jnp.int32(step), params, jax.tree.map(lambda p: p / 2, params), {"m": jnp.ones(5) * step})


def like(width=3):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state_of(0, width))


def iterator():
    source = ShapesSource(num_clips=432, seed=0, frames=1, height=4, width=4)
    return make_iterator(source, batch_size=2, seed=0, tokenize=byte_tokens, text_length=8)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2, 3, of which two are kept, and the batches that follow the newest."""
    data = iterator()
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        next(data)
        checkpoints.save(step, state_of(step), data)
    checkpoints.close()
    return tmp_path, next(data)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_small_newest_state_and_data_position_come_back(saved):
    workdir, following = saved
    data = iterator()
    step, state = Checkpoints(workdir, keep=2).restore(like(), data)
    assert step == 3
    assert_same(state, state_of(3))
    assert_same(next(data), following)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "3"]
    assert sorted(p.name for p in (workdir / "digests").iterdir()) == ["2.json", "3.json"]


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    file = largest(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(folder):
    file = largest(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage", [truncate, flip, lambda folder: largest(folder).unlink()], ids=["cut", "flip", "gone"]
)
def test_small_damaged_newest_is_set_aside_and_the_one_before_used(saved, damage, caplog):
    workdir, _ = saved
    damage(workdir / "checkpoints" / "3")
    with caplog.at_level(logging.WARNING, "ivideo"):
        step, state = Checkpoints(workdir, keep=2).restore(like(), iterator())
    assert step == 2
    assert_same(state, state_of(2))
    assert "checkpoint 3 is damaged" in caplog.text
    assert (workdir / "damaged" / "3").is_dir()  # moved, never deleted


def test_small_truncated_without_digests_is_found_too(saved, caplog):
    """A run killed between a save and its digests has Orbax's own errors to go by."""
    workdir, _ = saved
    (workdir / "digests" / "3.json").unlink()
    truncate(workdir / "checkpoints" / "3")
    step, state = Checkpoints(workdir, keep=2).restore(like(), iterator())
    assert step == 2
    assert_same(state, state_of(2))
    assert "checkpoint 3 is damaged" in caplog.text


def test_small_all_damaged_is_an_error_that_says_where_they_are(saved):
    workdir, _ = saved
    for step in ("2", "3"):
        truncate(workdir / "checkpoints" / step)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged .*damaged"):
        Checkpoints(workdir, keep=2).restore(like(), iterator())


def test_small_checkpoint_of_another_model_is_refused_and_kept(saved):
    workdir, _ = saved
    with pytest.raises(
        UserError, match=r"of another model: layer/kernel is \(3, 4\) there and \(7, 4\) in this config"
    ):
        Checkpoints(workdir, keep=2).restore(like(width=7), iterator())
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "3"]


def test_small_empty_folder_has_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path, keep=2).restore(like(), iterator()) is None

"""Storage that refuses a checkpoint: one error, no partial checkpoint is left, and finished ones stay."""

import contextlib
import logging
import resource

import jax
import light_network
import numpy as np
import pytest
from checkpoint_files import assert_same, iterator, iterator_at, like, names, state_of

from configs import base
from ivideo.errors import UserError
from ivideo.training import loop
from ivideo.training.checkpoint import Checkpoints, _storage_problem

# Of Orbax's writes that were still under way when one failed
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextlib.contextmanager
def full(size=8000):
    """Files can grow no further than this many bytes, which is met as a full disk is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "notes", ["[os_error_code='28'] [spec='{\"a\":true}']", "[spec='{\"a\":true}'] [os_error_code='28']"]
)
def test_small_the_storage_s_message_is_found_among_its_notes(notes):
    error = ValueError(f'RESOURCE_EXHAUSTED: Error writing "d/0": No space left on device {notes}')
    assert _storage_problem(error) == "No space left on device"
    assert _storage_problem(ValueError("DATA_LOSS: a chunk is short")) == "DATA_LOSS: a chunk is short"
    assert _storage_problem(ValueError("another error: of the program")) == ""


@pytest.mark.parametrize("met_by", ["finish", "check", "save"])
def test_small_a_full_disk_is_one_error_and_leaves_what_was_whole(tmp_path, met_by):
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    data, checkpoints = iterator_at(1), Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, state_of(1), data)
    checkpoints.finish()
    checkpoints.check()
    with full(), pytest.raises(UserError) as error:
        checkpoints.save(2, state_of(2), data)
        if met_by == "check":
            with contextlib.suppress(Exception):
                checkpoints._digest_task.result()
            checkpoints.check()
        checkpoints.save(3, state_of(3), data) if met_by == "save" else checkpoints.finish()
    assert str(error.value) == (
        f"a checkpoint could not be saved in {tmp_path / 'checkpoints'} (File too large): free some space there, "
        "or make the folder writable; the same command continues from step 1"
    )
    checkpoints.close()
    assert names(tmp_path / "checkpoints") == ["1"]
    step, state = Checkpoints(tmp_path, keep=3).restore(like(), iterator())
    assert step == 1
    assert_same(state, state_of(1))


def test_small_a_read_only_folder_is_the_same_error(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=3)

    def refuse(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoints._manager, "save", refuse)
    with pytest.raises(UserError, match=r"\(Read-only file system\): .* continues from the start"):
        checkpoints.save(1, state_of(1), iterator())


def test_small_an_error_that_is_not_of_storage_stays_what_it_is(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=3)

    def fail(*args, **options):
        raise ValueError("a bug")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(ValueError, match="^a bug$"):
        checkpoints.save(1, state_of(1), iterator())


def test_training_on_a_full_disk_ends_with_the_checkpoints_error(tmp_path, caplog, shared_programs):
    """Not with that of the metrics, which cannot be written either."""
    config = base.get_config("small")
    config.update_from_flattened_dict(
        {
            **light_network.OPTIONS,
            "data.num_images": 0,
            "train.steps": 9,
            "train.checkpoint_every": 3,
            "train.sample_every": 0,
        }
    )
    begun, save = [], Checkpoints.save

    def then_full(self, step, state, data):
        save(self, step, state, data)
        if step == 3:
            self.finish()
            begun.append(limits.enter_context(full(500)))

    with contextlib.ExitStack() as limits, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", then_full)
        patch.setitem(jax.config.values, "jax_enable_compilation_cache", False)
        with pytest.raises(UserError, match=r"could not be saved .*continues from step 3"):
            loop.train(config, str(tmp_path), devices=jax.devices()[:1])
    assert begun and names(tmp_path / "checkpoints") == ["3"]
    assert sum("metrics.jsonl cannot be written" in record.getMessage() for record in caplog.records) == 1
    state = loop.train(config, str(tmp_path), devices=jax.devices()[:1])
    assert int(state.step) == 9 and np.isfinite(float(jax.tree.leaves(state.params)[0].sum()))

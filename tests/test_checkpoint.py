"""Checkpoints: a saved state is restored bit for bit; damage is detected, reported and survived."""

import functools
import hashlib
import json
import logging
import re
import shutil
import time
import tracemalloc

import jax
import orbax.checkpoint as ocp
import pytest
from checkpoint_files import (
    DAMAGES,
    assert_same,
    contents,
    cut,
    iterator,
    iterator_at,
    largest,
    like,
    names,
    remove,
    save_run,
    state_of,
)

from ivideo.errors import UserError
from ivideo.training import digests
from ivideo.training.checkpoint import Checkpoints

# Orbax warns of its other reads when one fails
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 3 of a run that keeps two, and the run's batches."""
    workdir = tmp_path_factory.mktemp("run")
    save_run(workdir)
    data = iterator()
    return workdir, [next(data) for _ in range(4)]


@pytest.fixture
def saved(original, tmp_path):
    """A copy of the folder, to damage it, and the batches."""
    shutil.copytree(original[0], tmp_path / "run")
    return tmp_path / "run", original[1]


def test_small_newest_state_and_data_position_come_back(saved):
    workdir, batches = saved
    data = iterator()
    step, state = Checkpoints(workdir, keep=2).restore(like(), data)
    assert step == 3
    assert_same(state, state_of(3))
    assert_same(next(data), batches[3])
    assert names(workdir / "checkpoints") == ["2", "3"]
    assert names(workdir / "digests") == ["2.json", "3.json"]
    assert names(workdir / "damaged") == []


CASES = [(name, digested) for name in DAMAGES for digested in (True, False) if digested or DAMAGES[name][2]]


def assert_training_continues_from_2(workdir, data, batches):
    """The next batch is that after step 2. The step that was set aside is saved again, and one more."""
    assert names(workdir / "checkpoints") == ["2"]
    assert_same(next(data), batches[2])
    checkpoints = Checkpoints(workdir, keep=2)
    assert checkpoints.restore(like(), data)[0] == 2
    for step in (3, 4):
        next(data)
        checkpoints.save(step, state_of(step, seed=10), data)
    checkpoints.close()
    assert names(workdir / "checkpoints") == ["3", "4"]
    assert names(workdir / "digests") == ["3.json", "4.json"]
    for step in (3, 4):
        written = json.loads((workdir / "digests" / f"{step}.json").read_text())
        assert written == digests.folder_digests(workdir / "checkpoints" / str(step))
    data = iterator()
    step, state = Checkpoints(workdir, keep=2).restore(like(), data)
    assert step == 4
    assert_same(state, state_of(4, seed=10))


@pytest.mark.parametrize(("name", "digested"), CASES, ids=[f"{n}-{'digests' if d else 'orbax'}" for n, d in CASES])
def test_small_damaged_newest_is_set_aside_and_the_one_before_used(saved, caplog, name, digested):
    workdir, batches = saved
    damage, by_digests, by_orbax = DAMAGES[name]
    if not digested:
        (workdir / "digests" / "3.json").unlink()
    damage(workdir / "checkpoints" / "3")
    damaged = contents(workdir / "checkpoints" / "3")
    data = iterator()
    step, state = Checkpoints(workdir, keep=2).restore(like(), data)
    assert step == 2
    assert_same(state, state_of(2))
    (message,) = (r.getMessage() for r in caplog.records if "is damaged" in r.getMessage())
    assert message.startswith("checkpoint 3 is damaged (")
    assert re.search(by_digests if digested else by_orbax, message), message
    assert names(workdir / "damaged") == ["3"]
    assert contents(workdir / "damaged" / "3") == damaged  # moved, never deleted
    assert_training_continues_from_2(workdir, data, batches)
    assert contents(workdir / "damaged" / "3") == damaged


@pytest.mark.parametrize("name", [name for name in DAMAGES if DAMAGES[name][2] is None and name != "flipped"])
def test_small_harmless_damage_without_digests_changes_no_number(saved, name):
    """Orbax does not read what it does not check, except for numbers: a flipped byte in them needs digests."""
    workdir, batches = saved
    (workdir / "digests" / "3.json").unlink()
    DAMAGES[name][0](workdir / "checkpoints" / "3")
    data = iterator()
    step, state = Checkpoints(workdir, keep=2).restore(like(), data)
    assert step == 3
    assert_same(state, state_of(3))
    assert_same(next(data), batches[3])


@pytest.mark.parametrize("text", [b"", b"not json", b"\xff\xfe\x00", b"[1, 2]", b"{}", b'{"state/_METADATA": "ab'])
def test_small_damaged_digests_are_named_and_orbax_checks_the_checkpoint(saved, caplog, text):
    workdir, batches = saved
    (workdir / "digests" / "3.json").write_bytes(text)
    data = iterator()
    step, state = Checkpoints(workdir, keep=2).restore(like(), data)
    assert step == 3
    assert_same(state, state_of(3))
    assert_same(next(data), batches[3])
    assert re.search(r"digests/3.json is damaged \(.+\): only Orbax's own checks remain for checkpoint 3", caplog.text)
    assert names(workdir / "damaged") == []
    # A checkpoint that is damaged as well is still recognised
    cut(largest(workdir / "checkpoints" / "3"))
    step, state = Checkpoints(workdir, keep=2).restore(like(), data)
    assert step == 2
    assert_same(state, state_of(2))
    assert_training_continues_from_2(workdir, data, batches)


@pytest.mark.parametrize("digested", [True, False], ids=["digests", "orbax"])
def test_small_checkpoint_under_another_step_is_set_aside(saved, caplog, digested):
    """As step 7 it would have the wrong random numbers, learning rate and name."""
    workdir, batches = saved
    (workdir / "checkpoints" / "3").rename(workdir / "checkpoints" / "7")
    (workdir / "digests" / "3.json").rename(workdir / "digests" / ("7.json" if digested else "3.json"))
    data = iterator()
    step, state = Checkpoints(workdir, keep=2).restore(like(), data)
    assert step == 2
    assert_same(state, state_of(2))
    assert "checkpoint 7 is damaged (it holds step 3)" in caplog.text
    assert names(workdir / "damaged") == ["7"]
    assert_training_continues_from_2(workdir, data, batches)


@pytest.mark.parametrize("name", ["03", "3.bak", "step_3"])
def test_small_folder_that_is_not_a_step_is_set_aside(saved, caplog, name):
    workdir, batches = saved
    (workdir / "checkpoints" / "3").rename(workdir / "checkpoints" / name)
    data = iterator()
    step, state = Checkpoints(workdir, keep=2).restore(like(), data)
    assert step == 2
    assert_same(state, state_of(2))
    assert f"checkpoint {name} is damaged (its name is not a step)" in caplog.text
    assert names(workdir / "damaged") == [name]
    assert_training_continues_from_2(workdir, data, batches)


def test_small_only_training_deletes_what_a_killed_save_left(saved, caplog):
    """A sampler may read the folder of a run that is saving."""
    workdir, batches = saved
    left = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    (workdir / "checkpoints" / "3").rename(left)
    (left / "commit_success.txt").unlink()
    remove(left / "data")
    step, _ = Checkpoints(workdir, keep=2).restore(like())
    assert step == 2
    assert left.is_dir()
    data = iterator()
    caplog.set_level(logging.INFO, "ivideo")
    step, state = Checkpoints(workdir, keep=2).restore(like(), data)
    assert step == 2
    assert_same(state, state_of(2))
    assert f"deleting {left}: a save was killed before its end" in caplog.text
    assert not left.exists() and not (workdir / "damaged").exists()
    assert_training_continues_from_2(workdir, data, batches)


def test_small_run_killed_in_its_first_save_starts_again(saved):
    workdir, _ = saved
    for step in ("2", "3"):
        (workdir / "checkpoints" / step).rename(workdir / "checkpoints" / f"{step}.orbax-checkpoint-tmp")
    for _ in range(2):
        assert Checkpoints(workdir, keep=2).restore(like(), iterator()) is None


def test_small_second_damaged_checkpoint_of_a_step_is_kept_beside_the_first(saved):
    workdir, batches = saved
    for _ in range(2):
        cut(largest(workdir / "checkpoints" / "3"))
        data = iterator()
        checkpoints = Checkpoints(workdir, keep=2)
        assert checkpoints.restore(like(), data)[0] == 2
        checkpoints.save(3, state_of(3), data)
        checkpoints.close()
    assert names(workdir / "damaged") == ["3", "3_"]
    remove(workdir / "checkpoints" / "3")
    assert_training_continues_from_2(workdir, iterator_at(2), batches)


def test_small_all_damaged_is_an_error_that_says_where_they_are(saved):
    """At every start: a run that started again would train for days next to checkpoints that could be repaired."""
    workdir, _ = saved
    for step in ("2", "3"):
        cut(largest(workdir / "checkpoints" / step))
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint in .* is damaged .*damaged"):
            Checkpoints(workdir, keep=2).restore(like(), iterator())
    assert names(workdir / "damaged") == ["2", "3"]


@pytest.mark.parametrize("digested", [True, False], ids=["digests", "orbax"])
def test_small_checkpoint_of_another_model_is_refused_and_kept(saved, digested):
    workdir, _ = saved
    if not digested:
        shutil.rmtree(workdir / "digests")
    with pytest.raises(
        UserError, match=r"checkpoints/3 is of another model: layer/kernel is \(64, 64\) there and \(7, 64\) in this"
    ):
        Checkpoints(workdir, keep=2).restore(like(width=7), iterator())
    other = like().replace(opt_state=({"m": like().opt_state[0]["m"], "v": like().step}, ()))
    with pytest.raises(UserError, match=r"of another optimizer .*: opt_state/0/v is absent there and \(\) in this"):
        Checkpoints(workdir, keep=2).restore(other, iterator())
    assert names(workdir / "checkpoints") == ["2", "3"]
    assert names(workdir / "damaged") == []


def test_small_failure_that_is_not_the_files_sets_nothing_aside(saved, monkeypatch):
    """With digests, the files are known to be complete. Without, an error of the device is not about files."""
    workdir, _ = saved

    def fail(error, *_, **__):
        raise error

    def fails_with(error):
        with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
            patch.setattr(ocp.StandardCheckpointHandler, "restore", functools.partial(fail, error))
            Checkpoints(workdir, keep=2).restore(like(), iterator())
        return caught.value

    assert "are right, so it is not moved" in fails_with(OSError("the network is gone")).__notes__[0]
    (workdir / "digests" / "3.json").unlink()
    fails_with(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 60 GiB"))
    assert names(workdir / "checkpoints") == ["2", "3"]
    assert Checkpoints(workdir, keep=2).restore(like(), iterator())[0] == 3


def test_small_empty_folder_has_nothing_to_restore(tmp_path):
    """A file browser's files are neither checkpoints nor damage."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".DS_Store").write_text("")
    assert Checkpoints(tmp_path, keep=2).restore(like(), iterator()) is None
    assert names(tmp_path / "damaged") == []


def test_small_digests_are_written_as_soon_as_the_checkpoint_is(tmp_path):
    """A run that is killed before its next checkpoint has written them."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state_of(1), iterator())
    deadline = time.time() + 60
    while not (tmp_path / "digests" / "1.json").exists():
        assert time.time() < deadline
        time.sleep(0.01)
    assert json.loads((tmp_path / "digests" / "1.json").read_text()) == digests.folder_digests(
        tmp_path / "checkpoints" / "1"
    )
    checkpoints.close()


def test_small_digests_that_cannot_be_written_do_not_stop_training(tmp_path, caplog):
    (tmp_path / "digests").write_text("in the way")
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, state_of(step), iterator())
    checkpoints.close()
    assert re.search(r"checkpoint 2 has no digests \(FileExistsError.*\): only Orbax's own checks remain", caplog.text)
    step, state = Checkpoints(tmp_path, keep=2).restore(like(), iterator())
    assert step == 2
    assert_same(state, state_of(2))


def test_small_failed_save_is_reported(tmp_path, monkeypatch):
    """It is reported at the next call, since saving runs in the background. The earlier checkpoint stays."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state_of(1), iterator())
    checkpoints.finish()

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "finalize", fail)
        checkpoints.save(2, state_of(2), iterator())
        with pytest.raises(UserError, match=r"could not be saved in .*\(no space left\).*continues from step 1"):
            checkpoints.finish()
    data = iterator()
    step, state = Checkpoints(tmp_path, keep=2).restore(like(), data)
    assert step == 1
    assert_same(state, state_of(1))
    assert names(tmp_path / "checkpoints") == ["1"]
    assert names(tmp_path / "digests") == ["1.json"]


def test_small_saved_step_is_not_saved_again(saved, caplog):
    workdir, _ = saved
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save(3, state_of(3, seed=10), iterator())
    checkpoints.close()
    assert "step 3 is not saved: there is one of step 3 already" in caplog.text
    assert names(workdir / "digests") == ["2.json", "3.json"]
    step, state = Checkpoints(workdir, keep=2).restore(like())
    assert step == 3
    assert_same(state, state_of(3))


def test_small_digests_of_a_deleted_checkpoint_are_not_used_for_a_new_one(saved, monkeypatch):
    """A user deletes the newest checkpoint, the run saves that step again, and is killed before writing digests."""
    workdir, _ = saved
    remove(workdir / "checkpoints" / "3")
    data = iterator()
    checkpoints = Checkpoints(workdir, keep=2)
    assert checkpoints.restore(like(), data)[0] == 2
    monkeypatch.setattr(digests, "write", lambda *_, **__: None)
    checkpoints.save(3, state_of(3, seed=10), data)
    checkpoints.close()
    step, state = Checkpoints(workdir, keep=2).restore(like(), iterator())
    assert step == 3
    assert_same(state, state_of(3, seed=10))
    assert names(workdir / "damaged") == []


def test_small_restoring_waits_for_the_checkpoint_being_saved(saved):
    """A run does this after a spike."""
    workdir, _ = saved
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save(4, state_of(4), iterator())
    step, state = checkpoints.restore(like())
    assert step == 4
    assert_same(state, state_of(4))


def test_small_digests_are_sha256_and_read_in_pieces(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "abc").write_bytes(b"abc")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(64 << 20)
    wanted = {
        "deep/abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "large": hashlib.sha256(bytes(64 << 20)).hexdigest(),
    }
    tracemalloc.start()
    try:
        assert digests.folder_digests(tmp_path) == wanted
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_small_a_folder_in_a_bucket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir=gs://bucket/run is in a bucket, .* mount the bucket"):
        Checkpoints("gs://bucket/run", keep=2)
    assert names(tmp_path) == []

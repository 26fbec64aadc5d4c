"""Reads the averaged parameters of a run that stays unchanged, may be training, and may be damaged."""

import contextlib
import errno
import os
import re
import shutil
import threading
import time

import jax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from checkpoint_files import (
    DAMAGES,
    assert_same,
    contents,
    flip,
    iterator,
    largest,
    like,
    names,
    save_run,
    state_of,
)
from jax.sharding import NamedSharding, PartitionSpec

from ivideo.errors import UserError
from ivideo.training import average, digests
from ivideo.training.average import read_average
from ivideo.training.checkpoint import Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    save_run(workdir)
    return workdir


@pytest.fixture
def saved(original, tmp_path):
    """A copy of steps 2 and 3, to be damaged."""
    return shutil.copytree(original, tmp_path / "run")


def read(workdir, **options):
    return read_average(str(workdir), like(**options).ema)


def assert_read(workdir, step):
    """The average is that of the step, and the run's folder as it was."""
    before = contents(workdir)
    found, params = read(workdir)
    assert found == step
    assert_same(params, state_of(step).ema)
    assert contents(workdir) == before


def test_small_average_of_the_newest_checkpoint(saved):
    assert_read(saved, 3)


CASES = [(name, digested) for name in DAMAGES for digested in (True, False) if digested or name == "is-step-2"]


@pytest.mark.parametrize(("name", "digested"), CASES)
def test_small_damaged_newest_is_named_and_left_where_it_is(saved, caplog, name, digested):
    if not digested:
        shutil.rmtree(saved / "digests")
    DAMAGES[name][0](saved / "checkpoints" / "3")
    assert_read(saved, 2)
    (message,) = (r.getMessage() for r in caplog.records)
    assert re.search(r"run/checkpoints/3 is damaged \(.+\): using the previous one", message)


def locations(folder, prefix):
    """Where the numbers of a state's leaves are, by their names: file, offset, length."""
    base, found = ts.KvStore.open(f"file://{folder}/").result(), {}
    root = ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
    for entry in ts.ocdbt.dump(base, root).result()["entries"]:
        value = entry.get("indirect_value")
        if value and entry["key"].startswith(prefix):
            _, below, file, offset, length = value.split(":")
            found[entry["key"]] = (folder / below / file, int(offset), int(length))
    return found


def test_small_nothing_else_is_read(saved):
    """Without digests, what cannot be restored of the parameters and the optimizer does not matter."""
    shutil.rmtree(saved / "digests")
    state = saved / "checkpoints" / "3" / "state"
    others = locations(state, b"params") | locations(state, b"opt_state")
    assert len(others) >= 1
    for file, offset, length in others.values():
        data = bytearray(file.read_bytes())
        data[offset : offset + length] = bytes(length)
        file.write_bytes(bytes(data))
    shutil.rmtree(saved / "checkpoints" / "3" / "data")
    shutil.rmtree(saved / "checkpoints" / "2")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        Checkpoints(shutil.copytree(saved, saved.parent / "copy"), keep=2).restore(like())
    assert_read(saved, 3)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_small_average_comes_back_on_other_devices(saved, count):
    mesh = jax.make_mesh((count,), ("x",), devices=jax.devices()[:count])

    def placed(shape):
        split = PartitionSpec("x") if shape.shape == (64, 64) else PartitionSpec()
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, split))

    wanted = jax.tree.map(placed, like().ema)
    step, params = read_average(str(saved), wanted)
    assert step == 3
    assert_same(params, state_of(3).ema)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, wanted)


def test_small_what_is_wrong_with_a_folder_is_said(saved, tmp_path):
    with pytest.raises(UserError, match=r"run/nothing has no checkpoints: give the folder that --mode=train"):
        read(saved / "nothing")
    assert names(saved) == ["checkpoints", "digests"]
    (tmp_path / "new" / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(UserError, match=r"new has no whole checkpoint yet: train longer than"):
        read(tmp_path / "new")
    with pytest.raises(UserError, match=r"--workdir=gs://bucket/run is in a bucket"):
        read("gs://bucket/run")
    other = r"checkpoints/3 is of another model: layer/kernel is \(64, 64\) there and \(7, 64\) in this"
    with pytest.raises(UserError, match=other):
        read(saved, width=7)
    shutil.rmtree(saved / "digests")
    with pytest.raises(UserError, match=other):
        read(saved, width=7)
    for step in ("2", "3"):
        DAMAGES["tree-gone"][0](saved / "checkpoints" / step)
    before = contents(saved)
    with pytest.raises(
        UserError, match=r"every checkpoint in .*run/checkpoints is damaged: copy an undamaged one back"
    ):
        read(saved)
    assert contents(saved) == before


def test_small_failure_that_is_not_the_files_is_not_called_damage(saved, monkeypatch):
    def fails_with(error):
        def fail(*_, **__):
            raise error

        with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
            patch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
            read(saved)
        return str(caught.value)

    assert re.search(
        "checkpoints/3 cannot be read although its digests are right.*the network is gone",
        fails_with(OSError("the network is gone")),
    )
    assert fails_with(MemoryError("60 GiB")) == "60 GiB"
    shutil.rmtree(saved / "digests")
    assert "RESOURCE" in fails_with(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 60 GiB"))


@pytest.fixture
def no_links(monkeypatch, tmp_path):
    """As on a system that has no links to opened files."""
    monkeypatch.setattr(average, "DESCRIPTORS", tmp_path / "none")


@pytest.mark.parametrize("where", ["digests", "restore"])
@pytest.mark.parametrize("linux", [True, False])
def test_small_checkpoint_deleted_while_it_is_read(saved, monkeypatch, caplog, where, linux, request):
    """By a run that has saved a newer one: reading goes on, or the new one is read; the old one is not damaged."""
    if not linux:
        request.getfixturevalue("no_links")

    def meanwhile(function, *args, **options):
        monkeypatch.undo()
        training = Checkpoints(saved, keep=1)
        training.save(4, state_of(4), iterator())
        training.close()
        (saved / "checkpoints" / "3" / "data").mkdir(parents=True)
        return function(*args, **options)

    target, name = {
        "digests": (digests, "folder_digests"),
        "restore": (ocp.PyTreeCheckpointHandler, "restore"),
    }[where]
    original = getattr(target, name)
    monkeypatch.setattr(target, name, lambda *args, **options: meanwhile(original, *args, **options))
    caplog.set_level("INFO", logger="ivideo")
    step, params = read(saved)
    assert step == 3 if linux else 4
    assert_same(params, state_of(step).ema)
    message = "checkpoint 3 was deleted while it was read: reading the newest one instead"
    assert [r.getMessage() for r in caplog.records if r.name == "ivideo"] == ([] if linux else [message])
    assert names(saved / "checkpoints") == ["3", "4"]


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOSPC])
def test_small_links_that_cannot_be_made_are_done_without(saved, monkeypatch, error):
    """More files than may be open, or no place for links: the checkpoint's own files are read."""

    def fail(*_, **__):
        raise OSError(error, os.strerror(error))

    if error == errno.EMFILE:
        monkeypatch.setattr(average, "open", fail, raising=False)
    else:
        monkeypatch.setattr(average.tempfile, "TemporaryDirectory", fail)
    with contextlib.ExitStack() as stack:
        assert average._keep_readable(saved / "checkpoints" / "3", stack) == saved / "checkpoints" / "3"
    assert_read(saved, 3)


def test_small_nothing_is_left_open_or_in_the_way(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(average.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    assert_read(saved, 3)
    assert len(os.listdir("/proc/self/fd")) == before
    assert names(tmp_path / "temporary") == []


def test_small_damaged_checkpoint_that_the_run_moves_away_meanwhile(saved, monkeypatch):
    """A run that begins again beside the reader sets it aside; the one before is read, as it is the newest now."""
    flip(largest(saved / "checkpoints" / "3"))

    def moved(folder, step, files):
        monkeypatch.undo()
        (saved / "checkpoints" / "3").rename(saved / "moved")
        return "it has changed"

    monkeypatch.setattr(digests, "compare", moved)
    step, params = read(saved)
    assert step == 2
    assert_same(params, state_of(2).ema)


def test_reading_beside_a_run_that_saves_every_step(tmp_path):
    """Fifty times, with one checkpoint kept: each is the average of one step, and none is older than the one before."""
    over = threading.Event()

    def train():
        data = iterator()
        checkpoints = Checkpoints(tmp_path, keep=1)
        step = 0
        while not over.is_set():
            step += 1
            checkpoints.save(step, state_of(step), data)
            checkpoints.finish()
        checkpoints.close()

    training = threading.Thread(target=train)
    training.start()
    try:
        deadline = time.monotonic() + 60
        while not any(name.isdigit() for name in names(tmp_path / "checkpoints")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        steps = []
        for _ in range(50):
            step, params = read(tmp_path)
            assert_same(params, state_of(step).ema)
            steps.append(step)
    finally:
        over.set()
        training.join()
    assert steps == sorted(steps)
    assert not (tmp_path / "damaged").exists()


def test_small_checkpoints_that_never_last_end_with_advice(saved, monkeypatch):
    steps = iter(range(4, 1000))

    def deleted(folder, step, files):
        (saved / "checkpoints" / str(step)).rename(saved / "checkpoints" / str(next(steps)))
        return "state/_METADATA is missing"

    monkeypatch.setattr(digests, "compare", deleted)
    with pytest.raises(UserError, match="are deleted faster than they can be read: .* larger config.train.keep"):
        read(saved)

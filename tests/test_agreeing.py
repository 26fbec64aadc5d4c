"""Values that processes compare before they compile, with a key-value store in this process instead of jax's."""

import threading

import pytest

from configs import base
from ivideo.devices import agreeing, hosts
from ivideo.errors import UserError


class Store:
    """Works like jax's store: a key is set once, readers wait for it, and a barrier opens when all have come."""

    def __init__(self, count):
        self._values, self._change, self._count, self._barriers = {}, threading.Condition(), count, {}

    def key_value_set(self, key, value):
        with self._change:
            assert key not in self._values and isinstance(value, str)
            self._values[key] = value
            self._change.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self._change:
            assert self._change.wait_for(lambda: key in self._values, 10)
            return self._values[key]

    def wait_at_barrier(self, name, timeout_in_ms):
        with self._change:
            barrier = self._barriers.setdefault(name, threading.Barrier(self._count))
        barrier.wait(1)


@pytest.fixture
def in_processes(monkeypatch):
    """Calls a function in threads that stand for processes. Returns the error of each, or None."""

    def call(count, function):
        numbers, turns, found = threading.local(), threading.local(), [None] * count
        store = Store(count)
        monkeypatch.setattr(hosts, "is_distributed", lambda: True)
        monkeypatch.setattr(hosts, "store", lambda: store)
        monkeypatch.setattr(hosts, "process", lambda: (numbers.own, count))

        class Turns:
            def __next__(self):
                turns.next = getattr(turns, "next", -1) + 1
                return turns.next

        monkeypatch.setattr(agreeing, "_calls", Turns())

        def run(number):
            numbers.own = number
            try:
                function(number)
            except Exception as e:
                found[number] = e

        threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return call


def test_small_processes_with_equal_values_continue(in_processes):
    def twice(number):
        agreeing.agree(lambda: {"a": 1, "b": "x"})
        agreeing.agree(lambda: {"a": 2})

    assert in_processes(3, twice) == [None, None, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"a": 1, "b": 3, "c": 4},
            r"processes differ: b is 3 on process 1 \(.*\) and 2 on process 0 \(.*\); start",
        ),
        ({"a": 1, "c": 3}, "b is missing on process 1"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "d is 4 on process 1 .* and missing on process 0"),
    ],
)
def test_small_the_first_value_that_differs_is_named(in_processes, values, message):
    """The process that differs names it. The others are at the barrier, which breaks."""
    all_values = [{"a": 1, "b": 2, "c": 3}, values]
    first, second = in_processes(2, lambda number: agreeing.agree(lambda: all_values[number]))
    assert isinstance(first, threading.BrokenBarrierError)
    with pytest.raises(UserError, match=message):
        raise second


def test_small_one_process_has_nothing_to_compare():
    agreeing.agree(None)
    agreeing.check_shared(None)


def test_small_shared_folders_and_others(in_processes, tmp_path):
    def check(*folders):
        return in_processes(3, lambda number: agreeing.check_shared(str(tmp_path / folders[number]), seconds=0.3))

    assert check("new", "new", "new") == [None, None, None]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    first, *others = check("there", "there", "elsewhere")
    assert all(isinstance(other, threading.BrokenBarrierError) for other in others)
    with pytest.raises(
        UserError, match=r"there is not the same folder .*: 1 of 3 do not see .* the first of them process 2 \("
    ):
        raise first
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_small_digest_of_a_folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a").write_bytes(b"12345")
    before = agreeing.folder_digest(str(tmp_path))
    assert before.startswith("1 files of 5 bytes (digest ")
    (tmp_path / "part" / "a").rename(tmp_path / "part" / "b")
    assert before != agreeing.folder_digest(str(tmp_path))
    assert agreeing.folder_digest("") == "none"


def test_small_every_value_of_a_config_has_a_name():
    found = agreeing.config_values(base.get_config("small"))
    assert found["config.seed"] == "0" and found["config.train.mesh.fsdp"] == "1"
    assert found["config.data.source"] == "'shapes'"


def test_small_code_and_libraries_are_compared():
    found = agreeing.program_values()
    assert {"the version of ivideo", "the version of jax", "the version of jaxlib"} < found.keys()
    assert {"the code of ivideo/devices/agreeing.py", "the code of ivideo/models/unet.py"} < found.keys()

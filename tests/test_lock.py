"""One run at a time per folder: who holds the lock, when it is free, and what happens to a run that loses it."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from ivideo.errors import UserError
from ivideo.training import lock

ROOT = pathlib.Path(__file__).parent.parent
HOLDER = """
import sys, time
from ivideo.training import lock
lock.BEAT_SECONDS = 0.05
with lock.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder):
    """Starts another process that holds the lock of the folder."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def write_lock(folder, **changes):
    """Writes the lock file of a run on another machine, with changes."""
    folder.mkdir(exist_ok=True)
    (folder / lock.NAME).write_text(json.dumps({**lock._own_identity(), "host": "elsewhere", **changes}))


def test_small_second_run_is_told_who_holds_the_lock_and_since_when(tmp_path):
    with lock.held(str(tmp_path)):
        since = json.loads((tmp_path / lock.NAME).read_text())["since"]
        with pytest.raises(UserError) as error, lock.held(str(tmp_path)):
            pass
        assert (
            str(error.value)
            == f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()} since {since}: "
            "stop that run, or give another --workdir"
        )
        assert (tmp_path / lock.NAME).exists()  # the second run has not removed it
    assert list(tmp_path.iterdir()) == []
    with lock.held(str(tmp_path)):
        pass


def test_small_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--workdir=.*/file/run cannot be written to \(Not a directory\): make"):
        lock.held(str(tmp_path / "file" / "run")).__enter__()

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(lock, "open", read_only, raising=False)
    with pytest.raises(UserError, match=r"--workdir=.*/new cannot be written to \(Read-only file system\): make"):
        lock.held(str(tmp_path / "new")).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_small_new_folder_is_removed_if_nothing_was_written(tmp_path):
    with pytest.raises(UserError, match="no data"), lock.held(str(tmp_path / "new" / "run")):
        raise UserError("no data")
    assert not (tmp_path / "new" / "run").exists()
    with lock.held(str(tmp_path / "run")):
        (tmp_path / "run" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_small_only_the_first_process_of_a_run_locks_the_folder(tmp_path):
    with lock.held(str(tmp_path)), lock.held(str(tmp_path), first=False):
        pass
    with lock.held(str(tmp_path / "none"), first=False):
        assert not (tmp_path / "none").exists()


def test_small_after_kill_9_the_folder_is_free_at_once(tmp_path, monkeypatch):
    process = holder(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {process.pid} on"), lock.held(str(tmp_path)):
        pass
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    monkeypatch.setattr(lock, "STALE_SECONDS", 1e9)  # a wait would not end
    with lock.held(str(tmp_path)):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    process.wait(30)


def test_small_reused_pid_is_not_the_run(tmp_path, monkeypatch):
    write_lock(tmp_path, started="1")
    monkeypatch.setattr(lock, "STALE_SECONDS", 1e9)
    with lock.held(str(tmp_path)):
        pass


@pytest.mark.parametrize("machine", ["another machine", ""])
def test_small_run_on_another_machine_is_alive_while_its_file_changes(tmp_path, monkeypatch, machine):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    write_lock(tmp_path, machine=machine, pid=7)
    over = threading.Event()

    def beat():
        while not over.wait(0.05):
            os.utime(tmp_path / lock.NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="in use by process 7 on elsewhere since"), lock.held(str(tmp_path)):
        pass
    over.set()
    thread.join()
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.3)
    with lock.held(str(tmp_path)):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_small_empty_lock_file_of_a_dead_run_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.1)
    (tmp_path / lock.NAME).touch()
    with lock.held(str(tmp_path)):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_small_two_runs_find_a_dead_one_and_one_of_them_gets_the_folder(tmp_path):
    write_lock(tmp_path, started="1")
    got, refused, begun = [], [], threading.Barrier(2)

    def take():
        begun.wait()
        try:
            with lock.held(str(tmp_path)):
                got.append(1)
                time.sleep(1)
        except UserError as e:
            refused.append(str(e))

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 1


def test_small_run_whose_folder_was_taken_over_ends(tmp_path):
    process = holder(tmp_path)
    write_lock(tmp_path, pid=7, since="today")
    assert process.wait(30) == 2
    assert f"{tmp_path} was taken over by process 7 on elsewhere since today" in process.stderr.read()


def test_small_heartbeat_updates_the_time_and_restores_a_deleted_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    path = tmp_path / lock.NAME

    def until(true):
        deadline = time.monotonic() + 20
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with lock.held(str(tmp_path)):
        first = path.stat().st_mtime_ns
        until(lambda: path.stat().st_mtime_ns > first)
        path.unlink()
        until(path.exists)
    assert not path.exists()

"""Mode prepare_data: files that crash or hang, interruptions and kills."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import collections_of_clips as clips
import ending_tasks
import pytest
from prepared_sets import command, contents, here, one_clip, prepared, quarantine, read_set

from ivideo.data.preparing import pool, prepare, records
from ivideo.data.preparing.tasks import measure
from ivideo.errors import UserError


def test_a_task_that_ends_its_process_is_reported_and_the_others_are_done():
    ended = {3: pool.Ended(1), 5: pool.Ended(-signal.SIGALRM)}
    found = dict(pool.run(ending_tasks.crash_or_hang, list(range(8)), processes=2))
    assert found == {k: 10 * k for k in range(8)} | ended
    assert (ended[3].timed_out, ended[5].timed_out) == (False, True)


def test_an_error_in_a_process_of_its_own_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(pool._alone(ending_tasks.divide, [0], processes=1))


@pytest.mark.parametrize(("code", "reason"), [(-signal.SIGSEGV, "crashed"), (-signal.SIGALRM, "timeout")])
def test_small_files_that_crash_the_decoder_are_left_out(tmp_path, code, reason):
    """One of a task's files does; the task's others are measured one by one."""
    folder = one_clip(tmp_path / "in")
    (folder / "b.mp4").write_bytes(b"crash")
    (folder / "b.txt").write_text("crashes")

    def run(function, tasks):
        for task in tasks:
            crashes = function is measure and any(item.name == "b.mp4" for _, item in task.items)
            yield task, pool.Ended(code) if crashes else function(task)

    out = prepared(folder, tmp_path / "out", run=run)
    assert read_set(out).keys() == {"a.mp4"} and quarantine(out) == {"b.mp4": reason}


def test_a_file_that_takes_too_long_is_left_out(tmp_path):
    """Its process is ended while the decoder works, and the file is in the report, without a picture."""
    folder, out = one_clip(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(UserError, match="none of 1 videos is left: 1 timeout"):
        prepared(folder, out, run=functools.partial(pool.run, processes=1), timeout=0.001)
    assert quarantine(out) == {"a.mp4": "timeout"}
    assert "not read after 0.001 seconds (config.prepare.timeout)" in (out / prepare.QUARANTINE).read_text()
    assert "<img" not in (out / prepare.REPORT).read_text(encoding="utf-8")


def test_small_a_longer_timeout_tries_files_again(tmp_path, monkeypatch):
    """Those that took too long, and no others; the shards are those of the files that are kept then."""
    monkeypatch.setattr(prepare, "PER_TASK", 1)
    folder = one_clip(tmp_path / "in")
    for name, seed in (("b", 1), ("c", 2)):
        (folder / f"{name}.mp4").write_bytes(clips.h264(clips.texture(seed), 24))
        (folder / f"{name}.txt").write_text(f"clip {name}")
    whole = contents(prepared(folder, tmp_path / "whole", timeout=50.0))
    tried = []

    def run(slow, stop=False):
        def run(function, tasks):
            for task in tasks:
                if function is not measure and stop:
                    yield task, function(task)
                    raise KeyboardInterrupt
                names = [item.name for _, item in task.items] if function is measure else []
                tried.extend(names)
                yield task, pool.Ended(-signal.SIGALRM) if set(slow) & set(names) else function(task)

        return run

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):  # when the only shard is written
        prepared(folder, out, timeout=20.0, run=run(["a.mp4", "c.mp4"], stop=True))
    assert quarantine(out) == {"a.mp4": "timeout", "c.mp4": "timeout"}
    tried.clear()
    prepared(folder, out, timeout=50.0, run=run([]))
    assert contents(out) == whole and set(tried) == {"a.mp4", "c.mp4"}
    prepared(folder, tmp_path / "short", timeout=20.0, run=run(["a.mp4"]))
    with pytest.raises(UserError, match="finished, and 1 of its files took longer than config.prepare.timeout = 20: "):
        prepared(folder, tmp_path / "short", timeout=0.0)
    prepared(folder, tmp_path / "short", timeout=10.0)


def test_small_what_killed_processes_left_is_removed(tmp_path):
    folder, out = one_clip(tmp_path / "in"), tmp_path / "out"
    whole = contents(prepared(folder, tmp_path / "whole"))

    def run(function, tasks):
        (out / f"prepared-train.array_record-00000-of-00001.tmp{'0' * 32}").write_bytes(b"half a shard")
        return here(function, tasks)

    assert contents(prepared(folder, out, run=run)) == whole


def test_small_a_pipe_is_not_waited_for(tmp_path):
    """Reading one that nothing writes to takes forever."""
    folder = one_clip(tmp_path / "in")
    os.mkfifo(folder / "b.mp4")
    (folder / "b.txt").write_text("a pipe")
    out = prepared(folder, tmp_path / "out")
    assert read_set(out).keys() == {"a.mp4"} and quarantine(out) == {"b.mp4": "unreadable"}


def test_small_an_interrupted_preparation_continues(tmp_path, monkeypatch):
    """Whatever was written when it stopped, the result is the same, byte for byte."""
    monkeypatch.setattr(prepare, "PER_TASK", 2)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.mp4").write_bytes(clips.good(number, "h264").data)
        (folder / f"{number}.txt").write_text(f"clip {number}")
    whole = contents(prepared(folder, tmp_path / "whole"))
    measured = []

    class Stop(Exception):
        pass

    def stopping(function, tasks):
        for count, task in enumerate(tasks):
            if count == 1:
                raise Stop
            measured.append(task)
            yield task, function(task)

    out = tmp_path / "out"
    for _ in range(8):
        try:
            prepared(folder, out, run=stopping)
            break
        except Stop:
            assert not (out / records.INFO).exists()
    paths = [task.path for task in measured]
    assert contents(out) == whole and len(paths) == len(set(paths)) == 4  # three of measures, one shard


def test_a_killed_preparation_continues(tmp_path):
    """Killed three times, at moments when something is written."""
    folder = tmp_path / "in"
    clips.write_folder(folder, count=120)
    whole = contents(prepared(folder, tmp_path / "whole", shard_megabytes=1))
    out = tmp_path / "out"
    more = ("--config.prepare.shard_megabytes=1", "--config.prepare.workers=1")
    arguments = [sys.executable, "-m", "ivideo.main", *command(folder, out, *more)[1:]]
    for kill in range(3):
        process = subprocess.Popen(arguments, cwd=pathlib.Path(__file__).parent.parent)
        while process.poll() is None and len(list((out / prepare.WORK).glob("*.jsonl"))) < 2 * kill + 1:
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert not (out / records.INFO).exists()
    subprocess.run(arguments, cwd=pathlib.Path(__file__).parent.parent, check=True)
    assert contents(out) == whole

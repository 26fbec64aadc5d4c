"""Unreadable clips are replaced, logged and counted, and all readers get the same stream."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import base
from ivideo.data import check, pipeline, sets, shapes_set, workers
from ivideo.data.video_io import VideoError
from ivideo.errors import UserError
from ivideo.text.tokenizers import byte_tokens
from ivideo.training import loop

ROOT = pathlib.Path(__file__).parent.parent
BAD = {3, 4, 11}  # of twelve clips; the one after 11 is 0


class Source:
    """Twelve clips, each of its own brightness, of which some cannot be read."""

    def __init__(self, bad=BAD):
        self.bad = bad

    def __len__(self):
        return 12

    def check(self, index):
        if index in self.bad:
            raise VideoError(f"clip {index} is corrupt.")

    def read(self, index, rng):
        self.check(index)
        return {"video": np.full((2, 4, 4, 3), index, np.uint8), "caption": f"clip {index}"}

    def image(self, index, rng):
        clip = self.read(index, rng)
        return {"image": clip["video"][rng.integers(2)], "caption": clip["caption"]}


def iterator(source=None, **options):
    options = {"batch_size": 4, "seed": 0, "text_length": 8, "num_images": 2, "max_unreadable": 3, **options}
    return pipeline.make_iterator(source or Source(), tokenize=byte_tokens, num_threads=0, **options)


def batches(data, count=6):
    return [next(data) for _ in range(count)]


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys() and pipeline.unreadable.KEY not in a
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def clips(found, name="video"):
    first = {"video": (0, 0, 0, 0), "images": (0, 0, 0)}[name]  # a clip's first value tells which one it is
    return [int(x) for batch in found for x in batch[name][(..., *first)].ravel()]


def test_small_the_next_readable_clip_stands_in_its_place():
    whole, found = batches(iterator(Source(bad=()), num_images=0)), batches(iterator(num_images=0))
    place = {3: 5, 4: 5, 11: 0}
    assert clips(found) == [place.get(clip, clip) for clip in clips(whole)]
    assert set(clips(whole)) >= BAD
    caption = byte_tokens(["clip 5"], 8)[0][0]
    assert all((batch["tokens"][batch["video"][:, 0, 0, 0, 0] == 5] == caption).all() for batch in found)
    images = clips(batches(iterator()), "images")
    assert not BAD & set(images) and len(images) == 6 * 4 * 2


def test_small_the_stream_is_the_same_for_readers_workers_and_after_a_restart():
    wanted = batches(iterator())
    halves = [batches(iterator(reader=reader, readers=((0,), (1,)))) for reader in (0, 1)]
    joined = [
        {name: np.concatenate([half[name] for half in pair]) for name in pair[0]} for pair in zip(*halves, strict=True)
    ]
    assert_same(joined, wanted)
    data = iterator()
    batches(data, 4)
    fresh = iterator()
    fresh.set_state(data.get_state())
    assert_same(batches(fresh, 2), wanted[4:])


def test_workers_leave_out_the_same_clips(caplog):
    wanted, data = batches(iterator()), iterator(num_workers=1)
    caplog.clear()
    assert_same(batches(data), wanted)
    data.close()
    assert len(caplog.records) == 3


def test_small_each_is_named_once(caplog):
    data = iterator()
    batches(data, 12)
    said = sorted(record.getMessage() for record in caplog.records)
    assert [text.split(" (")[0] for text in said] == [
        f"clip {index} is corrupt. Another clip is used in its place" for index in (11, 3, 4)
    ]
    assert sum(text.endswith("(3 unreadable, config.data.max_unreadable = 3)") for text in said) == 1


@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("images", [0, 2])
def test_small_more_than_the_limit_end_the_run(limit, images):
    """Whether in a row or not."""
    with pytest.raises(UserError, match=rf"clip \d+ is corrupt. \({limit + 1} unreadable, .*max_unreadable = {limit};"):
        batches(iterator(max_unreadable=limit, num_images=images), 12)


def test_small_a_set_without_a_readable_clip_ends_the_run():
    with pytest.raises(UserError, match="none of the 12 clips can be read: --mode=check_data"):
        next(iterator(Source(bad=set(range(12))), max_unreadable=100))


def test_small_other_errors_end_the_run_at_once():
    class Broken(Source):
        def read(self, index, rng):
            raise OSError("the storage is away")

    with pytest.raises(OSError, match="the storage is away"):
        next(iterator(Broken(), max_unreadable=100))


def test_small_a_check_lists_them(capsys):
    with pytest.raises(UserError, match=r"3 of 12 clips cannot be read: .* --config.data.max_unreadable=3"):
        check.check_data(Source())
    assert capsys.readouterr().out.splitlines() == [
        *(f"clip {index} is corrupt." for index in sorted(BAD)), "12 clips read, 3 of them unreadable",
    ]  # fmt: skip
    check.check_data(Source(bad=()))
    assert capsys.readouterr().out == "12 clips read, 0 of them unreadable\n"


def test_small_a_damaged_clip_of_a_prepared_set_is_left_out_of_training(tmp_path, caplog, monkeypatch):
    """As config.data.max_unreadable says, and the check reads the set as the stage does."""
    folder = shapes_set.prepare_shapes(tmp_path, num_train=8, num_held_out=1, frames=16, height=16, width=16)
    config = base.get_config("small")
    config.update_from_flattened_dict({"data.source": "tfds", "data.dir": folder, "data.max_unreadable": 1})
    record = sets.EncodedSet.__getitem__

    def damaged(self, index):
        found = record(self, index)
        return found._replace(data=found.data[: len(found.data) // 3]) if index in bad else found

    monkeypatch.setattr(sets.EncodedSet, "__getitem__", damaged)

    class Encoder:
        tokenizer, length = staticmethod(byte_tokens), 64

    bad = {2}
    next(loop.make_data(config, Encoder))  # eight clips, and two images for each
    (said,) = [record.getMessage() for record in caplog.records if record.name == "ivideo"]
    assert said.startswith("clip 2 of 'train' in ")
    with pytest.raises(UserError, match="1 of 8 clips cannot be read"):
        check.check_data(loop.data_source(config))
    bad = {2, 5}
    with pytest.raises(UserError, match=r"2 unreadable, config.data.max_unreadable = 1"):
        next(loop.make_data(config, Encoder))


WORKER = """
import sys, time
sys.path.insert(0, "tests")
from absl import flags
flags.FLAGS.mark_as_parsed()
from ivideo.devices import hosts
from test_unreadable import *

if __name__ == "__main__":
    import multiprocessing
    data = iterator(num_workers=1)
    next(data)
    (worker,) = multiprocessing.active_children()
    print(worker.pid, flush=True)
    for line in sys.stdin:
        try:
            for _ in range(9):
                next(data)
            print("whole", flush=True)
        except Exception as e:
            print(hosts.is_killed_worker(e), data.get_state()["global_next_index"] % 4, flush=True)
"""


def test_a_worker_leaves_signals_to_the_run_is_missed_and_ends_with_it(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program)]

    def begin():
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return process, int(process.stdout.readline())

    def asked(process):
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline()

    process, worker = begin()
    for number in workers.IGNORED_SIGNALS:
        os.kill(worker, number)
    assert asked(process) == "whole\n"
    process.kill()
    deadline = time.monotonic() + 60
    while alive(worker):
        assert time.monotonic() < deadline, "the worker outlives its run"
        time.sleep(0.05)
    process, worker = begin()
    os.kill(worker, signal.SIGKILL)
    assert asked(process) == "True 0\n"  # a whole number of batches: the run can be saved
    process.kill()


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

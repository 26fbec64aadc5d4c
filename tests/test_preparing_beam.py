"""Mode prepare_data with Apache Beam; skipped where that is not installed."""

import os
import tarfile

import collections_of_clips as clips
import fake_bucket
import pytest
from prepared_sets import add_to_tar, contents, prepared, quarantine

from configs import base
from ivideo.data.preparing import inputs, prepare
from ivideo.errors import UserError

BROKEN = ("empty", "half of it", "copy", "no caption")
LOCAL = ["--runner=DirectRunner"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clips.write_folder(folder, count=8, broken=BROKEN)
    return folder


@pytest.fixture(scope="module")
def tars(folder, tmp_path_factory):
    """The same files in two tars."""
    out = tmp_path_factory.mktemp("tars")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt")
    for shard in range(2):
        with tarfile.open(out / f"{shard:05}.tar", "w") as tar:
            for number, path in list(enumerate(paths))[shard::2]:
                add_to_tar(tar, f"{number:03}{path.suffix}", path.read_bytes())
                add_to_tar(tar, f"{number:03}.txt", path.with_suffix(".txt").read_bytes())
    return out


def test_beam_makes_the_same_set(folder, tars, tmp_path, monkeypatch):
    """The same files, byte for byte, of a folder and of tars, also when shots are encoded."""
    pytest.importorskip("apache_beam")
    from ivideo.data.preparing import beam

    monkeypatch.setattr(prepare, "PER_SPREAD_TASK", 5)
    for name, path, options in (("folder", folder, {}), ("tars", tars, {"split_shots": True})):
        whole = prepared(path, tmp_path / f"{name} whole", shard_megabytes=1, **options)
        out = tmp_path / name
        prepared(path, out, run=None, spread=beam.spread(LOCAL, str(out)), shard_megabytes=1, **options)
        assert contents(out) == contents(whole) and len(quarantine(out)) >= len(BROKEN) - 1


def test_beam_continues_and_works_in_a_bucket(tars, tmp_path, monkeypatch, capsys):
    """The tars and the set are there."""
    pytest.importorskip("apache_beam")
    from ivideo.data.preparing import beam

    monkeypatch.setattr(prepare, "PER_SPREAD_TASK", 5)
    whole = contents(prepared(tars, tmp_path / "whole"))
    config = base.get_config("small")
    with fake_bucket.bucket() as objects:
        for path in tars.iterdir():
            objects[f"in/{path.name}"] = path.read_bytes()
        out, tasks = "gs://bucket/out", []
        on_workers = beam.spread(LOCAL, out)

        def stopping(function, todo):
            """Ends after half of the tasks, as if the machine that began the pipeline was lost."""
            tasks.extend(todo)
            yield from on_workers(function, todo[: len(todo) // 2] if len(todo) > 1 else todo)
            if len(todo) > 1:
                raise KeyboardInterrupt

        for _ in range(5):
            try:
                prepare.prepare(config, "gs://bucket/in/*.tar", out, spread=stopping)
                break
            except KeyboardInterrupt:
                assert "out/dataset_info.json" not in objects
        found = {name.removeprefix("out/"): data for name, data in objects.items() if name.startswith("out/")}
        by_pattern, by_folder = (inputs.find(f"gs://bucket/in{end}", "video") for end in ("/*.tar", ""))
        assert by_pattern == by_folder and by_folder.items[0].name == "00000.tar/000.mp4"
        with pytest.raises(UserError, match=r"gs://bucket/none has no videos: .* of a bucket only .tar files are read"):
            inputs.find("gs://bucket/none", "video")
    assert found == whole


def test_small_beam_says_what_is_wrong_with_its_options(tmp_path):
    pytest.importorskip("apache_beam")
    from ivideo.data.preparing import beam

    with pytest.raises(UserError, match="Beam rejects --beam=--runner=Nope"):
        beam.spread(["--runner=Nope"], str(tmp_path / "out"))
    assert not os.listdir(tmp_path)


def test_small_a_spread_task_that_ends_its_process_is_narrowed_down(folder, tmp_path):
    """To the file that causes it, by halves."""
    from ivideo.data.preparing import pool
    from ivideo.data.preparing.tasks import measure

    sizes = []

    def run(function, tasks):
        for task in tasks:
            bad = function is measure and any("clip 6" in item.name for _, item in task.items)
            sizes.extend([len(task.items)] if bad else [])
            yield task, pool.Ended(1) if bad else function(task)

    spread = lambda function, tasks: function(tasks, run)  # noqa: E731
    out = prepared(folder, tmp_path / "out", spread=spread)
    assert "crashed" in quarantine(out).values() and sizes[0] == 12 and sizes[-1] == 1 and len(sizes) <= 5

"""Mode doctor: what it finds on this machine, and each problem that it can name."""

import importlib.metadata
import json

import jax
import numpy as np
import pytest

from configs import base, cascade
from ivideo import main, stages
from ivideo.devices import sharding
from ivideo.errors import UserError
from ivideo.planning import doctor


def test_small_everything_is_found(capsys, tmp_path):
    found = doctor.doctor(base.get_config("small"), compile_cache=str(tmp_path / "cache"), as_json=True)
    assert json.loads(capsys.readouterr().out) == found
    by_subject = {row["subject"]: row for row in found}
    assert by_subject["jax"] == {"status": "ok", "subject": "jax", "text": jax.__version__}
    assert by_subject["devices"]["text"].startswith(f"{jax.device_count()} × cpu, ")
    assert by_subject["compiled programs"]["text"] == f"are kept in {tmp_path}/cache"
    assert not {row["status"] for row in found} - {"ok", "note"}
    assert not list(tmp_path.iterdir())


def test_table_has_the_cascades_stages_in_order(capsys):
    config = cascade.get_config("small")
    doctor.doctor(config)
    lines = capsys.readouterr().out.splitlines()
    subjects = [line[9:29].strip() for line in lines if "parameters; at least" in line]
    assert subjects == [name for name in config.order for _ in range(2)]


def test_small_sizes_are_those_of_the_state():
    """Parameters, their average, Adam's two moments and gradients: 20 bytes per parameter, and the step's numbers."""
    config = base.get_config("small")
    params = sum(leaf.size for leaf in jax.tree.leaves(stages.param_shapes(config)))
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    assert 0 <= doctor._state_bytes(config, mesh) - 20 * params <= 64
    assert doctor._param_bytes(config, mesh) == 4 * params
    split = doctor._bytes_per_device(
        np.zeros((512, 1024), np.float32), sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
    )
    assert split == 512 * 1024


def test_small_what_is_too_large_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "_device_memory", lambda: 1000)
    texts = [row["text"] for row in doctor.doctor(base.get_config("small")) if row["status"] == "note"]
    assert sum("too large; a smaller variant (:demo)" in text for text in texts) == 2


@pytest.mark.parametrize("key", ["text.checkpoint", "data.dir", "data.image_dir", "data.text_cache", "train.start"])
def test_small_files_that_are_not_there_are_problems(key, tmp_path, capsys):
    config = base.get_config("small")
    config.update_from_flattened_dict({key: str(tmp_path / "none")})
    with pytest.raises(
        UserError, match=rf"1 problem\(s\), the first: base: config.{key} = {tmp_path}/none is not there"
    ):
        doctor.doctor(config)
    assert "PROBLEM" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "file").write_text("")
    doctor.doctor(config)


def test_small_packages_that_do_not_fit_are_problems(monkeypatch):
    versions = {"numpy": "1.26.0", "flax": None}
    version = importlib.metadata.version

    def other(name):
        if name not in versions:
            return version(name)
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    needed = ["numpy>=2.0", "flax<0.14,>=0.12", "jax", "ruff>=99; extra == 'test'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(importlib.metadata, "version", other)
    found = {row[1]: row for row in doctor._installed()}
    assert found["numpy"][::2] == ("PROBLEM", "1.26.0, expected >=2.0: pip install -U ivideo")
    assert found["flax"][::2] == ("PROBLEM", "is not installed: pip install 'flax<0.14,>=0.12'")
    assert found["jax"][::2] == ("ok", jax.__version__) and "ruff" not in found
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: other("flax"))
    assert "not installed: it runs from" in {row[1]: row for row in doctor._installed()}["ivideo"][2]


def test_small_a_cache_that_cannot_be_written_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    status, _, text = doctor._folder("compiled programs", "/proc/none/cache")
    assert status == "PROBLEM" and text.startswith("/proc/none/cache cannot be written (")
    assert doctor._folder("compiled programs", "")[0] == "note"


def test_small_doctor_needs_no_config(command_line, capsys):
    assert main.main(["ivideo", "--mode=doctor", "--compile_cache="]) == 0
    assert "are not kept, so every command compiles again" in capsys.readouterr().out

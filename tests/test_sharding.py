"""Meshes, the layouts of compiled programs, and results that do not depend on them."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from configs import base, tsr1
from ivideo import stages
from ivideo.devices import sharding
from ivideo.errors import UserError
from ivideo.models import blocks
from ivideo.training import step


def mesh_of(**sizes):
    return sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1}, (8, 1, 1, 1, 1)),
        ({"fsdp": -1, "height": 2}, (1, 4, 1, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2, "frames": -1}, (2, 2, 2, 1, 1)),
    ],
)
def test_small_one_axis_takes_the_devices_that_are_left(sizes, shape):
    mesh = sharding.make_mesh(sizes)
    assert mesh.devices.shape == shape
    assert tuple(mesh.shape) == sharding.AXES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"data = 3, .* on 8 devices: the product of the sizes must be 8"),
        ({"data": 3, "fsdp": -1}, r"data = 3, fsdp = -1, .* on 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0, "fsdp": 8}, "expected sizes of 1 or more"),
    ],
)
def test_small_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(sizes)


def spec_of(shape, name="down_0/residual/conv_0/kernel", **sizes):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    tree = leaf
    for part in reversed(name.split("/")):
        tree = {part: tree}
    (found,) = jax.tree.leaves(sharding.param_shardings(mesh_of(**sizes), tree))
    return tuple(found.spec)


def test_small_parameters_are_split_over_fsdp_along_their_largest_dimension():
    assert spec_of((2, 3, 3, 64, 128), fsdp=8) == (None, None, None, None, "fsdp")
    assert spec_of((2, 3, 3, 128, 64), fsdp=8) == (None, None, None, "fsdp", None)
    assert spec_of((2, 3, 3, 128, 128), fsdp=8) == (None, None, None, None, "fsdp")  # of equal ones the last
    assert spec_of((129, 130), fsdp=8) == (None, None)  # nothing divides
    assert spec_of((64, 64), fsdp=8) == (None, None)  # too small to be worth it


def test_small_heads_and_inner_channels_are_split_over_tensor():
    both = {"fsdp": 4, "tensor": 2}
    assert spec_of((2, 3, 3, 64, 128), **both) == (None, None, None, "fsdp", "tensor")
    assert spec_of((2, 3, 3, 64, 128), "up_1/residual/conv_1/kernel", **both) == (None, None, None, "tensor", "fsdp")
    assert spec_of((2, 256, 4, 64), "down_0/spatial_attention/q/kernel", **both) == (None, "fsdp", "tensor", None)
    assert spec_of((2, 4, 64, 256), "down_0/cross_attention/out/kernel", **both) == (None, "tensor", None, "fsdp")
    assert spec_of((2, 256, 3, 64), "down_0/spatial_attention/q/kernel", **both) == (None, "fsdp", None, None)


def test_small_state_of_a_paper_sized_stage_is_fully_sharded():
    """Parameters, their average and both moments: less than 1% of the bytes are on every device."""
    config = tsr1.get_config()
    state = step.state_shapes(config)
    where = sharding.param_shardings(mesh_of(fsdp=8), state)
    size = {"whole": 0, "split": 0}
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        size["whole" if place.is_fully_replicated else "split"] += 4 * math.prod(leaf.shape)
    assert size["split"] > 4 * 4 * 1.69e9
    assert size["whole"] < 0.01 * size["split"]


def test_compiled_step_keeps_the_layouts(monkeypatch):
    """What the compiled program itself says of its arguments and results, and its communication."""
    monkeypatch.setattr(sharding, "MIN_SHARDED", 1)
    config = base.get_config("small")
    mesh = mesh_of(fsdp=2, frames=2, height=2)
    state, batch = step.state_shapes(config), step.batch_shapes(config)
    where, split = sharding.param_shardings(mesh, state), sharding.batch_shardings(mesh, batch)
    update = jax.jit(step.make_train_step(config, mesh), out_shardings=(where, sharding.replicated(mesh)))
    placed = jax.tree.map(
        lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), (state, batch), (where, split)
    )
    compiled = update.lower(*placed).compile()
    (found_state, found_batch), _ = compiled.input_shardings
    made, _ = compiled.output_shardings
    # [layers, 3, 3, channels of the block and its skip, channels]: the larger is split
    kernel = NamedSharding(mesh, PartitionSpec(None, None, None, "fsdp"))
    for tree in (found_state.params, found_state.ema, made.params, made.ema):
        assert tree["up_0"]["residual"]["conv_0"]["kernel"].is_equivalent_to(kernel, 5)
    video = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "frames", "height"))
    assert found_batch["video"].is_equivalent_to(video, 5)
    text = compiled.as_text()
    assert "collective-permute" in text  # rows and frames of the neighbours


GRADIENT_MESHES = [
    {"fsdp": 2, "height": 2},
    {"frames": 2, "height": 2},
    {"fsdp": 4, "frames": 2},
    {"tensor": 2, "height": 4},
]


@pytest.mark.parametrize("sizes", GRADIENT_MESHES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_small_convolution_split_by_rows_has_the_gradient_of_the_whole(sizes, stride):
    """XLA's own partitioning of it sums the kernel's gradient over axes that do not split the convolution."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 16, 6, 3)).astype(np.float32)
    layer = blocks.convolution(5, jnp.float32, None, stride=stride)
    params = layer.init(jax.random.key(0), x)
    mesh = mesh_of(**sizes)

    def loss(params, x, mesh):
        with sharding.layout(mesh):
            y = sharding.constrain(layer.apply(params, sharding.constrain(x, *sharding.VIDEO)), *sharding.VIDEO)
            return jnp.sin(y).sum(), y

    def run(mesh):
        return jax.jit(jax.grad(lambda p, x: loss(p, x, mesh), argnums=(0, 1), has_aux=True))(params, x)

    (grads, y), (wanted, whole) = run(mesh), run(None)
    np.testing.assert_allclose(y, whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, wanted)
    kernel = np.asarray(params["params"]["kernel"])
    plain = lax.conv_general_dilated(
        x.reshape(8, 16, 6, 3), kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(np.asarray(whole).reshape(plain.shape), plain, atol=1e-5)


@pytest.mark.parametrize("sizes", GRADIENT_MESHES, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["products", "convolution"])
def test_small_temporal_convolution_split_by_frames_has_the_gradient_of_the_whole(sizes, which, monkeypatch):
    """Both forms, the accelerators' too."""
    monkeypatch.setattr(blocks.lax, "platform_dependent", lambda *args, cpu, default: (cpu, default)[which](*args))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 4, 6, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 5)).astype(np.float32)

    def run(mesh):
        def loss(kernel, x):
            with sharding.layout(mesh):
                y = blocks.convolve_frames(sharding.constrain(x, *sharding.VIDEO), kernel)
                return jnp.sin(y).sum(), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(kernel, x)

    (grads, y), (wanted, whole) = run(mesh_of(**sizes)), run(None)
    np.testing.assert_allclose(y, whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, wanted)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0))).astype(np.float64)
    np.testing.assert_allclose(whole, sum(padded[:, i : i + 8] @ kernel[i] for i in range(3)), atol=1e-4)


@pytest.mark.parametrize("sizes", [{"frames": 8}, {"frames": 2, "height": 4}, {"tensor": 4, "frames": 2}], ids=str)
def test_sampling_does_not_depend_on_the_mesh(sizes):
    """A super-resolution stage with every layer awake: the same clip on one device and on eight."""
    config = tsr1.get_config("small")
    config.sample.steps = 2
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: (0.1 * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config))
    low = rng.uniform(-1, 1, (1, *[config.cond[k] for k in ("frames", "height", "width")], 3)).astype(np.float32)
    text = rng.normal(size=(1, config.text.length, config.text.dim)).astype(np.float32)
    mask = np.ones((1, config.text.length), bool)

    def run(mesh):
        def sample(params, text, low):
            with sharding.layout(mesh):
                keys = jax.random.split(jax.random.key(0), 1)
                return stages.sample(config, stages.build_model(config), params, text, mask, keys, low_res=low)

        return jax.jit(sample)(params, text, low)

    np.testing.assert_allclose(run(mesh_of(**sizes)), run(None), atol=2e-5)


def mesh_over(processes, **sizes):
    """What is asked of a mesh whose devices, in their order, are of these processes."""
    devices = np.array([types.SimpleNamespace(process_index=p) for p in processes])
    shape = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
    return types.SimpleNamespace(devices=devices.reshape(list(shape.values())), shape=shape)


def test_small_processes_have_the_parts_of_their_devices():
    found = sharding.process_parts(mesh_over([0, 1, 0, 1, 2, 3, 2, 3], fsdp=8))  # as on a torus of 2 × 2 a host
    assert found == (0, ((0, 2), (1, 3), (4, 6), (5, 7)))
    assert sharding.process_parts(mesh_over([1, 1, 0, 0], data=2, fsdp=2)) == (1, ((0, 1), (2, 3)))
    # two processes split every video of theirs, and read the same
    assert sharding.process_parts(mesh_over([0, 1, 0, 1, 2, 3, 2, 3], fsdp=4, height=2)) == (0, ((0, 1), (2, 3)))
    with pytest.raises(UserError, match=r"over 2 processes: each process must hold whole videos of its own"):
        sharding.process_parts(mesh_over([0, 0, 0, 1, 1, 1], fsdp=3, height=2))


def test_small_every_device_gets_its_part_of_a_batch():
    mesh = mesh_of(data=2, fsdp=2, height=2)
    batch = {
        "video": np.arange(4 * 2 * 4 * 2 * 3, dtype=np.float32).reshape(4, 2, 4, 2, 3),
        "mask": np.ones((4, 5), bool),
    }
    assert sharding.process_parts(mesh) == (0, ((0, 1, 2, 3),))
    placed = sharding.to_devices(batch, mesh)
    for name, value in batch.items():
        np.testing.assert_array_equal(sharding.to_host(placed[name]), value)
    parts = {shard.device: shard.data for shard in placed["video"].addressable_shards}
    assert parts[mesh.devices[1, 0, 0, 0, 1]].shape == (1, 2, 2, 2, 3)
    np.testing.assert_array_equal(parts[mesh.devices[1, 0, 0, 0, 1]], batch["video"][2:3, :, 2:])

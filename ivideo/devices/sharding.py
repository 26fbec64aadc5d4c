"""The placement of arrays on devices: the mesh, and the rules that map logical axes to mesh axes.

Only this module names the axes of the mesh:
data, fsdp  the batch is split over both; parameters, their average and the optimizer's state are split over fsdp
tensor      heads of attention and inner channels of residual blocks, and their parameters
frames      a video's frames
height      a frame's rows

A dimension that the number of devices does not divide is not split, so a small network runs under any mesh.
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ivideo.errors import UserError

AXES = ("data", "fsdp", "tensor", "frames", "height")

# Logical axis of an activation: the mesh axes that it is split over.
RULES = {
    "batch": ("data", "fsdp"),
    "frames": ("frames",),
    "height": ("height",),
    # Attention within a frame splits frames over the devices of rows; attention over frames splits columns over the
    # devices of frames
    "whole_frames": ("frames", "height"),
    "columns": ("frames",),
    "heads": ("tensor",),
    "inner": ("tensor",),
}
VIDEO = ("batch", "frames", "height", None, None)  # [B, F, H, W, C]

# Parameters with a dimension that is split over tensor: the end of the name, and the dimension.
TENSOR = (
    (re.compile(r"residual/(conv_0|norm_1/groups)/(kernel|bias|scale)$"), -1),
    (re.compile(r"residual/conv_1/kernel$"), -2),
    (re.compile(r"attention/(q|k|v)/kernel$"), -2),
    (re.compile(r"attention/out/kernel$"), -3),
    # The text encoder's; its heads are one dimension with their channels
    (re.compile(r"layers_\d+/(attention/(query|key|value)|mlp/(wi_0|wi_1))/kernel$"), -1),
    (re.compile(r"layers_\d+/(attention/out|mlp/wo)/kernel$"), -2),
)
MIN_SHARDED = 2**14  # parameters with fewer elements are replicated: gathering them would cost more than it saves

_mesh = contextvars.ContextVar("mesh", default=None)


def make_mesh(sizes: Mapping[str, int] | None = None, devices=None) -> jax.sharding.Mesh:
    """The mesh with these sizes of axes; one size may be -1, for all remaining devices.

    `devices` are the devices to use, by default all. An axis without a size has 1; without `sizes`, all devices are on
    the data axis. UserError where the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": -1} if sizes is None else sizes
    shape = mesh_shape(sizes, len(devices))
    if devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(sizes: Mapping[str, int], count: int) -> tuple[int, ...]:
    """The sizes of all axes for `count` devices. UserError where the sizes do not fit that number."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    text = ", ".join(f"{axis} = {size}" for axis, size in zip(AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh of {text}: expected sizes of 1 or more, and at most one -1, for all other devices")
    fixed = math.prod(size for size in shape if size != -1)
    filled = [count // fixed if size == -1 else size for size in shape]
    if math.prod(filled) != count:
        raise UserError(
            f"mesh of {text} on {count} devices: the product of the sizes must be {count}, or divide it with one -1; "
            "set the config's train.mesh, sample.mesh or text.mesh"
        )
    return tuple(filled)


@contextlib.contextmanager
def layout(mesh):
    """A context in which `constrain` places arrays on this mesh. Enter it inside the function that is traced."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def constrain(x, *axes: str | None):
    """Constrains the sharding of x by the logical axes of its dimensions (`RULES`); outside a `layout`, returns x.

    The input and the output of a layer's matrix product must have the same sharding, each by its own call. The gradient
    of the kernel multiplies the two and sums over samples, frames and rows. If one of them has another sharding, XLA's
    partitioner may omit the sum over some mesh axes: the loss is right and the gradient wrong. This was seen with jax
    0.10.2 and 0.12.0, under Shardy and GSPMD, on data = 2, height = 2. There one side was split by rows and the other
    had frames on the devices of rows, and the sum was over `height` alone (tests/test_gradients.py).
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, logical_sharding(mesh, x.shape, axes))


def with_halo(fn, x, weights, *, axes: Mapping[int, str], halo: tuple[int, int], over: int, unit: int = 1):
    """Calls fn(x, weights, padding) on each device's shard of x, extended by rows or frames of the neighbouring shards.

    `axes` maps the dimensions of x that are split to their logical axes. `over` is the dimension along which fn needs
    `halo` = (before, after) elements of its neighbours. `padding` is how many zeros fn still has to add there, before
    and after: the halo where the dimension is not split; (0, 0) where it is, since the shards then contain their
    neighbours' elements, and zeros at the ends of x. A dimension is split only into multiples of `unit`.

    This is explicit because of the partitioner's gradients: where a convolution is split in space and the mesh has
    other axes as well, its gradients of a kernel are too large by a factor (seen with jax 0.10). See `constrain` for
    matrix products.
    """
    mesh = _mesh.get()
    split = {dimension: RULES[axis][0] for dimension, axis in axes.items()} if mesh is not None else {}

    def divides(dimension, axis):
        count = mesh.shape[axis]
        return count > 1 and x.shape[dimension] % (count * (unit if dimension == over else 1)) == 0

    split = {dimension: axis for dimension, axis in split.items() if divides(dimension, axis)}
    if not split:
        return fn(x, weights, halo)

    def local(x, weights):
        if over not in split:
            return fn(x, weights, halo)
        axis, size = split[over], x.shape[over]
        last, first = (
            jax.lax.slice_in_dim(x, size - halo[0], size, axis=over),
            jax.lax.slice_in_dim(x, 0, halo[1], axis=over),
        )
        steps = range(mesh.shape[axis] - 1)
        # The devices at the ends receive nothing there, and ppermute gives them zeros
        before = jax.lax.ppermute(last, axis, [(i, i + 1) for i in steps]) if halo[0] else last
        after = jax.lax.ppermute(first, axis, [(i + 1, i) for i in steps]) if halo[1] else first
        return fn(jnp.concatenate([before, x, after], axis=over), weights, (0, 0))

    if mesh.shape["tensor"] == 1:
        # Otherwise the partitioner would use the kernel shard by shard, and read the video once for each shard
        weights = gathered(weights)
    spec = PartitionSpec(*(split.get(dimension) for dimension in range(x.ndim)))
    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, axis_names=set(split.values())
    )(x, weights)


def dot_with_gathered_kernel(x, kernel, dimensions, **options):
    """`lax.dot_general` for which every device gathers the kernel.

    It is for layers of one vector per sample, where the partitioner would gather the vectors of the whole batch, since
    they are fewer bytes.
    """
    return jax.lax.dot_general(x, gathered(kernel), dimensions, **options)


def gathered(kernel):
    """A layer's kernel, complete on every device. It is sent after its cast; the partitioner would send it before."""
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return kernel
    shards = NamedSharding(mesh, PartitionSpec(*_param_spec(mesh, "", kernel.shape)))
    return constrain(jax.lax.with_sharding_constraint(kernel, shards))


def logical_sharding(mesh, shape: tuple[int, ...], axes) -> NamedSharding:
    """The sharding of an array of this shape, by the logical axes of its dimensions; None is not split."""
    spec = []
    for size, axis in zip(shape, axes, strict=False):
        over = RULES[axis] if axis else ()
        while over and size % math.prod(mesh.shape[name] for name in over):
            over = over[:-1]
        spec.append(over or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh) -> NamedSharding:
    """The sharding of arrays that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh, shapes):
    """Shardings of a tree of parameters, or of any state with such trees in it (averages, an optimizer's moments).

    A dimension that `TENSOR` names is split over tensor. Of the others, the largest divisible one is split over fsdp.
    """

    def sharding(path, leaf):
        name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        return NamedSharding(mesh, PartitionSpec(*_param_spec(mesh, name, leaf.shape)))

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def _param_spec(mesh, name, shape):
    spec = [None] * len(shape)
    if math.prod(shape) < MIN_SHARDED:
        return spec
    for pattern, dimension in TENSOR if mesh.shape["tensor"] > 1 else ():
        # An optimizer's factored moments have the parameter's name but fewer dimensions
        if pattern.search(name) and len(shape) >= -dimension and shape[dimension] % mesh.shape["tensor"] == 0:
            spec[dimension] = "tensor"
    free = [i for i, taken in enumerate(spec) if taken is None and shape[i] % mesh.shape["fsdp"] == 0]
    if free and mesh.shape["fsdp"] > 1:
        # Of equal dimensions, the last one: a layer's output
        spec[max(free, key=lambda i: (shape[i], i))] = "fsdp"
    return spec


def batch_shardings(mesh, shapes):
    """Shardings of a tree of batched arrays: videos [B, T, H, W, C] by all their axes, others [B, ...] by the batch."""

    def sharding(leaf):
        return logical_sharding(mesh, leaf.shape, VIDEO if len(leaf.shape) == 5 else VIDEO[:1])

    return jax.tree.map(sharding, shapes)


def batch_parts(mesh) -> int:
    """The number of parts that the mesh splits a batch into."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def process_parts(mesh) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """(the index of this process's reader, the parts of each reader). A batch has `batch_parts` equal parts.

    A reader is a process, or the processes that hold shards of the same videos; each of them reads all of the reader's
    parts. A pod's mesh follows the network between chips, so a host's parts need not be consecutive. UserError where
    two processes share some parts but not all.
    """
    rows = np.arange(batch_parts(mesh)).reshape([mesh.shape[axis] for axis in RULES["batch"]] + [1, 1, 1])
    rows = np.broadcast_to(rows, mesh.devices.shape)
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    parts = {p: tuple(sorted(set(rows[processes == p].tolist()))) for p in set(processes.ravel().tolist())}
    readers = tuple(sorted(set(parts.values())))
    if sum(map(len, readers)) != batch_parts(mesh) or len(set(map(len, readers))) > 1:
        raise UserError(
            f"mesh of {dict(mesh.shape)} over {len(parts)} processes: each process must hold whole videos of its own, "
            "or share all of them; make data × fsdp a multiple of the processes, or divide them"
        )
    return readers.index(parts[jax.process_index()]), readers


def to_devices(batch, mesh):
    """Makes global arrays on the mesh from numpy arrays, this process's parts of a batch (`process_parts`)."""
    index, readers = process_parts(mesh)
    mine, count = readers[index], batch_parts(mesh)

    def place(x):
        shape = (len(readers) * len(x), *x.shape[1:])
        rows = np.arange(shape[0])
        if len(readers) > 1:
            rows = rows.reshape(count, -1)[list(mine)].ravel()

        def part(indices):
            start, stop, _ = indices[0].indices(shape[0])
            first = np.searchsorted(rows, start)
            return x[(slice(first, first + stop - start), *indices[1:])]

        sharding = batch_shardings(mesh, jax.ShapeDtypeStruct(shape, x.dtype))
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)


def from_host(tree, shardings):
    """Makes global arrays with these shardings from arrays that every process holds completely."""

    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda indices: x[indices])

    return jax.tree.map(place, tree, shardings)


def input_sharding(mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a sampler's inputs: clips [B, T, H, W, C] by batch and frames, others by the batch."""
    return logical_sharding(mesh, shape, VIDEO[:2] if len(shape) == 5 else VIDEO[:1])


def inputs_to_mesh(tree, mesh):
    """As `from_host`, with the sharding of a sampler's inputs (`input_sharding`)."""
    return jax.tree.map(lambda x: from_host(x, input_sharding(mesh, np.shape(x))), tree)


def to_host(x) -> np.ndarray:
    """A global array as a complete numpy array, in every process."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def rows_of_all_processes(rows: np.ndarray) -> np.ndarray:
    """The rows [n, …] of all processes, in the order of the processes; all have as many. Exact in every dtype."""
    if jax.process_count() == 1:
        return rows
    from jax.experimental import multihost_utils

    # As bytes, since jax would round float64 to float32
    packed = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    found = np.ascontiguousarray(multihost_utils.process_allgather(packed, tiled=True))
    return found.view(rows.dtype).reshape(len(found), *rows.shape[1:])

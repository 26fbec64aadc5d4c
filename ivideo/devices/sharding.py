"""Where arrays live on the devices: the mesh, and the rules from logical axes to it. It alone names the mesh's axes.

data, fsdp  the batch is split over both; parameters, their average and the optimizer's state are split over fsdp
tensor      heads of attention and inner channels of residual blocks, and their parameters
frames      a video's frames
height      a frame's rows

A dimension that its devices do not divide is left whole, so a small network runs under any mesh.
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
    # Attention over a whole frame takes its rows' devices for more frames; over all frames, its frames' for columns
    "whole_frames": ("frames", "height"),
    "columns": ("frames",),
    "heads": ("tensor",),
    "inner": ("tensor",),
}
VIDEO = ("batch", "frames", "height", None, None)  # [B, F, H, W, C]

# Parameters of which a dimension is split over tensor, by the end of their names.
TENSOR = (
    (re.compile(r"residual/(conv_0|norm_1/groups)/(kernel|bias|scale)$"), -1),
    (re.compile(r"residual/conv_1/kernel$"), -2),
    (re.compile(r"attention/(q|k|v)/kernel$"), -2),
    (re.compile(r"attention/out/kernel$"), -3),
    # The text encoder's, whose heads are joined
    (re.compile(r"layers_\d+/(attention/(query|key|value)|mlp/(wi_0|wi_1))/kernel$"), -1),
    (re.compile(r"layers_\d+/(attention/out|mlp/wo)/kernel$"), -2),
)
MIN_SHARDED = 2**14  # parameters of fewer elements are on every device: to gather them would cost more than it saves

_mesh = contextvars.ContextVar("mesh", default=None)


def make_mesh(sizes: Mapping[str, int] | None = None, devices=None) -> jax.sharding.Mesh:
    """The mesh of the sizes by axis, of which one may be -1 for all the devices that are left.

    `devices`: those to use, all unless given. An axis without a size has 1; without sizes all devices are data.
    UserError where the sizes' product is not the number of devices.
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
    """The sizes of all axes for `count` devices; UserError where they cannot be."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    text = ", ".join(f"{axis} = {size}" for axis, size in zip(AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh of {text}: expected sizes of 1 or more, and at most one of -1 for what is left")
    given = math.prod(size for size in shape if size != -1)
    filled = [count // given if size == -1 else size for size in shape]
    if math.prod(filled) != count:
        raise UserError(
            f"mesh of {text} on {count} devices: the sizes' product must be {count}, or divide it where one is -1; "
            "set the config's train.mesh, sample.mesh or text.mesh"
        )
    return tuple(filled)


@contextlib.contextmanager
def layout(mesh):
    """Within it, `constrain` lays arrays out on this mesh. To be entered inside of the function that is traced."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def constrain(x, *axes: str | None):
    """Lays x out by its dimensions' logical axes (`RULES`), in a `layout`; elsewhere returns it as it is.

    What goes into a layer's matrix product and what comes out of it are laid out alike, each by its own call. The
    gradient of the kernel multiplies the two and sums over samples, frames and rows. Where one of the two is left in
    another layout, XLA's partitioner may leave out the sum over some mesh axes, and the gradient is wrong while the
    loss is right. Seen with jax 0.10.2 and 0.12.0, under Shardy and GSPMD, on data = 2, height = 2: rows on one side,
    frames over the rows' devices on the other, and the sum was over `height` alone (tests/test_gradients.py).
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, logical_sharding(mesh, x.shape, axes))


def with_halo(fn, x, weights, *, axes: Mapping[int, str], halo: tuple[int, int], over: int, unit: int = 1):
    """fn(x, weights, padding) on every device's own part of x, with the rows or frames that it needs of its neighbours.

    `axes`: dimensions of x that are split, with their logical axes; `over` is the one along which `halo` counts the
    neighbours' elements, before and after. `padding` is what fn has still to put there of zeros: the halo where the
    dimension is whole, and nothing where it is split, whose parts come with their neighbours' elements, zeros at the
    ends. A dimension that its devices do not divide, into multiples of `unit`, is whole.

    Written out rather than left to the partitioner, whose gradients of a kernel are too large by a factor where a
    convolution is split in space and the mesh has other axes besides (seen with jax 0.10). See `constrain` for
    what it does to matrix products.
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
        # Those at the ends, whom nobody sends anything, have zeros
        before = jax.lax.ppermute(last, axis, [(i, i + 1) for i in steps]) if halo[0] else last
        after = jax.lax.ppermute(first, axis, [(i + 1, i) for i in steps]) if halo[1] else first
        return fn(jnp.concatenate([before, x, after], axis=over), weights, (0, 0))

    if mesh.shape["tensor"] == 1:
        # The partitioner would take a kernel from its devices part by part and read the video once for each
        weights = gathered(weights)
    spec = PartitionSpec(*(split.get(dimension) for dimension in range(x.ndim)))
    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, axis_names=set(split.values())
    )(x, weights)


def dot_with_gathered_kernel(x, kernel, dimensions, **options):
    """`lax.dot_general` for which every device gathers the kernel.

    For layers of one vector a sample: the partitioner would gather the whole batch's vectors, as fewer bytes.
    """
    return jax.lax.dot_general(x, gathered(kernel), dimensions, **options)


def gathered(kernel):
    """A layer's kernel, whole on every device, sent in its own type: the partitioner would send it as before a cast."""
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return kernel
    parts = NamedSharding(mesh, PartitionSpec(*_param_spec(mesh, "", kernel.shape)))
    return constrain(jax.lax.with_sharding_constraint(kernel, parts))


def logical_sharding(mesh, shape: tuple[int, ...], axes) -> NamedSharding:
    """The sharding of an array of this shape whose dimensions have these logical axes; missing ones are whole."""
    spec = []
    for size, axis in zip(shape, axes, strict=False):
        over = RULES[axis] if axis else ()
        while over and size % math.prod(mesh.shape[name] for name in over):
            over = over[:-1]
        spec.append(over or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh, shapes):
    """Shardings of a tree of parameters, or of any state made of such trees (averages, an optimizer's moments).

    Where `TENSOR` names a dimension it is split over tensor; of the others the largest that can be is split over fsdp.
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
        # An optimizer's factored moments have a parameter's name but fewer dimensions
        if pattern.search(name) and len(shape) >= -dimension and shape[dimension] % mesh.shape["tensor"] == 0:
            spec[dimension] = "tensor"
    free = [i for i, taken in enumerate(spec) if taken is None and shape[i] % mesh.shape["fsdp"] == 0]
    if free and mesh.shape["fsdp"] > 1:
        # Of equal dimensions the last: a layer's output
        spec[max(free, key=lambda i: (shape[i], i))] = "fsdp"
    return spec


def batch_shardings(mesh, shapes):
    """Shardings of a tree of arrays [B, ...] that are split by the batch alone; of videos [B, T, H, W, C] by all."""

    def sharding(leaf):
        return logical_sharding(mesh, leaf.shape, VIDEO if len(leaf.shape) == 5 else VIDEO[:1])

    return jax.tree.map(sharding, shapes)


def batch_parts(mesh) -> int:
    """How many parts of a batch are on devices of their own."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def process_parts(mesh) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Which of a batch's equal parts (`batch_parts`) each reader of data has, and which reader this process is.

    A pod's mesh follows the chips' network, so that a host's parts need not be in a row. Processes that split a video
    are one reader: each reads all of its parts. UserError where processes share some parts and not others.
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
    """This process's parts of a batch (`process_parts`), a tree of numpy arrays, as global arrays on the mesh."""
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
    """Arrays that every process has whole, as global arrays of these shardings."""

    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda indices: x[indices])

    return jax.tree.map(place, tree, shardings)


def input_sharding(mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of what a sampler is given: clips [B, T, H, W, C] by batch and frames, all else by the batch."""
    return logical_sharding(mesh, shape, VIDEO[:2] if len(shape) == 5 else VIDEO[:1])


def inputs_to_mesh(tree, mesh):
    """As `from_host`, laid out as a sampler's inputs (`input_sharding`)."""
    return jax.tree.map(lambda x: from_host(x, input_sharding(mesh, np.shape(x))), tree)


def to_host(x) -> np.ndarray:
    """A global array whole, as numpy, in every process."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)

"""Where arrays live on the devices. The only file that names mesh axes."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def make_mesh(devices=None):
    """A mesh over which a batch is split: all devices, or those given."""
    devices = jax.devices() if devices is None else devices
    return jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh):
    """The sharding of what every device holds whole: parameters, and all of the training state."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh):
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def to_devices(batch, mesh):
    """This process's part of a batch, a tree of numpy arrays, as global arrays split over the mesh."""
    sharding = split_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

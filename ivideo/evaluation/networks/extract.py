"""Runs a network over many clips or frames, batch by batch, on one device or on all."""

import itertools
from collections.abc import Callable, Iterable

import jax
import numpy as np

from ivideo.devices import sharding
from ivideo.errors import UserError


def extract(
    features: Callable, params, inputs: Iterable[np.ndarray], *, batch: int, mesh: jax.sharding.Mesh | None = None
) -> np.ndarray:
    """The features [N, D], float32, of N inputs of one shape.

    `features` maps (params, inputs [B, …]) to [B, D]. `batch` inputs are in memory at a time; the last batch is filled
    up, so the network is compiled once. The batch is split over the devices of `mesh`, which all hold the parameters,
    and is enlarged to a multiple of their number. UserError where an input has another shape than the first one, or
    where there is none.
    """
    if mesh is not None:
        parts = sharding.batch_parts(mesh)
        batch = -(-batch // parts) * parts
        params = sharding.from_host(params, jax.tree.map(lambda _: sharding.replicated(mesh), params))
    remaining, found, count, shape = iter(inputs), [], 0, None
    while chunk := list(itertools.islice(remaining, batch)):
        shape = shape or chunk[0].shape
        for n, value in enumerate(chunk, count + 1):
            if value.shape != shape:
                raise UserError(
                    f"input {n} has shape {value.shape}, and the first has {shape}: give inputs of one size and number "
                    "of frames"
                )
        filled = np.stack([*chunk, *[chunk[-1]] * (batch - len(chunk))])
        if mesh is not None:
            filled = sharding.from_host(filled, sharding.logical_sharding(mesh, filled.shape, ("batch",)))
        found.append(sharding.to_host(features(params, filled))[: len(chunk)])
        count += len(chunk)
    if not found:
        raise UserError("there are no clips to measure: give one or more")
    return np.concatenate(found)

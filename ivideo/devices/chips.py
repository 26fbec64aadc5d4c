"""Peak rates and memory of TPU chips, for utilisation and rooflines, and the slices that Google offers."""

import dataclasses
import math
import re

from ivideo.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Google's published figures: peak FLOP/s in bfloat16, HBM bandwidth in bytes per second, HBM bytes.

    Google writes GB for memory and means GiB: programs get 31.25 GiB of a v6e's 32. `devices` is the number of jax
    devices per chip, each with an equal share of it. `dimensions` is that of the network between chips, and `largest`
    the number of chips of the largest slice.
    """

    flops: float
    bandwidth: float
    memory: int
    devices: int = 1
    dimensions: int = 3
    largest: int = 0

    def device(self) -> "Chip":
        """One jax device's share of the chip."""
        n = self.devices
        return dataclasses.replace(
            self, flops=self.flops / n, bandwidth=self.bandwidth / n, memory=self.memory // n, devices=1
        )


CHIPS = {
    "v4": Chip(275e12, 1.2e12, 32 * 2**30, largest=4096),
    "v5e": Chip(197e12, 0.82e12, 16 * 2**30, dimensions=2, largest=256),
    "v5p": Chip(459e12, 2.77e12, 95 * 2**30, largest=6144),
    "v6e": Chip(918e12, 1.64e12, 32 * 2**30, dimensions=2, largest=256),
    "tpu7x": Chip(2307e12, 7.37e12, 192 * 2**30, devices=2, largest=9216),
}
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
# The slices that Google offers (https://docs.cloud.google.com/tpu/docs/, pages v4, v5e, v5p, v6e and tpu7x). Chips in
# three dimensions also come in all grids whose sizes are multiples of 4, in ascending order
GRIDS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL_GRIDS_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


def of_device(device) -> Chip | None:
    """A jax device's share of its chip, or None for a device whose peaks are not listed here."""
    chip = CHIPS.get(KINDS.get(device.device_kind, ""))
    return chip and chip.device()


def slice_of(topology: str) -> tuple[str, tuple[int, ...]]:
    """The chip and the grid of a slice's name such as v5p:4x4x4; UserError where Google offers no such slice."""
    name, _, grid = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", grid, re.ASCII):
        raise UserError(
            f"--topology={topology!r}: expected a chip of {', '.join(CHIPS)} and its grid, such as v5e:4x4 or v5p:4x4x4"
        )
    chip, sizes = CHIPS[name], tuple(map(int, grid.split("x")))
    if not _offered(name, sizes):
        raise UserError(f"--topology={topology}: {_why_not(name, chip, sizes)}")
    return name, sizes


def _offered(name: str, sizes: tuple[int, ...]) -> bool:
    chip, grid = CHIPS[name], "x".join(map(str, sizes))
    if chip.dimensions == 2 or len(sizes) != 3:
        return chip.dimensions == 2 and grid in GRIDS_2D
    cubes = all(size % 4 == 0 for size in sizes) and list(sizes) == sorted(sizes) and math.prod(sizes) <= chip.largest
    return cubes or grid in SMALL_GRIDS_3D or (name == "tpu7x" and grid == "1x1x1")


def _why_not(name: str, chip: Chip, sizes: tuple[int, ...]) -> str:
    if len(sizes) != chip.dimensions:
        why = f"the chips of {name} are connected in {chip.dimensions} dimensions"
    else:
        why = f"Google offers no such slice of {name}"
    if chip.dimensions == 2:
        return f"{why}; choose one of {', '.join(f'{name}:{grid}' for grid in GRIDS_2D)}"
    ordered = tuple(sorted(sizes))
    if ordered != sizes and _offered(name, ordered):
        return f"{why}; give the sizes in ascending order: {name}:{'x'.join(map(str, ordered))}"
    return (
        f"{why}; choose one of {', '.join(f'{name}:{grid}' for grid in SMALL_GRIDS_3D)}, or multiples of 4 in "
        f"ascending order, up to {chip.largest:,} chips, such as {name}:4x4x8"
    )

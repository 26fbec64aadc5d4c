"""What TPU chips can do, for utilisation and for the roofline of a compiled program, and which slices of them exist."""

import dataclasses
import math
import re

from ivideo.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak FLOP/s in bfloat16, bytes a second of HBM, and its bytes; Google's published figures.

    Memory is published in GB and means GiB: the compiler offers programs 31.25 GiB of a v6e's 32. `devices` is how many
    jax devices a chip is: each has an equal part of the chip. `dimensions` are those of the network between chips, and
    `largest` is the number of chips of the largest slice.
    """

    flops: float
    bandwidth: float
    memory: int
    devices: int = 1
    dimensions: int = 3
    largest: int = 0

    def device(self) -> "Chip":
        """What one jax device has of the chip."""
        if self.devices == 1:
            return self
        parts = self.devices
        return dataclasses.replace(
            self, flops=self.flops / parts, bandwidth=self.bandwidth / parts, memory=self.memory // parts, devices=1
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
# The slices that Google offers, from https://docs.cloud.google.com/tpu/docs/ and there v4, v5e, v5p, v6e and tpu7x. Of
# chips in three dimensions all multiples of 4 are offered besides, the smaller sizes first
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


def of_device(device) -> Chip | None:
    """What a jax device has of its chip, or None where its peaks are not known here."""
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
        return chip.dimensions == 2 and grid in FLAT
    cubes = all(size % 4 == 0 for size in sizes) and list(sizes) == sorted(sizes) and math.prod(sizes) <= chip.largest
    return cubes or grid in BELOW_A_CUBE or (name == "tpu7x" and grid == "1x1x1")


def _why_not(name: str, chip: Chip, sizes: tuple[int, ...]) -> str:
    if len(sizes) != chip.dimensions:
        why = f"the chips of {name} are connected in {chip.dimensions} dimensions"
    else:
        why = f"Google offers no such slice of {name}"
    if chip.dimensions == 2:
        return f"{why}; choose one of {', '.join(f'{name}:{grid}' for grid in FLAT)}"
    ordered = tuple(sorted(sizes))
    if ordered != sizes and _offered(name, ordered):
        return f"{why}; the smaller sizes come first: {name}:{'x'.join(map(str, ordered))}"
    return (
        f"{why}; choose one of {', '.join(f'{name}:{grid}' for grid in BELOW_A_CUBE)}, or multiples of 4, the smaller "
        f"sizes first and up to {chip.largest:,} chips, such as {name}:4x4x8"
    )

"""What TPU chips can do, a chip: for utilisation, and for the roofline of a compiled program."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak FLOP/s in bfloat16, bytes a second of HBM, and its bytes; Google's published figures.

    Memory is published in GB and means GiB: the compiler offers programs 31.25 GiB of a v6e's 32.
    """

    flops: float
    bandwidth: float
    memory: int


CHIPS = {
    "v4": Chip(275e12, 1.2e12, 32 * 2**30),
    "v5e": Chip(197e12, 0.82e12, 16 * 2**30),
    "v5p": Chip(459e12, 2.77e12, 95 * 2**30),
    "v6e": Chip(918e12, 1.64e12, 32 * 2**30),
}
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
}
KINDS["TPU v6e"] = "v6e"


def of_device(device) -> Chip | None:
    """The chip that a jax device is, or None where its peaks are not known here."""
    return CHIPS.get(KINDS.get(device.device_kind, ""))

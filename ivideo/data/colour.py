"""Converts HDR and wide-gamut colours to BT.709, in numpy: ITU-R BT.2100, BT.2390, BT.2408 and BT.1886.

Matrices, primaries and transfers have the numbers of ITU-T H.273, which FFmpeg and PyAV use. The input is an array;
this module needs no PyAV.
"""

import functools

import numpy as np

PQ, HLG = 16, 18  # transfers
BT709, BT601, BT2020 = 1, 6, 9  # matrices; 1 and 9 are primaries as well
UNSPECIFIED = 2

# Luminances in cd/m²: the one that SDR shows as white (BT.2408, HDR reference white), and the brightest one that is
# kept, which is the nominal peak of HLG (BT.2100) and of the displays that most PQ video is graded on.
WHITE, PEAK = 203.0, 1000.0

# Chromaticities xy of red, green and blue. All use the white point D65, also DCI-P3 (11).
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
_PRIMARIES = {
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: _P3,
    12: _P3,
}
_D65 = (0.3127, 0.3290)


def needs_conversion(transfer: int, primaries: int) -> bool:
    """Whether the RGB values mean other colours than in BT.709. BT.601's primaries are close enough to need nothing."""
    return transfer in (PQ, HLG) or (primaries in _PRIMARIES and primaries != BT709)


def to_bt709(rgb: np.ndarray, *, transfer: int, primaries: int) -> np.ndarray:
    """Converts full-range RGB, uint16 [H,W,3], to BT.709 RGB, uint8 [H,W,3].

    PQ and HLG are decoded to light of up to `PEAK` cd/m² (BT.2100) and tone mapped to `WHITE` (BT.2390, Section 5.4.1,
    by the largest channel, which keeps the hue). Other transfers are decoded as in BT.1886, with a power of 2.4.
    Colours outside BT.709 are clipped. Unspecified primaries are BT.2020's for PQ and HLG, and BT.709's otherwise.
    """
    if primaries not in _PRIMARIES:
        primaries = BT2020 if transfer in (PQ, HLG) else BT709
    # A few rows at a time, since a 4K frame as floats takes 100 MB, and there are several such arrays
    strips = [_strip_to_bt709(rgb[top : top + 128], transfer, primaries) for top in range(0, len(rgb), 128)]
    return np.concatenate(strips)


def _strip_to_bt709(rgb: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    light = _light_table(transfer)[rgb]
    if transfer == HLG:
        # The display's system gamma of 1.2 applies to luminance (BT.2100, Table 5)
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= np.power(luminance, np.float32(0.2))[..., None] * np.float32(PEAK / WHITE)
    light = np.maximum(light @ _to_bt709_primaries(primaries).T, 0)
    if transfer in (PQ, HLG):
        brightest = light.max(axis=-1)
        levels, gains = _tone_curve()
        light *= np.interp(brightest, levels, gains).astype(np.float32)[..., None]
    return np.rint(255 * np.power(np.minimum(light, 1), np.float32(1 / 2.4))).astype(np.uint8)


@functools.cache
def _light_table(transfer: int) -> np.ndarray:
    """Light for each uint16 level: for HLG scene light in [0, 1], otherwise display light in units of `WHITE`."""
    signal = np.arange(65536) / 65535
    if transfer == PQ:
        light = np.minimum(_pq_to_light(signal), PEAK) / WHITE
    elif transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = signal**2.4
    return light.astype(np.float32)


def _pq_to_light(signal: np.ndarray) -> np.ndarray:
    """The luminance in cd/m² of a PQ signal in [0, 1] (BT.2100, Table 4)."""
    root = np.power(signal, 1 / 78.84375)
    return 10000 * np.power(np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root), 1 / 0.1593017578125)


def _light_to_pq(light: np.ndarray) -> np.ndarray:
    power = np.power(np.asarray(light) / 10000, 0.1593017578125)
    return np.power((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power), 78.84375)


@functools.cache
def _tone_curve() -> tuple[np.ndarray, np.ndarray]:
    """BT.2390's curve from `PEAK` to `WHITE`, as (brightness in units of `WHITE`, gain)."""
    levels = np.linspace(0, 1, 1025)[1:] ** 3 * PEAK
    peak = _light_to_pq(PEAK)
    signal, highest = _light_to_pq(levels) / peak, _light_to_pq(WHITE) / peak
    knee = 1.5 * highest - 0.5
    t = np.maximum(signal - knee, 0) / (1 - knee)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * highest
    mapped = np.where(signal < knee, levels, _pq_to_light(curve * peak))
    return levels / WHITE, mapped / levels


@functools.cache
def _to_bt709_primaries(primaries: int) -> np.ndarray:
    """The matrix [3,3] from linear RGB of these primaries to that of BT.709."""
    return np.linalg.solve(_to_xyz(BT709), _to_xyz(primaries)).astype(np.float32)


def _to_xyz(primaries: int) -> np.ndarray:
    def xyz(x, y):
        return np.array([x / y, 1, (1 - x - y) / y])

    columns = np.stack([xyz(*xy) for xy in _PRIMARIES[primaries]], axis=1)
    return columns * np.linalg.solve(columns, xyz(*_D65))

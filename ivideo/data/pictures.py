"""Converts decoded frames to the pictures that players show: BT.709 RGB, upright, with square pixels."""

from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation

from ivideo.data import colour
from ivideo.errors import UserError

# Matrices that FFmpeg's scaler supports, by their number in ITU-T H.273. It silently decodes others as BT.601
_MATRICES = {0, 1, 4, 5, 6, 7, 9}
# Linear, two logarithmic ones and digital cinema's: players do not show such frames without a conversion
_TRANSFERS_REFUSED = {8, 9, 10, 17}
_FULL_RANGE = 2
_CONVERT = "convert it: ffmpeg -i IN -vf libplacebo=colorspace=bt709:color_primaries=bt709:color_trc=bt709 OUT.mp4"
_LARGEST = 16384  # pixels per side


class VideoError(UserError):
    """A file that cannot be read as the requested video: corrupt, empty, too short, or not a video."""


class Extras(NamedTuple):
    """A frame's side data: (a, b, c, d) of its display matrix, if it has one, and whether it is Dolby Vision.

    It is read from a file's first frame alone: PyAV keeps a frame whose side data was read in memory until the next
    garbage collection.
    """

    matrix: tuple[int, int, int, int] | None
    dolby: bool

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Extras":
        """Reads the side data of a decoded frame."""
        data = frame.side_data.get("DISPLAYMATRIX")
        matrix = None if data is None else tuple(np.frombuffer(data, np.int32)[[0, 1, 3, 4]].tolist())
        return cls(matrix, any(frame.side_data.get(kind) is not None for kind in ("DOVI_METADATA", "DOVI_RPU_BUFFER")))


def picture(frame: av.VideoFrame, stream: av.VideoStream, extras: Extras, name: str) -> np.ndarray:
    """Converts a decoded frame of the file `name` to a picture, uint8 [H,W,3].

    The colour matrix is the file's own. Without one, as in players, it is BT.709 for frames wider than 1279 or taller
    than 576 pixels, and BT.601 for smaller ones. The range is limited unless the file states full range. PQ, HLG and
    wide gamuts are converted to BT.709 (`colour.to_bt709`); transparent pixels become black. Frames with non-square
    pixels are stretched along one side, then the display matrix is applied. VideoError for unsupported colours.
    """
    how = _shown_size(frame, stream, name)
    transfer, primaries = stream.codec_context.color_trc, stream.codec_context.color_primaries
    if not (frame.format.is_rgb or frame.format.has_palette):
        how |= _yuv(frame, transfer, extras, name)
    if transfer in _TRANSFERS_REFUSED:
        raise VideoError(f"{name} has transfer {transfer} (linear, log or cinema), expected SDR, PQ or HLG: {_CONVERT}")
    if colour.needs_conversion(transfer, primaries):
        rgb = colour.to_bt709(frame.to_ndarray(format="rgb48le", **how), transfer=transfer, primaries=primaries)
    elif any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", **how).astype(np.uint16)
        rgb = ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24", **how)
    return upright(rgb, extras.matrix)


def resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resizes an image [h,w,3] to the height and width of a shape [H,W,3]."""
    if image.shape == shape:
        return image
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return frame.to_ndarray(format="rgb24", width=shape[1], height=shape[0], interpolation=Interpolation.BICUBIC)


def _yuv(frame: av.VideoFrame, transfer: int, extras: Extras, name: str) -> dict:
    """The scaler's arguments for a YUV frame."""
    matrix = frame.colorspace
    if extras.dolby and transfer == colour.UNSPECIFIED:
        raise VideoError(f"{name} is Dolby Vision without a layer for other players, expected one: {_CONVERT}")
    if matrix == colour.UNSPECIFIED:
        large = frame.width >= 1280 or frame.height > 576
        matrix = colour.BT2020 if transfer in (colour.PQ, colour.HLG) else colour.BT709 if large else colour.BT601
    if matrix not in _MATRICES:
        raise VideoError(f"{name} has colour matrix {matrix} of ITU-T H.273, expected BT.709, 601 or 2020: {_CONVERT}")
    how = dict(src_colorspace=5 if matrix == colour.BT601 else matrix)  # the scaler has one number for both BT.601s
    if frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj"):
        how["src_color_range"] = _FULL_RANGE
    return how


def _shown_size(frame: av.VideoFrame, stream: av.VideoStream, name: str) -> dict:
    ratio = Fraction(stream.sample_aspect_ratio or 1)
    if ratio == 1:
        return {}
    wide, tall = max(ratio, 1), max(1 / ratio, 1)
    width, height = round(frame.width * wide), round(frame.height * tall)
    if max(width, height) > _LARGEST:
        raise VideoError(
            f"{name} has pixels of {ratio.numerator}:{ratio.denominator}, expected about 1:1: re-encode it."
        )
    return dict(width=width, height=height, interpolation=Interpolation.BICUBIC)


def upright(image: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """Rotates and mirrors an image by its display matrix, to the nearest right angle.

    The matrix shows pixel (x, y) at (a x + c y, b x + d y), up to a shift (ISO/IEC 14496-12, 6.2.2).
    """
    if matrix is not None:
        a, b, c, d = matrix
        if abs(b) + abs(c) > abs(a) + abs(d):
            image, a, d = image.transpose(1, 0, 2), c, b
        image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(image)

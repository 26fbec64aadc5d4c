"""Decoded frames as the pictures that players show: BT.709 RGB, upright, with square pixels."""

from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation

from ivideo.data import colour
from ivideo.errors import UserError

# Matrices that FFmpeg's scaler knows, by their number in ITU-T H.273; it decodes any other one as BT.601, silently.
_MATRICES = {0, 1, 4, 5, 6, 7, 9}
# Linear, logarithmic (two) and digital cinema's: frames that no player shows as they are.
_TRANSFERS_REFUSED = {8, 9, 10, 17}
_FULL_RANGE = 2
_CONVERT = "convert it: ffmpeg -i IN -vf libplacebo=colorspace=bt709:color_primaries=bt709:color_trc=bt709 OUT.mp4"
_LARGEST = 16384  # pixels a side


class VideoError(UserError):
    """A file that cannot be read as the video asked for: corrupt, empty, too short, or no video at all."""


class Extras(NamedTuple):
    """What a frame came with: (a, b, c, d) of its display matrix, if it has one, and whether it is Dolby Vision's.

    A file's first frame tells it for all of them: PyAV keeps a frame whose side data was looked at until the garbage
    collector comes by.
    """

    matrix: tuple[int, int, int, int] | None
    dolby: bool

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Extras":
        """Those of a decoded frame."""
        data = frame.side_data.get("DISPLAYMATRIX")
        matrix = None if data is None else tuple(np.frombuffer(data, np.int32)[[0, 1, 3, 4]].tolist())
        return cls(matrix, any(frame.side_data.get(kind) is not None for kind in ("DOVI_METADATA", "DOVI_RPU_BUFFER")))


def picture(frame: av.VideoFrame, stream: av.VideoStream, extras: Extras, name: str) -> np.ndarray:
    """A decoded frame of a stream of the file called `name`, uint8 [H,W,3].

    The matrix is the one that the file states; where it states none, as players do, BT.709 for frames wider than 1279
    or taller than 576 pixels, BT.601 for smaller ones. Range is limited unless stated. PQ, HLG and wide gamuts become
    BT.709 (`colour.to_bt709`), transparent pixels black. Pixels that are not square are stretched along one side, then
    the display matrix is applied. VideoError on colour that cannot be converted.
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
    return _upright(rgb, extras.matrix)


def resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An image [h,w,3] at the height and width of a shape [H,W,3]."""
    if image.shape == shape:
        return image
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return frame.to_ndarray(format="rgb24", width=shape[1], height=shape[0], interpolation=Interpolation.BICUBIC)


def _yuv(frame: av.VideoFrame, transfer: int, extras: Extras, name: str) -> dict:
    """What the scaler is told of a frame's YUV."""
    matrix = frame.colorspace
    if extras.dolby and transfer == colour.UNSPECIFIED:
        raise VideoError(f"{name} is Dolby Vision without a layer that other players show: {_CONVERT}")
    if matrix == colour.UNSPECIFIED:
        large = frame.width >= 1280 or frame.height > 576
        matrix = colour.BT2020 if transfer in (colour.PQ, colour.HLG) else colour.BT709 if large else colour.BT601
    if matrix not in _MATRICES:
        raise VideoError(f"{name} has colour matrix {matrix} of ITU-T H.273, expected BT.709, 601 or 2020: {_CONVERT}")
    how = dict(src_colorspace=5 if matrix == colour.BT601 else matrix)  # the scaler's number for both of BT.601
    if frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj"):
        how["src_color_range"] = _FULL_RANGE
    return how


def _shown_size(frame: av.VideoFrame, stream: av.VideoStream, name: str) -> dict:
    ratio = stream.sample_aspect_ratio or 1
    if ratio == 1:
        return {}
    wide, tall = max(ratio, 1), max(1 / ratio, 1)
    width, height = round(frame.width * wide), round(frame.height * tall)
    if max(width, height) > _LARGEST:
        raise VideoError(f"{name} has pixels of {ratio.numerator}:{ratio.denominator}, expected about 1:1: correct it.")
    return dict(width=width, height=height, interpolation=Interpolation.BICUBIC)


def _upright(image: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """Turned and mirrored as the display matrix says, to the nearest right angle.

    Its pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift (ISO/IEC 14496-12, 6.2.2).
    """
    if matrix is not None:
        a, b, c, d = matrix
        if abs(b) + abs(c) > abs(a) + abs(d):
            image, a, d = image.transpose(1, 0, 2), c, b
        image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(image)

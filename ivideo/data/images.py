"""Decodes image files as viewers show them: upright, in RGB."""

import io

import numpy as np

from ivideo.data.pictures import VideoError

_LARGEST = 2**28  # pixels


def read_image(data: bytes) -> np.ndarray:
    """The picture in a file's bytes, uint8 [H,W,3]. Transparent pixels become black. VideoError for damaged files."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise VideoError("the file is empty, expected an image: write it again, or use another")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > _LARGEST:
                raise VideoError(f"the image has {image.width} x {image.height} pixels, expected up to {_LARGEST}")
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "I;16", "I;16B", "F"):
                raise VideoError(f"the image has mode {image.mode}, expected 8 bits a channel: convert it")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            return np.asarray(image.convert("RGB"))
    except VideoError:
        raise
    except MemoryError:
        raise
    except UnidentifiedImageError as e:  # its message has an address in memory
        raise VideoError("the file is no image that Pillow can read: write it again, or use another") from e
    except Exception as e:  # damaged files cause many types of error
        raise VideoError(f"the image cannot be read ({type(e).__name__}: {e}): write it again, or use another") from e

"""Pictures of an evaluation: contact sheets, with frames of several clips, and plots."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ivideo import files
from ivideo.data import video_io

_MARGIN = 4  # pixels between frames
_LINE = 14  # pixels of a caption's line


def contact_sheet(
    videos: Sequence[np.ndarray], captions: Sequence[str], *, frames: int = 6, width: int = 160
) -> Image.Image:
    """Draws up to `frames` frames of each clip [T,H,W,3] in [-1, 1], the first to the last, in a row under its caption.

    `width`: of a frame in pixels; its height follows from the first clip.
    """
    height = round(width * videos[0].shape[1] / videos[0].shape[2])
    row = _LINE + height + _MARGIN
    sheet = Image.new("RGB", (frames * (width + _MARGIN) + _MARGIN, len(videos) * row + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        top = _MARGIN + number * row
        draw.text((_MARGIN, top), caption, fill="black")
        for column, time in enumerate(video_io.evenly(len(video), frames)):
            levels = video_io.to_uint8(video[time][None])[0]
            # Enlarged frames show their pixels
            method = Image.Resampling.NEAREST if width > levels.shape[1] else Image.Resampling.LANCZOS
            picture = Image.fromarray(levels).resize((width, height), method)
            sheet.paste(picture, (_MARGIN + column * (width + _MARGIN), top + _LINE))
    return sheet


def plot(path, draw: Callable) -> bool:
    """Writes the figure that `draw(pyplot)` returns as a PNG, and returns True.

    Without matplotlib it prints what to install, and returns False.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"{path} is not drawn, because matplotlib is not installed: run `pip install '.[plot]'` in the clone")
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = draw(pyplot)
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
    return True

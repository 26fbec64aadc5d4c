"""Black bars above, below or beside a picture, as of a letterboxed film."""

import numpy as np

DARK = 24  # of 255: bars are coded as black, and lossy coding makes them a little lighter
_THINNEST = 0.02  # share of the side that bars take at least
_SMALLEST = 0.4  # share of each side that the box takes at least: otherwise the scene is dark


class Bars:
    """Finds the bars that all pictures of a clip have. Pictures of another size than the first end the search."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self._rows, self._columns = np.zeros(height, np.uint8), np.zeros(width, np.uint8)
        self._same_size = True

    def add(self, picture: np.ndarray) -> None:
        """Notes the brightest pixel of each row and column of a picture, uint8 [H,W,3]."""
        if picture.shape[:2] != (self.height, self.width):
            self._same_size = False
            return
        brightest = picture.max(axis=-1)
        self._rows = np.maximum(self._rows, brightest.max(axis=1))
        self._columns = np.maximum(self._columns, brightest.max(axis=0))

    def box(self) -> list[int]:
        """The top, left, height and width of the picture inside the bars; zeros where there are no bars."""
        top, height = _inside(self._rows)
        left, width = _inside(self._columns)
        whole = (height, width) == (self.height, self.width)
        small = height < _SMALLEST * self.height or width < _SMALLEST * self.width
        return [0] * 4 if whole or small or not self._same_size else [top, left, height, width]


def _inside(brightest: np.ndarray) -> tuple[int, int]:
    """The first line that is not in a bar, and the number of lines between the bars."""
    lit = np.flatnonzero(brightest > DARK)
    if not len(lit):
        return 0, len(brightest)
    first, last = int(lit[0]), int(lit[-1])
    if first + len(brightest) - 1 - last < _THINNEST * len(brightest):
        return 0, len(brightest)
    return first, last + 1 - first

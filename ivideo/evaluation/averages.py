"""Means of measurements of clips, and how far they are from certain."""

import math
from collections.abc import Sequence


def mean(values: Sequence[float | bool]) -> float | None:
    """The mean, or None of nothing."""
    return float(sum(values) / len(values)) if len(values) else None


def standard_error(values: Sequence[float | bool]) -> float | None:
    """The standard error of the mean: the standard deviation over √n. None of fewer than two values.

    It is 0 where all values are equal, which of a few clips says little.
    """
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def text(value: float | None, error: float | None, *, digits: int, percent: bool = False) -> str:
    """A mean and its standard error, such as '87.5% ± 3.4'; '–' where there is no value."""
    if value is None:
        return "–"
    scale, unit = (100, "%") if percent else (1, "")
    shown = f"{scale * value:.{digits}f}{unit}"
    return shown if error is None else f"{shown} ± {scale * error:.{digits}f}"

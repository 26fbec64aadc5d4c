"""The kinds of values that config keys may have."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Value:
    """A constraint on a key's value: `expected` describes it in messages, and `allows` tests a value."""

    expected: str
    allows: Callable[[Any], bool]


def whole(least: int, most: int | None = None) -> Value:
    """A whole number from `least` to `most`, or from `least` upwards."""

    def allows(value):
        integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return integer and least <= value and (most is None or value <= most)

    return Value(f"a whole number, {least} or more" if most is None else f"a whole number, {least} to {most}", allows)


def number(expected: str, allows: Callable[[float], bool] = lambda value: True) -> Value:
    """A finite number that also satisfies `allows`."""

    def finite(value):
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)

    return Value(expected, lambda value: finite(value) and allows(value))


def choice(*options: str) -> Value:
    """One of the words `options`."""
    return Value(f"one of {', '.join(options)}", lambda value: value in options)


def several(item: Value, count: int | None = None) -> Value:
    """A tuple or list of values of one kind: `count` of them, or one or more."""

    def allows(values):
        if not isinstance(values, tuple | list) or not values or count not in (None, len(values)):
            return False
        return all(map(item.allows, values))

    return Value(f"{count or 'one or more'} values with commas between them, each {item.expected}", allows)

"""Images on levels, as those of an 8-bit file: the level of a value, the value of a level."""

from __future__ import annotations

import math

from torch import Tensor


def nearest(values: Tensor, bounds: tuple[float, float], levels: int) -> Tensor:
    """The nearest of so many levels from one bound to the other, the even one of two.

    Values beyond the bounds get levels beyond the first and the last.

    Args:
        values: float32 or float64.
        bounds: (lower, upper), the values of the first and the last level.
        levels: how many there are.
    """
    lower, upper = bounds
    return ((values - lower) * ((levels - 1) / (upper - lower))).round()


def value(level: Tensor, bounds: tuple[float, float], levels: int) -> Tensor:
    """The value of a level: for bounds (0, 1) and (0, 255) what an 8-bit file is read as."""
    lower, upper = bounds
    last = level.new_full((), levels - 1)  # a tensor: a number might be multiplied by its inverse
    return level * (upper - lower) / last + lower


def shown(
    values: Tensor, origin: Tensor, bounds: tuple[float, float], levels: int, epsilon: float
) -> Tensor:
    """Each value at the nearest level, of those within epsilon of the level of its origin."""
    middle, reach = nearest(origin, bounds, levels), radius(epsilon, bounds, levels)
    level = nearest(values, bounds, levels).clamp(middle - reach, middle + reach)
    return value(level.clamp(0, levels - 1), bounds, levels)


def radius(epsilon: float, bounds: tuple[float, float], levels: int) -> float:
    """How many levels lie within epsilon of a level, on each side; infinite without a ball."""
    rounding = 1 + 1e-6  # 8/255 is 8 levels, however computed
    steps = epsilon * (levels - 1) / (bounds[1] - bounds[0]) * rounding
    return steps if math.isinf(steps) else float(math.floor(steps))

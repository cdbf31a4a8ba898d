"""Images on evenly spaced levels, such as those of an 8-bit file."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor


def nearest(values: Tensor, bounds: tuple[float, float], levels: int) -> Tensor:
    """Return the nearest of `levels` levels from one bound to the other; ties go to the even one.

    Values beyond the bounds get levels beyond the first and the last.

    Args:
        values: float32 or float64.
        bounds: (lower, upper), the values of the first and the last level.
        levels: number of levels.
    """
    lower, upper = bounds
    return ((values - lower) * ((levels - 1) / (upper - lower))).round()


def value(level: Tensor, bounds: tuple[float, float], levels: int) -> Tensor:
    """Return the value of a level; for bounds (0, 1) and (0, 255), that read from an 8-bit file."""
    lower, upper = bounds
    last = level.new_full((), levels - 1)  # a tensor: division by a number may use its inverse
    return level * (upper - lower) / last + lower


def shown(
    values: Tensor,  # (N, *)
    origin: Tensor,  # (N, *)
    bounds: tuple[float, float],
    levels: int,
    epsilon: float | Tensor,  # (N,)
    norm: str = "linf",
) -> Tensor:
    """Move each value to a level, so that images stay within epsilon of the levels of their origin.

    In L-infinity, a value takes the nearest level within epsilon. In L2, it takes one of the two
    levels around it. This is the one farther from the level of the origin if the value is more than
    a threshold beyond the nearer one. Each image has its own threshold, the first of 8/16, 9/16,
    ... 1 level at which it stays in the ball. At 1, all values move towards their origin, so an
    image that was inside the ball stays inside.

    Args:
        values, origin: (N, *) float32 or float64.
        bounds: (lower, upper), the values of the first and the last level.
        levels: number of levels.
        epsilon: radius of the ball for all images, or a float64 tensor (N,) with that of each.
        norm: "linf" or "l2".
    """
    middle = nearest(origin, bounds, levels)
    if norm == "linf":
        reach = radius(epsilon, bounds, levels)
        if isinstance(reach, Tensor):
            reach = reach.reshape(-1, *[1] * (values.dim() - 1)).to(values.dtype)
        level = nearest(values, bounds, levels).clamp(middle - reach, middle + reach)
        return value(level.clamp(0, levels - 1), bounds, levels)
    middle = middle.clamp(0, levels - 1)
    away = (values - bounds[0]) * ((levels - 1) / (bounds[1] - bounds[0])) - middle
    room = torch.where(away < 0, middle, levels - 1 - middle)
    distance = torch.where(away.abs() <= room, away.abs(), room)
    whole = torch.where(distance >= 0, distance.floor(), 0)  # false for NaN
    most = _in_levels(epsilon, bounds, levels)
    found = whole
    for sixteenths in range(15, 7, -1):
        outward = whole + (distance - whole > sixteenths / 16)
        squares = outward.double().square().flatten(1).sum(1)  # exact, as they are integers
        fits = (squares <= most * most).reshape(-1, *[1] * (values.dim() - 1))
        found = torch.where(fits, outward, found)
    return value(middle + torch.where(away < 0, -found, found), bounds, levels)


@overload
def radius(epsilon: float, bounds: tuple[float, float], levels: int) -> float: ...
@overload
def radius(epsilon: Tensor, bounds: tuple[float, float], levels: int) -> Tensor: ...
def radius(epsilon: float | Tensor, bounds: tuple[float, float], levels: int) -> float | Tensor:
    """Return the number of levels within epsilon of a level, per side; infinite without a ball."""
    steps = _in_levels(epsilon, bounds, levels)
    if isinstance(steps, Tensor):
        return steps.floor()
    return steps if math.isinf(steps) else float(math.floor(steps))


def _in_levels(epsilon: float | Tensor, bounds: tuple[float, float], levels: int) -> float | Tensor:
    """Return a distance in levels, with a little for rounding: 8/255 is always 8 levels."""
    return epsilon * (levels - 1) / (bounds[1] - bounds[0]) * (1 + 1e-6)

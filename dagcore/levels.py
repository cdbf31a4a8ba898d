"""Images on levels, as those of an 8-bit file: the level of a value, the value of a level."""

from __future__ import annotations

import math
from typing import overload

import torch
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
    values: Tensor,  # (N, *)
    origin: Tensor,  # (N, *)
    bounds: tuple[float, float],
    levels: int,
    epsilon: float | Tensor,  # (N,)
    norm: str = "linf",
) -> Tensor:
    """Each value at a level, so that images stay within epsilon of the levels of their origin.

    In L-infinity that is the nearest level of those within epsilon. In L2 it is one of the two
    around the value: the farther one from the level of the origin where more than a threshold lies
    between the nearer one and the value. The threshold is the image's own, the first of 8/16, 9/16
    to 1 level at which it stays in the ball. At 1 all values are moved towards their origin, which
    leaves none outside that was inside.

    Args:
        values, origin: float32 or float64.
        bounds: (lower, upper), the values of the first and the last level.
        levels: how many there are.
        epsilon: radius of the ball, of all images or, a float64 tensor, of each.
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
    whole = torch.where(distance >= 0, distance.floor(), 0)  # not of a NaN
    most = _in_levels(epsilon, bounds, levels)
    found = whole
    for sixteenths in range(15, 7, -1):
        outward = whole + (distance - whole > sixteenths / 16)
        squares = outward.double().square().reshape(len(outward), -1).sum(1)  # exact: whole numbers
        fits = (squares <= most * most).reshape(-1, *[1] * (values.dim() - 1))
        found = torch.where(fits, outward, found)
    return value(middle + torch.where(away < 0, -found, found), bounds, levels)


@overload
def radius(epsilon: float, bounds: tuple[float, float], levels: int) -> float: ...
@overload
def radius(epsilon: Tensor, bounds: tuple[float, float], levels: int) -> Tensor: ...
def radius(epsilon: float | Tensor, bounds: tuple[float, float], levels: int) -> float | Tensor:
    """How many levels lie within epsilon of a level, on each side; infinite without a ball."""
    steps = _in_levels(epsilon, bounds, levels)
    if isinstance(steps, Tensor):
        return steps.floor()
    return steps if math.isinf(steps) else float(math.floor(steps))


def _in_levels(epsilon: float | Tensor, bounds: tuple[float, float], levels: int) -> float | Tensor:
    """A distance in levels, with a little for rounding: 8/255 is 8 levels, however computed."""
    return epsilon * (levels - 1) / (bounds[1] - bounds[0]) * (1 + 1e-6)

"""Steps: how a gradient moves the images."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor

from ..engine.loop import State
from ..levels import radius, shown


@dataclasses.dataclass(frozen=True)
class NormalisedStep:
    """x <- clip(x + gamma / ||r||_inf * r), the norm of each image its own.

    Args:
        gamma: step length, in the units of the images.
        bounds: valid range of the images, None for no clipping.
        epsilon: radius of the L-infinity ball around the origin, None for none.
        levels: number of levels between the bounds on which images are shown, None for any value.
            Steps then add up in a shadow, whose nearest level is what is evaluated.
    """

    gamma: float
    bounds: tuple[float, float] | None = None
    epsilon: float | None = None
    levels: int | None = None

    def begin(self, images: Tensor, start: Tensor) -> State:
        """With levels, the shadow, and what it looks like."""
        if self.levels is None or self.bounds is None:
            return {}
        exact = torch.promote_types(start.dtype, torch.float32)
        epsilon = math.inf if self.epsilon is None else self.epsilon
        image = shown(start.to(exact), images.to(exact), self.bounds, self.levels, epsilon)
        return {"shadow": start, "x": image.to(start.dtype)}

    @property
    def reach(self) -> float:
        """How many levels an image may be changed by."""
        assert self.levels is not None
        assert self.bounds is not None
        epsilon = math.inf if self.epsilon is None else self.epsilon
        return radius(epsilon, self.bounds, self.levels)

    def move(self, state: State, gradient: Tensor, going: Tensor) -> Tensor:
        """Take the step; not where the norm is 0 or not finite, or no other level is near."""
        on_levels = self.levels is not None
        if on_levels and self.reach == 0:
            return torch.zeros_like(going)
        lower, upper = self.bounds or (-math.inf, math.inf)
        # Past the wrapper's checks: arguments were checked as the images came.
        _, moved = torch.ops.dagcore.linf_step_(
            state["shadow" if on_levels else "x"],
            state["origin"],
            gradient,
            going.int(),
            self.gamma,
            lower,
            upper,
            math.inf if self.epsilon is None else self.epsilon,
            state["x"] if on_levels else None,
            self.levels or 0,
        )
        return cast(Tensor, moved)

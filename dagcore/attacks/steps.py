"""Steps: how a gradient moves the images."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .. import ops
from ..engine.loop import State


@dataclasses.dataclass(frozen=True)
class NormalisedStep:
    """x <- clip(x + gamma / ||r||_inf * r), the norm of each image its own.

    Args:
        gamma: step length, in the units of the images.
        bounds: valid range of the images, None for no clipping.
        epsilon: radius of the L-infinity ball around the origin, None for none.
    """

    gamma: float
    bounds: tuple[float, float] | None = None
    epsilon: float | None = None

    def begin(self, images: Tensor) -> State:
        """No state of its own."""
        return {}

    def move(self, state: State, gradient: Tensor, going: Tensor) -> Tensor:
        """Take the step; not where the norm is 0 or not finite."""
        lower, upper = self.bounds or (None, None)
        norms = ops.linf_step_(
            state["x"],
            state["origin"],
            gradient,
            going.int(),
            gamma=self.gamma,
            lower=lower,
            upper=upper,
            epsilon=self.epsilon,
        )
        return ops.step_scale(norms, self.gamma) > 0

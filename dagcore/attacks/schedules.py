"""Schedules: how long an attack goes on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..engine.loop import State


@dataclasses.dataclass(frozen=True)
class UntilFooled:
    """Until no more targets are active than the tolerance allows.

    Args:
        max_iter: updates at the most.
        tolerance: the fraction of an image's targets that may be left active; None: images are
            never done before the last update.
        patience: an image has stalled when so many steps in a row could not be taken.
    """

    max_iter: int
    tolerance: float | None = 0.0
    patience: int = 1

    def begin(self, images: Tensor) -> State:
        """No state of its own."""
        return {}

    def allowed(self, targets: Tensor) -> Tensor:
        """The largest count k with k / targets <= tolerance, exactly: (N,) float64.

        -1, which no count is below, where images are never done.
        """
        count = targets.double().clamp(min=1)
        if self.tolerance is None:
            return torch.full_like(count, -1)
        k = (self.tolerance * count).floor()  # the product is rounded: k may be one off either way
        k = torch.where((k + 1) / count <= self.tolerance, k + 1, k)
        return torch.where(k / count > self.tolerance, k - 1, k)

"""Schedules: when an attack stops."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..engine.loop import State


@dataclasses.dataclass(frozen=True)
class UntilFooled:
    """Stops an image when no more targets are active than the tolerance allows.

    Args:
        max_iter: maximum number of updates.
        tolerance: fraction of an image's targets that may stay active; None: images are never done
            before the last update.
        patience: number of failed steps in a row after which an image has stalled.
    """

    max_iter: int
    tolerance: float | None = 0.0
    patience: int = 1

    def begin(self, images: Tensor) -> State:
        """Return no state."""
        return {}

    def allowed(self, targets: Tensor) -> Tensor:
        """Return the largest count k with k / targets <= tolerance, exactly: (N,) float64.

        It is -1, below every count, if images are never done.
        """
        count = targets.double().clamp(min=1)
        if self.tolerance is None:
            return torch.full_like(count, -1)
        k = (self.tolerance * count).floor()  # the product is rounded: k may be off by one
        k = torch.where((k + 1) / count <= self.tolerance, k + 1, k)
        return torch.where(k / count > self.tolerance, k - 1, k)

"""Several runs per image, each from a different random point; the best run counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.fallback import CONVERGED
from .loop import Finished, Slots
from .networks import Networks, Targets

Point = Callable[[Tensor, int, int], "Tensor | None"]
"""Returns where a run of an image (*) begins, from the image's seed and the run's number; None for
the image itself."""


class Run(NamedTuple):
    """The run under attack in a slot. The tag of `Slots`."""

    key: Any
    """Key of the image."""
    seed: int | None = None
    """Seed of the image's random points, if it has any."""
    number: int = 0
    best: Finished | None = None
    """Best outcome of the earlier runs."""


class Runs:
    """Number and starting points of the runs of each image.

    Args:
        most: maximum number of runs per image.
        point: returns where each run begins.
    """

    def __init__(self, most: int, point: Point) -> None:
        self.most, self.point = most, point

    def start(self, image: Tensor, run: Run) -> Tensor:
        """Return where a run of an image (*) begins."""
        point = None if run.seed is None else self.point(image, run.seed, run.number)
        return image if point is None else point

    def over(self, outcome: Finished, slots: Slots) -> Finished | None:
        """Return an image's outcome after a finished run, or None if another run was started."""
        best, run = self.best(outcome), outcome.tag
        again = Run(run.key, run.seed, run.number + 1, best)
        if outcome.error or outcome.status == CONVERGED or again.number == self.most:
            return best
        networks = slots.evaluator
        assert isinstance(networks, Networks)
        with torch.inference_mode(False):
            start = self.start(outcome.origin, again)
            taken = slots.admit([again], outcome.origin[None], start[None])
            networks.admit(taken, [_same(own) for own in zip(*outcome.aims[1:], strict=True)])
        return None

    @staticmethod
    def best(outcome: Finished) -> Finished:
        """Return the best outcome of an image's runs so far, with the image's key."""
        before = outcome.tag.best
        kept = outcome.error is None and before is not None and before.left <= outcome.left
        return (before if kept else outcome)._replace(tag=outcome.tag.key)


def _same(aims: tuple[Tensor, Tensor | str, Tensor | None]) -> Targets:
    """Return the targets of a finished image, for another run."""
    labels, adversarial, boxes = aims
    again = adversarial[None] if isinstance(adversarial, Tensor) else adversarial
    return Targets(labels[None], lambda *_: again, None if boxes is None else boxes[None])

"""Several runs of one image, each from a random point of its own, of which the best counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.fallback import CONVERGED
from .loop import Finished, Slots
from .networks import Networks, Targets

Point = Callable[[Tensor, int, int], "Tensor | None"]
"""Where a run of an image (*) begins, from its seed and the run's number; None: at the image."""


class Run(NamedTuple):
    """What is under attack in a slot: a run of an image. The tag of `Slots`."""

    key: Any
    """Of the image."""
    seed: int | None = None
    """Of the image's random points, where it has any."""
    number: int = 0
    best: Finished | None = None
    """Of the runs before."""


class Runs:
    """How often images are run, and from where.

    Args:
        most: runs of an image.
        point: where each begins.
    """

    def __init__(self, most: int, point: Point) -> None:
        self.most, self.point = most, point

    def start(self, image: Tensor, run: Run) -> Tensor:
        """Where a run of an image (*) begins."""
        point = None if run.seed is None else self.point(image, run.seed, run.number)
        return image if point is None else point

    def over(self, outcome: Finished, slots: Slots) -> Finished | None:
        """What came of an image whose run has finished; None if it has been given another one."""
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
        """The best of an image's runs so far, with its key."""
        before = outcome.tag.best
        kept = outcome.error is None and before is not None and before.left <= outcome.left
        return (before if kept else outcome)._replace(tag=outcome.tag.key)


def _same(aims: tuple[Tensor, Tensor | str, Tensor | None]) -> Targets:
    """What a finished image was attacked at, for another run."""
    labels, adversarial, boxes = aims
    again = adversarial[None] if isinstance(adversarial, Tensor) else adversarial
    return Targets(labels[None], lambda *_: again, None if boxes is None else boxes[None])

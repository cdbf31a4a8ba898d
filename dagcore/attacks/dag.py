"""Dense Adversary Generation, the attack of the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks, reference
from ..engine import ScoreModel, frozen
from ..engine.devices import device_for
from ..engine.loop import Objective, Schedule, Step
from ..errors import ArgumentError
from ..labels import KINDS
from ..losses import DAGObjective
from ..perturbation import perceptibility, value_range
from .base import Attack, Callback
from .result import Result, Status
from .schedules import UntilFooled
from .steps import NormalisedStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class DAG(Attack):
    """Dense Adversary Generation: Algorithm 1 of Xie et al., ICCV 2017.

    Args:
        gamma: step length in the L-infinity norm, in the units of the images. The paper uses 0.5
            for images in 0..255; the default is the same for images in [0, 1].
        max_iter: maximum number of updates (the paper: 200 for segmentation, 150 for detection).
        goal: "leave" stops when no target is classified as its label; "reach" when every target is
            classified as its adversarial label.
        bounds: valid range of the images, None for no clipping (as in the paper).
        epsilon: radius of the L-infinity ball around the clean image, None for no ball.
        tolerance: an image is done when at most this fraction of its targets is active.
        ignore_index: label of the targets that never count.
        margin: kappa, in the units of the scores. A target stays active until it is won by at least
            this much, so that true classes do not end up just behind the winner. 0 is the paper's
            rule.
        levels: number of evenly spaced levels from one bound to the other: 256 for 8-bit files.
            Every image that is evaluated or returned lies on them, and the clean images must too.
            The ball is rounded inward. None for any value.
        backend: "native", or "reference" for the plain PyTorch loop, which supports neither streams
            nor callbacks.

    Raises:
        TypeError, ValueError: a setting out of its range.
    """

    gamma: float = 0.5 / 255
    max_iter: int = 200
    goal: str = "leave"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    epsilon: float | None = None
    tolerance: float = 0.0
    ignore_index: int = 255
    margin: float = 0.0
    levels: int | None = None
    backend: str = "native"

    def __post_init__(self) -> None:
        checks.number("gamma", self.gamma, above=0)
        checks.integer("max_iter", self.max_iter, at_least=0, at_most=2**31 - 2)
        checks.choice("goal", self.goal, checks.GOALS)
        if self.epsilon is not None:
            checks.number("epsilon", self.epsilon, above=0)
        checks.tolerance(self.tolerance)
        checks.integer("ignore_index", self.ignore_index)
        checks.number("margin", self.margin, at_least=0)
        self.check_grid()
        checks.choice("backend", self.backend, ("native", "reference"))

    def objective(self) -> Objective:
        """Return the objective f_l' - f_l, summed over the active targets."""
        return DAGObjective(self.goal, self.ignore_index, self.margin)

    def step(self) -> Step:
        """Return a step of gamma in the L-infinity norm."""
        return NormalisedStep(self.gamma, self.bounds, self.epsilon, self.levels)

    def schedule(self) -> Schedule:
        """Return a schedule that ends when no more targets are active than the tolerance allows."""
        return UntilFooled(self.max_iter, self.tolerance)

    def _attack(
        self,
        model: Callable[..., Any],
        images: Tensor,
        labels: Tensor,
        adversarial_labels: Tensor | str | None,
        generator: torch.Generator | None,
        boxes: Tensor | None,
        start: Tensor | None,
        callback: Callback | None,
    ) -> Result:
        if self.backend == "native":
            return super()._attack(
                model, images, labels, adversarial_labels, generator, boxes, start, callback
            )
        if callback is not None:
            raise ArgumentError("callback must be None for backend='reference', which has none")
        scores_of = ScoreModel(model)
        settings = dataclasses.asdict(self)
        del settings["backend"]
        align_corners = scores_of.align_corners

        def scores_at(x: Tensor, boxes: Tensor | None = None) -> Tensor:
            scores = scores_of(x, labels, boxes)
            if scores_of.align_corners != align_corners:  # the scores define it, not the model
                scores = reference.enlarge(scores, labels.shape[1:], scores_of.align_corners)
            return scores

        device = device_for(images.device)
        with frozen(model), device.current(), torch.inference_mode(False):
            trace = reference.dag(
                scores_at,
                images,
                labels,
                "permutation" if adversarial_labels is None else adversarial_labels,
                align_corners=align_corners,
                generator=generator,
                boxes=boxes,
                start=start,
                **settings,
            )
        perturbation = trace.images - images.detach()
        return Result(
            adversarial=trace.images,
            perturbation=perturbation,
            iterations=trace.iterations,
            status=tuple(map(Status, trace.status)),
            active=trace.active,
            targets=trace.targets,
            perceptibility=perceptibility(perturbation, value_range(images, self.bounds)),
            adversarial_labels=trace.adversarial_labels,
            last=trace.images,
            left=trace.active.gather(0, trace.iterations[None].long())[0],
        )

    def check_kind(self, adversarial_labels: Any) -> None:
        """Raise unless this is one of `dagcore.labels.KINDS` that suits the goal."""
        checks.choice("adversarial_labels", adversarial_labels, KINDS)
        if adversarial_labels == "runner-up" and self.goal == "reach":
            raise ArgumentError(
                "adversarial_labels must be a tensor, 'permutation' or 'random' for goal='reach', "
                "got 'runner-up'"
            )

    def check_spacing(self, spacing: float, images: Tensor) -> None:
        """Raise if a step of gamma would be lost to rounding."""
        if self.gamma < spacing:
            raise ArgumentError(
                f"gamma must be at least the spacing of {checks.names([images.dtype])} images, "
                f"{spacing:.2e}, got {self.gamma:.2e}: steps would be lost. Use float32 images "
                "(dagcore.victims.Victim(model) accepts them for a network in half precision)"
            )

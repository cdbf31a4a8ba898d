"""Projected gradient descent on dense losses: PGD, SegPGD, CosPGD."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..engine.loop import Objective, Schedule, Step
from ..errors import ArgumentError
from ..losses import Loss, LossObjective, UserLoss, named
from ..seeds import generator_of
from .base import Attack
from .schedules import UntilFooled
from .steps import ProjectedStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class BallAttack(Attack, abc.ABC):
    """Base class of attacks on a dense loss within a ball: `PGD` and `APGD`.

    `Result.active` counts the targets whose argmax is their label, or for a targeted attack those
    whose argmax is not their adversarial label. `Result.adversarial` is the iterate with the fewest
    active targets (the first of equals), `Result.last` the last one.
    """

    norm: str = "linf"
    epsilon: float = 8 / 255
    random_start: bool = True
    restarts: int = 1
    tolerance: float | None = 0.0
    bounds: tuple[float, float] | None = (0.0, 1.0)
    ignore_index: int = 255
    levels: int | None = None

    def __post_init__(self) -> None:
        checks.choice("norm", self.norm, checks.NORMS)
        checks.number("epsilon", self.epsilon, above=0)
        checks.boolean("random_start", self.random_start)
        checks.integer("restarts", self.restarts, at_least=1, at_most=2**31 - 1)
        if self.restarts > 1 and not self.random_start:
            raise ArgumentError(
                f"random_start must be True with restarts={self.restarts}, got False: all runs "
                "would be the same"
            )
        if self.tolerance is not None:
            checks.tolerance(self.tolerance)
        checks.integer("ignore_index", self.ignore_index)
        self.check_grid()

    @property
    @abc.abstractmethod
    def dense_loss(self) -> Loss | UserLoss:
        """The loss to maximise."""

    def objective(self) -> Objective:
        """Return the loss, summed over the targets."""
        return LossObjective(self.dense_loss, self.ignore_index)

    def check_kind(self, adversarial_labels: Any) -> None:
        """Raise unless this is "untargeted", or a way to draw labels for a targeted loss.

        The loss "dag" always has adversarial labels; it accepts "runner-up" instead of
        "untargeted".
        """
        LossObjective(self.dense_loss).check_kind(adversarial_labels)

    @property
    def first_radius(self) -> float:
        """Radius of the ball that the attack starts in."""
        return self.epsilon

    def random_point(self, image: Tensor, seed: int, run: int) -> Tensor | None:
        """Draw a point uniformly from the ball around an image (*); None for the image itself.

        The point depends only on the seed and the number of the run.
        """
        if not self.random_start:
            return None
        source, epsilon = generator_of((seed, run)), self.first_radius
        exact = torch.promote_types(image.dtype, torch.float32)
        origin = image.to(exact)
        if self.norm == "linf":
            noise = torch.rand(image.shape, generator=source, dtype=torch.float64) * 2 - 1
        else:
            noise = torch.randn(image.shape, generator=source, dtype=torch.float64)
            inside = torch.rand((), generator=source, dtype=torch.float64) ** (1 / noise.numel())
            noise *= inside / torch.linalg.vector_norm(noise)
        point = origin + (noise * epsilon).to(device=image.device, dtype=exact)
        if self.norm == "linf":
            point = point.clamp(origin - epsilon, origin + epsilon)
        return (point if self.bounds is None else point.clamp(*self.bounds)).to(image.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGD(BallAttack):
    """Projected gradient descent (Madry et al., ICLR 2018) on a dense loss.

    The update is x <- Proj(x + alpha sign g) in an L-infinity ball and x <- Proj(x + alpha g /
    ||g||_2) in an L2 ball, where g is the gradient of the loss, summed over all targets that are
    not ignored. The attack is untargeted unless adversarial labels are given; the loss "dag" draws
    a permutation if none are.

    Args:
        loss: a name (see `dagcore.ops.loss_seed`), a `dagcore.losses.Loss`, or a function in plain
            PyTorch that maps (scores (N, C, *T), labels (N, *T)), and adversarial labels (N, *T) if
            there are any, to values (N,) or (N, *T).
        norm: "linf" or "l2".
        epsilon: radius of the ball around the clean image, in the units of the images.
        alpha: step length, in the units of the images.
        steps: maximum number of updates.
        random_start: whether each image begins at a random point of its ball.
        restarts: maximum number of runs from different random points; the run with the fewest
            active targets is returned. An image that is done is not run again.
        momentum: mu of m <- mu m + g / ||g||_1; the attack follows the sign (direction) of m
            instead of that of the gradient (Dong et al., CVPR 2018). 0 for no momentum.
        tolerance: an image is done when at most this fraction of its targets is active; None: it
            runs to the last step.
        bounds: valid range of the images, None for no clipping.
        ignore_index: label of the targets that never count.
        levels: as for `dagcore.DAG`.

    Raises:
        TypeError, ValueError: a setting out of its range.
    """

    loss: str | Loss | UserLoss = "cross-entropy"
    alpha: float = 0.01
    steps: int = 20
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        named(self.loss)
        checks.number("alpha", self.alpha, above=0)
        checks.integer("steps", self.steps, at_least=0, at_most=2**31 - 2)
        checks.number("momentum", self.momentum, at_least=0)

    @property
    def dense_loss(self) -> Loss | UserLoss:
        """The loss to maximise."""
        return named(self.loss)

    def step(self) -> Step:
        """Return a step of alpha along the sign or the normalised gradient."""
        return ProjectedStep(
            self.norm, self.alpha, self.epsilon, self.bounds, self.momentum, self.levels
        )

    def schedule(self) -> Schedule:
        """Return a schedule of `steps` updates, or fewer if the tolerance allows."""
        return UntilFooled(self.steps, self.tolerance)

    def check_spacing(self, spacing: float, images: Tensor) -> None:
        """Raise if a step of alpha would be lost to rounding."""
        if self.norm == "linf" and self.alpha < spacing:
            raise ArgumentError(
                f"alpha must be at least the spacing of {checks.names([images.dtype])} images, "
                f"{spacing:.2e}, got {self.alpha:.2e}: steps would be lost. Use float32 images "
                "(dagcore.victims.Victim(model) accepts them for a network in half precision)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegPGD(PGD):
    """`PGD` on a cross-entropy whose weight moves from correct targets to wrong ones.

    At update t of T, targets that are still correct have weight 1 - t / 2T and the others t / 2T; a
    targeted attack swaps the weights (Gu et al., ECCV 2022).
    """

    loss: str = dataclasses.field(init=False, default="blended-cross-entropy")

    def objective(self) -> Objective:
        """Return the blended cross-entropy, with the weights of each image's update."""
        return LossObjective(self.dense_loss, self.ignore_index, blend_steps=max(self.steps, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosPGD(PGD):
    """`PGD` on a cross-entropy weighted by how correct each target is.

    The weight is the cosine similarity of the softmax and the one-hot label, or for a targeted
    attack 1 minus the similarity to the adversarial label (Agnihotri et al., ICML 2024).
    """

    loss: str = dataclasses.field(init=False, default="cosine")

"""Auto-PGD on dense losses, in one ball or in a sequence of shrinking balls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from .. import checks
from ..engine.loop import Objective, Schedule, Step
from ..errors import ArgumentError
from ..losses import Loss, LossObjective, UserLoss, named
from .pgd import BallAttack
from .schedules import UntilFooled
from .steps import AdaptiveStep

SHRINKING = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))
"""Phases of SEA: factors of epsilon, and shares of the steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class APGD(BallAttack):
    """Auto-PGD (Croce and Hein, ICML 2020) on a dense loss, with a separate step size per image.

    The step size begins at twice the radius. When progress slows down, it is halved and the image
    goes back to where the loss was largest. See `dagcore.attacks.steps.AdaptiveStep`.

    Args:
        loss, norm, epsilon, random_start, restarts, tolerance, bounds, ignore_index, levels: as for
            `PGD`.
        steps: maximum number of steps over all phases.
        track: the loss that judges the steps and is reported in `Result.loss`, in the same forms as
            `loss`. SEA tracks "cross-entropy" whatever it maximises. None: `loss` itself.
        radii: phases in balls of shrinking radius (Croce et al., ECCV 2024), as pairs of a factor
            of epsilon and a share of the steps. The last factor is 1, and the shares add up to 1.
            "shrinking" stands for the paper's phases, ((2, 0.3), (1.5, 0.3), (1, 0.4)). Each phase
            begins at the best iterate of the previous one, projected; it is evaluated again, which
            counts as an update. No image is done before the last phase. None: a single ball.

    Raises:
        TypeError, ValueError: a setting out of its range.
    """

    loss: str | Loss | UserLoss = "cross-entropy"
    steps: int = 100
    radii: str | Sequence[tuple[float, float]] | None = None
    track: str | Loss | UserLoss | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        named(self.loss)
        if self.track is not None:
            named(self.track, "track")
        checks.integer("steps", self.steps, at_least=1, at_most=10**6)
        pairs = self._pairs()
        for k, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ArgumentError(f"radii[{k}] must be (factor, share), got {pair!r}")
            checks.number(f"radii[{k}][0]", pair[0], at_least=1)
            checks.number(f"radii[{k}][1]", pair[1], above=0)
        if not pairs or pairs[-1][0] != 1 or abs(sum(share for _, share in pairs) - 1) > 1e-6:
            raise ArgumentError(
                "radii must have 1 as their last factor, and shares that add up to 1, "
                f"got {self.radii!r}"
            )
        if min(steps for steps, _ in self.phases) < 1:
            raise ArgumentError(
                f"steps must give each of the {len(pairs)} phases of radii at least one step, "
                f"got {self.steps}"
            )

    def _pairs(self) -> Sequence[tuple[float, float]]:
        if self.radii is None:
            return ((1.0, 1.0),)
        if isinstance(self.radii, str):
            checks.choice("radii", self.radii, ("shrinking",))
            return SHRINKING
        if not isinstance(self.radii, (tuple, list)):
            raise ArgumentError(
                "radii must be pairs of a factor and a share, 'shrinking' or None, "
                f"got {self.radii!r}"
            )
        return tuple(self.radii)

    @property
    def phases(self) -> tuple[tuple[int, float], ...]:
        """Steps and radius of each phase; the last phase gets the steps that remain."""
        *early, _ = pairs = self._pairs()
        steps = [math.floor(share * self.steps + 1e-9) for _, share in early]
        steps.append(self.steps - sum(steps))
        return tuple(
            (count, factor * self.epsilon) for count, (factor, _) in zip(steps, pairs, strict=True)
        )

    @property
    def dense_loss(self) -> Loss | UserLoss:
        """The loss to maximise."""
        return named(self.loss)

    def objective(self) -> Objective:
        """Return the loss, summed over the targets; the tracked loss is the one reported."""
        track = None if self.track is None else named(self.track, "track")
        return LossObjective(self.dense_loss, self.ignore_index, track=track)

    @property
    def first_radius(self) -> float:
        """Radius of the first phase."""
        return self.phases[0][1]

    def step(self) -> Step:
        """Return the adaptive step through all phases."""
        return self._step()

    def _step(self) -> AdaptiveStep:
        return AdaptiveStep(
            norm=self.norm, bounds=self.bounds, levels=self.levels, phases=self.phases
        )

    def schedule(self) -> Schedule:
        """Return a schedule of all updates, or fewer if the tolerance allows."""
        return UntilFooled(self._step().updates, self.tolerance)

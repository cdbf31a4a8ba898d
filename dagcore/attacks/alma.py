"""ALMAProx: the smallest perturbation that fools most targets of an image."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import checks
from ..engine.loop import Evaluation, Objective, Schedule, Seed, State, Step
from ..errors import ArgumentError
from ..losses import Loss, LossObjective, UserLoss
from .base import Attack
from .schedules import UntilFooled
from .steps import NONE_YET, copy_rows

CHECK = 10  # updates between checks; targets that came no closer get a steeper penalty
CLOSER = 0.95  # closer: at most this fraction of the constraint at the last check
STEEPER = 2.0
STEEPEST = 1e9  # so that squares of gradients stay finite
SMOOTHING = 0.8  # decay of the averages of multipliers and of squared gradients
MULTIPLIERS = (1e-12, 1.0)
SCALES = (0.1, 1.0)  # limits of the constraints' scale, which falls while enough are fooled
SCALE_RATE = 0.02
BEYOND = 1e-4  # margin by which a target must be lost, in the units of the scores
LEAST_SPREAD = 1e-8
RATIO = Loss("dlr")  # it needs as many classes as the ratio of scores does
LEAST_METRIC = 1e-8
FIRST_BALL = 0.5  # initial radius, in step lengths
BALL_RATES = (0.05, 0.002)  # rates at which the ball shrinks and grows, at first and at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALMAProx(Attack):
    """The smallest L-infinity perturbation that fools a share of an image's targets.

    An augmented Lagrangian with one multiplier per target, which minimises the norm by its
    proximity operator (Rony, Pesquet, Ben Ayed, CVPR 2023). Each target is a constraint: its ratio
    of scores must not be above 0, see `PenaltyObjective`. The step is `ProximalStep`.

    Perturbations stay in a ball that grows after each failure and shrinks after each success
    (Pintor et al., NeurIPS 2021). This finds smaller perturbations in half the steps: without it
    they first grow to many times what is needed, and targets move to classes that need more.

    `Result.adversarial` holds the smallest perturbation found that fools the share of targets, with
    the status "converged". If there is none, it is the iterate with the fewest active targets, with
    the status "budget". `Result.active` counts the targets whose argmax is their label, or for a
    targeted attack those whose argmax is not their adversarial label; `Result.last` is the last
    iterate. The attack always makes all `steps`, unless the clean image is already fooled. It is
    untargeted unless adversarial labels are given.

    Networks need at least 3 classes, 4 for a targeted attack. A perturbation is always for one
    image and one network: `joint_attack` and `universal_perturbation` refuse the attack.

    Args:
        share: fraction of the targets, ignored ones aside, that must be fooled.
        steps: number of updates.
        alpha: initial step length, in the units of the images.
        decay: final step length, as a fraction of `alpha`. The step length begins to fall when the
            share is fooled for the first time, at the latest half way.
        mu: initial multipliers of the targets.
        rho: initial steepness of the penalties.
        bounds: valid range of the images, None for no clipping. The norm is measured as a fraction
            of it, so that results do not depend on the units; without bounds the unit is 1.
        ignore_index: label of the targets that never count.

    Raises:
        TypeError, ValueError: a setting out of its range.
    """

    alone = True
    share: float = 0.99
    steps: int = 250
    alpha: float = 0.001
    decay: float = 0.3
    mu: float = 1.0
    rho: float = 0.01
    bounds: tuple[float, float] | None = (0.0, 1.0)
    ignore_index: int = 255

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("decay", self.decay)):
            checks.number(name, value, above=0)
            if value > 1:
                raise ArgumentError(f"{name} must be a number above 0, at most 1, got {value}")
        checks.integer("steps", self.steps, at_least=1, at_most=10**6)
        checks.number("alpha", self.alpha, above=0)
        checks.number("mu", self.mu, above=0)
        checks.number("rho", self.rho, above=0)
        checks.integer("ignore_index", self.ignore_index)
        self.check_grid()

    @property
    def tolerance(self) -> float:
        """Fraction of the targets that may stay active."""
        return round(1 - self.share, 15)  # 1 - 0.9 is less than 0.1

    def objective(self) -> Objective:
        """Return the penalties of the constraints."""
        return PenaltyObjective(
            ignore_index=self.ignore_index,
            tolerance=self.tolerance,
            steps=self.steps,
            mu=float(self.mu),
            rho=float(self.rho),
        )

    def step(self) -> Step:
        """Return a step of gradient descent, followed by one towards a smaller norm."""
        return ProximalStep(self.steps, self.alpha, self.decay, self.bounds)

    def schedule(self) -> Schedule:
        """Return a schedule of `steps` updates; the step decides when an image is done."""
        return UntilFooled(self.steps, self.tolerance)

    def check_kind(self, adversarial_labels: Any) -> None:
        """Raise unless this is "untargeted", or a way to draw adversarial labels."""
        PenaltyObjective().check_kind(adversarial_labels)

    def check_spacing(self, spacing: float, images: Tensor) -> None:
        """Raise if the last steps would be lost to rounding."""
        if self.alpha * self.decay < spacing:
            raise ArgumentError(
                "alpha * decay must be at least the spacing of "
                f"{checks.names([images.dtype])} images, {spacing:.2e}, got "
                f"{self.alpha * self.decay:.2e}: steps would be lost. Use float32 images "
                "(dagcore.victims.Victim(model) accepts them for a network in half precision)"
            )


class Ratio(NamedTuple):
    """Ratios of scores (N, *T): (plus - minus + BEYOND) / (first - last), and their gradients."""

    value: Tensor
    """The ratio, 0 if it is not finite."""
    weight: Tensor
    """1 / (first - last), 0 if the ratio is not finite."""
    winner: Tensor
    """(N, *T) int64, the lowest of the classes with the largest score."""
    broken: Tensor
    """Whether a score is NaN."""
    terms: list[tuple[Tensor, Tensor]]
    """Classes (N, *T), each with the gradient of the ratio with respect to its score."""


def score_ratio(scores: Tensor, aims: Tensor, *, targeted: bool) -> Ratio:
    """Measure how far targets are from being fooled, whatever the scale of their scores.

    The ratio is (z_y - max_{k != y} z_k) / (z_(1) - z_(3)), or with an adversarial label l'
    (max_{k != l'} z_k - z_l') / (z_(1) - (z_(3) + z_(4)) / 2), as in Croce and Hein, ICML 2020.
    BEYOND is added to the numerator, so that a tie is not enough, and LEAST_SPREAD to the
    denominator.

    Args:
        scores: (N, C, *T) float32 or float64; overwritten.
        aims: (N, *T) int64, y or l'.
        targeted: whether `aims` are adversarial labels.
    """
    own = scores.gather(1, aims[:, None])[:, 0]
    top = [_take_strongest(scores) for _ in range(4 if targeted else 3)]
    (first, winner), *_, (last, _) = top
    if targeted:
        last = (top[2][0] + last) / 2
    right = winner == aims
    rival = torch.where(right, top[1][0], first), torch.where(right, top[1][1], winner)
    plus, minus = (rival, (own, aims)) if targeted else ((own, aims), rival)
    spread = first - last + LEAST_SPREAD
    value = (plus[0] - minus[0] + BEYOND) / spread
    usable = value.isfinite()
    weight = torch.where(usable, 1 / spread, 0)
    value = torch.where(usable, value, 0)
    slope = value * weight
    lows = [(index, slope / 2) for _, index in top[2:]] if targeted else [(top[2][1], slope)]
    terms = [(plus[1], weight), (minus[1], -weight), (winner, -slope), *lows]
    return Ratio(value, weight, winner, first.isnan(), terms)


def _take_strongest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's largest score and its lowest class, and set that score to -inf.

    This is faster than `max`, which is not vectorised over targets when it returns classes too.
    """
    value, count = scores.amax(1), scores.shape[1]
    narrow = torch.int16 if count < 2**15 else torch.int32
    ranks = torch.arange(count, 0, -1, dtype=narrow, device=scores.device)
    rank = ((scores == value[:, None]) * ranks.view(-1, *[1] * (scores.dim() - 2))).amax(1)
    lowest = (count - rank.long()).clamp(max=count - 1)  # a NaN has no rank
    scores.scatter_(1, lowest[:, None], -math.inf)
    return value, lowest


def penalty_slope(y: Tensor, rho: Tensor, mu: Tensor) -> Tensor:
    """Return the derivative with respect to y of the penalty of a constraint y <= 0.

    The penalty is mu y + mu rho y^2 + rho^2 y^3 / 6 for y >= 0, and mu y / (1 - max(rho, 1) y)
    below.
    """
    above = mu + 2 * mu * rho * y + (rho * y).square() / 2
    below = mu / (1 - rho.clamp(min=1) * y.clamp(max=0)).square()
    return torch.where(y >= 0, above, below)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PenaltyObjective(LossObjective):
    """Penalties of the constraints that no target's `score_ratio` is above 0, to be minimised.

    Each target has a multiplier mu and a steepness rho. The multiplier follows the slope of the
    penalty. Once enough targets have been fooled at least once, the steepness of a target doubles
    if it has neither been fooled nor come closer since the last check; before that, targets wait
    for the ball to grow. The largest constraints, as many as the tolerance allows in the end, are
    given up one by one.

    Args:
        ignore_index: label of the targets that never count.
        tolerance: fraction of the targets that may stay active.
        steps: number of updates of the attack.
        mu, rho: initial values for each target.
    """

    loss: Loss | UserLoss = RATIO
    tolerance: float = 0.01
    steps: int = 250
    mu: float = 1.0
    rho: float = 0.01
    tells_loss = False

    def begin(self, labels: Tensor) -> State:
        """Return the initial multipliers, steepness, constraints, targets fooled, and scale."""
        zeros = torch.zeros_like(labels, dtype=torch.float64)
        return {
            "mu": torch.full_like(zeros, self.mu),
            "rho": torch.full_like(zeros, self.rho),
            "checked": zeros,
            "fooled": torch.zeros_like(labels, dtype=torch.bool),
            "scale": zeros.new_full((len(labels),), SCALES[1]),
        }

    def seed(
        self,
        scores: Tensor,  # (N, C, *T), or maps (N, C, h, w) below the labels' size
        labels: Tensor,  # (N, *T)
        adversarial: Tensor | str,  # (N, *T)
        *,
        align_corners: bool,
        state: State,
    ) -> Seed:
        """Return minus the gradient of the penalties at the scores, and the active targets."""
        if "mu" not in state:
            return super().seed(
                scores, labels, adversarial, align_corners=align_corners, state=state
            )
        size, low = labels.shape[1:], scores.shape
        # Maxima over classes are slow if the classes are the last dimension in memory.
        z = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).contiguous()
        if low[2:] != size:
            z = torch.ops.aten.upsample_bilinear2d(z, size, align_corners)
        elif z.data_ptr() == scores.data_ptr():
            z = z.clone()
        targeted = isinstance(adversarial, Tensor)
        counted = self._counted(low[1], labels, adversarial)
        wrong = counted & _out_of_range(labels, low[1])
        if isinstance(adversarial, Tensor):
            wrong |= counted & _out_of_range(adversarial, low[1])
        aims = (adversarial if isinstance(adversarial, Tensor) else labels).long()
        aims = torch.where(counted & ~wrong, aims, 0)
        ratio = score_ratio(z, aims, targeted=targeted)
        active = counted & (((ratio.winner == aims) != targeted) | ratio.broken)
        count = active.reshape(len(active), active.shape[1:].numel()).sum(1, dtype=torch.int32)
        weights = self._weights(state, ratio.value, active, counted, count).to(z.dtype)
        seed = torch.zeros_like(z)
        for classes, gradient in ratio.terms:
            seed.scatter_add_(1, classes[:, None], (-weights * gradient)[:, None])
        if low[2:] != size:
            seed = torch.ops.aten.upsample_bilinear2d_backward(seed, size, low, align_corners)
        if scores.dtype == torch.float16:
            seed = seed.clamp(-torch.finfo(scores.dtype).max, torch.finfo(scores.dtype).max)
        bad = wrong.reshape(len(wrong), wrong.shape[1:].numel()).any(1)
        return Seed(seed.to(scores.dtype), torch.where(bad, -2, count))

    def _weights(
        self,
        state: State,
        ratio: Tensor,  # (N, *T)
        active: Tensor,  # (N, *T)
        counted: Tensor,  # (N, *T)
        count: Tensor,  # (N,) of active targets
    ) -> Tensor:
        """Update the state, and return the slope of each target's penalty to its ratio."""

        def per_target(values: Tensor) -> Tensor:
            return values.view(-1, *[1] * (ratio.dim() - 1))

        update = state["updates"]
        success = count <= state["allowed"]
        state["success"].copy_(success)
        scale = state["scale"]
        scale.div_(torch.where(success, 1 + SCALE_RATE, 1 - SCALE_RATE)).clamp_(*SCALES)
        constraint = per_target(scale) * ratio.double()
        given_up = state["allowed"] * (update / max(self.steps - 1, 1)).clamp(max=1)
        kept = counted & (constraint <= per_target(self._limit(constraint, counted, given_up)))

        mu, rho, checked, fooled = (state[name] for name in ("mu", "rho", "checked", "fooled"))
        fooled.logical_or_(~active)
        first, check = per_target(update == 0), per_target((update + 1) % CHECK == 0)
        check = check & ~first
        closer = constraint * kept <= CLOSER * checked
        steeper = check & ~(fooled | closer) & per_target(state["found"])
        rho.copy_(torch.where(steeper, STEEPER * rho, rho).clamp_(max=STEEPEST))
        checked.copy_(torch.where(check | first, constraint, checked))
        fooled.logical_and_(~check)
        smoothed = mu.lerp(penalty_slope(constraint, rho, mu) * kept, 1 - SMOOTHING)
        mu.copy_(torch.where(first, mu, smoothed.clamp_(*MULTIPLIERS)))
        return penalty_slope(constraint, rho, mu) * kept * per_target(scale)

    def _limit(self, constraint: Tensor, counted: Tensor, given_up: Tensor) -> Tensor:
        """Return the largest constraint (N,) except the `given_up` (N,) largest, rounded down."""
        rows = torch.where(counted, constraint, -math.inf).reshape(len(constraint), -1)
        if not rows.numel():
            return torch.zeros_like(given_up)
        most = min(int(self.tolerance * rows.shape[1]) + 2, rows.shape[1])
        return rows.topk(most).values.gather(1, given_up.long()[:, None])[:, 0]


def _out_of_range(labels: Tensor, num_classes: int) -> Tensor:
    labels = labels.long()  # a uint8 would be compared modulo 256
    return (labels < 0) | (labels >= num_classes)


def _size(images: Tensor, origin: Tensor) -> Tensor:
    """Return the L-infinity norms of perturbations, (N,) float64."""
    exact = torch.promote_types(images.dtype, torch.float32)
    return (images.to(exact) - origin.to(exact)).abs_().flatten(1).amax(1).double()


@dataclasses.dataclass(frozen=True)
class ProximalStep:
    """A step of gradient descent, then the proximity operator of the norm, in a diagonal metric H.

    H is the root mean square of the gradients so far. With d = x - x_0 - alpha g / H, the new
    perturbation is the p within the bounds and a ball that minimises
    alpha ||p||_inf + sum_i H_i (p_i - d_i)^2 / 2.

    The ball begins at half a step, or at the size of the start if that is larger. Until a
    perturbation succeeds, it grows at a rate that reaches the whole range half way. From then on
    its radius is a little below the smallest success; it shrinks after each success and grows after
    each failure, at a rate that falls. The step keeps the smallest perturbation that the
    objective's row "success" accepts, or, until there is one, that with the fewest active targets.

    Args:
        steps: number of updates of the attack.
        alpha: initial step length.
        decay: ratio of the last step length to the first.
        bounds: valid range of the images, None for no clipping.
    """

    steps: int
    alpha: float
    decay: float
    bounds: tuple[float, float] | None = None

    def begin(self, images: Tensor, start: Tensor) -> State:
        """Return root mean squares, the radius, and what was found and when."""
        count = len(images)
        no = images.new_zeros(count, dtype=torch.bool)
        return {
            "rms": torch.zeros_like(images, dtype=torch.promote_types(images.dtype, torch.float32)),
            "best": start,
            "best_active": images.new_full((count,), NONE_YET, dtype=torch.int64),
            "best_size": images.new_full((count,), math.inf, dtype=torch.float64),
            "radius": _size(start, images).clamp(min=FIRST_BALL * self.alpha),
            "success": no,
            "found": no,
            "found_at": images.new_full((count,), self.steps // 2, dtype=torch.int64),
            "done": no,
            "provisional": ~no,  # its last evaluation alone does not make an image done
        }

    def move(self, state: State, seen: Evaluation, going: Tensor) -> Tensor:
        """Keep the best, and take the step unless it is not finite."""
        self._keep_best(state, seen)
        if seen.gradient is None:
            return going
        going = going & ~state["done"]
        rms = state["rms"]
        gradient = seen.gradient.to(rms.dtype)
        rms.mul_(math.sqrt(SMOOTHING)).hypot_(gradient * math.sqrt(1 - SMOOTHING))
        update = state["updates"]
        unbiased = (1 - SMOOTHING ** (update + 1).double()).sqrt()
        metric = rms / unbiased.to(rms.dtype).view(-1, *[1] * (rms.dim() - 1))
        lower, upper = self.bounds or (-math.inf, math.inf)
        # Bypass the checks of the wrapper: arguments were checked on arrival.
        moved = torch.ops.dagcore.linf_prox_(
            state["x"],
            state["origin"],
            seen.gradient,
            metric.clamp_(min=LEAST_METRIC),
            going.int(),
            self._lengths(update, state["found_at"]),
            state["radius"],
            1.0 if self.bounds is None else 1 / (upper - lower),
            lower,
            upper,
        )
        return cast(Tensor, moved)

    def _lengths(self, update: Tensor, found_at: Tensor) -> Tensor:
        """Return step lengths (N,): constant at first, then falling like 1 / t."""
        if self.decay == 1:
            return torch.full_like(update, self.alpha, dtype=torch.float64)
        left = self.decay / (1 - self.decay) * (self.steps - found_at).clamp(min=1).double()
        return self.alpha * left / ((update - found_at).clamp(min=0) + left)

    def _keep_best(self, state: State, seen: Evaluation) -> None:
        """Keep the best image, and mark the images that are done."""
        x = state["x"]
        size = _size(x, state["origin"])
        active, success, found = seen.active.sum(1), state["success"], state["found"]
        fewer = ~found & (active < state["best_active"])
        better = state["running"] & torch.where(success, size < state["best_size"], fewer)
        for name, value, where in (
            ("best_active", active, better),
            ("best_size", size, better & success),
            ("found_at", state["updates"], success & ~found & (state["updates"] < self.steps // 2)),
        ):
            state[name].copy_(torch.where(where, value, state[name]))
        copy_rows(state["best"], x, better)
        found.logical_or_(better & success)
        self._resize_ball(state)
        over = (state["updates"] >= self.steps) | (state["best_size"] == 0)
        state["done"].copy_(found & over)

    def _resize_ball(self, state: State) -> None:
        """Shrink the ball where the share is fooled, and grow it elsewhere."""
        first, last = BALL_RATES
        turn = (state["updates"].double() * (math.pi / self.steps)).cos()
        rate = last + (first - last) * (1 + turn) / 2
        best, radius = state["best_size"], state["radius"]
        smaller = torch.minimum(radius, best) * (1 - rate)
        larger = radius * torch.where(state["found"], 1 + rate, self._growth)
        radius.copy_(torch.where(state["success"], smaller, torch.minimum(larger, best)))

    @property
    def _growth(self) -> float:
        """Factor by which the ball grows until the first success, to be the range half way."""
        lower, upper = self.bounds or (0.0, 1.0)
        return math.pow(max((upper - lower) / (FIRST_BALL * self.alpha), 1.0), 2 / self.steps)

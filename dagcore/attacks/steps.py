"""Steps: how a gradient moves the images."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..engine.devices import device_for
from ..engine.loop import Evaluation, State
from ..levels import radius, shown

NONE_YET = torch.iinfo(torch.int32).max  # above any number of active targets


@dataclasses.dataclass(frozen=True)
class NormalisedStep:
    """The step x <- clip(x + gamma / ||r||_inf * r), with the norm taken per image.

    Args:
        gamma: step length, in the units of the images.
        bounds: valid range of the images, None for no clipping.
        epsilon: radius of the L-infinity ball around the origin, None for no ball.
        levels: number of levels between the bounds on which images are evaluated, None for any
            value. Steps then accumulate in a shadow copy between the levels; its nearest levels are
            evaluated.
    """

    gamma: float
    bounds: tuple[float, float] | None = None
    epsilon: float | None = None
    levels: int | None = None

    def begin(self, images: Tensor, start: Tensor) -> State:
        """Return the shadow and its image on the levels, if there are levels."""
        if self.levels is None or self.bounds is None:
            return {}
        exact = torch.promote_types(start.dtype, torch.float32)
        epsilon = math.inf if self.epsilon is None else self.epsilon
        image = shown(start.to(exact), images.to(exact), self.bounds, self.levels, epsilon)
        return {"shadow": start, "x": image.to(start.dtype)}

    @property
    def reach(self) -> float:
        """Number of levels by which a pixel may change."""
        assert self.levels is not None
        assert self.bounds is not None
        epsilon = math.inf if self.epsilon is None else self.epsilon
        return radius(epsilon, self.bounds, self.levels)

    def move(self, state: State, seen: Evaluation, going: Tensor) -> Tensor:
        """Take the step, unless the norm is 0 or not finite, or no other level is within reach."""
        if seen.gradient is None:
            return going
        on_levels = self.levels is not None
        if on_levels and self.reach == 0:
            return torch.zeros_like(going)
        lower, upper = self.bounds or (-math.inf, math.inf)
        # Bypass the checks of the wrapper: arguments were checked on arrival.
        _, moved = torch.ops.dagcore.linf_step_(
            state["shadow" if on_levels else "x"],
            state["origin"],
            seen.gradient,
            going.int(),
            self.gamma,
            lower,
            upper,
            math.inf if self.epsilon is None else self.epsilon,
            state["x"] if on_levels else None,
            self.levels or 0,
        )
        return cast(Tensor, moved)


@dataclasses.dataclass(frozen=True)
class ProjectedStep:
    """PGD's step x <- Proj(x + alpha * direction), onto the bounds and a ball around the origin.

    The direction is the sign of the gradient g, or for "l2" g divided by its L2 norm. With
    momentum, m <- momentum * m + g / ||g||_1 takes the place of g.

    Args:
        norm: norm of the ball, "linf" or "l2".
        alpha: step length, in the units of the images.
        epsilon: radius of the ball.
        bounds: valid range of the images, None for no clipping.
        momentum: factor by which m decays in each step; 0 for no momentum.
        levels: as for `NormalisedStep`.
        keep: whether to keep the iterate with the fewest active targets (the first of equals).
    """

    norm: str
    alpha: float
    epsilon: float
    bounds: tuple[float, float] | None = None
    momentum: float = 0.0
    levels: int | None = None
    keep: bool = True

    def begin(self, images: Tensor, start: Tensor) -> State:
        """Return step lengths, radii, images on the levels, best images and momentum."""
        return self._begin(images, start, self.epsilon)

    def _begin(self, images: Tensor, start: Tensor, epsilon: float) -> State:
        state: State = {}
        if self.levels is not None and self.bounds is not None:
            exact = torch.promote_types(start.dtype, torch.float32)
            image = shown(
                start.to(exact), images.to(exact), self.bounds, self.levels, epsilon, self.norm
            )
            state |= {"shadow": start, "x": image.to(start.dtype)}
        for name, value in (("alpha", self.alpha), ("radius", epsilon)):
            state[name] = images.new_full((len(images),), value, dtype=torch.float64)
        if self.keep:
            state["best"] = state.get("x", start)
            state["best_active"] = images.new_full((len(images),), NONE_YET, dtype=torch.int64)
        if self.momentum:
            exact = torch.promote_types(images.dtype, torch.float32)
            state["momentum"] = torch.zeros_like(images, dtype=exact)
        return state

    def move(self, state: State, seen: Evaluation, going: Tensor) -> Tensor:
        """Take the step, unless the direction is zero or not finite."""
        self.keep_best(state, seen)
        if seen.gradient is None:
            return going
        return self.step(state, seen.gradient, going)

    def keep_best(self, state: State, seen: Evaluation) -> None:
        """Keep the images that have fewer active targets than ever before."""
        if self.keep:
            active = seen.active.sum(1)
            better = state["running"] & (active < state["best_active"])
            state["best_active"].copy_(torch.where(better, active, state["best_active"]))
            copy_rows(state["best"], state["x"], better)

    def step(self, state: State, gradient: Tensor, going: Tensor) -> Tensor:
        """Run the step kernel."""
        on_levels = self.levels is not None
        lower, upper = self.bounds or (-math.inf, math.inf)
        # Bypass the checks of the wrapper: arguments were checked on arrival.
        moved = torch.ops.dagcore.pgd_step_(
            state["shadow" if on_levels else "x"],
            state["origin"],
            gradient,
            going.int(),
            self.norm,
            state["alpha"],
            state["radius"],
            lower,
            upper,
            state.get("momentum"),
            self.momentum,
            state.get("previous"),
            state.get("share"),
            state["x"] if on_levels else None,
            self.levels or 0,
        )
        return cast(Tensor, moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveStep(ProjectedStep):
    """APGD's step: PGD with inertia and an adaptive step length (Croce and Hein, ICML 2020).

    With z = Proj(x + alpha * direction) and a = 0.75, the update is
    x <- Proj(x + a (z - x) + (1 - a)(x - previous)).

    At a checkpoint alpha is halved, and the image goes back to where the loss was largest, in two
    cases: if the loss has risen in at most 0.75 of the steps since the last checkpoint; or if its
    largest value has not risen since then, and alpha was not halved there.

    Args:
        phases: steps and radius of the ball for each phase. A phase begins at the best iterate of
            the previous one, projected, with alpha at twice its radius. Only the best of the last
            phase is kept.
    """

    alpha: float = math.nan
    epsilon: float = math.nan
    phases: tuple[tuple[int, float], ...]

    @property
    def updates(self) -> int:
        """Number of updates in all phases; a change of phase is an update too."""
        return sum(steps for steps, _ in self.phases) + len(self.phases) - 1

    def begin(self, images: Tensor, start: Tensor) -> State:
        """Return the state of PGD, and the history of the losses."""
        count = len(images)
        state = self._begin(images, start, self.phases[0][1])
        iterate = state.get("shadow", start)
        for name in ("top_loss", "checked_loss", "last_loss", "share"):
            state[name] = images.new_zeros(count, dtype=torch.float64)
        state["rises"] = images.new_zeros(count, dtype=torch.int64)
        state["halved"] = images.new_zeros(count, dtype=torch.bool)
        state["previous"] = iterate
        state["top"] = iterate
        state["top_gradient"] = torch.zeros_like(images)
        if len(self.phases) > 1:
            state["provisional"] = images.new_ones(count, dtype=torch.bool)
        return state

    def move(self, state: State, seen: Evaluation, going: Tensor) -> Tensor:
        """Take the step, or go to the next phase."""
        self.keep_best(state, seen)
        if seen.gradient is None:
            return going
        assert seen.loss is not None
        loss, gradient = seen.loss.sum(1), seen.gradient
        plan = timetable(self.phases, str(gradient.device))
        at = state["updates"]
        first, check, ends = plan.first[at], plan.check[at], plan.ends[at]
        iterate = state["shadow" if self.levels is not None else "x"]

        def put(name: str, where: Tensor, value: Tensor | float) -> None:
            state[name].copy_(torch.where(where, value, state[name]))

        put("alpha", first, 2 * plan.radius[at])
        put("rises", first, 0)
        put("halved", first, True)
        state["share"].copy_(torch.where(first, 1.0, 0.75))
        rose = loss > state["last_loss"]
        state["rises"].add_(~first & rose)
        top = first | (loss > state["top_loss"])
        put("top_loss", top, loss)
        put("checked_loss", first, loss)
        state["last_loss"].copy_(loss)
        copy_rows(state["top"], iterate, going & top)
        copy_rows(state["top_gradient"], gradient, going & top)

        checked = check > 0
        still = ~state["halved"] & (state["checked_loss"] >= state["top_loss"])
        halve = checked & ((state["rises"] <= 0.75 * check) | still)
        put("alpha", halve, state["alpha"] / 2)
        put("halved", checked, halve)
        put("checked_loss", checked, state["top_loss"])
        put("rises", checked, 0)
        copy_rows(iterate, state["top"], going & halve)
        copy_rows(gradient, state["top_gradient"], going & halve)
        if len(self.phases) == 1:
            return self.step(state, gradient, going)
        # At the end of a phase, its best image is projected onto the next ball. Until the last
        # phase, updates pass without a step where the loss is flat.
        ends = ends & going
        put("radius", ends, plan.next_radius[at])
        moved = self.step(state, gradient, going & ~ends) | (going & state["provisional"])
        self._begin_again(state, ends)
        state["best_active"].masked_fill_(ends, NONE_YET)
        state["provisional"].logical_and_(~(ends & plan.to_last[at]))
        return moved

    def _begin_again(self, state: State, where: Tensor) -> None:
        """Go to the best image so far, projected onto the ball around the origin."""
        x, best, origin, reach = (state[name] for name in ("x", "best", "origin", "radius"))
        if device_for(x.device).synchronous and not bool(where.any()):
            return
        exact = torch.promote_types(x.dtype, torch.float32)
        origin = origin.to(exact)
        rows = (-1, *[1] * (x.dim() - 1))
        away, most = best.to(exact) - origin, reach.to(exact).view(rows)
        if self.norm == "linf":
            away = away.clamp(-most, most)
        else:
            size = torch.linalg.vector_norm(away.flatten(1), dim=1).view(rows)
            away = torch.where(size > most, away * (most / size), away)
        point = origin + away
        if self.bounds is not None:
            point = point.clamp(*self.bounds)
        if self.levels is not None and self.bounds is not None:
            image = shown(point, origin, self.bounds, self.levels, reach, self.norm)
            copy_rows(state["shadow"], point.to(x.dtype), where)
            copy_rows(x, image.to(x.dtype), where)
        else:
            copy_rows(x, point.to(x.dtype), where)


class Timetable(NamedTuple):
    """What to do after each number of updates, (M + 1,) each."""

    first: Tensor
    """Whether a phase begins."""
    check: Tensor
    """At a checkpoint, the number of steps since the last one; 0 elsewhere."""
    ends: Tensor
    """Whether the update goes to the next phase."""
    to_last: Tensor
    """Whether that phase is the last one."""
    radius: Tensor
    next_radius: Tensor
    """Radius of the current phase, and of the next one."""


@functools.lru_cache(maxsize=32)
def timetable(phases: tuple[tuple[int, float], ...], device: str) -> Timetable:
    """Return the timetable of APGD: a checkpoint after 0.22 of a phase, then closer and closer."""
    first, check, radii = [], [], []
    for steps, reach in phases:
        marks = [0] * (steps + 1)
        window, at = max(int(0.22 * steps), 1), 0
        while at + window <= steps:
            at += window
            marks[at] = window
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        check += marks
        first += [True] + [False] * steps
        radii += [reach] * (steps + 1)
    ends = [*first[1:], False]
    to_last = [end and k == len(first) - phases[-1][0] - 2 for k, end in enumerate(ends)]
    with torch.inference_mode(False):
        return Timetable(
            torch.tensor(first, device=device),
            torch.tensor(check, device=device),
            torch.tensor(ends, device=device),
            torch.tensor(to_last, device=device),
            torch.tensor(radii, dtype=torch.float64, device=device),
            torch.tensor([*radii[1:], radii[-1]], dtype=torch.float64, device=device),
        )


def copy_rows(kept: Tensor, values: Tensor, where: Tensor) -> None:
    """Set kept[n] = values[n] where `where` (N,) is true, without waiting for a device."""
    if device_for(kept.device).synchronous:
        for n in where.nonzero().flatten().tolist():
            kept[n].copy_(values[n])
    else:
        rows = where.view(-1, *[1] * (kept.dim() - 1))
        kept.copy_(torch.where(rows, values, kept))

"""The checks, one function for each. docs/validity.md has a section for each of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...defences import Defence
from ..summary import warning_of_labels
from .case import DRAWS, Batch, Case
from .modules import ZERO, random_modules, without_gradient
from .planted import find_planted

# Accuracies are in percent of the pixels that count, and their differences are in points.
# docs/validity.md has the figures of sound networks, from which the thresholds keep a distance.
SAME = 1e-4  # of the scores' spread: kernels that only round differently stay below
WITHOUT_GRADIENT = 50.0  # % of the images' pixels
SATURATED = 90.0  # % of the correct pixels
PARALLEL = 0.9999  # cosine of two gradients that are the same up to scale
UNBOUNDED = 10.0  # % of the pixels that an attack without bounds may leave correct
STRIDE = 1 / 8  # of the whole range: the radius that the steps of the unbounded attack suit
NOTHING = 1.0  # % of the pixels: too few for a fall
SLACK = 1.0  # points: runs of the same attack from different points differ by less
PLATEAU = 20.0  # points that twice the steps may take in addition
GROWTH = 1.75  # times as much with twice the steps; an attack that only continues takes 2 times
NOISE_SHARE = 0.5  # of what the attack takes
FOUND = 0.9  # of the planted examples


class Seen(NamedTuple):
    """The observation of a check."""

    bad: bool | None
    """Whether the check is flagged; None if it could not be made."""
    text: str
    meaning: str = ""
    """Meaning of the observation if it is bad."""
    figures: Mapping[str, Any] = {}


def labels_fit(case: Case) -> Seen:
    """Check whether the labels use the network's classes."""
    shifted = dict.fromkeys((-1, 0, 1), 0)
    for batch, scores in case.clean_scores:
        seen, counts = case.seen(scores, batch), case.counts(batch)
        for shift in shifted:
            shifted[shift] += int(((seen == batch.labels + shift) & counts).sum())
    record = {
        "labelled": True,
        "targets": case.counted,
        "correct_before": shifted[0],
        "correct_if_shifted": {"-1": shifted[-1], "+1": shifted[1]},
    }
    warning = warning_of_labels([record])
    shares = {shift: 100 * count / case.counted for shift, count in shifted.items()}
    return Seen(
        warning is not None,
        warning or f"{shares[0]:.1f} % of the pixels are correct on the clean images",
        figures={
            "correct": shares[0],
            "correct if one less": shares[-1],
            "correct if one more": shares[1],
        },
    )


def stochastic_forward(case: Case) -> Seen:
    """Check whether a second pass of the same images gives different scores."""
    worst, changed = 0.0, 0
    for batch, first in case.clean_scores:
        again = case.look(batch.images, batch)
        difference = float((again.double() - first.double()).abs().nan_to_num(0).max())
        spread = float(first.double().nan_to_num(0).std())
        worst = max(worst, difference / max(spread, 1e-30))
        differs = case.seen(first, batch) != case.seen(again, batch)
        changed += int((differs & case.counts(batch)).sum())
    if isinstance(case.victim, Defence) and case.victim.random:
        return _drawing(case.victim)
    modules = []
    if worst > SAME and isinstance(case.victim, nn.Module):
        batch = case.batches[0]
        names = random_modules(case.victim, lambda: case.look(batch.images, batch))
        modules = [_named(case.victim, name) for name in names]
    return Seen(
        worst > SAME,
        f"two forward passes of the same images differ by {worst:.2g} times the scores' spread"
        + _at(modules),
        "the attack must follow the mean of the gradients of many draws, and accuracies are those "
        "of one draw",
        {
            "difference": worst,
            "pixels changed": 100 * changed / case.counted,
            "modules": modules,
        },
    )


def _drawing(defence: Defence) -> Seen:
    """Return the observation for a random defence, which draws the same for the same images."""
    layers = [one for one in defence.layers if any(view.random for view in one.views)]
    most = max(one.draws for one in layers)  # later ones draw once for each of these
    return Seen(
        most == 1,
        f"the defence is random: {'; '.join(one.described() for one in layers)}",
        "the attack must follow the mean over many draws: attack what its method adaptive() gives",
        {"draws": most, "modules": [one.described() for one in layers]},
    )


def _named(network: nn.Module, name: str) -> str:
    """Return a module's name and kind for messages."""
    kind = type(network.get_submodule(name)).__name__
    return f"{name} ({kind})" if name else f"the network's own forward ({kind})"


def _at(modules: list[str]) -> str:
    return f", at {', '.join(modules)}" if modules else ""


def zero_gradient(case: Case) -> Seen:
    """Check whether the gradient of the cross-entropy is zero."""
    zero = _with_targets(case, [(batch, own == 0) for batch, own in case.clean_gradients])
    images, pixels = _shares(zero, every=True)
    count = sum(_saturated(case, batch, scores) for batch, scores in case.clean_scores)
    saturated = 100 * count / max(1, round(case.clean / 100 * case.counted))
    return Seen(
        images > 0 or pixels > WITHOUT_GRADIENT or saturated > SATURATED,
        f"the gradient of the cross-entropy is zero everywhere in {images:.0f} % of the images, "
        f"and at {pixels:.1f} % of all pixels; {saturated:.1f} % of the correct pixels have a loss "
        "of 0",
        "an attack that follows it learns nothing there",
        {"images": images, "pixels": pixels, "saturated": saturated},
    )


def nan_gradient(case: Case) -> Seen:
    """Check whether the gradient of the cross-entropy is finite."""
    broken = _with_targets(case, [(batch, ~own.isfinite()) for batch, own in case.clean_gradients])
    images, pixels = _shares(broken, every=False)
    return Seen(
        images > 0,
        f"the gradient of the cross-entropy is not finite in {images:.0f} % of the images, and at "
        f"{pixels:.1f} % of all pixels",
        "attacks cannot take a step there",
        {"images": images, "pixels": pixels},
    )


def _with_targets(case: Case, batches: list[tuple[Batch, Tensor]]) -> list[Tensor]:
    """Keep the rows of images with pixels that count. For others, having no gradient is right."""
    return [rows[case.counts(batch).flatten(1).any(1)] for batch, rows in batches]


def _shares(where: list[Tensor], *, every: bool) -> tuple[float, float]:
    """Return the percentages of images and of pixels at which masks (N, 3, H, W) hold.

    With `every`, a mask must hold everywhere in an image and in all channels of a pixel. Without,
    it must hold somewhere.
    """
    gather = torch.all if every else torch.any
    images = torch.cat([gather(one.flatten(1), 1) for one in where])
    pixels = torch.cat([gather(one, 1).flatten() for one in where])
    return 100 * float(images.double().mean()), 100 * float(pixels.double().mean())


def _saturated(case: Case, batch: Batch, scores: Tensor) -> int:
    """Return the number of pixels whose cross-entropy, and so its gradient, is 0 in float32."""
    count = 0
    for one, label in zip(scores.float(), batch.labels, strict=True):
        high = one[None]
        if high.shape[2:] != label.shape:
            high = functional.interpolate(
                high, label.shape, mode="bilinear", align_corners=case.scores_of.align_corners
            )
        ignored = case.attack.ignore_index
        loss = functional.cross_entropy(high, label[None], ignore_index=ignored, reduction="none")
        count += int(((loss[0] == 0) & (label != ignored)).sum())
    return count


def constant_gradient(case: Case) -> Seen:
    """Check whether the gradient is the same everywhere."""
    inside, between = [], []
    for batch, gradient in case.clean_gradients:
        moved, _ = case.gradient(case.points(batch, 0), batch)
        if moved is not None:
            inside += _cosines(gradient, moved)
        between += _cosines(gradient[1:], gradient[:-1])
    if not inside:
        return Seen(None, "no gradient is finite and nonzero: see zero-gradient")
    figures = {"within ball": min(inside)} | ({"between images": min(between)} if between else {})
    return Seen(
        max(figures.values()) > PARALLEL,
        "gradients at an image and at a random point of its ball have a cosine of "
        f"{min(inside):.3g}" + (f", those of two images {min(between):.3g}" if between else ""),
        "the gradient does not depend on the image, so it is not that of the loss",
        figures,
    )


def _cosines(one: Tensor, other: Tensor) -> list[float]:
    """Return the cosines of pairs of gradients (N, 3, H, W) that are finite and nonzero."""
    a, b = one.flatten(1).double(), other.flatten(1).double()
    cosines = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return [value for value in cosines.tolist() if math.isfinite(value)]


def non_differentiable(case: Case) -> Seen:
    """Check whether modules stop all gradients."""
    ends, batch = {}, case.batches[0]
    module = isinstance(case.victim, nn.Module)
    if module:

        def run() -> tuple[Tensor, Tensor]:
            leaf = batch.images.detach().requires_grad_()
            return leaf, case.loss(leaf, batch)[0]

        ends = without_gradient(case.victim, run)
    modules = [_named(case.victim, name) for name in ends]
    if not modules and case.differentiable:
        text = "every module lets gradients through"
        if isinstance(case.victim, Defence):
            text += f" ({case.victim.gradient})"
        text = text if module else "the scores have a gradient; a function has no modules to check"
        return Seen(False, text, figures={"modules": []})
    zero = bool(ends) and set(ends.values()) == {ZERO}
    return Seen(
        True,
        f"the gradient {'becomes zero' if zero else 'ends'}{_at(modules)}",
        "the attack needs a differentiable stand-in for it in the backward pass (BPDA), or must "
        "do without gradients",
        {"modules": modules},
    )


def unbounded_attack(case: Case) -> Seen:
    """Check whether an attack without bounds leaves no pixel correct."""
    largest = max(batch.images[0].numel() for batch in case.batches)
    whole = 1.0 if case.attack.norm == "linf" else math.sqrt(largest)
    steps = 2 * case.steps
    _, left = case.attacked(
        epsilon=whole,
        steps=steps,
        random_start=False,  # it would be noise alone
        restarts=1,
        **case.stride(whole * STRIDE / case.attack.epsilon),
    )
    return Seen(
        left > UNBOUNDED,
        f"{steps} steps without bounds leave {left:.1f} % of the pixels correct",
        "0 % is possible, so the gradients mislead, or the loss or the steps are unsuitable",
        {"accuracy": left, "steps": steps},
    )


def no_fall_with_epsilon(case: Case) -> Seen:
    """Check whether the accuracy falls in larger balls."""
    half, twice = (
        case.attacked(epsilon=factor * case.attack.epsilon, **case.stride(factor))[1]
        for factor in (0.5, 2)
    )
    curve = [case.clean, half, case.own, twice]
    rise = max(after - before for before, after in itertools.pairwise(curve))
    grows = case.clean - twice >= 1.5 * (case.clean - half) > 0
    falls = grows or twice <= 0.9 * half or half <= NOTHING
    return Seen(
        rise > SLACK or not falls,
        f"accuracy at 0, 1/2, 1 and 2 epsilon is {', '.join(f'{one:.1f}' for one in curve)} %",
        "a larger ball contains the smaller one, but the attack does not make use of it",
        {"accuracies": [round(one, 2) for one in curve], "largest rise": rise},
    )


def not_at_plateau(case: Case) -> Seen:
    """Check whether twice the steps take much more accuracy."""
    _, twice = case.attacked(steps=2 * case.steps)
    more, taken = case.own - twice, case.clean - case.own
    return Seen(
        more > PLATEAU or more > max(SLACK, (GROWTH - 1) * taken),
        f"{case.steps} steps leave {case.own:.1f} % of the pixels correct, {2 * case.steps} steps "
        f"{twice:.1f} %",
        "the attack needs more steps, or larger ones",
        {"accuracy": case.own, "with twice the steps": twice},
    )


def one_step_stronger(case: Case) -> Seen:
    """Check whether a single step across the ball is stronger than the attack."""
    epsilon, left = case.attack.epsilon, []
    for batch, gradient in case.clean_gradients:
        if case.attack.norm == "linf":
            step = gradient.nan_to_num(0).sign()
        else:
            length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            step = (gradient / length).nan_to_num(0)
        images = (batch.images + epsilon * step).clamp(0, 1)
        left.append(case.correct(case.look(images, batch), batch))
    one = case.accuracy(left)
    return Seen(
        one < case.own - SLACK,
        f"one step of epsilon leaves {one:.1f} % of the pixels correct, "
        f"the attack {case.own:.1f} %",
        "the steps of the attack are unsuitable",
        {"one step": one, "attack": case.own},
    )


def noise_as_strong(case: Case) -> Seen:
    """Check whether random points of the ball are nearly as strong as the attack."""
    left = case.accuracy([noise.correct.amin(0) for noise in case.noise])
    taken, by_attack = case.clean - left, case.clean - case.own
    return Seen(
        taken >= NOISE_SHARE * by_attack,
        f"the worst of {DRAWS} random points of the ball takes {taken:.2f} points of accuracy, the "
        f"attack {by_attack:.2f}",
        "the attack does little more than noise",
        {"noise": taken, "attack": by_attack},
    )


def planted_example(case: Case) -> Seen:
    """Check whether the attack finds planted adversarial examples."""
    planted, found, by_noise = find_planted(case)
    if not planted:
        return Seen(None, "no point of the ball has scores that differ from those of random points")
    return Seen(
        found < FOUND * planted,
        f"the attack finds {found} of {planted} planted adversarial examples, noise {by_noise}",
        "it misses examples that exist",
        {
            "planted": planted,
            "found": 100 * found / planted,
            "found by noise": 100 * by_noise / planted,
        },
    )


def transfer_stronger(case: Case) -> Seen:
    """Check whether adversarial examples for another network are stronger than the victim's own."""
    if case.surrogate is None:
        return Seen(None, "it needs a surrogate, another network for the same classes")
    examples, of_surrogate = case.attacked(case.surrogate)
    left = case.accuracy(
        [
            case.correct(case.look(images, batch), batch)
            for images, batch in zip(examples, case.batches, strict=True)
        ]
    )
    return Seen(
        left < case.own - SLACK,
        f"adversarial examples for the surrogate leave {left:.1f} % of the pixels correct, the "
        f"victim's own {case.own:.1f} %",
        "the victim's gradients mislead",
        {"transfer": left, "white box": case.own, "on the surrogate": of_surrogate},
    )


LOOKS: dict[str, Callable[[Case], Seen]] = {
    "labels-fit": labels_fit,
    "stochastic-forward": stochastic_forward,
    "zero-gradient": zero_gradient,
    "nan-gradient": nan_gradient,
    "constant-gradient": constant_gradient,
    "non-differentiable": non_differentiable,
    "unbounded-attack": unbounded_attack,
    "no-fall-with-epsilon": no_fall_with_epsilon,
    "not-at-plateau": not_at_plateau,
    "one-step-stronger": one_step_stronger,
    "noise-as-strong": noise_as_strong,
    "planted-example": planted_example,
    "transfer-stronger": transfer_stronger,
}
WITHOUT_GRADIENTS = ("labels-fit", "stochastic-forward", "non-differentiable")
"""Checks that can be made if the scores have no gradient."""

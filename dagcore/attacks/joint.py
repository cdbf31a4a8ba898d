"""One perturbation for several networks at once: `DAG` on the sum of their normalised gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..engine import ScoreModel, frozen
from ..engine.memory import freed_memory_kept
from ..errors import ArgumentError, ArgumentTypeError
from ..labels import assign
from ..perturbation import perceptibility
from ..reference import allowance, input_gradient, seed_op, step_scale, targets
from .dag import DAG, Status, check_boxes


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One of the networks, with what the attack on it aims at. See `DAG.__call__`."""

    model: Callable[..., Any]
    labels: Tensor
    """(N, *T)."""
    adversarial_labels: Tensor | str = "permutation"
    """(N, *T), or how to choose them."""
    boxes: Tensor | None = None
    """(N, P, 4) that a detector takes."""
    goal: str | None = None
    """"leave" or "reach"; the attack's if None."""


@dataclasses.dataclass(frozen=True, eq=False)
class JointResult:
    """What a joint attack on N images by K networks found."""

    adversarial: Tensor
    """(N, 3, H, W) attacked images."""
    perturbation: Tensor
    """(N, 3, H, W) adversarial - images."""
    iterations: Tensor
    """(N,) int32, updates applied."""
    status: tuple[Status, ...]
    """Why each image stopped: converged where all networks are fooled."""
    active: Tensor
    """(max_iter + 1, K, N) int32: active targets after 0, 1, ... updates; -1 once stopped."""
    targets: Tensor
    """(K, N) int32, targets that count."""
    perceptibility: Tensor
    """(N,), in units of the [0, 1] range."""


def joint_attack(
    attack: DAG,
    parts: Sequence[Part],
    images: Tensor,  # (N, 3, H, W)
    generator: torch.Generator | None = None,
) -> JointResult:
    """Attack several networks by one perturbation of each image.

    In each update the gradient of every network that still has active targets is divided by its
    L-infinity norm, and the sum of these by its own, so that no network outweighs the others. An
    image stops when none has more active targets than the tolerance allows.

    Args:
        attack: the settings; its backend does not matter.
        parts: the networks and their targets, at least one.
        images: (N, 3, H, W) floating point, within the attack's bounds.
        generator: source of the random choices.

    Raises:
        TypeError, ValueError: the argument, what was required and what came.
    """
    if not isinstance(parts, Sequence):
        raise ArgumentTypeError(
            f"parts must be a sequence of dagcore.Part, got {type(parts).__name__}"
        )
    if not parts:
        raise ArgumentError("parts must have at least one network, got none")
    rules = []
    for k, part in enumerate(parts):
        if not isinstance(part, Part):
            raise ArgumentTypeError(f"parts[{k}] must be a dagcore.Part, got {type(part).__name__}")
        rule = attack if part.goal is None else dataclasses.replace(attack, goal=part.goal)
        try:
            rule._check(images, part.labels, part.adversarial_labels, generator)
            check_boxes(part.model, part.boxes, images)
        except (TypeError, ValueError) as error:
            raise type(error)(f"parts[{k}]: {error}") from error
        rules.append(rule)
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(frozen(part.model))
        if images.device.type == "cpu":
            stack.enter_context(freed_memory_kept())
        stack.enter_context(torch.inference_mode(False))
        return _run(attack, rules, list(parts), images, generator)


def _run(
    attack: DAG,
    rules: list[DAG],
    parts: list[Part],
    images: Tensor,
    generator: torch.Generator | None,
) -> JointResult:
    lower, upper = attack.bounds or (None, None)
    readers = [ScoreModel(part.model) for part in parts]
    x = images.detach().clone(memory_format=torch.contiguous_format)
    count, device = len(x), x.device
    history = torch.full(
        (attack.max_iter + 1, len(parts), count), -1, dtype=torch.int32, device=device
    )
    iterations = torch.zeros(count, dtype=torch.int32, device=device)
    status = [Status.BUDGET] * count
    counted = torch.zeros((len(parts), count), dtype=torch.int32, device=device)
    allowed = torch.zeros((len(parts), count), dtype=torch.float64, device=device)
    aims: list[Tensor | str] = [part.adversarial_labels for part in parts]
    live = torch.arange(count, device=device)
    for m in range(attack.max_iter + 1 if count else 0):
        total, active = torch.zeros_like(x[live]), []
        for k, (part, reader, rule) in enumerate(zip(parts, readers, rules, strict=True)):
            leaf = x[live].requires_grad_()
            labels = part.labels[live]
            with torch.enable_grad():
                scores = reader(leaf, labels, None if part.boxes is None else part.boxes[live])
            if m == 0:
                classes, ignored = scores.shape[1], rule.ignore_index
                aims[k] = assign(aims[k], part.labels, classes, ignored, generator)
                counted[k] = targets(classes, part.labels, aims[k], rule.goal, ignored).int()
                allowed[k] = allowance(counted[k], attack.tolerance)
            aim = aims[k]
            seed, own = seed_op(ops, scores, labels, reader.align_corners)(
                scores,
                labels,
                aim if isinstance(aim, str) else aim[live],
                goal=rule.goal,
                ignore_index=rule.ignore_index,
            )
            active.append(own)
            wanted = own > allowed[k, live]
            if m < attack.max_iter and bool(wanted.any()):
                total += normalised(input_gradient(scores, leaf, seed), wanted)
        now = torch.stack(active)
        history[m, :, live] = now
        done = (now <= allowed[:, live]).all(0)
        for n in live[done].tolist():
            status[n] = Status.CONVERGED
        if m == attack.max_iter or bool(done.all()):
            break
        moving = x[live]
        norms = ops.linf_step_(
            moving,
            images[live].detach(),
            total,
            torch.where(done, 0, 1).int(),
            gamma=attack.gamma,
            lower=lower,
            upper=upper,
            epsilon=attack.epsilon,
        )
        x[live] = moving
        moved = step_scale(norms, attack.gamma) > 0
        for n in live[~done & ~moved].tolist():
            status[n] = Status.STALLED
        live = live[moved]
        iterations[live] += 1
        if not len(live):
            break
    perturbation = x - images.detach()
    return JointResult(
        adversarial=x,
        perturbation=perturbation,
        iterations=iterations,
        status=tuple(status),
        active=history,
        targets=counted,
        perceptibility=perceptibility(perturbation, attack._range()),
    )


def normalised(gradient: Tensor, wanted: Tensor) -> Tensor:
    """Each image's gradient over its L-infinity norm; 0 where that cannot be, or is not wanted."""
    norms = gradient.abs().flatten(1).amax(1)
    scale = torch.where(wanted, step_scale(norms, 1.0), 0)
    clean = torch.where((scale > 0).view(-1, 1, 1, 1), gradient, 0)
    return clean * scale.to(gradient.dtype).view(-1, 1, 1, 1)

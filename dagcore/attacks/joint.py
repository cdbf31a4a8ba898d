"""Joint attacks: one perturbation for several networks, along the sum of their gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..engine.networks import Targets
from ..engine.stream import Sample, StreamCallback
from ..errors import ArgumentError, ArgumentTypeError
from .base import Attack, Callback, check_shared, run_batch, run_stream
from .dag import DAG
from .result import Result


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One network of a joint attack, with its targets. See `DAG.__call__`."""

    model: Callable[..., Any]
    labels: Tensor | None = None
    """(N, *T); None for a stream, whose samples have them."""
    adversarial_labels: Tensor | str | None = None
    """(N, *T), or how to choose them; None for the attack's default."""
    boxes: Tensor | None = None
    """(N, P, 4), the boxes at which a detector computes its scores."""
    goal: str | None = None
    """For `DAG`: "leave" or "reach"; None for the attack's goal."""


def joint_attack(
    attack: Attack,
    parts: Sequence[Part],
    images: Tensor,  # (N, 3, H, W)
    generator: torch.Generator | None = None,
    *,
    start: Tensor | None = None,  # (N, 3, H, W)
    callback: Callback | None = None,
) -> Result:
    """Attack several networks with one perturbation per image.

    In each update the gradient of every network that still has active targets is divided by its
    L-infinity norm, so that no network outweighs the others. The step follows the sum of these
    gradients, divided by the norm of the sum. An image stops when no network has more active
    targets than the tolerance allows.

    Args:
        attack: the settings; the backend is ignored.
        parts: the networks and their targets, at least one.
        images: (N, 3, H, W) floating point, within the attack's bounds.
        generator: source of the random choices.
        start: where to begin, as for `DAG.__call__`.
        callback: called with (update, active targets (K, N)) as they become known.

    Returns:
        A `Result` whose `active`, `targets` and `adversarial_labels` have one entry per network.

    Raises:
        TypeError, ValueError: a wrong argument; the message names it, what was required and what
            came.
    """
    attacks = _attacks(attack, parts)
    targets = []
    for k, (part, own) in enumerate(zip(parts, attacks, strict=True)):
        try:
            own.check(
                part.model, images, part.labels, part.adversarial_labels, part.boxes, generator
            )
        except (ArgumentTypeError, ArgumentError) as error:
            raise type(error)(f"parts[{k}]: {error}") from error
        assert part.labels is not None
        assign = own.assign(part.adversarial_labels, generator)
        targets.append(Targets(part.labels, assign, part.boxes))
    attack.check_start(start, images)
    images, start = attack.fitted("images", images), attack.fitted_start(start)
    checks.callback(callback)
    networks = [own.network(part.model) for part, own in zip(parts, attacks, strict=True)]
    return run_batch(attack, networks, images, targets, start, generator, callback, attacks=attacks)


def joint_stream(
    attack: Attack,
    parts: Sequence[Part],
    samples: Iterable[Sample],
    slots: int = 8,
    generator: torch.Generator | None = None,
    *,
    callback: StreamCallback | None = None,
) -> Iterator[Result]:
    """Attack several networks with one perturbation per image, on a stream of images.

    Args:
        attack: the settings; the backend is ignored.
        parts: the networks and their goals, without targets.
        samples: an iterable of `dagcore.Sample` whose `labels`, `adversarial_labels` and `boxes`
            have an entry for each network.
        slots: number of images under attack at a time.
        generator: source of the random choices, which do not depend on `slots`.
        callback: called with (keys of the images under attack, active targets (N, K)).

    Yields:
        A `Result` of one image (N = 1), like that of `joint_attack`, with the sample's `key`.

    Raises:
        TypeError, ValueError: as for `DAG.stream`.
    """
    attacks = _attacks(attack, parts)
    for k, part in enumerate(parts):
        for name in ("labels", "adversarial_labels", "boxes"):
            if getattr(part, name) is not None:
                raise ArgumentError(f"parts[{k}]: {name} must be None: samples have their own")
    networks = [own.network(part.model) for part, own in zip(parts, attacks, strict=True)]
    return run_stream(attack, networks, samples, slots, generator, callback, attacks=attacks)


def _attacks(attack: Attack, parts: Sequence[Part]) -> list[Attack]:
    """Return one attack per network, with the network's goal."""
    check_shared(attack)
    if not isinstance(parts, Sequence):
        raise ArgumentTypeError(
            f"parts must be a sequence of dagcore.Part, got {type(parts).__name__}"
        )
    if not parts:
        raise ArgumentError("parts must have at least one network, got none")
    for k, part in enumerate(parts):
        if not isinstance(part, Part):
            raise ArgumentTypeError(f"parts[{k}] must be a dagcore.Part, got {type(part).__name__}")
        if part.goal is not None and not isinstance(attack, DAG):
            raise ArgumentError(
                f"parts[{k}]: goal must be None for {type(attack).__name__}, got {part.goal!r}"
            )
    return [
        dataclasses.replace(attack, goal=part.goal)
        if isinstance(attack, DAG) and part.goal is not None
        else attack
        for part in parts
    ]

"""Run all checks on one network: check the arguments, and return the findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...attacks import BallAttack, CosPGD
from ...engine import frozen
from ...engine.devices import device_for
from ...errors import ArgumentError, ArgumentTypeError
from ...victims import Detector
from .case import Batch, Case
from .looks import LOOKS, WITHOUT_GRADIENTS

PASSED, FLAGGED, SKIPPED = "passed", "flagged", "skipped"

STEPS = 20  # of the default attack


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check."""

    name: str
    """Name of the check."""
    verdict: str
    """Either "passed", "flagged" or "skipped"."""
    text: str
    """Observation of the check and, if flagged, its meaning."""
    figures: dict[str, float | int | str | list[Any]]
    """Figures by name, for JSON. Accuracies and shares are in percent."""


def check(
    victim: Any,
    images: Sequence[Tensor],  # (3, H, W) each
    labels: Sequence[Tensor],  # (h, w) each
    *,
    epsilon: float = 8 / 255,
    norm: str = "linf",
    attack: BallAttack | None = None,
    surrogate: Any = None,
    seed: int = 0,
) -> list[Finding]:
    """Look for signs that an evaluation of a segmentation network cannot be trusted.

    The checks are those of Carlini et al. ("On evaluating adversarial robustness", 2019), and the
    planted example of Zimmermann et al. ("Increasing confidence in adversarial robustness
    evaluations", NeurIPS 2022). The network is not changed. The same call returns the same
    findings, even if the network is random.

    With an attack of S steps, an image takes at most 10 S + 30 passes through the network, most of
    them forward and backward. It takes fewer if attacks finish early.

    Args:
        victim: network to evaluate. It maps images (N, 3, H, W) in [0, 1] to scores (N, C, h, w),
            like the model of an attack.
        images: a few images, (3, H, W) floating point in [0, 1]. Sizes may differ.
        labels: true classes of the images, (h, w) uint8, int32 or int64, at least of the scores'
            size. Pixels with the attack's `ignore_index` (255) do not count.
        epsilon: radius of the evaluated ball, in the units of the images.
        norm: norm of the ball, "linf" or "l2".
        attack: strongest attack of the evaluation. It runs in that ball, without `levels` and
            `tolerance`. None is CosPGD with 20 steps of epsilon / 4.
        surrogate: another network for the same classes, whose adversarial examples are tried on
            the victim. None skips this check.
        seed: seed of the random choices.

    Returns:
        A finding for each check, in the order of docs/validity.md. Checks that could not run are
        "skipped", and their text says why.

    Raises:
        TypeError, ValueError: if an argument is invalid. The message names it, what was required
            and what was given.
    """
    checks.number("epsilon", epsilon, above=0)
    checks.choice("norm", norm, checks.NORMS)
    checks.integer("seed", seed, at_least=0)
    _check_network("victim", victim)
    if surrogate is not None:
        _check_network("surrogate", surrogate)
    attack = _in_ball(attack, epsilon, norm)
    batches = _batches(images, labels, attack)
    with _held(victim, surrogate, batches[0].images.device, seed):
        case = Case(victim, batches, attack, surrogate, seed)
        return [_find(name, case) for name in LOOKS]


def _find(name: str, case: Case) -> Finding:
    if not case.differentiable and name not in WITHOUT_GRADIENTS:
        text = "the scores have no gradient: see non-differentiable."
        return Finding(name, SKIPPED, text, {})
    seen = LOOKS[name](case)
    if seen.bad is None:
        return Finding(name, SKIPPED, f"{seen.text}.", {})
    text = f"{seen.text}: {seen.meaning}" if seen.bad and seen.meaning else seen.text
    text += "" if text.endswith("?") else "."
    figures = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in seen.figures.items()
    }
    return Finding(name, FLAGGED if seen.bad else PASSED, text, figures)


@contextmanager
def _held(victim: Any, surrogate: Any, device: torch.device, seed: int) -> Iterator[None]:
    """Hold networks in eval mode and seed torch's random numbers. Restore both afterwards."""
    gpus = [device] if device.type == "cuda" else []
    with (
        device_for(device).current(),
        frozen(victim),
        frozen(surrogate),
        torch.inference_mode(False),
        torch.random.fork_rng(gpus),
    ):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed(seed)
        yield


def _check_network(name: str, network: Any) -> None:
    if isinstance(network, Detector):
        raise ArgumentTypeError(
            f"{name} must be a segmentation network, got {type(network).__name__}, a detector"
        )
    if not callable(network):
        raise ArgumentTypeError(f"{name} must be callable, got {type(network).__name__}")


def _in_ball(attack: BallAttack | None, epsilon: float, norm: str) -> BallAttack:
    """Return the attack in the evaluated ball."""
    if attack is None:
        return CosPGD(epsilon=epsilon, norm=norm, alpha=epsilon / 4, steps=STEPS)
    if not isinstance(attack, BallAttack):
        raise ArgumentTypeError(
            "attack must be an attack within a ball, such as PGD or APGD, or None, "
            f"got {type(attack).__name__}"
        )
    return dataclasses.replace(
        attack, epsilon=epsilon, norm=norm, bounds=(0.0, 1.0), levels=None, tolerance=0.0
    )


def _batches(images: Any, labels: Any, attack: BallAttack) -> list[Batch]:
    """Check images and labels, and return them in batches of the same size."""
    for name, given in (("images", images), ("labels", labels)):
        if not isinstance(given, (Sequence, Tensor)) or not len(given):
            what = type(given).__name__
            what = f"an empty {what}" if isinstance(given, (Sequence, Tensor)) else what
            raise ArgumentError(f"{name} must be a sequence of at least one tensor, got {what}")
    if len(images) != len(labels):
        raise ArgumentError(
            f"labels must have one map for each of {len(images)} images, got {len(labels)}"
        )
    sizes: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        checks.tensor(f"images[{k}]", image, checks.FLOAT_DTYPES)
        checks.tensor(f"labels[{k}]", label, checks.LABEL_DTYPES)
        checks.device(f"images[{k}]", image, "images[0]", images[0])
        checks.device(f"labels[{k}]", label, "images[0]", images[0])
        if image.dim() != 3 or len(image) != 3:
            raise ArgumentError(f"images[{k}] must have shape (3, H, W), got {tuple(image.shape)}")
        if label.dim() != 2:
            raise ArgumentError(f"labels[{k}] must have shape (h, w), got {tuple(label.shape)}")
        attack.check_pixels(f"images[{k}]", image)
        sizes.setdefault((image.shape, label.shape, image.dtype), []).append(
            (attack.fitted(f"images[{k}]", image), label.long())
        )
    batches = [Batch(*map(torch.stack, zip(*group, strict=True))) for group in sizes.values()]
    if not any(bool((batch.labels != attack.ignore_index).any()) for batch in batches):
        raise ArgumentError(f"labels must have a pixel that counts, got {attack.ignore_index} only")
    return batches

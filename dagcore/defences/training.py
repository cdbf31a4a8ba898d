"""Adversarial training: batches in which some images are attacked at the network as it is now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..attacks import DAG, PGD, Attack, SegPGD
from ..errors import ArgumentError, ArgumentTypeError


def attacked(
    attack: Attack,
    model: Callable[..., Any],
    images: Tensor,  # (N, 3, H, W)
    labels: Tensor,  # (N, *T)
    *,
    share: float = 0.5,
    adversarial_labels: Tensor | str | None = None,
    boxes: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A batch to train on: its first images attacked, the others as they are.

    Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018; mixed
    batches as in Kurakin et al., Adversarial Machine Learning at Scale, ICLR 2017. Meanwhile the
    network is in eval mode, so that batch norms use the statistics that they have and do not learn
    from half-made images, and no gradient goes to its parameters. Afterwards it is as it was.

    One step with a step length above the radius, `PGD(epsilon=e, alpha=1.25 * e, steps=1)`, is fast
    adversarial training (Wong, Rice and Kolter, ICLR 2020).

    Args:
        attack: the inner attack: `PGD`, `SegPGD`, `DAG` or any other.
        model: the network, in training mode or not.
        images: (N, 3, H, W) floating point within the attack's bounds.
        labels: (N, *T), as for the attack.
        share: of the images that are attacked, in [0, 1], rounded to whole ones.
        adversarial_labels: as for the attack; its own default if None.
        boxes: (N, P, 4), what a detector's scores are read at.
        generator: source of the attack's random choices; torch's global one if None.

    Returns:
        (N, 3, H, W), without a gradient.

    Raises:
        TypeError, ValueError: the argument, what was required and what came.
    """
    if not isinstance(attack, Attack):
        raise ArgumentTypeError(f"attack must be an Attack, got {type(attack).__name__}")
    checks.tensor("images", images, checks.FLOAT_DTYPES)
    checks.number("share", share, at_least=0)
    if share > 1:
        raise ArgumentError(f"share must be at most 1, got {share}")
    if images.dim() != 4 or len(labels) != len(images):
        raise ArgumentError(
            f"images must have shape (N, 3, H, W) and an entry of labels each, got "
            f"{tuple(images.shape)} and {tuple(labels.shape)}"
        )
    count = round(share * len(images))
    if not count:
        return images.detach()
    rows = slice(0, count)
    given: dict[str, Any] = {} if boxes is None else {"boxes": boxes[rows]}
    if isinstance(adversarial_labels, Tensor):
        adversarial_labels = adversarial_labels[rows]
    if adversarial_labels is not None:
        given["adversarial_labels"] = adversarial_labels
    result = attack(model, images[rows].detach(), labels[rows], generator=generator, **given)
    return torch.cat([result.adversarial, images[count:].detach()])


INNER = ("pgd", "segpgd", "dag")


def inner(name: str, epsilon: float, steps: int) -> Attack:
    """The attack of a training, by name: "pgd", "segpgd" or "dag", in an L-infinity ball.

    Together its steps are 2.5 times as long as the radius, as in Madry et al.

    Args:
        name: one of `INNER`.
        epsilon: the radius, of images in [0, 1].
        steps: updates.

    Raises:
        TypeError, ValueError: the argument, what was required and what came.
    """
    checks.choice("adversarial", name, INNER)
    checks.number("epsilon", epsilon, above=0)
    checks.integer("steps", steps, at_least=1)
    length = 2.5 * epsilon / steps
    if name == "dag":
        return DAG(gamma=length, max_iter=steps, epsilon=epsilon)
    kind = PGD if name == "pgd" else SegPGD
    return kind(epsilon=epsilon, alpha=length, steps=steps)

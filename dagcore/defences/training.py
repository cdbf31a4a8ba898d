"""Adversarial training: batches in which some images are attacked on the current network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..attacks import DAG, PGD, Attack, SegPGD
from ..errors import ArgumentError, ArgumentTypeError
from ..victims import refresh
from ..victims.prepare.follow import Follower


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
    """Return a batch to train on, with its first images attacked and the others unchanged.

    Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018; mixed
    batches as in Kurakin et al., Adversarial Machine Learning at Scale, ICLR 2017. During the
    attack the network is in eval mode, so that batch norms use their running statistics and do not
    learn from intermediate images. Its parameters get no gradients. Afterwards it is as before.

    With `PGD`, `SegPGD`, `CosPGD` and `DAG` the attacked images are the last iterate of one run,
    which is not evaluated again. With other attacks they are the attack's result.

    Batch norms cost as much as convolutions in an attack. A copy with folded batch norms,
    `faster = dagcore.victims.prepare(network)`, can be attacked instead of the network. It takes
    over the network's current weights before each attack.

    One step that is longer than the radius, `PGD(epsilon=e, alpha=1.25 * e, steps=1)`, is fast
    adversarial training (Wong, Rice and Kolter, ICLR 2020).

    Args:
        attack: the inner attack: `PGD`, `SegPGD`, `DAG` or any other.
        model: the network, in training or eval mode; or a copy of it made by `prepare`.
        images: (N, 3, H, W) floating point within the attack's bounds.
        labels: (N, *T), as for the attack.
        share: fraction of the images to attack, in [0, 1], rounded to whole images.
        adversarial_labels: as for the attack; its default if None.
        boxes: (N, P, 4), the boxes at which a detector's scores are read.
        generator: source of the attack's random choices; torch's global one if None.

    Returns:
        Images (N, 3, H, W), without a gradient.

    Raises:
        TypeError, ValueError: if an argument is invalid. The message names the argument, what was
            required and what was given.
    """
    if not isinstance(attack, Attack):
        raise ArgumentTypeError(f"attack must be an Attack, got {type(attack).__name__}")
    checks.tensor("images", images, checks.FLOAT_DTYPES)
    checks.number("share", share, at_least=0)
    if share > 1:
        raise ArgumentError(f"share must be at most 1, got {share}")
    checks.tensor("labels", labels, checks.LABEL_DTYPES)
    if boxes is not None:
        checks.tensor("boxes", boxes, checks.FLOAT_DTYPES)
    if images.dim() != 4 or len(labels) != len(images):
        raise ArgumentError(
            f"images must have shape (N, 3, H, W) and one entry of labels each, got "
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
    for part in model.modules() if isinstance(model, nn.Module) else ():
        follower = getattr(part, "follower", None)
        if isinstance(follower, Follower) and follower.alive:
            refresh(part)
    clean, aims = images[rows].detach(), labels[rows]
    if isinstance(attack, (PGD, DAG)):
        made = attack.last_iterate(model, clean, aims, generator=generator, **given)
    else:
        made = attack(model, clean, aims, generator=generator, **given).adversarial
    return torch.cat([made, images[count:].detach()])


INNER = ("pgd", "segpgd", "dag")


def inner(name: str, epsilon: float, steps: int) -> Attack:
    """Return the inner attack of adversarial training by name, in an L-infinity ball.

    The steps add up to 2.5 times the radius, as in Madry et al.

    Args:
        name: one of `INNER`: "pgd", "segpgd" or "dag".
        epsilon: radius of the ball, for images in [0, 1].
        steps: number of updates.

    Raises:
        TypeError, ValueError: if an argument is invalid. The message names the argument, what was
            required and what was given.
    """
    checks.choice("adversarial", name, INNER)
    checks.number("epsilon", epsilon, above=0)
    checks.integer("steps", steps, at_least=1)
    length = 2.5 * epsilon / steps
    if name == "dag":
        return DAG(gamma=length, max_iter=steps, epsilon=epsilon)
    kind = PGD if name == "pgd" else SegPGD
    return kind(epsilon=epsilon, alpha=length, steps=steps)

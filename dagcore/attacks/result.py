"""Results of attacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..engine.loop import Finished
from ..ops.fallback import BUDGET, CONVERGED, STALLED
from ..perturbation import perceptibility, value_range


class Status(str, Enum):
    """Why an image stopped."""

    CONVERGED = "converged"  # no more active targets than the tolerance allows
    BUDGET = "budget"  # all updates were applied, and targets are left
    STALLED = "stalled"  # the gradient was zero or not finite

    def __str__(self) -> str:
        return self.value


STATUS = {CONVERGED: Status.CONVERGED, BUDGET: Status.BUDGET, STALLED: Status.STALLED}


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The result of an attack on N images.

    A joint attack on K networks has one entry per network in `active`, `targets` and
    `adversarial_labels`. A universal perturbation is the result of one image of zeros (N = 1).
    """

    adversarial: Tensor
    """(N, 3, H, W) attacked images. `DAG` returns the last iterate, whatever the status; `PGD`,
    `APGD` and their variants the iterate with the fewest active targets over all restarts;
    `ALMAProx` the smallest perturbation that fools its share of the targets, if it found one."""
    perturbation: Tensor
    """(N, 3, H, W) adversarial - images."""
    iterations: Tensor
    """(N,) int32, number of updates applied."""
    status: tuple[Status, ...]
    """Why each image stopped."""
    active: Tensor
    """(max_iter + 1, N) int32: active targets after 0, 1, ... updates; -1 once an image stopped.

    Joint: (max_iter + 1, K, N). Universal: those of the batch that each update saw. With restarts:
    those of the run that `adversarial` comes from, as are `iterations`, `status`, `loss` and
    `last`."""
    perceptibility: Tensor
    """(N,) sqrt(mean over pixels of ||r_k||_2^2), as a fraction of the images' valid range.

    If the attack has no bounds, the range is inferred from each clean image: see
    `dagcore.perturbation.value_range`."""
    targets: Tensor
    """(N,) int32, number of targets that count.

    Ignored targets do not count, nor, for "leave", do those whose adversarial label is their label.
    An image without targets that count is left alone: it is converged from the start. Joint:
    (K, N). Universal: over all samples that were evaluated."""
    adversarial_labels: Tensor | str | tuple[Tensor | str, ...]
    """The adversarial labels (N, *T), given or drawn, or "runner-up" or "untargeted". Pass them to
    a second call.

    Joint: a tuple of K. Universal: the permutation of the classes (C,) that was drawn, or "given"
    if none was."""
    last: Tensor
    """(N, 3, H, W) the last iterates."""
    left: Tensor
    """(N,) int32, number of active targets of `adversarial`. Joint: over all networks."""
    loss: Tensor | None = None
    """(max_iter + 1, N) float64: the loss, summed over the targets, after 0, 1, ... updates; NaN
    once an image has stopped. None for `DAG` and `ALMAProx`, which report none. Joint:
    (max_iter + 1, K, N)."""
    key: Any = None
    """The sample's key, for results of a stream."""

    @property
    def converged(self) -> Tensor:
        """(N,) bool: images with no more active targets than the tolerance allows."""
        stopped = [status is Status.CONVERGED for status in self.status]
        return torch.tensor(stopped, dtype=torch.bool, device=self.iterations.device)

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{status.value} after {int(m)} updates (p={float(p):.2e})"
            for status, m, p in zip(self.status, self.iterations, self.perceptibility, strict=True)
        )
        return f"Result({shown})"


def gather(
    outcomes: Sequence[Finished],
    bounds: tuple[float, float] | None,
    *,
    joint: bool = False,
    key: Any = None,
) -> Result:
    """Combine the outcomes of a batch's images, at least one, into a result."""
    adversarial = torch.stack([o.image for o in outcomes])
    origin = torch.stack([o.origin for o in outcomes])
    device = adversarial.device
    status = tuple(STATUS[o.status] for o in outcomes)
    active = torch.stack([o.active for o in outcomes], dim=-1)  # (M + 1, K, N)
    targets = torch.stack([o.aims.targets for o in outcomes], dim=-1).int()  # (K, N)
    labels: list[Tensor | str] = []
    for own in zip(*(o.aims.adversarial_labels for o in outcomes), strict=True):
        maps = [one for one in own if isinstance(one, Tensor)]
        labels.append(torch.stack(maps) if maps else own[0])
    losses = [o.loss for o in outcomes if o.loss is not None]
    loss = torch.stack(losses, dim=-1) if losses else None
    perturbation = adversarial - origin
    return Result(
        adversarial=adversarial,
        perturbation=perturbation,
        iterations=torch.tensor([o.iterations for o in outcomes], dtype=torch.int32, device=device),
        status=status,
        active=active if joint else active[:, 0],
        perceptibility=perceptibility(perturbation, value_range(origin, bounds)),
        targets=targets if joint else targets[0],
        adversarial_labels=tuple(labels) if joint else labels[0],
        last=torch.stack([o.last for o in outcomes]),
        left=torch.tensor([o.left for o in outcomes], dtype=torch.int32, device=device),
        loss=loss if joint or loss is None else loss[:, 0],
        key=key,
    )

"""The objectives of attacks: what counts at the scores, and what to seed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import checks
from .engine.loop import State
from .labels import assign


@dataclasses.dataclass(frozen=True)
class DAGObjective:
    """Dense Adversary Generation's: f_l' - f_l, summed over the active targets.

    Args:
        goal: "leave": a target is active while its label wins; "reach": until its adversarial
            label does.
        ignore_index: label of the targets that never count.
        margin: by how much a target must be won to count no more, in the units of the scores.
    """

    goal: str = "leave"
    ignore_index: int = 255
    margin: float = 0.0

    def assign(
        self,
        wanted: Tensor | str | None,  # (N, *T)
        labels: Tensor,  # (N, *T)
        num_classes: int,
        generator: torch.Generator | None,
    ) -> Tensor | str:
        """Adversarial labels, given or drawn; see `dagcore.labels.assign`.

        Labels out of range are looked for where that waits for no device; `seed` tells of them too.
        """
        return assign(
            wanted or "permutation" if not isinstance(wanted, Tensor) else wanted,
            labels,
            num_classes,
            self.ignore_index,
            generator,
            look=checks.at_hand(labels),
        )

    def count(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> Tensor:
        """Number of targets that count, (N,) int64.

        They are not ignored and, for "leave", not meant for their own label.
        """
        labels, ignored = labels.long(), self.ignore_index  # a uint8 would be compared modulo 256
        counted = labels != ignored
        if not isinstance(adversarial, Tensor):
            counted = counted & (num_classes > 1)
        else:
            adversarial = adversarial.long()
            if not 0 <= ignored < num_classes:
                counted = counted & (adversarial != ignored)
            if self.goal == "leave":
                counted = counted & (adversarial != labels)
        return counted.flatten(1).sum(1) if counted.dim() > 1 else counted.long()

    def seed(
        self,
        scores: Tensor,  # (N, C, *T), or maps (N, C, h, w) below the labels' size
        labels: Tensor,  # (N, *T)
        adversarial: Tensor | str,  # (N, *T)
        *,
        align_corners: bool,
        state: State | None = None,
    ) -> tuple[Tensor, Tensor]:
        """+1 at the adversarial label of each active target, -1 at its label; their number.

        A number below 0 tells of a label that is out of range.
        """
        given = adversarial if isinstance(adversarial, Tensor) else None
        rule = self.goal, self.ignore_index, float(self.margin)
        scores = scores.detach()
        # Past the wrappers' checks: arguments were checked as the images came.
        if scores.shape[2:] == labels.shape[1:]:
            seed, active = torch.ops.dagcore.dag_seed(scores, labels, given, *rule)
        else:
            seed, active = torch.ops.dagcore.dag_seed_bilinear(
                scores, labels, given, *rule, align_corners
            )
        return seed, active

    def refuse(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> None:
        """Raise an error that names the label that is out of range."""
        given = adversarial if isinstance(adversarial, Tensor) else None
        checks.target_labels(num_classes, labels, given, self.ignore_index)

"""Checks on the original networks after attacks on their prepared copies."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine import ScoreModel, frozen
from ..engine.devices import device_for
from ..engine.loop import Finished
from ..engine.stream import device_of
from ..ops.fallback import CONVERGED
from ..victims.segmentation import Victim, precision

if TYPE_CHECKING:
    from .base import Attack


class Originals:
    """The networks that `prepare` has copied, as far as they still exist.

    Args:
        attacks: the attack on each network, which defines the targets that count.
        models: the models under attack.
    """

    def __init__(self, attacks: Sequence[Attack], models: Sequence[Callable[..., Any]]) -> None:
        self.attacks, self.models = attacks, models
        self.looked = self.wrong = self.left = 0  # images checked, images failed, targets left

    def look(self, outcome: Finished) -> None:
        """Evaluate the network itself if an image converged on its copy, and count what is left."""
        if outcome.status != CONVERGED:
            return
        left = [
            _active(attack, network, outcome, k)
            for k, (attack, model) in enumerate(zip(self.attacks, self.models, strict=True))
            if (network := original_of(model, outcome.image.device)) is not None
        ]
        self.looked += bool(left)
        self.wrong += any(left)
        self.left += sum(left)

    def warn(self) -> None:
        """Warn if targets are still active on a network itself."""
        if self.wrong:
            warnings.warn(
                f"{self.wrong} of {self.looked} images that converged on the prepared network have "
                f"active targets on the network itself ({self.left} in all): continue there with "
                "start=result.adversarial, adversarial_labels=result.adversarial_labels",
                RuntimeWarning,
                stacklevel=3,
            )


def original_of(model: object, device: torch.device) -> nn.Module | None:
    """Return the network that `prepare` copied, if it still exists and is on the images' device."""
    known = getattr(model, "original", None)
    network = known() if isinstance(known, weakref.ref) else None
    return network if device_of(network) in (None, device) else None


def _active(attack: Attack, network: nn.Module, outcome: Finished, k: int) -> int:
    """Count an image's active targets on its k-th network; 0 if the tolerance allows them."""
    aims, boxes = outcome.aims.adversarial_labels[k], outcome.aims.boxes[k]
    scores_of = ScoreModel(network)
    scores_of.looked = True  # the copy's scores have been checked
    own = None if isinstance(network, Victim) else precision(network)
    labels, image = outcome.aims.labels[k][None], outcome.image[None]
    with device_for(image.device).current(), frozen(network), torch.no_grad():
        scores = scores_of(
            image.to(own or image.dtype), labels, None if boxes is None else boxes[None]
        )
    active = attack.active_targets(
        scores,
        labels,
        aims[None] if isinstance(aims, Tensor) else aims,
        align_corners=scores_of.align_corners,
    )
    allowed = attack.schedule().allowed(outcome.aims.targets[k])
    return int(active) if float(active) > float(allowed) else 0

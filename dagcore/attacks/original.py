"""A look at the networks themselves, where faster copies of them were attacked."""

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
    """The networks that `prepare` has made copies of, as far as someone still holds them.

    Args:
        attacks: the attack at each network, for the rule by which targets count.
        models: what is attacked.
    """

    def __init__(self, attacks: Sequence[Attack], models: Sequence[Callable[..., Any]]) -> None:
        self.attacks, self.models = attacks, models
        self.looked = self.wrong = self.left = 0  # images, of these, targets

    def look(self, outcome: Finished) -> None:
        """Run the network itself on an image that converged on the copy, and note what is left."""
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
        """Warn where targets are active at a network itself."""
        if self.wrong:
            warnings.warn(
                f"{self.left} targets of {self.wrong} images, of {self.looked} that converged on "
                "the prepared network, are active at the network itself: go on there with "
                "start=result.adversarial and result.adversarial_labels",
                RuntimeWarning,
                stacklevel=3,
            )


def original_of(model: object, device: torch.device) -> nn.Module | None:
    """The network that `prepare` made a model of, if it is there, and on the images' device."""
    known = getattr(model, "original", None)
    network = known() if isinstance(known, weakref.ref) else None
    return network if device_of(network) in (None, device) else None


def _active(attack: Attack, network: nn.Module, outcome: Finished, k: int) -> int:
    """Active targets of an image at its k-th network, 0 where they are few enough."""
    aims, boxes = outcome.aims.adversarial_labels[k], outcome.aims.boxes[k]
    scores_of = ScoreModel(network)
    scores_of.looked = True  # at the copy's scores
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

"""Binary segmentation: one logit a pixel as the scores of two classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..engine import read_scores
from ..engine.scores import aligns_corners, warn_of_probabilities
from ..errors import ArgumentError, ArgumentTypeError


class Binary(nn.Module):
    """A network made by `binary`; see there."""

    def __init__(
        self,
        network: Callable[[Tensor], Any],
        threshold: float,
        classes: Sequence[str],
    ) -> None:
        super().__init__()
        self.network, self.threshold, self.classes = network, threshold, tuple(classes)
        self.training = bool(getattr(network, "training", False))
        self.looked = False

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, 2, *T) of images (N, 3, H, W): the logit of the threshold, the network's."""
        logits = read_scores(self.network(images), images, least=1)
        if logits.shape[1] != 1:
            raise ArgumentError(
                f"model must return one logit a target, ({len(images)}, 1, *targets), "
                f"got {tuple(logits.shape)}"
            )
        constant = math.log(self.threshold / (1 - self.threshold))
        if not self.looked and not 0 <= constant <= 1:  # the attack itself looks at the others
            self.looked = True
            warn_of_probabilities(logits)
        return torch.cat([torch.full_like(logits, constant), logits], 1)

    @property
    def align_corners(self) -> bool:
        """How scores at a lower resolution than the labels are to be enlarged."""
        return aligns_corners(self.network)

    def around(self, network: Callable[[Tensor], Any]) -> Binary:
        """The same with another network inside."""
        return Binary(network, self.threshold, self.classes)


def binary(
    model: Callable[[Tensor], Any],
    threshold: float = 0.5,
    classes: Sequence[str] = ("background", "object"),
) -> Binary:
    """A network with one logit a pixel as one with two classes, which attacks need.

    Class 1 has the network's logit, class 0 the logit of the threshold. So the best class is 1
    exactly where the sigmoid is above the threshold, also in maps that are enlarged.

    Args:
        model: maps images (N, 3, H, W) to logits (N, 1, *T) before the sigmoid, in any form that an
            attack takes; also what `prepare` made.
        threshold: of the sigmoid, in (0, 1).
        classes: names of the two classes.

    Returns:
        A module: images (N, 3, H, W) -> scores (N, 2, *T), to be attacked, prepared, put into a
        `Victim`, or returned by the function of `--model module:function`.

    Raises:
        TypeError, ValueError: the argument, what was required and what came; and, once it runs, a
            model with more than one class.
    """
    if not callable(model):
        raise ArgumentTypeError(f"model must be callable, got {type(model).__name__}")
    checks.number("threshold", threshold, above=0)
    if not threshold < 1:
        raise ArgumentError(f"threshold must lie in (0, 1), got {threshold}")
    if len(classes) != 2:
        raise ArgumentError(f"classes must be two names, got {len(classes)}")
    return Binary(model, float(threshold), classes)

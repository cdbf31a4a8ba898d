"""Binary segmentation: one logit per pixel, as the scores of two classes."""

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
    """A network with two classes, made by `binary`."""

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
        """Return scores (N, 2, *T) of images (N, 3, H, W): the threshold's logit, the network's."""
        logits = read_scores(self.network(images), images, least=1)
        if logits.shape[1] != 1:
            raise ArgumentError(
                f"model must return one logit per target, ({len(images)}, 1, *targets), "
                f"got {tuple(logits.shape)}"
            )
        constant = math.log(self.threshold / (1 - self.threshold))
        if not self.looked and not 0 <= constant <= 1:  # the attack itself checks other constants
            self.looked = True
            warn_of_probabilities(logits)
        return torch.cat([torch.full_like(logits, constant), logits], 1)

    @property
    def align_corners(self) -> bool:
        """Whether scores of lower resolution than the labels are enlarged with align_corners."""
        return aligns_corners(self.network)

    def around(self, network: Callable[[Tensor], Any]) -> Binary:
        """Return the same wrapper around another network."""
        return Binary(network, self.threshold, self.classes)


def binary(
    model: Callable[[Tensor], Any],
    threshold: float = 0.5,
    classes: Sequence[str] = ("background", "object"),
) -> Binary:
    """Turn a network with one logit per pixel into one with two classes, as attacks need.

    Class 1 gets the network's logit, class 0 the logit of the threshold. The best class is thus 1
    exactly where the sigmoid is above the threshold, in enlarged maps too.

    Args:
        model: maps images (N, 3, H, W) to logits (N, 1, *T) before the sigmoid, in any form that an
            attack takes. It may be a result of `prepare`.
        threshold: threshold of the sigmoid, in (0, 1).
        classes: names of the two classes.

    Returns:
        A module: images (N, 3, H, W) -> scores (N, 2, *T). It can be attacked, prepared, put into a
        `Victim`, or returned by the function of `--model module:function`.

    Raises:
        TypeError, ValueError: if an argument is invalid. The message names the argument, what was
            required and what was given. Once it runs, also if the model has more than one class.
    """
    if not callable(model):
        raise ArgumentTypeError(f"model must be callable, got {type(model).__name__}")
    checks.number("threshold", threshold, above=0)
    if not threshold < 1:
        raise ArgumentError(f"threshold must lie in (0, 1), got {threshold}")
    if len(classes) != 2:
        raise ArgumentError(f"classes must be two names, got {len(classes)}")
    return Binary(model, float(threshold), classes)

"""One-stage detectors: every anchor or point is a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...optional import optional_import
from .base import OfTorchvision


def _sigmoid_threshold(network: Any) -> float | None:
    """Return the class probability below which nothing is detected; None for a softmax.

    FCOS compares sqrt(class x centre-ness) to its threshold, and the centre-ness is at most 1.
    """
    detection = optional_import("torchvision.models.detection", "vision")
    threshold = float(network.score_thresh)
    if isinstance(network, detection.FCOS):
        return threshold**2
    return threshold if isinstance(network, detection.RetinaNet) else None


class OneStage(OfTorchvision):
    """torchvision's RetinaNet, FCOS, SSD and SSDlite, whose scores need no boxes.

    RetinaNet and FCOS have a sigmoid for every class but the background. The background's column of
    the scores (class 0, which torchvision counts in num_classes but never trains) is therefore a
    constant: the logit of the probability below which nothing is detected. A target is thus active
    as long as its class is the strongest and can still be detected. Networks that use class 0 for
    objects are not supported.

    Args:
        network: one of torchvision's one-stage detectors.
        classes: names of the classes.
    """

    has_own_targets = True

    def __init__(self, network: nn.Module, classes: Sequence[str] | None = None) -> None:
        super().__init__(network, classes)
        self.threshold = _sigmoid_threshold(network)
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ArgumentError(
                f"network must have a score_thresh in (0, 1), got {network.score_thresh}"
            )

    @staticmethod
    def kinds(detection: Any) -> tuple[type, ...]:
        """Return torchvision's one-stage detectors."""
        return detection.RetinaNet, detection.FCOS, detection.ssd.SSD

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Return scores (N, C, A) of images (N, 3, H, W) at all anchors."""
        _, features = self.features(images)
        logits = self.network.head.classification_head(list(features.values()))
        return self._with_background(logits).transpose(1, 2)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities (P, C) of scores (P, C): sigmoids, or SSD's softmax."""
        return scores.softmax(-1) if self.threshold is None else scores.sigmoid()

    def candidates(
        self, images: Tensor, nms_threshold: float, max_proposals: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return every anchor's predicted box and scores."""
        network = self.network
        transformed, features = self.features(images)
        levels = list(features.values())
        outputs, anchors = network.head(levels), network.anchor_generator(transformed, levels)
        # FCOS's coder has one method for both single images and batches.
        decode = getattr(network.box_coder, "decode_single", network.box_coder.decode)
        scores = self._with_background(outputs["cls_logits"])
        found = []
        for n, size in enumerate(transformed.image_sizes):
            boxes = decode(outputs["bbox_regression"][n], anchors[n])
            found.append((self.restored(boxes, size, images), scores[n]))
        return found

    def _with_background(self, logits: Tensor) -> Tensor:
        """Return logits (N, A, C) with the background's column first."""
        if self.threshold is None:
            return logits
        constant = math.log(self.threshold / (1 - self.threshold))
        return torch.cat([torch.full_like(logits[..., :1], constant), logits[..., 1:]], -1)

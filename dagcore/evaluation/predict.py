"""Predictions of networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine import frozen, read_scores
from ..engine.devices import device_for
from ..engine.scores import aligns_corners
from ..ops import argmax_bilinear
from ..victims import Detector

Prediction = Tensor | Mapping[str, Tensor]
"""A label map (h, w) int64, or detections: "boxes", "labels" and "scores"."""


def predict(
    victim: Any,
    image: Tensor,  # (3, H, W)
    size: tuple[int, int],
) -> Prediction:
    """Return a network's label map of a size (h, w), or its detections, on the CPU."""
    given = image[None].clone()  # a copy, as the network may write to it
    with device_for(given.device).current(), frozen(victim), torch.no_grad():
        if isinstance(victim, Detector):
            (found,) = victim.detect(given)
            return {key: value.cpu() for key, value in found.items()}
        scores = read_scores(victim(given), given)
    align_corners = aligns_corners(victim, scores)
    scores = scores.as_subclass(Tensor)
    return argmax_bilinear(scores, size, align_corners=align_corners)[0].cpu()

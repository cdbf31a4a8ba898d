"""Wrap a detector as a victim, by the kind of its network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import ArgumentError, ArgumentTypeError
from .base import Detector
from .one_stage import OneStage
from .queries import Queries
from .two_stage import TwoStage

FAMILIES: tuple[Any, ...] = (Queries, TwoStage, OneStage)


def is_detector(network: nn.Module) -> bool:
    """Return whether `detector` supports a network."""
    return any(family.understands(network) for family in FAMILIES)


def detector(network: nn.Module, classes: Sequence[str] | None = None, **options: Any) -> Detector:
    """Wrap a detector of a supported kind; for other kinds see `dense_detector`.

    Args:
        network: a two-stage detector, whose targets are proposals: torchvision's Faster R-CNN,
            Mask R-CNN and Keypoint R-CNN, or the zoo's R-FCN. A one-stage detector, whose targets
            are anchors or points: torchvision's RetinaNet, FCOS, SSD and SSDlite. Or transformers'
            DetrForObjectDetection or TableTransformerForObjectDetection, whose targets are the
            object queries. The victim shares the network's parameters. A `Detector` is returned
            unchanged.
        classes: names of the classes; the network's own `classes` or config if None.
        options: see `TwoStage`, `OneStage` and `Queries`.

    Returns:
        The victim, a `Detector`.

    Raises:
        TypeError: if the network is of no supported kind.
        ValueError: if `classes` or options are given for a `Detector`, which has its own.
    """
    if isinstance(network, Detector):
        given = [*options, *["classes"] * (classes is not None)]
        if given:
            raise ArgumentError(f"{given[0]} must not be given for a Detector, which has its own")
        return network
    for family in FAMILIES:
        if family.understands(network):
            names = getattr(network, "classes", None) if classes is None else classes
            victim: Detector = family(network, names, **options)
            return victim
    raise ArgumentTypeError(
        "network must be a detector of torchvision (two-stage or one-stage) or transformers' DETR, "
        f"got {type(network).__module__}.{type(network).__qualname__}: use dense_detector for "
        "others, with a function from images to boxes and logits"
    )

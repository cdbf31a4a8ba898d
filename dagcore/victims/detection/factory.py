"""The victim around a detector, by the kind of network that it is."""

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
    """Whether `detector` understands a network."""
    return any(family.understands(network) for family in FAMILIES)


def detector(network: nn.Module, classes: Sequence[str] | None = None, **options: Any) -> Detector:
    """The victim around a detector; for those of other kinds see `dense_detector`.

    Args:
        network: torchvision's Faster R-CNN, Mask R-CNN and Keypoint R-CNN, and the zoo's R-FCN
            (two stages: the targets are proposals); its RetinaNet, FCOS, SSD and SSDlite (one
            stage: the targets are the anchors or points); or transformers'
            ...ForObjectDetection of the DETR kind (the targets are the object queries).
            It shares its parameters with the victim. A `Detector` is returned as it is.
        classes: names of the classes; the network's own `classes` or config if None.
        options: see `TwoStage`, `OneStage` and `Queries`.

    Raises:
        TypeError: a network that is not understood.
        ValueError: `classes` or options for a `Detector`, which has its own.
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
        f"got {type(network).__module__}.{type(network).__qualname__}: dense_detector takes any "
        "other, by a function from images to boxes and logits"
    )

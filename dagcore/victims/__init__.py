"""Networks to attack: images in [0, 1] in, scores before softmax out."""

from .binary import binary
from .detection import Detector, Targets, dense_detector, detector
from .load import load
from .prepare import prepare
from .prepare.low_resolution import low_resolution
from .segmentation import Victim

__all__ = [
    "Detector",
    "Targets",
    "Victim",
    "binary",
    "dense_detector",
    "detector",
    "load",
    "low_resolution",
    "prepare",
]

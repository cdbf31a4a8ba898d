"""Networks to attack: they map images in [0, 1] to scores before softmax."""

from .binary import binary
from .detection import Detector, Targets, dense_detector, detector
from .load import load
from .prepare import prepare, refresh
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
    "refresh",
]

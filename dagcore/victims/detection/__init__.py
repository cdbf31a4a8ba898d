"""Detectors to attack, and the targets of attacks on them."""

from .base import Detector
from .dense import dense_detector
from .factory import detector, is_detector
from .targets import ADVERSARIAL_KINDS, Targets

__all__ = [
    "ADVERSARIAL_KINDS",
    "Detector",
    "Targets",
    "dense_detector",
    "detector",
    "is_detector",
]

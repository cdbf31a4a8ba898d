"""Detectors to attack, and what an attack on them aims at."""

from .base import Detector
from .factory import detector, is_detector
from .targets import ADVERSARIAL_KINDS, Targets

__all__ = ["ADVERSARIAL_KINDS", "Detector", "Targets", "detector", "is_detector"]

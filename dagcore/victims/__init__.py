"""Networks to attack: images in [0, 1] in, scores before softmax out."""

from .low_resolution import low_resolution
from .prepare import prepare
from .segmentation import Victim, load

__all__ = ["Victim", "load", "low_resolution", "prepare"]

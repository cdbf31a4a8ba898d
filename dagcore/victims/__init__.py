"""Networks to attack: images in [0, 1] in, scores before softmax out."""

from .segmentation import Victim, load

__all__ = ["Victim", "load"]

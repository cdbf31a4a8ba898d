"""Data sets: procedural scenes made on the fly, and PASCAL VOC from a folder."""

from .example import Example
from .scenes import SCENE_CLASSES, SCENES_VERSION, Scenes
from .voc import VOC, VOC_CLASSES

__all__ = ["SCENES_VERSION", "SCENE_CLASSES", "VOC", "VOC_CLASSES", "Example", "Scenes"]

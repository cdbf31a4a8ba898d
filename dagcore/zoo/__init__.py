"""The paper's twelve networks and an FCOS by name, at any width: built, loaded, saved."""

from .backbones import fold
from .checkpoint import read_metadata, save_weights
from .registry import ENTRIES, Entry, build, find, load

__all__ = ["ENTRIES", "Entry", "build", "find", "fold", "load", "read_metadata", "save_weights"]

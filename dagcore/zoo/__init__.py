"""Build, load and save the paper's networks and some others by name, at any width."""

from .backbones import fold
from .checkpoint import read_metadata, save_weights
from .registry import ENTRIES, ROBUST, Adversary, Entry, build, find, load

__all__ = [
    "ENTRIES",
    "ROBUST",
    "Adversary",
    "Entry",
    "build",
    "find",
    "fold",
    "load",
    "read_metadata",
    "save_weights",
]

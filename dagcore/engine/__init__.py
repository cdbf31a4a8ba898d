"""Engine that runs images under attack in slots, for any task."""

from .freeze import frozen
from .memory import freed_memory_kept
from .scores import ScoreModel, read_scores

__all__ = ["ScoreModel", "freed_memory_kept", "frozen", "read_scores"]

"""`dagcore run`: whole data sets attacked into a folder, by one process or many, nothing lost."""

from .run import run
from .settings import Settings

__all__ = ["Settings", "run"]

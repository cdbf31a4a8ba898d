"""`dagcore run`: whole data sets attacked into a folder, by one process or many, nothing lost."""

from .settings import Settings
from .work import run

__all__ = ["Settings", "run"]

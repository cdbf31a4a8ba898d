"""Attacks on data sets (`dagcore run`) and evaluations of robustness (`dagcore evaluate`)."""

from .run import run
from .settings import Settings

__all__ = ["Settings", "run"]

"""Check whether an evaluation can be trusted: look for known failures on a few images."""

from .checking import FLAGGED, PASSED, SKIPPED, Finding, check

__all__ = ["FLAGGED", "PASSED", "SKIPPED", "Finding", "check"]

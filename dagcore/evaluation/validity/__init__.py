"""Whether an evaluation can be believed: what is known to go wrong, looked for on a few images."""

from .checking import FLAGGED, PASSED, SKIPPED, Finding, check

__all__ = ["FLAGGED", "PASSED", "SKIPPED", "Finding", "check"]

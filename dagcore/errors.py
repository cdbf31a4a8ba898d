"""Errors of what a caller has given, which commands tell in one line.

Every message names the argument, what was required and what came. Any other error is a fault of the
program, or of a user's own code that it runs.
"""


class ArgumentError(ValueError):
    """A value that cannot be taken."""


class ArgumentTypeError(TypeError):
    """A value of a wrong type or dtype."""

"""Errors for wrong arguments, which commands report in one line.

Every message names the argument, what was required and what came. Any other error is a bug in the
program, or in the user's own code that it runs.
"""


class ArgumentError(ValueError):
    """An argument with an invalid value."""


class ArgumentTypeError(TypeError):
    """An argument of a wrong type or dtype."""

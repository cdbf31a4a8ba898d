"""Errors in a network that the user has brought."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Collection, Iterator

import torch

from ..errors import ArgumentError, ArgumentTypeError


@contextlib.contextmanager
def of_model(spec: str | None, at: Collection[str] = ()) -> Iterator[None]:
    """Tell of an error in the network of --model as one of the user's, whatever it is.

    `at` are the images that it may have failed on, looked up when it has.

    Raises:
        ArgumentError: the network's error; all others pass.
    """
    try:
        yield
    except (ArgumentError, ArgumentTypeError):
        raise
    except Exception as error:
        if spec is None or not comes_from(spec, error):
            raise
        where = f", at one of {', '.join(sorted(at))}" if at else ""
        raise ArgumentError(
            f"--model {spec} failed with {type(error).__name__}: {error}{where}"
        ) from error


def comes_from(spec: str, error: BaseException) -> bool:
    """Whether an error, or what caused it, was raised in a network rather than in dagcore.

    That is: below dagcore's last frame there is a call of a module, or a frame of SPEC's package.
    """
    package = spec.partition(":")[0].partition(".")[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(cause):
            return True
        for frame, _ in reversed(list(traceback.walk_tb(cause.__traceback__))):
            name = frame.f_globals.get("__name__", "")
            if name.partition(".")[0] == "dagcore":
                break
            if name == "torch.nn.modules.module" or name.partition(".")[0] == package:
                return True
        cause = cause.__cause__
    return False

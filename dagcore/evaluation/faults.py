"""Errors raised in the user's network."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Collection, Iterator

import torch

from ..errors import ArgumentError, ArgumentTypeError


@contextlib.contextmanager
def of_model(spec: str | None, at: Collection[str] = ()) -> Iterator[None]:
    """Report any error raised in the network of --model as the user's.

    Args:
        spec: value of --model. None lets all errors pass.
        at: names of the images that the network may have failed on, read when it fails.

    Raises:
        ArgumentError: if the network raises an error. All other errors pass unchanged.
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
    """Whether an error, or one of its causes, was raised in a network rather than in dagcore.

    That is the case if below dagcore's last frame there is a call of a module, or a frame of
    SPEC's package, or if memory ran out.
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

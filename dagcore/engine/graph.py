"""Iterations that a device captures, as a CUDA graph, and replays."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from .devices import Device, Replay


class Graph:
    """An iteration that is captured once; the graph does not keep what it was captured from."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.replay: Replay | None = None
        self.tried = False

    def captured(self, iteration: Callable[[], None]) -> Replay | None:
        """Return the replay, captured at the first call; None if that is not possible."""
        if not self.tried:
            self.tried = True
            try:
                self.replay = self.device.captured(iteration)
            except RuntimeError as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                warnings.warn(
                    f"the model cannot be captured as a CUDA graph ({reason}): its iterations are "
                    "launched one by one",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return self.replay

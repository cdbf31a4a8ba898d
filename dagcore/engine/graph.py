"""Iterations as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


class Graph:
    """An iteration as a CUDA graph, captured at its first replay."""

    def __init__(self, iteration: Callable[[], None]) -> None:
        self.iteration = iteration
        self.captured: torch.cuda.CUDAGraph | None = None
        self.refused = False

    def replay(self) -> None:
        """Run one iteration: replayed, or eagerly where the model cannot be captured."""
        if self.captured is None and not self.refused:
            self._capture()
        if self.captured is not None:
            self.captured.replay()
        else:
            self.iteration()

    def _capture(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads, which load images, may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.iteration()
        except RuntimeError as error:
            self.refused = True
            torch.cuda.set_stream(stream)  # a capture that fails does not leave its own
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"the model cannot be captured as a CUDA graph ({reason}): its iterations are "
                "launched one by one",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self.captured = graph

"""Interfaces through which long work reports its progress, so that commands can show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor


class Progress(Protocol):
    """Progress of several named tasks."""

    def add(self, what: str, total: int, *, done: int = 0) -> None:
        """Add a task of `total` steps, of which `done` are finished already."""

    def advance(self, what: str, count: int = 1) -> None:
        """Advance a task by `count` steps."""


class ImageProgress(Protocol):
    """Progress of a run over images. `begin` is called first, then a `with` block is entered."""

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def begin(self, total: int, missing: int, *, silent: bool = False) -> None:
        """Announce `total` images, of which `missing` remain. All but the first rank are silent."""

    def watched(self, keys: Sequence[object], active: Tensor) -> None:
        """Receive the active targets of the images under attack, -1 for images that stopped."""

    def finished(self, count: int, what: str, *, passed_over: bool = False) -> None:
        """Receive the result of an image as text. All ranks have finished `count` images by now."""

    def summary(self, summary: Mapping[str, Any], speed: float | None) -> None:
        """Show the summary of the run, and its speed in images per second."""


class Silent:
    """An `ImageProgress` that shows nothing."""

    def __enter__(self) -> object:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, total: int, missing: int, *, silent: bool = False) -> None:
        """Do nothing."""

    def watched(self, keys: Sequence[object], active: Tensor) -> None:
        """Do nothing."""

    def finished(self, count: int, what: str, *, passed_over: bool = False) -> None:
        """Do nothing."""

    def summary(self, summary: Mapping[str, Any], speed: float | None) -> None:
        """Do nothing."""

"""What long work tells of itself; the commands show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor


class Progress(Protocol):
    """How far several pieces of work are, each called by a name."""

    def add(self, what: str, total: int, *, done: int = 0) -> None:
        """Announce a piece of work, of which some may be done already."""

    def advance(self, what: str, count: int = 1) -> None:
        """Count what has been done."""


class ImageProgress(Protocol):
    """How far a run over images is, from `begin` on while a `with` block runs."""

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def begin(self, total: int, missing: int, *, silent: bool = False) -> None:
        """Announce the images, of which some are done already; all but the first rank is silent."""

    def watched(self, keys: Sequence[object], active: Tensor) -> None:
        """Hear of the active targets of the images under attack, -1 of those that stopped."""

    def finished(self, count: int, what: str, *, passed_over: bool = False) -> None:
        """Hear what became of an image, of which so many have been finished by all ranks."""

    def summary(self, summary: Mapping[str, Any], speed: float | None) -> None:
        """Show the summary of the run, and how many images were attacked a second."""


class Silent:
    """An `ImageProgress` that shows nothing."""

    def __enter__(self) -> object:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, total: int, missing: int, *, silent: bool = False) -> None:
        """Nothing."""

    def watched(self, keys: Sequence[object], active: Tensor) -> None:
        """Nothing."""

    def finished(self, count: int, what: str, *, passed_over: bool = False) -> None:
        """Nothing."""

    def summary(self, summary: Mapping[str, Any], speed: float | None) -> None:
        """Nothing."""

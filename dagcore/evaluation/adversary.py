"""Adversarial labels from the command line: drawn labels, one class, or a painted pattern."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import labels as label_maps
from ..errors import ArgumentError
from ..files import IGNORE
from ..labels import KINDS, PATTERNS, assign
from ..losses import UNTARGETED


def is_pattern(name: str) -> bool:
    """Whether a name stands for a pattern, even a malformed one."""
    return name in PATTERNS or name.partition(":")[0] in ("text", "mask")


def find_class(name: str, num_classes: int, classes: Sequence[str] | None) -> int:
    """Return the index of a class, given its number or its name."""
    if name.lstrip("-").isdecimal():
        if not 0 <= int(name) < num_classes:
            raise ArgumentError(f"class must lie in [0, {num_classes}), got {name}")
        return int(name)
    if classes is None:
        raise ArgumentError(f"class must be a number for a model without class names, got {name!r}")
    found = [k for k, known in enumerate(classes) if known.lower() == name.lower()]
    if len(found) > 1:
        raise ArgumentError(f"class {name!r} is ambiguous, give one of its numbers {found}")
    if not found:
        lower = {known.lower(): known for known in classes}
        near = [lower[key] for key in difflib.get_close_matches(name.lower(), lower)]
        hint = f" (near: {', '.join(near)})" if near else ""
        raise ArgumentError(f"class must be a number or a name of a class, got {name!r}{hint}")
    return found[0]


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A rule that gives each image its adversarial labels.

    Attributes:
        kind: one of `labels.KINDS`, "untargeted", "class" (all targets get `foreground`), or a
            pattern.
        foreground: class of the pattern. None draws a class that is absent from the labels.
        background: class around the pattern. None takes the most frequent other label.
    """

    kind: str
    foreground: int | None = None
    background: int | None = None

    @classmethod
    def parse(
        cls,
        name: str,
        foreground: str | None,
        background: str | None,
        num_classes: int,
        classes: Sequence[str] | None,
    ) -> Adversary:
        """Parse --adversarial, --foreground and --background. Raise ValueError if invalid."""
        if not is_pattern(name):
            if foreground is not None or background is not None:
                raise ArgumentError("--foreground and --background require a pattern")
            if name in (*KINDS, UNTARGETED):
                return cls(name)
            try:
                return cls("class", find_class(name, num_classes, classes))
            except ValueError as error:
                raise ArgumentError(
                    f"--adversarial must be {', '.join((*KINDS, UNTARGETED))}, a pattern "
                    f"({', '.join(PATTERNS)}, text:WORDS, mask:FILE) or a class: {error}"
                ) from error
        chosen: dict[str, int | None] = {"--foreground": None, "--background": None}
        for option, given in zip(chosen, (foreground, background), strict=True):
            try:
                if given is not None:
                    chosen[option] = find_class(given, num_classes, classes)
            except ValueError as error:
                raise ArgumentError(f"{option}: {error}") from error
        inside, outside = chosen.values()
        if inside is not None and inside == outside:
            raise ArgumentError(
                f"--foreground and --background must differ, both are class {inside}"
            )
        return cls(name, inside, outside)

    @property
    def paints(self) -> bool:
        """Whether the rule paints a pattern."""
        return is_pattern(self.kind)

    def check(self, height: int, width: int) -> None:
        """Raise unless a pattern can be painted at this size."""
        if self.paints:
            self._mask(height, width)

    def choose(
        self,
        labels: Tensor,  # (h, w)
        num_classes: int,
        generator: torch.Generator,
    ) -> tuple[Tensor | str, dict[str, Any]]:
        """Choose the adversarial labels of an image.

        Returns:
            Labels (h, w), or "runner-up" or "untargeted"; and the chosen classes for the record.
        """
        if self.kind == UNTARGETED:
            return self.kind, {}
        if self.kind in KINDS:
            drawn = assign(self.kind, labels[None], num_classes, IGNORE, generator)
            return (drawn if isinstance(drawn, str) else drawn[0]), {}
        if not self.paints:
            return torch.full_like(labels, self.foreground or 0), {"class": self.foreground}
        counts = torch.bincount(labels[labels != IGNORE].long().cpu(), minlength=num_classes)
        inside, outside = self.foreground, self.background
        if outside is None:
            others = counts.clone()
            if inside is not None:
                others[inside] = -1
            outside = int(others.argmax())
        if inside is None:
            inside = _absent(counts, outside, generator)
        mask = self._mask(*labels.shape).to(labels.device)
        painted = label_maps.paint(mask, inside, outside)
        return painted, {"foreground": inside, "background": outside}

    def _mask(self, height: int, width: int) -> Tensor:
        kind, _, words = self.kind.partition(":")
        if kind == "text" and not words.strip():
            raise ArgumentError(f"pattern text:WORDS needs words, got {self.kind!r}")
        mask = label_maps.pattern(self.kind, height, width)
        if bool(mask.all()) or not bool(mask.any()):
            raise ArgumentError(
                f"pattern {self.kind!r} must cover some, but not all, of {height} x {width} "
                "targets, try a larger image or another pattern"
            )
        return mask


def _absent(counts: Tensor, outside: int, generator: torch.Generator) -> int:
    """Return a random class that is neither among the labels nor `outside`."""
    free = counts == 0
    free[outside] = False
    candidates = free.nonzero().flatten()
    if not len(candidates):
        raise ArgumentError("every class occurs in the labels: give --foreground CLASS")
    return int(candidates[torch.randint(len(candidates), (1,), generator=generator)])

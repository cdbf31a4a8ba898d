"""How images are to be attacked, as users say it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from .. import files
from ..attacks import DAG
from ..errors import ArgumentError
from ..victims import Detector, Victim, load
from .adversary import is_pattern

LEVELS = ("256", "none")  # that images which are written to 8-bit files can be attacked on


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """The options that commands share, by their names."""

    model: str
    weights: Path | None = None
    size: str | None = None
    adversarial: str = "permutation"
    foreground: str | None = None
    background: str | None = None
    gamma: float = 0.5 / 255
    max_iter: int = 200
    goal: str | None = None
    epsilon: float | None = None
    tolerance: float = 0.0
    margin: float = 0.0
    levels: str = "256"
    device: str | None = None
    seed: int = 0

    def attack(self) -> DAG:
        """The attack's settings; ArgumentError where options contradict each other."""
        paints = is_pattern(self.adversarial)
        if paints and self.goal == "leave":
            raise ArgumentError("--goal must be reach for a pattern, got leave")
        goal = self.goal or ("reach" if paints else "leave")
        if goal == "reach" and self.adversarial == "runner-up":
            raise ArgumentError("--adversarial runner-up goes with --goal leave only")
        if self.levels not in LEVELS:
            raise ArgumentError(f"--levels must be {' or '.join(LEVELS)}, got {self.levels!r}")
        return DAG(
            gamma=self.gamma,
            max_iter=self.max_iter,
            goal=goal,
            epsilon=self.epsilon,
            tolerance=self.tolerance,
            margin=self.margin,
            levels=None if self.levels == "none" else int(self.levels),
            ignore_index=files.IGNORE,
        )


def find_victim(options: AttackOptions, device: torch.device) -> Victim | Detector:
    """The network that is attacked, for images of any size where it takes only one."""
    size = None if options.size is None else parse_size(options.size)
    return load(options.model, options.weights, device, size=size)


def parse_size(given: str) -> tuple[int, int]:
    """A size WIDTHxHEIGHT as (height, width)."""
    width, _by, height = given.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ArgumentError(f"size must be WIDTHxHEIGHT, {given!r} is no size like 512x384")
    return int(height), int(width)


def find_device(name: str | None) -> torch.device:
    """The device to run on: a GPU where there is one, unless told otherwise."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ArgumentError(
            f"--device {name} is not there: torch sees {count} CUDA devices, try cpu"
        )
    return device

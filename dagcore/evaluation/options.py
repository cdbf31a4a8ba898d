"""The user's options for attacks on images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import checks, files
from ..attacks import APGD, DAG, PGD, BallAttack, CosPGD, SegPGD
from ..errors import ArgumentError
from ..labels import KINDS
from ..losses import UNTARGETED
from ..victims import Detector, Victim, load
from .adversary import is_pattern

LEVELS = ("256", "none")  # on which images for 8-bit files can be attacked

KnownAttack = DAG | BallAttack

_IN_A_BALL: dict[str, Any] = {"norm": "linf", "epsilon": 8 / 255, "restarts": 1}
_PGD = {**_IN_A_BALL, "alpha": 0.01, "steps": 20}
ATTACKS: dict[str, tuple[Callable[..., KnownAttack], dict[str, Any]]] = {
    "dag": (
        DAG,
        {"gamma": 0.5 / 255, "max_iter": 200, "goal": None, "epsilon": None, "margin": 0.0},
    ),
    "pgd": (PGD, {"loss": "cross-entropy", **_PGD}),
    "segpgd": (SegPGD, _PGD),
    "cospgd": (CosPGD, _PGD),
    "apgd": (APGD, {"loss": "cross-entropy", **_IN_A_BALL, "steps": 100}),
}
"""The attacks by name, each with its options and their defaults."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The network, its device, and the seed of all random choices."""

    model: str
    weights: Path | None = None
    size: str | None = None
    device: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackOptions(NetworkOptions):
    """Options of the attack, shared by the commands.

    Options that the attack does not have are None. Options that are not given get the attack's
    default.
    """

    attack: str = "dag"
    adversarial: str | None = None
    foreground: str | None = None
    background: str | None = None
    loss: str | None = None
    norm: str | None = None
    gamma: float | None = None
    alpha: float | None = None
    max_iter: int | None = None
    steps: int | None = None
    restarts: int | None = None
    goal: str | None = None
    epsilon: float | None = None
    tolerance: float = 0.0
    margin: float | None = None
    levels: str = "256"

    def __post_init__(self) -> None:
        if self.attack not in ATTACKS:
            allowed = checks.names(ATTACKS)
            raise ArgumentError(f"--attack must be {allowed}, got {self.attack!r}")
        _, own = ATTACKS[self.attack]
        for name in {name for _, other in ATTACKS.values() for name in other}:
            value = getattr(self, name)
            if name in own:
                object.__setattr__(self, name, own[name] if value is None else value)
            elif value is not None:
                others = [attack for attack, (_, other) in ATTACKS.items() if name in other]
                raise ArgumentError(
                    f"--{name.replace('_', '-')} requires --attack {checks.names(others)}, "
                    f"got --attack {self.attack}"
                )
        if self.adversarial is None:
            object.__setattr__(self, "adversarial", KINDS[0] if self.draws else UNTARGETED)

    @property
    def draws(self) -> bool:
        """Whether the attack always needs adversarial labels."""
        return self.attack == "dag" or self.loss == "dag"

    @property
    def aims(self) -> str:
        """How adversarial labels are chosen: `adversarial`, or its default."""
        assert self.adversarial is not None
        return self.adversarial

    def build(self) -> KnownAttack:
        """Create the attack. Raise ArgumentError if options contradict each other."""
        if self.levels not in LEVELS:
            raise ArgumentError(f"--levels must be {' or '.join(LEVELS)}, got {self.levels!r}")
        kind, own = ATTACKS[self.attack]
        settings = {name: getattr(self, name) for name in own}
        if self.attack == "dag":
            paints = is_pattern(self.aims)
            if paints and self.goal == "leave":
                raise ArgumentError("--goal must be reach for a pattern, got leave")
            settings["goal"] = self.goal or ("reach" if paints else "leave")
            if settings["goal"] == "reach" and self.aims == "runner-up":
                raise ArgumentError("--adversarial runner-up requires --goal leave")
        if self.draws and self.aims == UNTARGETED:
            raise ArgumentError(f"--adversarial {UNTARGETED} cannot be used with DAG's loss")
        if not self.draws and self.aims == "runner-up":
            raise ArgumentError("--adversarial runner-up requires DAG's loss")
        return kind(
            **settings,
            tolerance=self.tolerance,
            levels=None if self.levels == "none" else int(self.levels),
            ignore_index=files.IGNORE,
        )


def find_victim(options: NetworkOptions, device: torch.device) -> Victim | Detector:
    """Load the network to attack. If a size is given, it resizes its images to that size."""
    size = None if options.size is None else parse_size(options.size)
    return load(options.model, options.weights, device, size=size)


def parse_size(given: str) -> tuple[int, int]:
    """Parse a size WIDTHxHEIGHT, and return (height, width)."""
    width, _by, height = given.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ArgumentError(f"size must be WIDTHxHEIGHT, such as 512x384, got {given!r}")
    return int(height), int(width)


def find_device(name: str | None) -> torch.device:
    """Return the device to run on. The default is a GPU if there is one."""
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
            f"--device {name} is not available: torch sees {count} CUDA devices, try cpu"
        )
    return device

"""Protocols: named and versioned sets of attacks that define a measure of robustness."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checks, files
from ..attacks import DAG, BallAttack
from ..errors import ArgumentError, ArgumentTypeError
from ..labels import KINDS
from ..losses import UNTARGETED, Loss
from ..victims.detection.targets import ADVERSARIAL_KINDS
from .options import ATTACKS, KnownAttack
from .settings import read_toml
from .tog import GOALS

TASKS = ("segmentation", "detection")
# Settings of an entry itself; all others are arguments of its attack.
OWN = ("name", "attack", "task", "adversarial", "epsilon", "class_weights", "returns")
BALANCED = "balanced"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """An attack of a protocol.

    Attributes:
        name: name of the attack in results.
        attack: kind of attack: "dag", "pgd", "segpgd", "cospgd" or "apgd".
        task: task of the networks it is for, "segmentation" or "detection". None is both.
        adversarial: how adversarial labels are chosen. For segmentation see `Attack.__call__`. For
            detectors it is a goal of TOG (`tog.GOALS`) or, with DAG's loss, a choice of
            `Detector.dense_targets`. None is "permutation" for DAG, else "untargeted".
        epsilon: one or more radii to use instead of the protocol's. DAG has a ball only if they
            are given.
        class_weights: "balanced" weights the loss of a target by 1 over the number of pixels of
            its class in the data set, scaled to sum to 1. None weights all classes equally.
        returns: which iterate counts: the "best", with the fewest active targets, or the "last".
        settings: arguments of the attack, by name.
    """

    name: str
    attack: str
    task: str | None = "segmentation"
    adversarial: str | None = None
    epsilon: float | Sequence[float] | None = None
    class_weights: str | None = None
    returns: str = "best"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.choice("attack", self.attack, ATTACKS)
        if self.task is not None:
            checks.choice("task", self.task, TASKS)
        checks.choice("returns", self.returns, ("best", "last"))
        if self.epsilon is not None:
            object.__setattr__(self, "epsilon", radii_of(self.epsilon))
        if self.adversarial is None:
            default = KINDS[0] if self.attack == "dag" else UNTARGETED
            object.__setattr__(self, "adversarial", default)
        if self.class_weights is not None:
            checks.choice("class_weights", self.class_weights, (BALANCED,))
            if not isinstance(self.settings.get("loss"), str):
                raise ArgumentError(f"class_weights require a loss by name, {self.name!r} has none")
            if self.task != "segmentation":
                raise ArgumentError(f"class_weights require task 'segmentation', got {self.task!r}")
        made = self.build(1.0 if self.in_a_ball else None)
        for task in TASKS if self.task is None else (self.task,):
            self._check_aim(task, made)

    def _check_aim(self, task: str, made: KnownAttack) -> None:
        """Raise unless the choice of adversarial labels is valid for a task."""
        if task == "segmentation":
            made.check_kind(self.adversarial)
            return
        of_dag = self.attack == "dag" or self.settings.get("loss") == "dag"
        allowed = (*ADVERSARIAL_KINDS, "runner-up") if of_dag else GOALS
        checks.choice("adversarial", self.adversarial, allowed)

    @property
    def aims(self) -> str:
        """How adversarial labels are chosen: `adversarial`, or its default."""
        assert self.adversarial is not None
        return self.adversarial

    @property
    def balls(self) -> tuple[float, ...]:
        """Radii of this entry; empty if it uses the protocol's."""
        return () if self.epsilon is None else radii_of(self.epsilon)

    @property
    def in_a_ball(self) -> bool:
        """Whether the attack is bounded by a radius."""
        return self.attack != "dag" or self.epsilon is not None

    @property
    def norm(self) -> str:
        """Norm of the attack's ball."""
        return str(self.settings.get("norm", "linf"))

    def build(
        self,
        epsilon: float | None,
        levels: int | None = None,
        class_weights: Tensor | None = None,  # (C,)
    ) -> KnownAttack:
        """Create the attack with a radius.

        Raises:
            TypeError, ValueError: if the attack does not have a setting, or a value is invalid.
        """
        kind, _ = ATTACKS[self.attack]
        known = inspect.signature(kind).parameters
        settings = dict(self.settings)
        for name in settings:
            if name not in known or name in ("levels", "ignore_index", "bounds", "epsilon"):
                allowed = ", ".join([*OWN, *(k for k in known if k not in OWN)])
                raise ArgumentError(f"{name!r} is not a setting of {self.attack}; it has {allowed}")
        if class_weights is not None:
            settings["loss"] = Loss(settings["loss"], class_weights=class_weights)
        if self.in_a_ball:
            settings["epsilon"] = epsilon
        made = kind(**settings, levels=levels, ignore_index=files.IGNORE)
        assert isinstance(made, (DAG, BallAttack))
        return made

    def record(self) -> dict[str, Any]:
        """Return everything that the results depend on, ready for JSON."""
        radii = list(self.balls) or None
        return {**dataclasses.asdict(self), "epsilon": radii, "settings": dict(self.settings)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """A named set of attacks that defines a measure of robustness.

    Attributes:
        name: name with a version, such as a year. Results of different versions are not
            comparable.
        title: description and source of the protocol.
        attacks: attacks in their order. Those for one task have different names.
        epsilon: one or more radii, for images in 0..1. Empty for attacks without a ball.
        norm: norm of these radii.
    """

    name: str
    title: str = ""
    attacks: tuple[Entry, ...]
    epsilon: float | Sequence[float] = (8 / 255,)
    norm: str = "linf"

    def __post_init__(self) -> None:
        checks.choice("norm", self.norm, checks.NORMS)
        object.__setattr__(self, "epsilon", radii_of(self.epsilon))
        if not self.attacks:
            raise ArgumentError("attacks must have at least one entry, got none")
        for task in TASKS:
            names = [entry.name for entry in self._of(task)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ArgumentError(
                    f"attacks must have different names, two are called {twice[0]!r}"
                )
        for entry in self.attacks:
            if entry.in_a_ball and not self.radii(entry):
                raise ArgumentError(
                    f"attacks: {entry.name} must have an epsilon in the norm {entry.norm}, for "
                    f"which the protocol has none"
                )

    def _of(self, task: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.attacks if entry.task in (None, task))

    def attacks_for(self, task: str) -> tuple[Entry, ...]:
        """Return the attacks on networks for a task."""
        found = self._of(task)
        if not found:
            raise ArgumentError(f"protocol {self.name} must have attacks for {task}, it has none")
        return found

    def radii(self, entry: Entry, given: Sequence[float] | None = None) -> tuple[float | None, ...]:
        """Return the radii of an attack in ascending order, or (None,) if it has no ball.

        Radii given by the user replace those of attacks in the protocol's norm.
        """
        if not entry.in_a_ball:
            return (None,)
        shared = entry.norm == self.norm
        radii = given if given is not None and shared else entry.balls
        return tuple(sorted(set(radii or (self.balls if shared else ()))))

    @property
    def balls(self) -> tuple[float, ...]:
        """Radii of the protocol."""
        return radii_of(self.epsilon)

    def record(self) -> dict[str, Any]:
        """Return everything that the results depend on, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "epsilon": list(self.balls),
            "attacks": [entry.record() for entry in self.attacks],
        }


def radii_of(epsilon: Any) -> tuple[float, ...]:
    """Return one or more radii as a tuple. Raise unless they are numbers above 0."""
    radii = tuple(epsilon) if isinstance(epsilon, (list, tuple)) else (epsilon,)
    for radius in radii:
        checks.number("epsilon", radius, above=0)
    return radii


def _sea(name: str, loss: str, class_weights: str | None = None) -> Entry:
    settings = {"loss": loss, "steps": 300, "radii": "shrinking", "track": "cross-entropy"}
    return Entry(name=name, attack="apgd", class_weights=class_weights, settings=settings)


def _three(steps: int, **settings: Any) -> tuple[Entry, ...]:
    """Return entries for PGD, SegPGD and CosPGD with a number of steps."""
    kinds = {"PGD": "pgd", "SegPGD": "segpgd", "CosPGD": "cospgd"}
    return tuple(
        Entry(name=name, attack=attack, settings={"steps": steps, **settings})
        for name, attack in kinds.items()
    )


def _renamed(entries: Sequence[Entry], ending: str, **changes: Any) -> tuple[Entry, ...]:
    return tuple(dataclasses.replace(e, name=f"{e.name}{ending}", **changes) for e in entries)


SEA = Protocol(
    name="sea-2024",
    title=(
        "Segmentation Ensemble Attack (Croce, Singh, Hein: Towards Reliable Evaluation and Fast "
        "Training of Robust Semantic Segmentation Models, ECCV 2024): Auto-PGD on three losses, "
        "300 steps in shrinking balls, random start, steps judged by cross-entropy"
    ),
    attacks=(
        _sea("MCE-bal", "masked-cross-entropy", BALANCED),
        _sea("MCE", "masked-cross-entropy"),
        _sea("JS", "jensen-shannon"),
    ),
    epsilon=(4 / 255, 8 / 255),
)

SEMSEGBENCH = Protocol(
    name="semsegbench-2025",
    title=(
        "SemSegBench (Agnihotri et al., 2025): PGD, SegPGD and CosPGD, 20 steps from a random "
        "start, in an L-infinity ball of 8/255 with steps of 0.01 and an L2 ball of 64/255 with "
        "steps of 0.1"
    ),
    attacks=(
        *_three(20, alpha=0.01),
        *_renamed(_three(20, alpha=0.1, norm="l2"), " L2", epsilon=(64 / 255,)),
    ),
)

COSPGD = Protocol(
    name="cospgd-2024",
    title=(
        "CosPGD's comparison (Agnihotri, Jung, Keuper, ICML 2024): PGD, SegPGD and CosPGD of 3 to "
        "100 steps of 0.01 in an L-infinity ball of 0.03"
    ),
    attacks=tuple(
        entry
        for steps in (3, 5, 10, 20, 40, 100)
        for entry in _renamed(_three(steps, alpha=0.01), f"-{steps}")
    ),
    epsilon=(0.03,),
)

TOG = Protocol(
    name="detection-tog-2020",
    title=(
        "TOG's four attacks on detectors (Chow et al.: Adversarial Objectness Gradient Attacks in "
        "Real-time Object Detection Systems, 2020): 10 steps of 2/255 in an L-infinity ball of "
        "8/255 from a random start, on the detector's dense targets"
    ),
    attacks=tuple(
        Entry(
            name=goal,
            attack="pgd",
            task="detection",
            adversarial=goal,
            returns="last",
            settings={"steps": 10, "alpha": 2 / 255, "tolerance": None},
        )
        for goal in GOALS
    ),
)

DAG_2017 = Protocol(
    name="dag-2017",
    title=(
        "Dense Adversary Generation (Xie et al., ICCV 2017): steps of 0.5/255 until no target is "
        "correct, at most 200 for segmentation and 150 for detection, towards the classes of a "
        "random permutation, in no ball"
    ),
    attacks=tuple(
        Entry(
            name="DAG",
            attack="dag",
            task=task,
            adversarial="permutation",
            settings={"max_iter": updates},
        )
        for task, updates in (("segmentation", 200), ("detection", 150))
    ),
    epsilon=(),
)

PROTOCOLS = {one.name: one for one in (SEA, SEMSEGBENCH, COSPGD, TOG, DAG_2017)}


def find_protocol(given: str | Path | Protocol) -> Protocol:
    """Return a protocol by its name, or read it from a TOML file.

    The file must have `name`, and may have `title`, `epsilon` and `norm`. Each of its tables
    `[[attacks]]` must have `name` and `attack`, and may have the other attributes of `Entry` and
    the arguments of the attack. Numbers may be written as fractions: "8/255".

    Raises:
        FileNotFoundError, TypeError, ValueError: if there is no such protocol, or the file is
            invalid. The message names the problem.
    """
    if isinstance(given, Protocol):
        return given
    if not isinstance(given, (str, Path)):
        raise ArgumentTypeError(
            f"protocol must be a name, a TOML file or a Protocol, got {type(given).__name__}"
        )
    if str(given) in PROTOCOLS:
        return PROTOCOLS[str(given)]
    path = Path(given)
    if path.suffix != ".toml":
        allowed = ", ".join(PROTOCOLS)
        raise ArgumentError(f"protocol must be one of {allowed} or a TOML file, got {given!s}")
    content = read_toml(path)
    try:
        return _read(content)
    except (ArgumentTypeError, ArgumentError) as error:
        raise type(error)(f"protocol {path}: {error}") from error


def _read(content: Mapping[str, Any]) -> Protocol:
    known = ("name", "title", "epsilon", "norm", "attacks")
    for name in content:
        if name not in known:
            raise ArgumentError(
                f"{name!r} is not a setting of a protocol; it has {', '.join(known)}"
            )
    for name in ("name", "attacks"):
        if name not in content:
            raise ArgumentError(f"{name} must be given")
    for name in ("name", "title", "norm"):
        if not isinstance(content.get(name, ""), str):
            raise ArgumentTypeError(f"{name} must be text, got {content[name]!r}")
    if content["name"] in PROTOCOLS:
        raise ArgumentError(f"name must not be that of another protocol, got {content['name']}")
    tables = content["attacks"]
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise ArgumentTypeError(f"attacks must be tables [[attacks]], got {tables!r}")
    more = {name: content[name] for name in ("title", "norm") if name in content}
    if "epsilon" in content:
        more["epsilon"] = _radii(content["epsilon"])
    entries = [_entry(one, content.get("norm")) for one in tables]
    return Protocol(name=content["name"], attacks=tuple(entries), **more)


def _entry(table: Mapping[str, Any], norm: str | None) -> Entry:
    name = table.get("name")
    if not isinstance(name, str):
        raise ArgumentTypeError(f"attacks must each have a name, got {name!r}")
    if "attack" not in table:
        raise ArgumentError(f"attacks: {name} must have an attack, of {checks.names(ATTACKS)}")
    own = {key: table[key] for key in OWN if key in table}
    try:
        settings = {key: _number(key, value) for key, value in table.items() if key not in OWN}
        if "epsilon" in own:
            own["epsilon"] = _radii(own["epsilon"])
        if norm is not None and own["attack"] != "dag":
            settings.setdefault("norm", norm)
        return Entry(**own, settings=settings)
    except (ArgumentTypeError, ArgumentError) as error:
        raise type(error)(f"attacks: {name}: {error}") from error


def _number(name: str, value: Any) -> Any:
    """Convert a fraction written as text to a number. Return everything else unchanged."""
    if isinstance(value, str) and value.lstrip("+-.")[:1].isdigit():
        return checks.fraction(name, value)
    return value


def _radii(given: Any) -> tuple[float, ...]:
    values = given if isinstance(given, list) else [given]
    return tuple(checks.fraction("epsilon", value) for value in values)

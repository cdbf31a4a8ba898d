"""Settings of work on a data set. They come from the command line or a file, and are kept."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks
from ..errors import ArgumentError, ArgumentTypeError
from .options import AttackOptions, NetworkOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from typing_extensions import Self  # in Python 3.10

TABLES = ("made_with", "versions")  # of a kept file that hold no settings
PATHS = ("weights", "labels", "out")
FRACTIONS = ("gamma", "alpha", "epsilon", "tolerance", "margin")
# Either these do not change results, or their contents are compared instead.
NOT_COMPARED = (
    *("out", "strict", "figures", "weights", "device"),
    *("protocol", "check", "surrogate"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(NetworkOptions):
    """A data set, and options for the work on it.

    Attributes:
        data: "scenes", a VOCdevkit folder, or a folder of images.
        out: folder for the results.
        labels: for a folder of images: a folder of label maps or of VOC's XML files, or a file in
            COCO's format. None takes the network's predictions.
        set: part of the data set: "FAMILY/SPLIT" for scenes, "YEAR/LIST" for VOC.
        images: maximum number of images. None takes all of them, or 200 scenes.
        slots: number of images attacked at the same time. None is 1 on the CPU and 8 on a GPU.
            Only with 1 are results independent of interruptions and of the number of processes,
            bit for bit.
        prepare: whether to attack a faster copy of the network (`victims.prepare`). The network
            itself judges the results.
        figures: number of images for which figures are drawn.
        strict: whether to stop at the first image that cannot be attacked.
    """

    data: str
    out: Path
    labels: Path | None = None
    set: str | None = None
    images: int | None = None
    slots: int | None = None
    prepare: bool = True
    figures: int = 4
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "slots"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), at_least=1)
        checks.integer("figures", self.figures, at_least=0)
        checks.integer("seed", self.seed, at_least=0)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Create settings from their names and values, in TOML's types.

        Raises:
            ValueError, TypeError: if a name is unknown or missing, or a value is invalid.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known)
                hint = f": did you mean {near[0]}?" if near else f"; use one of {', '.join(known)}"
                raise ArgumentError(f"{name!r} is not a setting{hint}")
        for name, field in known.items():
            if field.default is dataclasses.MISSING and given.get(name) is None:
                raise ArgumentError(f"{name} must be given")
        return cls(**{name: _value(known[name], value) for name, value in given.items()})

    def record(self) -> dict[str, Any]:
        """Return the settings in TOML's types, without `out` and without those that are None."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k != "out"}
        values["data"] = Path(self.data)  # without a trailing slash
        kept = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(AttackOptions, DataSettings):
    """Settings of `dagcore run`: the network, the data set and the attack.

    Attributes:
        perturbations: whether to write the perturbations too, unrounded.
    """

    perturbations: bool = False

    def __post_init__(self) -> None:
        DataSettings.__post_init__(self)
        super().__post_init__()
        if self.goal is not None:
            checks.choice("goal", self.goal, checks.GOALS)
        self.build()


def _value(field: dataclasses.Field[Any], value: Any) -> Any:
    """Convert a value to the type of a field."""
    name, kind = field.name, str(field.type).partition(" ")[0]
    if value is None:
        return None
    if kind == "tuple[float,":
        values = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return tuple(checks.fraction(name, one) for one in values)
    if name in FRACTIONS:
        return checks.fraction(name, value)
    if name in PATHS:
        kind = "Path"
    if name == "levels" and isinstance(value, int):
        value = str(value)
    kinds: dict[str, Any] = {"str": str, "int": int, "bool": bool, "Path": (str, Path)}
    wanted = kinds[kind]
    if not isinstance(value, wanted) or (kind == "int" and isinstance(value, bool)):
        told = {"str": "text", "int": "an integer", "bool": "true or false", "Path": "a path"}
        raise ArgumentTypeError(f"{name} must be {told[kind]}, got {value!r}")
    return Path(value) if kind == "Path" else value


def read_toml(path: Path, table: str | None = None) -> dict[str, Any]:
    """Read the settings of a TOML file, or another table of a kept one.

    Raises:
        FileNotFoundError, ValueError: if the file is missing or is not TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"{path} cannot be read as TOML: {error}") from error
    if table is not None:
        return dict(content.get(table, {}))
    return {name: value for name, value in content.items() if name not in TABLES}


def to_toml(settings: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Return plain values as TOML. Strings, numbers and booleans are written as in JSON."""
    lines = [f"{name} = {_toml(value)}" for name, value in settings.items()]
    for table, values in tables.items():
        lines += ["", f"[{table}]"]
        lines += [f"{_toml(name)} = {_toml(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

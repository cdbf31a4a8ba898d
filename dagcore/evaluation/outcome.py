"""The measured result of an attack on one image, and its files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..attacks import Status
from ..victims import Detector, Victim
from . import figures
from .predict import Prediction


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """The result of an attack on one image. Images are (3, H, W) in [0, 1]."""

    name: str
    image: Tensor
    adversarial: Tensor
    predicted: Prediction
    """Prediction on the clean image: a label map (h, w), or detections."""
    attacked: Prediction
    """Prediction on the attacked image as stored in its 8-bit file."""
    status: Status
    iterations: int
    active: list[int]
    """Number of active targets after 0, 1, ... updates."""
    left: int
    """Number of active targets of the attacked image."""
    to_fool: int
    """Number of active targets of the clean image."""
    targets: int
    """Number of counted targets: not ignored and, for "leave", not aimed at their own label."""
    correct_before: int
    """Number of counted targets that are correct on the clean image."""
    active_after_rounding: int
    """Number of active targets of the attacked image as stored in its 8-bit file."""
    perceptibility: float
    perceptibility_after_rounding: float
    notes: list[str]
    """Notes on the image for the user."""

    @property
    def perturbation(self) -> Tensor:
        """Attacked minus clean image, (3, H, W)."""
        return self.adversarial - self.image

    def numbers(self) -> dict[str, Any]:
        """Return the numbers, ready for JSON."""
        maps = ("image", "adversarial", "predicted", "attacked")
        fields = [field.name for field in dataclasses.fields(self) if field.name not in maps]
        return {name: getattr(self, name) for name in fields}

    def record(self) -> dict[str, Any]:
        """Return the numbers and a detector's detections, ready for JSON."""
        record = self.numbers()
        if isinstance(self.predicted, Mapping) and isinstance(self.attacked, Mapping):
            for name, seen in (("detections", self.predicted), ("attacked", self.attacked)):
                record[name] = {key: value.tolist() for key, value in seen.items()}
        return record

    def line(self) -> str:
        """Return the result in one line for the terminal."""
        return (
            f"{self.name}: {self.status} after {self.iterations} updates, "
            f"{self.left} targets active, "
            f"{self.correct_before} of {self.targets} correct when clean"
            f"{self.remarks()}"
        )

    def remarks(self) -> str:
        """Return the notes in brackets, to append to a line."""
        return f" ({'; '.join(self.notes)})" if self.notes else ""

    def note(self) -> str:
        """Return the numbers in one line for a figure."""
        if not self.targets:
            return "no targets: the image is unchanged"
        if not self.to_fool:
            return f"none of {self.targets} targets to fool: the image is unchanged"
        return (
            f"{self.status} after {self.iterations} updates · "
            f"{self.left} of {self.targets} targets active "
            f"({self.correct_before} correct when clean), "
            f"{self.active_after_rounding} after rounding to 8 bits · "
            f"perceptibility {self.perceptibility:.2e}"
        )


def output_files(folder: Path, name: str) -> dict[str, Path]:
    """Return the paths of the files of one attacked image."""
    endings = {
        "image": "png",
        "perturbation": "perturbation.safetensors",
        "figure": "figure.png",
        "record": "json",
    }
    return {what: folder / f"{name}.{ending}" for what, ending in endings.items()}


def write(
    outcome: Outcome, folder: Path, victim: Victim | Detector, *, record: dict[str, Any]
) -> None:
    """Write the attacked image, the perturbation, the figure and finally the record."""
    paths = output_files(folder, outcome.name)
    files.write_image(paths["image"], outcome.adversarial)
    with files.atomic_write(paths["perturbation"]) as temporary:
        save_file({"perturbation": outcome.perturbation.contiguous()}, temporary)
    draw(outcome, paths["figure"], victim, note=outcome.note())
    with files.atomic_write(paths["record"]) as temporary:
        temporary.write_text(json.dumps({**outcome.record(), **record}, indent=2) + "\n")


def draw(outcome: Outcome, path: Path, victim: Victim | Detector, *, note: str) -> None:
    """Write the figure of an outcome."""
    figures.attack_figure(
        path,
        image=outcome.image,
        adversarial=outcome.adversarial,
        predicted=outcome.predicted,
        attacked=outcome.attacked,
        classes=victim.classes,
        palette=getattr(victim, "palette", None),
        note=note,
    )

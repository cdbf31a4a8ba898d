"""What an attack made of one image: measured, and written into a folder."""

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
    """One attacked image, (3, H, W) in [0, 1]."""

    name: str
    image: Tensor
    adversarial: Tensor
    predicted: Prediction
    """What the network sees in the clean image: a label map (h, w), or detections."""
    attacked: Prediction
    """What it sees in the attacked image as its 8-bit file holds it."""
    status: Status
    iterations: int
    active: list[int]
    """Active targets after 0, 1, ... updates."""
    left: int
    """Active targets of the attacked image."""
    to_fool: int
    """Active targets of the clean image."""
    targets: int
    """Targets that count: neither ignored nor, for "leave", meant for their label."""
    right_before: int
    """Those of them that the network has right on the clean image."""
    active_after_rounding: int
    """Active targets of the attacked image as its 8-bit file holds it."""
    perceptibility: float
    perceptibility_after_rounding: float
    notes: list[str]
    """What users should know of the image."""

    @property
    def perturbation(self) -> Tensor:
        """(3, H, W), attacked minus clean."""
        return self.adversarial - self.image

    def numbers(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        maps = ("image", "adversarial", "predicted", "attacked")
        fields = [field.name for field in dataclasses.fields(self) if field.name not in maps]
        return {name: getattr(self, name) for name in fields}

    def record(self) -> dict[str, Any]:
        """The numbers, and what a detector has found, ready for JSON."""
        record = self.numbers()
        if isinstance(self.predicted, Mapping) and isinstance(self.attacked, Mapping):
            for name, seen in (("detections", self.predicted), ("attacked", self.attacked)):
                record[name] = {key: value.tolist() for key, value in seen.items()}
        return record

    def line(self) -> str:
        """What became of it, in short."""
        return (
            f"{self.name}: {self.status} after {self.iterations} updates, "
            f"{self.left} targets active, {self.right_before} of {self.targets} right before"
            f"{self.remarks()}"
        )

    def remarks(self) -> str:
        """The notes, behind a line."""
        return f" ({'; '.join(self.notes)})" if self.notes else ""

    def note(self, *, leaves: bool) -> str:
        """The numbers in one line."""
        if not self.targets:
            return "no targets: the image is left as it is"
        if not self.to_fool:
            return f"none of {self.targets} targets to fool: the image is left as it is"
        state = "left" if leaves else "not as wanted"
        return (
            f"{self.status} after {self.iterations} updates · "
            f"{self.left} of {self.targets} targets {state} ({self.right_before} right "
            f"before), {self.active_after_rounding} after rounding to 8 bits · "
            f"perceptibility {self.perceptibility:.2e}"
        )


def output_files(folder: Path, name: str) -> dict[str, Path]:
    """The files of one attacked image."""
    endings = {
        "image": "png",
        "perturbation": "perturbation.safetensors",
        "figure": "figure.png",
        "record": "json",
    }
    return {what: folder / f"{name}.{ending}" for what, ending in endings.items()}


def write(
    outcome: Outcome,
    folder: Path,
    victim: Victim | Detector,
    *,
    leaves: bool,
    record: dict[str, Any],
) -> None:
    """Write the attacked image, the perturbation, the figure and, last, the record."""
    paths = output_files(folder, outcome.name)
    files.write_image(paths["image"], outcome.adversarial)
    with files.atomic_write(paths["perturbation"]) as temporary:
        save_file({"perturbation": outcome.perturbation.contiguous()}, temporary)
    draw(outcome, paths["figure"], victim, note=outcome.note(leaves=leaves))
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

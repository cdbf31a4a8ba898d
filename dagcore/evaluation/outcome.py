"""What an attack made of one image: measured, and written into a folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..attacks.dag import DAG, Result, Status
from ..engine import frozen, read_scores
from ..ops import argmax_bilinear
from ..perturbation import perceptibility, round_to_8_bits
from ..victims import Detector, Victim
from . import figures

Seen = Tensor | Mapping[str, Tensor]  # a label map, or detections


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """One attacked image, (3, H, W) in [0, 1]."""

    name: str
    image: Tensor
    adversarial: Tensor
    predicted: Seen
    """What the network sees in the clean image: a label map (h, w), or detections."""
    attacked: Seen
    """What it sees in the attacked image."""
    status: Status
    iterations: int
    active: list[int]
    """Active targets after 0, 1, ... updates."""
    targets: int
    """Targets that count: neither ignored nor at their adversarial label from the start."""
    active_after_rounding: int
    """Active targets of the attacked image as its 8-bit file holds it."""
    perceptibility: float
    perceptibility_after_rounding: float

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
            f"{self.active[-1]} targets active"
        )

    def note(self, goal: str) -> str:
        """The numbers in one line."""
        if not self.targets:
            return "no targets: the image is left as it is"
        state = "still right" if goal == "leave" else "not as wanted"
        return (
            f"{self.status} after {self.iterations} updates · "
            f"{self.active[-1]} of {self.targets} targets {state}, "
            f"{self.active_after_rounding} after rounding to 8 bits · "
            f"perceptibility {self.perceptibility:.2e}"
        )


def predict(victim: Victim, images: Tensor) -> Tensor:
    """Scores of images (N, 3, H, W) without gradients: (N, C, *T)."""
    with frozen(victim), torch.no_grad():
        return read_scores(victim(images), images)


def look(victim: Victim | Detector, images: Tensor, size: tuple[int, ...]) -> Sequence[Seen]:
    """What a network sees in each image: detections, or a label map of a size."""
    if isinstance(victim, Detector):
        with frozen(victim), torch.no_grad():
            found = victim.detect(images)
        return [{key: value.cpu() for key, value in one.items()} for one in found]
    return list(see(victim, images, (size[0], size[1])).cpu())


def see(victim: Victim, images: Tensor, size: tuple[int, int]) -> Tensor:
    """What the network sees in images (N, 3, H, W), at any size: (N, *size) int64."""
    return argmax_bilinear(predict(victim, images), size, align_corners=victim.align_corners)


def attack_images(
    attack: DAG,
    victim: Victim | Detector,
    images: Tensor,  # (N, 3, H, W)
    labels: Tensor,  # (N, *T)
    adversarial_labels: Tensor | str,  # (N, *T)
    *,
    boxes: Tensor | None = None,  # (N, *)
    names: Sequence[str],
    generator: torch.Generator,
    callback: Callable[[int, Tensor], None] | None = None,
) -> list[Outcome]:
    """Attack a batch of images and measure what came of each."""
    result = attack(
        victim, images, labels, adversarial_labels, generator, boxes=boxes, callback=callback
    )
    return measure(attack, victim, images, labels, result, boxes=boxes, names=names)


def measure(
    attack: DAG,
    victim: Victim | Detector,
    images: Tensor,  # (N, 3, H, W)
    labels: Tensor,  # (N, *T)
    result: Result,
    *,
    boxes: Tensor | None = None,  # (N, *)
    names: Sequence[str],
) -> list[Outcome]:
    """What came of each image of an attack."""
    drawn = "runner-up" if result.adversarial_labels is None else result.adversarial_labels
    rounded = round_to_8_bits(result.adversarial)
    left = attack.count_active(victim, rounded, labels, drawn, boxes=boxes)
    size = tuple(labels.shape[1:])
    predicted, attacked = (look(victim, x, size) for x in (images, result.adversarial))
    rounded_perceptibility = perceptibility(rounded - images)
    return [
        Outcome(
            name=name,
            image=images[n].cpu(),
            adversarial=result.adversarial[n].cpu(),
            predicted=predicted[n],
            attacked=attacked[n],
            status=result.status[n],
            iterations=int(result.iterations[n]),
            active=[count for count in result.active[:, n].tolist() if count >= 0],
            targets=int(result.targets[n]),
            active_after_rounding=int(left[n]),
            perceptibility=float(result.perceptibility[n]),
            perceptibility_after_rounding=float(rounded_perceptibility[n]),
        )
        for n, name in enumerate(names)
    ]


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
    outcome: Outcome, folder: Path, victim: Victim | Detector, *, goal: str, record: dict[str, Any]
) -> None:
    """Write the attacked image, the perturbation, the figure and, last, the record."""
    paths = output_files(folder, outcome.name)
    files.write_image(paths["image"], outcome.adversarial)
    with files.atomic_write(paths["perturbation"]) as temporary:
        save_file({"perturbation": outcome.perturbation.contiguous()}, temporary)
    draw(outcome, paths["figure"], victim, note=outcome.note(goal))
    with files.atomic_write(paths["record"]) as temporary:
        temporary.write_text(json.dumps({**outcome.record(), **record}, indent=2) + "\n")


def draw(outcome: Outcome, path: Path, victim: Victim | Detector, *, note: str) -> None:
    """Write the figure of an outcome."""
    before, after = outcome.predicted, outcome.attacked
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        figures.detection_figure(
            path,
            image=outcome.image,
            adversarial=outcome.adversarial,
            predicted=before,
            attacked=after,
            classes=victim.classes,
            note=note,
        )
    elif isinstance(before, Tensor) and isinstance(after, Tensor):
        figures.attack_figure(
            path,
            image=outcome.image,
            adversarial=outcome.adversarial,
            predicted=before,
            attacked=after,
            classes=victim.classes,
            palette=getattr(victim, "palette", None),
            note=note,
        )

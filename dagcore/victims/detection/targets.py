"""The targets of an attack on a detector: boxes, their labels, and the labels to lead them to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.stream import Sample
from ...errors import ArgumentError
from ...labels import draw
from ...optional import optional_import

ADVERSARIAL_KINDS = ("permutation", "random", "vanish")
PADDED_TO = 128  # numbers of boxes are multiples of it, so that images share slots of a stream


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """What an attack on N images aims at, P targets each (padding included)."""

    boxes: Tensor
    """(N, P, 4) left, top, right, bottom in pixels of the images; NaN where padded. The attack
    takes them as `boxes`."""
    labels: Tensor
    """(N, P) int64, the class of the true object; the ignore label where there is none."""
    adversarial_labels: Tensor
    """(N, P) int64; the ignore label likewise."""
    proposals: Tensor
    """(N,) int64, boxes that were looked at."""
    num_classes: int
    """C, the background included."""
    counts: Tensor
    """(N,) int64, targets with a label: 0 for an image without objects, which is left alone."""
    boxes_needed: bool
    """Whether the detector reads its scores at `boxes`; if not, it has targets of its own."""

    def samples(self, images: Tensor, keys: Sequence[Any] | None = None) -> Iterator[Sample]:
        """The images (N, 3, H, W), one by one, for `DAG.stream`; keys are their numbers if None."""
        for n in range(len(images)):
            yield Sample(
                image=images[n],
                labels=self.labels[n],
                adversarial_labels=self.adversarial_labels[n],
                boxes=self.boxes[n] if self.boxes_needed else None,
                key=n if keys is None else keys[n],
            )


def match(
    boxes: Tensor,  # (P, 4)
    probabilities: Tensor,  # (P, C)
    true_boxes: Tensor,  # (K, 4)
    true_labels: Tensor,  # (K,)
    *,
    min_iou: float,
    min_score: float,
    none: int,
) -> Tensor:
    """The label of each box, `none` where it is no target: (P,) int64."""
    if not len(true_boxes) or not len(boxes):
        return torch.full((len(boxes),), none, dtype=torch.int64, device=boxes.device)
    overlap = optional_import("torchvision.ops", "vision").box_iou(boxes, true_boxes)
    fits = (overlap > min_iou) & (probabilities[:, true_labels] > min_score)
    best = torch.where(fits, overlap, -1).argmax(1)
    return torch.where(fits.any(1), true_labels[best], none)


def check_inside(name: str, boxes: Tensor, images: Tensor) -> None:
    """Raise unless boxes (*, 4) lie inside images (N, 3, H, W) and have an area. Reads values."""
    height, width = images.shape[-2:]
    left, top, right, bottom = boxes.unbind(-1)
    faults = {
        "be finite": ~boxes.isfinite().all(-1),
        "have left < right and top < bottom": (left >= right) | (top >= bottom),
        f"lie inside the image ({width} x {height} pixels)": (
            (left < 0) | (top < 0) | (right > width) | (bottom > height)
        ),
    }
    for required, wrong in faults.items():
        if bool(wrong.any()):
            where = tuple(int(i) for i in wrong.nonzero()[0])
            raise ArgumentError(
                f"{name} must {required}, got {boxes[where].tolist()} at {list(where)}"
            )


def stack(
    rows: list[tuple[Tensor, Tensor]], images: Tensor, ignore_index: int, *, pad: bool
) -> tuple[Tensor, Tensor]:
    """Boxes (N, P, 4) and labels (N, P) of all images."""
    most = max((len(labels) for _, labels in rows), default=0)
    size = -(-most // PADDED_TO) * PADDED_TO if pad else most
    boxes = images.new_full((len(images), size, 4), torch.nan)
    labels = torch.full((len(images), size), ignore_index, dtype=torch.int64, device=images.device)
    for n, (own_boxes, own_labels) in enumerate(rows):
        boxes[n, : len(own_boxes)], labels[n, : len(own_labels)] = own_boxes, own_labels
    return boxes, labels


def draw_adversarial_labels(
    labels: Tensor,  # (N, P)
    kind: str,
    classes: Tensor,
    *,
    background: int,
    ignore_index: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Adversarial labels (N, P) of one of `ADVERSARIAL_KINDS`, among the objects' classes."""
    counted = labels != ignore_index
    if kind == "vanish":
        return torch.where(counted, background, ignore_index)
    if len(classes) < 2:
        if bool(counted.any()):
            raise ArgumentError(
                f"adversarial={kind!r} needs at least 2 object classes, there are "
                f"{len(classes)}: use 'vanish'"
            )
        return labels.clone()
    # Ranks among the object classes; a label that is none of them gets the rank after its own.
    ranks = torch.bucketize(torch.where(counted, labels, 0), classes).clamp_(0, len(classes) - 1)
    drawn = draw(kind, ranks, len(classes), generator)
    return torch.where(counted, classes[drawn], ignore_index)

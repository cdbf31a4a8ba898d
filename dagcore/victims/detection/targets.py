"""The targets of an attack on a detector: boxes, their labels and their adversarial labels."""

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
PADDED_TO = 128  # the number of boxes is a multiple of it, so that images share stream slots


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """The targets of an attack on N images, P per image (with padding)."""

    boxes: Tensor
    """Boxes (N, P, 4) as left, top, right, bottom in pixels of the images; NaN where padded. The
    attack takes them as `boxes`."""
    labels: Tensor
    """Labels (N, P) int64: the class of the true object, or the ignore label if there is none."""
    adversarial_labels: Tensor
    """Adversarial labels (N, P) int64, with the ignore label at the same places."""
    proposals: Tensor
    """Number of boxes considered in each image, (N,) int64."""
    num_classes: int
    """Number of classes C, with the background."""
    counts: Tensor
    """Number of targets with a label, (N,) int64; 0 for an image that the attack leaves alone."""
    boxes_needed: bool
    """Whether the detector reads its scores at `boxes`; if not, it has its own targets."""

    def samples(self, images: Tensor, keys: Sequence[Any] | None = None) -> Iterator[Sample]:
        """Yield the images (N, 3, H, W) as samples for `DAG.stream`; keys default to indices."""
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
    """Return the label of each box, `none` if it is not a target: (P,) int64."""
    if not len(true_boxes) or not len(boxes):
        return torch.full((len(boxes),), none, dtype=torch.int64, device=boxes.device)
    overlap = optional_import("torchvision.ops", "vision").box_iou(boxes, true_boxes)
    fits = (overlap > min_iou) & (probabilities[:, true_labels] > min_score)
    best = torch.where(fits, overlap, -1).argmax(1)
    return torch.where(fits.any(1), true_labels[best], none)


def check_inside(name: str, boxes: Tensor, images: Tensor) -> None:
    """Raise unless boxes (*, 4) lie inside images (N, 3, H, W) and have an area.

    This reads values, and so waits for a GPU.
    """
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
    """Stack boxes and labels of all images to (N, P, 4) and (N, P), padded to the longest."""
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
    """Draw adversarial labels (N, P) of one of `ADVERSARIAL_KINDS` among the object classes."""
    counted = labels != ignore_index
    if kind == "vanish":
        return torch.where(counted, background, ignore_index)
    if len(classes) < 2:
        if bool(counted.any()):
            raise ArgumentError(
                f"adversarial={kind!r} needs at least 2 object classes, got "
                f"{len(classes)}: use 'vanish'"
            )
        return labels.clone()
    # Ranks among the object classes. A label that is not among them gets the next class's rank.
    ranks = torch.bucketize(torch.where(counted, labels, 0), classes).clamp_(0, len(classes) - 1)
    drawn = draw(kind, ranks, len(classes), generator)
    return torch.where(counted, classes[drawn], ignore_index)

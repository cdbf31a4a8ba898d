"""Examples of data sets: an image with its mask, its boxes, or both."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentTypeError


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An image and its ground truth. Class 0 is the background.

    Attributes:
        key: name of the example in its data set.
        image: (3, H, W) float32 in [0, 1].
        mask: (H, W) uint8 class indices, 255 where void; None if there is no mask.
        boxes: (K, 4) float32 in pixels: left, top, right, bottom, the last two exclusive.
        labels: (K,) int64, class indices in 1..C-1.
        difficult: (K,) bool, whether evaluations ignore the object.
    """

    key: str
    image: Tensor
    mask: Tensor | None
    boxes: Tensor
    labels: Tensor
    difficult: Tensor


def position(index: object) -> int:
    """Return the index of an example as an int, for any type that Python takes as an index.

    Raises:
        TypeError: for anything else, such as a slice.
    """
    try:
        return operator.index(index)  # type: ignore[arg-type]
    except TypeError as error:
        raise ArgumentTypeError(f"index must be an integer, got {index!r}") from error


def cut(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """Clip a box (left, top, right, bottom) to an image of `size` (height, width).

    Return None if no area is left.
    """
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[2], size[1]), min(box[3], size[0])
    return (left, top, right, bottom) if left < right and top < bottom else None


def boxes_of(objects: Sequence[tuple[Sequence[float], int, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (K, 4), labels (K,) and difficult flags (K,), as in an `Example`."""
    return (
        torch.tensor([box for box, _, _ in objects], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
        torch.tensor([difficult for _, _, difficult in objects], dtype=torch.bool),
    )

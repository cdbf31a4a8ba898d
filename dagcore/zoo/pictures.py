"""Training data of the zoo's networks: scenes and crops, cached in memory, and augmentation."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset

from ..data import Example, Scenes
from ..data.scenes import MATERIAL, VOID, crop

STRONG = 0.15  # root mean square of the crops' materials at the start of a training


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images and their ground truth."""

    images: Tensor  # (N, 3, H, W) float32 in [0, 1]
    masks: Tensor  # (N, H, W) int64
    boxes: list[Tensor]  # (K_n, 4)
    labels: list[Tensor]  # (K_n,)


class Pictures:
    """Training scenes, each painted on first use and cached in 8 bits.

    Difficult objects are left out of the boxes.

    Args:
        counts: number of scenes by family.
    """

    def __init__(self, counts: dict[str, int]) -> None:
        self._scenes: ConcatDataset[Example] = ConcatDataset(
            Scenes(family, "train", count=count) for family, count in counts.items()
        )
        self._known: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return image and mask, both uint8, boxes and labels."""
        if index not in self._known:
            example = self._scenes[index]
            assert example.mask is not None
            self._known[index] = (
                (example.image * 255).round().byte(),
                example.mask,
                example.boxes[~example.difficult],
                example.labels[~example.difficult],
            )
        return self._known[index]

    def batch(self, chosen: list[int]) -> Batch:
        """Return a batch of the scenes with these numbers."""
        images, masks, boxes, labels = zip(*(self[k] for k in chosen), strict=True)
        return Batch(
            torch.stack(images).float() / 255, torch.stack(masks).long(), [*boxes], [*labels]
        )


class Crops:
    """Crops with at most one object, and its class, cached as `Pictures` caches scenes.

    Args:
        counts: number of crops by family.
    """

    def __init__(self, counts: dict[str, int]) -> None:
        self._names = [(family, k) for family, count in counts.items() for k in range(count)]
        self._known: dict[int, tuple[Tensor, Tensor, int]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Return a crop without materials, the same crop with strong ones, and its class."""
        if index not in self._known:
            name = self._names[index]
            self._known[index] = crop(*name, 0.0)[0], *crop(*name, STRONG)
        return self._known[index]

    def batch(self, chosen: list[int], material: float = MATERIAL) -> Batch:
        """Return a batch of the crops with these numbers, with materials of this root mean square.

        The class of a crop is the label of a box around the whole crop.
        """
        weak, strong, labels = zip(*(self[k] for k in chosen), strict=True)
        images, others = (torch.stack(part).float() / 255 for part in (weak, strong))
        images += (others - images) * (material / STRONG)
        count, _, height, width = images.shape
        return Batch(
            images,
            torch.zeros(count, height, width, dtype=torch.int64),
            [torch.tensor([[0.0, 0.0, width, height]])] * count,
            [torch.tensor([label]) for label in labels],
        )


def augment(batch: Batch, zoom: tuple[float, float]) -> Batch:
    """Zoom, shift, mirror and relight scenes at random, using torch's global generator.

    Mirroring changes no class. Pixels outside the scene are grey, and void in masks. Boxes with
    less than a third of their area inside the frame are dropped.
    """
    count, _, height, width = batch.images.shape
    scale = torch.empty(count, 1).uniform_(*map(math.log, zoom)).exp()
    scale = torch.cat([scale * (1 - 2 * torch.randint(2, (count, 1))), scale], 1)  # (N, 2): x, y
    # The frame shows 1 / scale of the scene around a centre, in units of half the scene's size.
    center = (2 * torch.rand(count, 2) - 1) * (1 - 1 / scale.abs()).abs()
    grid = F.affine_grid(
        torch.cat([torch.diag_embed(1 / scale), center[:, :, None]], 2),
        [count, 1, height, width],
        align_corners=False,
    )
    images = F.grid_sample(batch.images - 0.5, grid, align_corners=False)
    contrast = torch.empty(count, 1, 1, 1).uniform_(0.8, 1.2)
    brightness = torch.empty(count, 1, 1, 1).uniform_(0.4, 0.6)
    masks = (batch.masks - VOID)[:, None].float()  # so that the zeros outside are void
    masks = F.grid_sample(masks, grid, mode="nearest", align_corners=False)[:, 0].long() + VOID
    boxes, labels = [], []
    for k in range(count):
        moved, kept = move(batch.boxes[k], scale[k], center[k], torch.tensor([width, height]))
        boxes.append(moved)
        labels.append(batch.labels[k][kept])
    return Batch((images * contrast + brightness).clamp(0, 1), masks, boxes, labels)


def move(boxes: Tensor, scale: Tensor, center: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Move boxes (K, 4) as `augment` moves scenes; return the clipped boxes kept, and a mask."""
    corners = ((2 * boxes.view(-1, 2, 2) / size - 1) - center) * scale  # the frame is [-1, 1]^2
    ends = torch.stack([corners.amin(1), corners.amax(1)], 1)
    inside = ends.clamp(-1, 1)
    areas, whole_areas = ((e[:, 1] - e[:, 0]).prod(1) for e in (inside, ends))
    kept = 3 * areas >= whole_areas
    return ((inside + 1) / 2 * size).view(-1, 4)[kept], kept

"""Segmentation networks as victims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Victim(nn.Module):
    """A network that takes images in [0, 1], with its normalisation inside.

    Args:
        network: maps normalised images (N, 3, H, W) to scores (N, C, *T) before softmax.
        mean: per channel, in units of the [0, 1] range.
        std: likewise.
        classes: names of the classes, for figures and the command line.
        palette: colour (r, g, b) in 0..255 of each class, for figures.
        cells: whether the commands take each cell of the scores as a target, not each pixel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Callable[[Tensor], Any],
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        classes: Sequence[str] | None = None,
        palette: Sequence[tuple[int, int, int]] | None = None,
        cells: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.cells = cells
        self.classes = None if classes is None else tuple(classes)
        self.palette = None if palette is None else tuple(palette)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Any:
        """Scores of images (N, 3, H, W), as the network returns them."""
        return self.network((images - self.mean) / self.std)

    @property
    def align_corners(self) -> bool:
        """How scores at a lower resolution than the labels are to be enlarged: as the network says.

        False where it says nothing.
        """
        return bool(getattr(self.network, "align_corners", False))

    def around(self, network: Callable[[Tensor], Any]) -> Victim:
        """The same victim with another network inside."""
        victim = Victim(network, classes=self.classes, palette=self.palette, cells=self.cells)
        victim.mean, victim.std = self.mean, self.std
        victim.training = self.training
        return victim

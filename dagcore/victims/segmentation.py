"""Segmentation networks as victims."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..engine import read_scores
from ..engine.scores import aligned, aligns_corners
from ..errors import ArgumentError, ArgumentTypeError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def per_channel(name: str, values: Any, *, positive: bool = False) -> Tensor:
    """Return three numbers, one per channel, as (3, 1, 1).

    Raises:
        ValueError: if they are anything else, or not above 0 although they must be.
    """
    given = values.detach().flatten() if isinstance(values, Tensor) else values
    try:
        numbers = [float(value) for value in given]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    good = len(numbers) == 3 and all(map(math.isfinite, numbers))
    if not good or (positive and min(numbers) <= 0):
        raise ArgumentError(
            f"{name} must be three numbers{' above 0' * positive}, one per channel, got {values!r}"
        )
    kept = isinstance(values, Tensor) and values.is_floating_point()
    dtype = values.dtype if kept else torch.get_default_dtype()
    return torch.tensor(numbers, dtype=dtype).view(3, 1, 1)


class Victim(nn.Module):
    """A segmentation network that takes images in [0, 1] and normalises them itself.

    A network with weights in half precision or float64 gets its images in that dtype.

    Args:
        network: maps normalised images (N, 3, H, W) to scores (N, C, *T) before softmax.
        mean: mean of the normalisation per channel, in units of the [0, 1] range.
        std: standard deviation of the normalisation, likewise.
        classes: names of the classes, for figures and the command line.
        palette: colour (r, g, b) in 0..255 of each class, for figures.
        cells: whether the commands use each cell of the scores as a target, instead of each pixel.
        size: (height, width) to which images are resized, for a network that takes one size.
            Resizing is bilinear, antialiased if it shrinks, and ignores the aspect ratio. Scores
            smaller than the images are enlarged to them as usual, larger ones are reduced to them.
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
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not callable(network):
            raise ArgumentTypeError(f"network must be callable, got {type(network).__name__}")
        self.network = network
        self.cells = cells
        self.size = None if size is None else check_size(size)
        self.classes = None if classes is None else tuple(classes)
        self.palette = None if palette is None else tuple(palette)
        self.register_buffer("mean", per_channel("mean", mean), persistent=False)
        self.register_buffer("std", per_channel("std", std, positive=True), persistent=False)

    def forward(self, images: Tensor) -> Any:
        """Return the network's scores of images (N, 3, H, W), with `size` fitted to the images."""
        x = (resized(images, self.size) - self.mean) / self.std
        output = self.network(x.to(precision(self.network) or x.dtype))
        if self.size is not None:
            output = self._fitted(read_scores(output, images, least=1), images)
        if not self.align_corners:
            return output
        if isinstance(output, Mapping) and "out" in output:
            return {**output, "out": aligned(output["out"])}
        return aligned(output) if isinstance(output, Tensor) else output

    def _fitted(self, scores: Tensor, images: Tensor) -> Tensor:
        """Reduce score maps (N, C, h, w) to the images' size if they are larger."""
        size = images.shape[2:]
        if scores.dim() != 4 or (scores.shape[2] <= size[0] and scores.shape[3] <= size[1]):
            return scores
        return nn.functional.interpolate(
            scores, size, mode="bilinear", align_corners=self.align_corners
        )

    @property
    def align_corners(self) -> bool:
        """Whether scores of lower resolution than the labels are enlarged with align_corners.

        It is the network's own attribute, False if it has none.
        """
        return aligns_corners(self.network)

    def around(self, network: Callable[[Tensor], Any]) -> Victim:
        """Return the same victim around another network."""
        victim = Victim(
            network, classes=self.classes, palette=self.palette, cells=self.cells, size=self.size
        )
        victim.mean, victim.std = self.mean, self.std
        victim.training = self.training
        return victim


def check_size(size: Any) -> tuple[int, int]:
    """Return a size as a tuple; raise unless it is (height, width) in pixels."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ArgumentTypeError(f"size must be (height, width), got {size!r}")
    for side in size:
        checks.integer("size", side, at_least=1)
    return size[0], size[1]


def resized(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resize images (N, 3, H, W) to a size (H, W), differentiably; return them as is if None."""
    if size is None or tuple(images.shape[2:]) == tuple(size):
        return images
    return nn.functional.interpolate(images, size, mode="bilinear", antialias=True)


def precision(network: Any) -> torch.dtype | None:
    """Return the dtype of a network's weights; None for float32, or if it has no weights.

    Also None for a result of `prepare`, which converts images itself.
    """
    if not isinstance(network, nn.Module) or hasattr(network, "preparation"):
        return None
    first = next((p.dtype for p in network.parameters() if p.is_floating_point()), None)
    return None if first == torch.float32 else first

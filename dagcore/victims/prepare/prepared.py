"""The results of `prepare`, and the record of what it did."""

from __future__ import annotations

import dataclasses
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...engine import read_scores
from ...engine.scores import aligned, aligns_corners
from ..segmentation import Victim, precision
from .follow import Follower


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What `prepare` did to a network."""

    low_resolution: bool
    """Whether the scores are returned before the last enlargement."""
    folded: int
    """Number of batch norms folded into the convolutions before them."""
    left: dict[str, str]
    """Reason for each batch norm that was not folded, by its name."""
    merged: int
    """Number of SegFormer decode heads whose linear layers were merged."""
    channels_last: bool
    bf16: bool
    compiled: bool


class Prepared(nn.Module):
    """A network made by `prepare`, always in eval mode, its parameters without gradients."""

    original: weakref.ref[nn.Module] | None
    """Weak reference to the network that this copy was made from; not pickled."""

    def __init__(
        self,
        network: nn.Module,
        preparation: Preparation,
        follower: Follower,
        original: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.original = None if original is None else weakref.ref(original)
        self.network = network
        self.follower = follower
        self.preparation = preparation
        self.align_corners = aligns_corners(network)
        self.classes: tuple[str, ...] | None = getattr(network, "classes", None)
        self.palette: tuple[tuple[int, int, int], ...] | None = getattr(network, "palette", None)
        self.cells = bool(getattr(network, "cells", False))
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, C, *T) of images (N, 3, H, W), in the images' dtype."""
        lower = self.preparation.bf16
        # Autocast does not convert float64.
        own = None if isinstance(self.network, Victim) else precision(self.network)
        x = images.to(torch.float32 if lower else own or images.dtype)
        with torch.autocast(x.device.type, torch.bfloat16) if lower else nullcontext():
            output = self.network(x)
        scores = read_scores(output, images, least=1).to(images.dtype)
        return aligned(scores) if self.align_corners else scores

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "original": None}

    def train(self, mode: bool = True) -> Prepared:
        """Stay in eval mode: a folded network cannot be trained."""
        return self

    def extra_repr(self) -> str:
        """Return what `prepare` did, for the module's repr."""
        return str(self.preparation)

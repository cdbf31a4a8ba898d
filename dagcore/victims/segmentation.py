"""Segmentation networks as victims, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..optional import optional_import

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


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file: .safetensors, or a state dict saved by torch.save.

    Checkpoints that keep it under "model" or "state_dict", or with DataParallel's "module."
    before each name, are understood. Nothing but tensors is ever unpickled.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    load_file = optional_import("safetensors.torch", "cli").load_file
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no weights fail in any way at all
        reason = str(error).strip().partition("\n")[0]
        raise ArgumentError(
            f"weights file {path} cannot be read as a state dict, .safetensors or by "
            f"torch.load(weights_only=True): {type(error).__name__}: {reason}"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ArgumentError(f"weights file {path} must hold a state dict (names and tensors)")
    return {key.removeprefix("module."): value for key, value in content.items()}


def fit(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict; where anything is missing, left over or misshapen, say what."""
    own = network.state_dict()
    # Files from before torch 0.4.1 lack these counters, which serve training only.
    wanted = [key for key in own if key in state or not key.endswith("num_batches_tracked")]
    faults = {
        "missing": [key for key in wanted if key not in state],
        "left over": [key for key in state if key not in own],
        "of another shape": [
            key for key in wanted if key in state and state[key].shape != own[key].shape
        ],
    }
    found = [f"{len(keys)} {fault} ({keys[0]}, ...)" for fault, keys in faults.items() if keys]
    if found:
        raise ArgumentError(f"weights must fit the network, {what} differ: {', '.join(found)}")
    network.load_state_dict({**own, **state})

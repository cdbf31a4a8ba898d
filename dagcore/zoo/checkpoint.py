"""Weights of the zoo's networks in safetensors files, with what is known about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..optional import optional_import
from ..victims.segmentation import Victim


def inside(network: nn.Module) -> nn.Module:
    """The network whose state dict a weights file holds: a victim's own, else itself."""
    return network.network if type(network) is Victim else network  # type: ignore[return-value]


def save_weights(path: str | Path, network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write a network's weights, whole or not at all.

    Weights of two and more dimensions are rounded to float16; biases and the like, which are few,
    keep their float32.

    Args:
        path: ends in .safetensors; folders that are missing are made.
        network: as `build` makes it, or `fold`ed.
        metadata: values that JSON can hold, by name. `load` reads "width" and "classes", the
            names of the classes; "training_set", "seed" and "score" are for people.

    Raises:
        ValueError: a path with another ending, metadata that JSON cannot hold, or weights that
            are not finite in float16.
    """
    from ..files import atomic_write  # needs Pillow, which loading does not

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ArgumentError(f"path must end in .safetensors, got {path}")
    state = {key: _stored(key, value) for key, value in inside(network).state_dict().items()}
    try:
        text = {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"metadata must hold values that JSON can hold: {error}") from error
    save_file = optional_import("safetensors.torch", "cli").save_file
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(state, temporary, metadata=text)
        _put_in_order(temporary)


def _put_in_order(path: Path) -> None:
    """Sort the header of a safetensors file, whose order is random: equal weights, equal bytes."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def _stored(key: str, value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    if value.is_floating_point() and value.dim() > 1:
        value = value.to(torch.float16)
    if value.is_floating_point() and not value.isfinite().all():
        raise ArgumentError(f"network must have weights that are finite in float16, {key} has not")
    return value


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_weights` was told, without reading the weights; empty for files of other makers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    safe_open = optional_import("safetensors", "cli").safe_open
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata() or {}
    except Exception as error:  # bytes that are no weights fail in any way at all
        raise ArgumentError(
            f"weights file {path} cannot be read as .safetensors: {error}"
        ) from error
    found = {}
    for key, value in text.items():
        try:
            found[key] = json.loads(value)
        except ValueError:
            continue  # another maker's: {"format": "pt"}
    return found

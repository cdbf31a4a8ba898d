"""Weights of the zoo's networks in safetensors files, with metadata."""

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
    """Return the network whose state dict a weights file holds: that in a `Victim`, else itself."""
    return network.network if type(network) is Victim else network  # type: ignore[return-value]


def save_weights(path: str | Path, network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write a network's weights to a file, atomically.

    Weights with two or more dimensions are rounded to float16. Biases and other vectors, which are
    small, stay in float32.

    Args:
        path: path that ends in .safetensors; missing folders are made.
        network: a network made by `build` or `fold`.
        metadata: JSON-serialisable values by name. `load` reads "width" and "classes" (the names of
            the classes). "training_set", "seed" and "score" are for information only.

    Raises:
        ValueError: if the path has another ending, the metadata cannot be serialised as JSON, or
            the weights are not finite in float16.
    """
    from ..files import atomic_write  # needs Pillow, which loading does not

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ArgumentError(f"path must end in .safetensors, got {path}")
    state = {key: _stored(key, value) for key, value in inside(network).state_dict().items()}
    try:
        text = {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"metadata must be serialisable as JSON: {error}") from error
    save_file = optional_import("safetensors.torch", "cli").save_file
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(state, temporary, metadata=text)
        _put_in_order(temporary)


def _put_in_order(path: Path) -> None:
    """Sort the header of a safetensors file, whose order is random, for reproducible bytes."""
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
        raise ArgumentError(f"network must have weights that are finite in float16, {key} is not")
    return value


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata that `save_weights` wrote, without the weights; empty for other files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    safe_open = optional_import("safetensors", "cli").safe_open
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata() or {}
    except Exception as error:  # a malformed file may raise anything
        raise ArgumentError(
            f"weights file {path} cannot be read as .safetensors: {error}"
        ) from error
    found = {}
    for key, value in text.items():
        try:
            found[key] = json.loads(value)
        except ValueError:
            continue  # written by another program, such as {"format": "pt"}
    return found

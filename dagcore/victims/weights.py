"""Read weights from files and load them into networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..optional import optional_import


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file: .safetensors, or a state dict saved by torch.save.

    The state dict may be stored under "model" or "state_dict", and its names may begin with
    DataParallel's "module.". Only tensors are ever unpickled (`weights_only=True`).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not hold a state dict.
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
    except Exception as error:  # a malformed file may raise anything
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


def load_state(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict into a network.

    Raises:
        ValueError: if entries are missing, unexpected or of another shape; the message says which.
    """
    own = network.state_dict()
    # Files from before torch 0.4.1 lack these counters, which only training uses.
    wanted = [key for key in own if key in state or not key.endswith("num_batches_tracked")]
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            key for key in wanted if key in state and state[key].shape != own[key].shape
        ],
    }
    found = [f"{len(keys)} {fault} ({keys[0]}, ...)" for fault, keys in faults.items() if keys]
    if found:
        raise ArgumentError(f"weights must fit the network, {what} differ: {', '.join(found)}")
    network.load_state_dict({**own, **state})

"""Keep results together with what they depend on, and reuse them only while that is unchanged."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ArgumentError
from ..files import atomic_write


def differences(
    had: Mapping[str, Any], have: Mapping[str, Any], without: Collection[str] = ()
) -> list[str]:
    """Return the differences between what two results depend on, in words."""

    def told(values: Mapping[str, Any], name: str) -> str:
        return repr(values[name]) if name in values else "not set"

    return [
        f"{name} was {told(had, name)} and is {told(have, name)}"
        for name in {**had, **have}
        if name not in without and had.get(name) != have.get(name)
    ]


def refuse(where: Path, differ: Sequence[str]) -> None:
    """Raise if results were made with other settings."""
    if differ:
        raise ArgumentError(
            f"--out: {where} has results of other settings: {'; '.join(differ)}. Choose another "
            "folder, or use the old settings"
        )


def keep_json(path: Path, kept: Mapping[str, Any], of: Mapping[str, Any]) -> None:
    """Write numbers to a file, with what they depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({**kept, "of": of}) + "\n")


def read_json(path: Path, of: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the content of a file if it depends on `of`, or None."""
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
        return kept if kept.get("of") == of else None
    except (AttributeError, ValueError) as error:
        raise ArgumentError(f"--out: {path} cannot be read, remove it: {error}") from error


def keep_tensor(
    path: Path, name: str, values: Tensor, known: Mapping[str, Any], of: Mapping[str, Any]
) -> None:
    """Write a tensor to a file, with what is known of it and what it depends on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {key: json.dumps(value) for key, value in {**known, "settings": of}.items()}
    with atomic_write(path) as temporary:
        save_file({name: values.cpu().contiguous()}, temporary, metadata=metadata)


def known_of(path: Path) -> dict[str, Any]:
    """Return what is known of a kept tensor, including its "settings"."""
    try:
        with safe_open(path, "pt") as file:
            return {key: json.loads(value) for key, value in file.metadata().items()}
    except Exception as error:  # foreign files can raise anything
        raise ArgumentError(f"--out: {path} cannot be read, remove it: {error}") from error


def is_kept(path: Path, of: Mapping[str, Any]) -> bool:
    """Whether a tensor is kept in a file.

    Raises:
        ArgumentError: if the tensor depends on other settings, or the file cannot be read.
    """
    if not path.is_file():
        return False
    had = known_of(path).get("settings", {})
    refuse(path, differences({name: had.get(name) for name in of}, of))
    return True


def read_tensor(path: Path, name: str) -> Tensor:
    """Read a kept tensor."""
    values: Tensor = load_file(path)[name]
    return values

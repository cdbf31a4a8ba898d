"""The compiled module, None if it is missing; importing raises if it exists but cannot load."""

from __future__ import annotations

import importlib
import json
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).parents[1]


def _load() -> ModuleType | None:
    # Only in this package: an editable install elsewhere would also answer for a copy of it.
    if PathFinder.find_spec("dagcore._native", [str(PACKAGE)]) is None:
        return None
    try:
        return importlib.import_module("dagcore._native")
    except ImportError as error:
        built = built_for()
        raise ImportError(
            f"dagcore's native module was built for torch {built.get('torch', '(unknown)')} "
            f"(CUDA {built.get('cuda') or 'none'}) and does not load with torch "
            f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}): {error}. "
            "Rebuild it: pip install --no-build-isolation --force-reinstall --no-deps PATH, where "
            "PATH is dagcore's folder."
        ) from error


def built_for() -> dict[str, str | None]:
    """Return the versions that the native module was built for: {"torch": ..., "cuda": ...}."""
    record = PACKAGE / "_build.json"
    if not record.exists():
        return {}
    built: dict[str, str | None] = json.loads(record.read_text())
    return built


module = _load()

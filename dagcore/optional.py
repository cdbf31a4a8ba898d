"""Imports of the packages of the extras."""

from __future__ import annotations

import importlib
from typing import Any


def optional_import(module: str, extra: str) -> Any:
    """Import an optional package; if it is missing, raise an error that names its extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(f'{package} is missing: pip install "dagcore[{extra}]"') from error

"""The compiled module: None where it is missing, an error where it is there and cannot load."""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch


def _load() -> ModuleType | None:
    # Only beside this file: an editable install elsewhere would answer for a copy of the package.
    if PathFinder.find_spec("dagcore._native", [str(Path(__file__).parent)]) is None:
        return None
    try:
        return importlib.import_module("dagcore._native")
    except ImportError as error:
        built = built_for()
        raise ImportError(
            f"dagcore's native module was built for torch {built.get('torch', '(unknown)')} "
            f"(CUDA {built.get('cuda') or 'none'}) and does not load with torch "
            f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}): {error}. "
            "Rebuild it: pip install --no-build-isolation --force-reinstall --no-deps dagcore's "
            "folder."
        ) from error


def built_for() -> dict[str, str | None]:
    """Versions that the native module was built for: {"torch": ..., "cuda": ...}."""
    record = Path(__file__).with_name("_build.json")
    if not record.exists():
        return {}
    built: dict[str, str | None] = json.loads(record.read_text())
    return built


module = _load()

# A generator that is collected may end its block in a thread that holds the lock.
_lock = threading.RLock()
_keeping = 0
# Whoever set one of these knows better.
_MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the process keep the memory that it frees, until the last of these blocks ends.

    An iteration allocates and frees the same large tensors as the one before. glibc gets each from
    the system and gives it back, and touching fresh pages can take longer than the network itself.
    Attacks on the CPU run in such a block; put one around many short attacks, or all free memory
    goes back after each. It acts on the whole process, on what the main thread allocates above
    all, and does nothing without the native module, with another C library than glibc, or where
    the environment sets MALLOC_... thresholds or GLIBC_TUNABLES of malloc.
    """
    global _keeping
    tuned = any(name in os.environ for name in _MALLOC_SETTINGS)
    if module is None or tuned or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        yield
        return
    counted = False
    try:
        with _lock:
            _keeping += 1
            counted = True
            if _keeping == 1:
                module.keep_freed_memory(True)
        yield
    finally:
        if counted:
            with _lock:
                _keeping -= 1
                if _keeping == 0:
                    module.keep_freed_memory(False)

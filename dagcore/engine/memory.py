"""Keeping freed memory for the next iteration."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..ops import native

# A garbage-collected generator may end its block in a thread that holds the lock.
_lock = threading.RLock()
_keeping = 0
# A user who set one of these knows better.
_MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the process keep the memory that it frees, until the last of these blocks ends.

    Each iteration allocates and frees the same large tensors as the one before. glibc gets them
    from the system and returns them each time, and touching fresh pages can take longer than the
    network itself. Attacks on the CPU run inside such a block. Put one around many short attacks,
    or all free memory is returned after each of them. It affects the whole process, above all what
    the main thread allocates. It does nothing without the native module, with a C library other
    than glibc, or if the environment sets MALLOC_... thresholds or GLIBC_TUNABLES of malloc.
    """
    global _keeping
    tuned = any(name in os.environ for name in _MALLOC_SETTINGS)
    if native.module is None or tuned or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        yield
        return
    counted = False
    try:
        with _lock:
            _keeping += 1
            counted = True
            if _keeping == 1:
                native.module.keep_freed_memory(True)
        yield
    finally:
        if counted:
            with _lock:
                _keeping -= 1
                if _keeping == 0:
                    native.module.keep_freed_memory(False)

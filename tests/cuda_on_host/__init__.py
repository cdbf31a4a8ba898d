"""The CUDA kernels, run on the host: `with running("random"): ops.dag_seed(...)`."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dagcore import ops

ROOT = Path(__file__).parents[2]
BUILT = Path(os.environ.get("DAGCORE_CUDA_ON_HOST") or ROOT / "build" / "cuda-on-host")
SOURCES = ("csrc/*.h", "csrc/cuda/*", *(f"tests/cuda_on_host/**/*.{x}" for x in ("h", "cpp", "cu")))
ORDERS = ("forward", "reverse", "random")  # of threads, and of blocks


def why_not() -> str | None:
    """Why the kernels cannot run here, None where they can.

    Raises:
        RuntimeError: if they were built, but a source has changed since then.
    """
    module = BUILT / "kernels.so"
    if not module.exists():
        return "the CUDA kernels are not built for the host: run `make cuda-on-host`"
    for source in (path for pattern in SOURCES for path in ROOT.glob(pattern)):
        if source.stat().st_mtime > module.stat().st_mtime:
            raise RuntimeError(
                f"the CUDA kernels for the host are older than {source.relative_to(ROOT)}: "
                "run `make cuda-on-host`"
            )
    return None


@functools.cache
def _loaded() -> tuple[Any, Any]:
    """The library torch.ops.dagcore_on_host, whose CPU kernels they are, and the module."""
    library = torch.library.Library("dagcore_on_host", "DEF")
    for op in ops.OPS:
        schema = str(getattr(torch.ops.dagcore, op).default._schema)
        library.define(schema.partition("::")[2], tags=(torch.Tag.pt2_compliant_tag,))
    for op, fake in ops._fakes.items():
        torch.library.register_fake(f"dagcore_on_host::{op}", fake, lib=library)
    torch.ops.load_library(BUILT / "kernels.so")
    return library, ctypes.CDLL(str(BUILT / "kernels.so"))


@contextlib.contextmanager
def running(order: str) -> Iterator[Callable[[], int]]:
    """Within, the ops run the CUDA kernels on CPU tensors, with threads in that order.

    Yields a function that tells how many kernels have been launched so far.
    """
    _, module = _loaded()
    module.cuda_on_host_order(ORDERS.index(order), 1)
    before = torch.ops.dagcore
    torch.ops.dagcore = torch.ops.dagcore_on_host
    try:
        yield module.cuda_on_host_launches
    finally:
        torch.ops.dagcore = before

"""dagcore: Dense Adversary Generation (Xie et al., ICCV 2017) on fused C++/CUDA kernels."""

from __future__ import annotations

import importlib
from typing import Any

from . import attacks, defences, labels, losses, ops, perturbation, reference, victims, zoo
from .attacks import (
    APGD,
    DAG,
    PGD,
    ALMAProx,
    Attack,
    CosPGD,
    Part,
    Result,
    SegPGD,
    Status,
    joint_attack,
    joint_stream,
    universal_perturbation,
)
from .engine import freed_memory_kept
from .engine.stream import Sample
from .version import __version__

__all__ = [
    "APGD",
    "DAG",
    "PGD",
    "ALMAProx",
    "Attack",
    "CosPGD",
    "Part",
    "Result",
    "Sample",
    "SegPGD",
    "Status",
    "__version__",
    "attacks",
    "data",
    "defences",
    "evaluate",
    "freed_memory_kept",
    "joint_attack",
    "joint_stream",
    "labels",
    "losses",
    "metrics",
    "ops",
    "perturbation",
    "reference",
    "universal_perturbation",
    "victims",
    "zoo",
]


def __getattr__(name: str) -> Any:
    """Import `dagcore.data`, `metrics` and `evaluate` on first access."""
    if name == "evaluate":
        return importlib.import_module("dagcore.evaluation.evaluate").evaluate
    if name in ("data", "metrics"):
        return importlib.import_module(f"dagcore.{name}")
    raise AttributeError(f"module 'dagcore' has no attribute {name!r}")

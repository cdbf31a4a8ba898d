"""dagcore: Dense Adversary Generation (Xie et al., ICCV 2017) on fused C++/CUDA kernels."""

from . import labels, ops, perturbation, reference, victims, zoo
from .attack import DAG, Result, Status
from .joint import JointResult, Part, joint_attack
from .native import freed_memory_kept
from .stream import Sample
from .universal import UniversalResult, universal_perturbation

__all__ = [
    "DAG",
    "JointResult",
    "Part",
    "Result",
    "Sample",
    "Status",
    "UniversalResult",
    "freed_memory_kept",
    "joint_attack",
    "labels",
    "ops",
    "perturbation",
    "reference",
    "universal_perturbation",
    "victims",
    "zoo",
]
__version__ = "0.1.0"

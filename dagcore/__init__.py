"""dagcore: Dense Adversary Generation (Xie et al., ICCV 2017) on fused C++/CUDA kernels."""

from . import labels, ops, perturbation, reference, victims, zoo
from .attacks.dag import DAG, Result, Status
from .attacks.joint import JointResult, Part, joint_attack
from .attacks.universal import UniversalResult, universal_perturbation
from .engine import freed_memory_kept
from .engine.stream import Sample

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

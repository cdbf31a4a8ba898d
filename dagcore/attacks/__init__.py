"""The attacks, as users call them."""

from .base import Attack
from .dag import DAG
from .joint import Part, joint_attack, joint_stream
from .result import Result, Status
from .universal import universal_perturbation

__all__ = [
    "DAG",
    "Attack",
    "Part",
    "Result",
    "Status",
    "joint_attack",
    "joint_stream",
    "universal_perturbation",
]

"""Attacks: the public classes and functions."""

from .alma import ALMAProx
from .apgd import APGD
from .base import Attack
from .dag import DAG
from .joint import Part, joint_attack, joint_stream
from .pgd import PGD, BallAttack, CosPGD, SegPGD
from .result import Result, Status
from .universal import universal_perturbation

__all__ = [
    "APGD",
    "DAG",
    "PGD",
    "ALMAProx",
    "Attack",
    "BallAttack",
    "CosPGD",
    "Part",
    "Result",
    "SegPGD",
    "Status",
    "joint_attack",
    "joint_stream",
    "universal_perturbation",
]

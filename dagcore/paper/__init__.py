"""The paper's experiments: perturbations, made once and kept, and the results from them."""

from .work import Attack, Perturbation, Setup

__all__ = ["Attack", "Perturbation", "Setup"]

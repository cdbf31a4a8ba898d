"""The paper's experiments: perturbations made once and kept, and what is read off them."""

from .work import Attack, Perturbation, Setup

__all__ = ["Attack", "Perturbation", "Setup"]

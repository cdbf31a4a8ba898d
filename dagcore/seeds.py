"""Seeds for separate purposes, derived from the user's seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def seed_of(seed: int | Sequence[int], *purpose: int, bits: int = 63) -> int:
    """Return a seed of `bits` bits, at most 63, for one purpose, unlike the seed of any other."""
    sequence = np.random.SeedSequence(seed, spawn_key=purpose)
    if bits <= 32:
        return int(sequence.generate_state(1)[0]) >> (32 - bits)
    return int(sequence.generate_state(1, np.uint64)[0]) >> (64 - bits)


def generator_of(seed: int | Sequence[int], *purpose: int) -> torch.Generator:
    """Return a generator for one purpose, which does not depend on what else is drawn."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))

"""Random numbers that depend on a seed and on the content of an image only.

A random defence thus draws the same numbers for an image in any batch and any order. It draws new
ones as soon as a pixel changes, which is after every update of an attack. It keeps no state, and
never waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014) in int64,
# whose two's complement wraps as uint64 does.
STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift `value` to the right logically, filling with zeros."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mixed(value: Tensor) -> Tensor:
    """Hash every int64 to an int64 of well mixed bits."""
    value = value + STEP
    value = (value ^ _shifted(value, 30)) * FIRST
    value = (value ^ _shifted(value, 27)) * SECOND
    return value ^ _shifted(value, 31)


def fingerprints(images: Tensor) -> Tensor:
    """Return a number (N,) int64 for each image (N, ...), a hash of its values and their places."""
    values = images.detach().float().flatten(1) + 0.0  # -0.0 becomes 0.0
    bits = values.view(torch.int32).long()
    places = torch.arange(bits.shape[1], device=bits.device)
    return mixed(bits ^ mixed(places)).sum(1)


def uniform(keys: Tensor, count: int) -> Tensor:
    """Draw numbers (N, count) uniformly from (0, 1), float64, for keys (N,) int64."""
    counters = torch.arange(count, device=keys.device)
    words = mixed(mixed(keys)[:, None] + counters * STEP)
    return (_shifted(words, 11).double() + 0.5) * 2.0**-53


def normal(keys: Tensor, count: int) -> Tensor:
    """Draw standard normal numbers (N, count), float32, for keys (N,) int64 (Box-Muller)."""
    half = -(-count // 2)
    radius, angle = uniform(keys, 2 * half).chunk(2, 1)
    radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    return both[:, :count].float()

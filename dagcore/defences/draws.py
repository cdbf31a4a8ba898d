"""Random numbers that follow from a seed and from what an image shows, and from nothing else.

So a random defence draws the same for an image wherever it lies in a batch, in whatever company and
order, and draws anew as soon as a pixel changes: after every update of an attack. It has no state,
and waits for no device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014), in the
# two's complement of int64, which wraps as uint64 does.
STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _shifted(value: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mixed(value: Tensor) -> Tensor:
    """Well mixed bits, int64, of every int64."""
    value = value + STEP
    value = (value ^ _shifted(value, 30)) * FIRST
    value = (value ^ _shifted(value, 27)) * SECOND
    return value ^ _shifted(value, 31)


def fingerprints(images: Tensor) -> Tensor:
    """A number (N,) int64 for each image (N, ...), of all its values in their places."""
    values = images.detach().float().flatten(1) + 0.0  # a negative zero is a zero
    bits = values.view(torch.int32).long()
    places = torch.arange(bits.shape[1], device=bits.device)
    return mixed(bits ^ mixed(places)).sum(1)


def uniform(keys: Tensor, count: int) -> Tensor:
    """Numbers (N, count) in (0, 1), float64, for each of the keys (N,) int64."""
    counters = torch.arange(count, device=keys.device)
    words = mixed(mixed(keys)[:, None] + counters * STEP)
    return (_shifted(words, 11).double() + 0.5) * 2.0**-53


def normal(keys: Tensor, count: int) -> Tensor:
    """Numbers (N, count) with a normal distribution, float32, by Box and Muller."""
    half = -(-count // 2)
    radius, angle = uniform(keys, 2 * half).chunk(2, 1)
    radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    return both[:, :count].float()

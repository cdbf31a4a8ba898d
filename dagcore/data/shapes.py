"""Outlines, surface patterns and smooth noise, from which scenes are drawn.

Everything uses only + - * / sqrt, comparisons and integers. IEEE 754 fixes their rounding, so the
pixels are the same on every machine. Sines, powers and sums over arrays differ between machines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32]
Random: TypeAlias = np.random.Generator
Outline: TypeAlias = Callable[[Array, Array], Array]
Pattern: TypeAlias = Callable[[Array, Array, float, Random], Array]


def uniform(rng: Random, low: float, high: float) -> float:
    """Draw a number from [low, high)."""
    return low + (high - low) * rng.random()


def pick(rng: Random, items: Any) -> Any:
    """Draw a member of a sequence."""
    return items[int(rng.random() * len(items))]


# numpy's functions, with types that say that they keep float32.
least: Callable[[Array, Array | np.float32], Array] = np.minimum
most: Callable[[Array, Array | np.float32], Array] = np.maximum
magnitude: Callable[[Array], Array] = np.abs
_root: Callable[[Array], Array] = np.sqrt


def clip(x: Array) -> Array:
    """Clip x to [0, 1]."""
    return least(most(x, np.float32(0)), np.float32(1))


def rotation(rng: Random) -> tuple[float, float]:
    """Return (cos, sin) of a random angle, from the rational points of the circle."""
    t = uniform(rng, -1, 1)
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return (cos, sin) if rng.random() < 0.5 else (-cos, -sin)


# --- outlines: roughly the distance to the edge, positive inside; all fit a circle of radius 1.2


def _radius(u: Array, v: Array) -> Array:
    return _root(u * u + v * v)


def disc(u: Array, v: Array) -> Array:
    """A disc."""
    return np.float32(0.95) - _radius(u, v)


def ring(u: Array, v: Array) -> Array:
    """A disc with a round hole."""
    return np.float32(0.27) - magnitude(_radius(u, v) - np.float32(0.72))


def square(u: Array, v: Array) -> Array:
    """A square."""
    return np.float32(0.8) - most(magnitude(u), magnitude(v))


def cross(u: Array, v: Array) -> Array:
    """Two crossing bars."""
    u, v = magnitude(u), magnitude(v)
    long, wide = np.float32(1.0), np.float32(0.34)
    return most(least(long - u, wide - v), least(wide - u, long - v))


def triangle(u: Array, v: Array) -> Array:
    """An equilateral triangle."""
    sides = np.float32(0.55) + np.float32(0.5) * v - np.float32(0.8660254) * magnitude(u)
    return least(sides, np.float32(0.55) - v)


def hexagon(u: Array, v: Array) -> Array:
    """A regular hexagon."""
    u, v = magnitude(u), magnitude(v)
    slant = np.float32(0.8660254) * u + np.float32(0.5) * v
    return np.float32(0.85) - most(v, slant)


def star(u: Array, v: Array) -> Array:
    """A star of five points: inside at least four of a pentagram's five lines."""
    size = np.float32(0.35)
    a, b = np.float32(0.95105652) * u, size - np.float32(0.30901699) * v
    e, f = np.float32(0.58778525) * u, size + np.float32(0.80901699) * v
    first = size - v
    second = np.full_like(first, 9)
    for line in (b - a, b + a, f - e, f + e):
        second = least(second, most(first, line))
        first = least(first, line)
    return second


def heart(u: Array, v: Array) -> Array:
    """A heart: a square on its corner and two discs."""
    u = magnitude(u)
    corner = np.float32(0.70710678) * (np.float32(0.78) - u - magnitude(v - np.float32(0.15)))
    lobe = np.float32(0.5515433) - _radius(u - np.float32(0.39), v + np.float32(0.24))
    return most(corner, lobe)


def crescent(u: Array, v: Array) -> Array:
    """A disc minus another disc."""
    hole = _radius(u - np.float32(0.5), v) - np.float32(0.68)
    return least(np.float32(1.0) - _radius(u, v), hole)


def arrow(u: Array, v: Array) -> Array:
    """A triangular head on a bar."""
    v = magnitude(v)
    slope = np.float32(0.64) * (np.float32(1.05) - u) - np.float32(0.768) * v
    head = least(slope, u - np.float32(0.1))
    tail = least(u + np.float32(1.0), np.float32(0.2) - u)
    return most(head, least(tail, np.float32(0.29) - v))


# --- patterns: 0 for one colour, 1 for the other


def wave(x: Array) -> Array:
    """A triangle wave of period 1 between -0.5 and 0.5."""
    return magnitude(x - np.floor(x) - np.float32(0.5)) * np.float32(2) - np.float32(0.5)


def _steep(x: Array, slope: float) -> Array:
    """Return 0 for x well below 0, 1 for x well above, and a ramp between, against aliasing."""
    x = x * np.float32(slope)
    x += np.float32(0.5)
    return clip(x)


def _cycles(rng: Random, scale: float) -> tuple[np.float32, float]:
    """Draw the cycles per unit of length, at least 5 pixels each, and the slope of their edges."""
    cycles = min(uniform(rng, 1.7, 2.5), scale / 5)
    return np.float32(cycles), max(scale / (2 * cycles), 1.5)


def _lattice(u: Array, v: Array, scale: float, rng: Random) -> tuple[Array, Array, float]:
    """Return waves along both axes with random phases, and the slope of their edges."""
    cycles, slope = _cycles(rng, scale)
    x, y = (wave(along * cycles + np.float32(rng.random())) for along in (u, v))
    return x, y, slope


def plain(u: Array, v: Array, scale: float, rng: Random) -> Array:
    """One colour."""
    return np.zeros_like(u)


def gloss(u: Array, v: Array, scale: float, rng: Random) -> Array:
    """One colour with a highlight."""
    u, v = u - np.float32(uniform(rng, -0.4, 0.4)), v - np.float32(uniform(rng, -0.4, 0.4))
    spot = most(np.float32(0.4) - u * u - v * v, np.float32(0))
    return spot * spot * np.float32(5)


def stripes(u: Array, v: Array, scale: float, rng: Random) -> Array:
    """Parallel stripes."""
    cycles, slope = _cycles(rng, scale)
    return _steep(wave(v * cycles + np.float32(rng.random())), slope)


def checks(u: Array, v: Array, scale: float, rng: Random) -> Array:
    """A chessboard."""
    x, y, slope = _lattice(u, v, scale, rng)
    return _steep(x * y, 4 * slope)


def dots(u: Array, v: Array, scale: float, rng: Random) -> Array:
    """Round dots on a square lattice."""
    x, y, slope = _lattice(u, v, scale, rng)
    x, y = x + np.float32(0.5), y + np.float32(0.5)
    return _steep(np.float32(0.42) - x * x - y * y, slope)


def grid(u: Array, v: Array, scale: float, rng: Random) -> Array:
    """Thin crossing lines."""
    x, y, slope = _lattice(u, v, scale, rng)
    return _steep(most(x, y) - np.float32(0.2), slope)


def rings(u: Array, v: Array, scale: float, rng: Random) -> Array:
    """Concentric circles."""
    cycles, slope = _cycles(rng, scale)
    return _steep(wave(_radius(u, v) * cycles + np.float32(rng.random())), slope)


def patches(u: Array, v: Array, scale: float, rng: Random) -> Array:
    """Squares of random shades."""
    cycles, _ = _cycles(rng, scale)
    shades = rng.random(64, dtype=np.float32)
    cell = np.floor(u * (cycles * np.float32(1.7))) * np.float32(5)
    cell += np.floor(v * (cycles * np.float32(1.7)))
    shade: Array = shades[cell.astype(np.int32) & 63]
    return shade


PATTERNS: tuple[Pattern, ...] = (plain, gloss, stripes, checks, dots, grid, rings, patches)


# --- smooth noise


@lru_cache(maxsize=64)
def _taps(extent: int, cells: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Return the cell of each of `extent` pixels, and its smoothed position in that cell."""
    place = (np.arange(extent, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / extent)
    cell = least(np.floor(place), np.float32(cells - 1))
    t = place - cell
    return cell.astype(np.int64), t * t * (np.float32(3) - np.float32(2) * t)


def smooth_noise(rng: Random, size: tuple[int, ...], rows: int, columns: int) -> Array:
    """Interpolate random values in [0, 1) at the corners of rows x columns cells, (H, W)."""
    height, width = size
    corners = rng.random((rows + 1, columns + 1), dtype=np.float32)
    cell, t = _taps(width, columns)
    lines = corners[:, cell]
    lines += (corners[:, cell + 1] - lines) * t
    cell, t = _taps(height, rows)
    noise: Array = (lines[1:] - lines[:-1])[cell]
    noise *= t[:, None]
    noise += lines[cell]
    return noise

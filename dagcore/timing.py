"""Timing the sides of a comparison."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Sides = Mapping[str, Callable[[], object]]


def seconds(
    run: Callable[[], object], device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds of one call, including the device's work, by the wall clock or `clock`."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    begin = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return clock() - begin


def alternate(
    sides: Sides,
    rounds: int,
    warmup: int = 1,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each side in turn, round by round, so that a drifting machine affects all alike."""
    for _ in range(warmup):
        for run in sides.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(seconds(run, device, clock))
    return times


def spread(values: list[float], scale: float = 1.0) -> str:
    """Format values as their median (lower to upper quartile)."""
    if len(values) < 2:
        return f"{values[0] * scale:.2f}"
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values) * scale:.2f} ({low * scale:.2f} to {high * scale:.2f})"

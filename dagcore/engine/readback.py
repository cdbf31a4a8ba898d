"""Delayed reading of counts from a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor

from .devices import Copy, Device

LAG = 4  # iterations by which the device may lead the host


class Readback:
    """Reads back counts and running images of past iterations, without hurrying the device.

    The copies follow the kernels of their iteration and are read once they are complete. The host
    waits only to stay within LAG iterations.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.under_way: deque[tuple[int, Copy]] = deque()

    def add(self, iteration: int, counts: Tensor, running: Tensor) -> None:
        """Start reading an iteration's counts (-1 for stopped images) and running flags, (K,)."""
        self.under_way.append((iteration, self.device.read(counts, running)))

    def known(self, wait: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield what has arrived, oldest first; with `wait`, everything."""
        while self.under_way:
            iteration, copy = self.under_way[0]
            if not (wait or len(self.under_way) > LAG or copy.arrived()):
                return
            counts, running = copy.wait()
            self.under_way.popleft()
            yield iteration, counts, running

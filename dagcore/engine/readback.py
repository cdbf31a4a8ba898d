"""Counts read back from a device, late."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor

from .devices import Copy, Device

LAG = 4  # iterations that a device may be ahead of the host


class Readback:
    """Counts and running images of past iterations, read back as late as the device likes.

    They are copied behind the iteration's kernels and looked at when the copy is done; the host
    waits only to stay within LAG iterations.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.under_way: deque[tuple[int, Copy]] = deque()

    def add(self, iteration: int, counts: Tensor, running: Tensor) -> None:
        """Note an iteration's counts (-1 for images that had stopped) and what runs on, (K,)."""
        self.under_way.append((iteration, self.device.read(counts, running)))

    def known(self, wait: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What has arrived, oldest first; with `wait`, everything."""
        while self.under_way:
            iteration, copy = self.under_way[0]
            if not (wait or len(self.under_way) > LAG or copy.arrived()):
                return
            counts, running = copy.wait()
            self.under_way.popleft()
            yield iteration, counts, running

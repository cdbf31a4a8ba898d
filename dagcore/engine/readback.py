"""Counts read back from a device, late."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

LAG = 4  # iterations that a device may be ahead of the host


class Readback:
    """Counts and running images of past iterations, read back as late as the device likes.

    On the CPU they are there at once. Elsewhere they are copied behind the iteration's kernels and
    looked at when the copy is done; the host waits only to stay within LAG iterations.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.under_way: deque[tuple[int, Tensor, Tensor, torch.Event | None]] = deque()

    def add(self, iteration: int, counts: Tensor, running: Tensor) -> None:
        """Note an iteration's counts (-1 for images that had stopped) and what runs on, (K,)."""
        if self.device.type == "cpu":
            self.under_way.append((iteration, counts, running.clone(), None))
            return
        copies = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in (counts, running)
        ]
        event = torch.Event(self.device)
        event.record()
        self.under_way.append((iteration, copies[0], copies[1], event))

    def known(self, wait: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What has arrived, oldest first; with `wait`, everything."""
        while self.under_way:
            iteration, counts, running, event = self.under_way[0]
            if event is not None:
                if not (wait or len(self.under_way) > LAG or event.query()):
                    return
                event.synchronize()
            self.under_way.popleft()
            yield iteration, counts, running

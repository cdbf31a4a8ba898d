"""What the engine asks of a device: where a thread works, how values come and go, what is captured.

`device_for` finds the object of a device; the rest of the engine never asks for its kind. Another
kind of device is another class in `KINDS`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from .memory import freed_memory_kept

Replay = Callable[[], None]
"""Runs the iteration that was captured, once."""


class Copy(Protocol):
    """Values on their way to the host."""

    def arrived(self) -> bool:
        """Whether `wait` returns at once."""

    def wait(self) -> tuple[Tensor, ...]:
        """The values, on the host."""


class Device(Protocol):
    """One device, as the engine sees it."""

    @property
    def synchronous(self) -> bool:
        """Whether reading a value does not hold up the work: the host may decide by values."""

    def attacking(self) -> AbstractContextManager[object]:
        """Surrounds a whole attack; it may last while the caller does something else."""

    def current(self) -> AbstractContextManager[object]:
        """What a thread works on the device in; it ends before the caller goes on."""

    def beside(self) -> AbstractContextManager[object]:
        """`current` for a thread that helps this one: its work is in order with this one's."""

    def kept(self, value: Tensor) -> Tensor:
        """A copy of a sample's tensor, where it waits for its slot."""

    def moved(self, value: Tensor) -> Tensor:
        """A sample's tensor on the device."""

    def read(self, *values: Tensor) -> Copy:
        """Begin to copy values to the host, as they are after all that was launched so far."""

    def captured(self, iteration: Callable[[], None]) -> Replay | None:
        """An iteration to be replayed on the same memory, not run yet; None without captures.

        Raises:
            RuntimeError: an iteration that cannot be captured. All is as it was before.
        """


class Arrived(tuple[Tensor, ...]):
    """Values that were on the host at once."""

    def arrived(self) -> bool:
        """They have."""
        return True

    def wait(self) -> tuple[Tensor, ...]:
        """The values."""
        return self


class Host:
    """The CPU, or a device that the engine does not know: every value is waited for."""

    synchronous = True

    def __init__(self, device: torch.device | None) -> None:
        self.device = device

    def attacking(self) -> AbstractContextManager[object]:
        """Freed memory stays with the process."""
        return freed_memory_kept()

    def current(self) -> AbstractContextManager[object]:
        """Nothing."""
        return contextlib.nullcontext()

    beside = current

    def kept(self, value: Tensor) -> Tensor:
        """A copy."""
        return value.detach().clone()

    def moved(self, value: Tensor) -> Tensor:
        """Where it is, if the device is not known."""
        return value if self.device is None else value.to(self.device)

    def read(self, *values: Tensor) -> Copy:
        """Copies: the values go on changing."""
        return Arrived(value.clone() for value in values)

    def captured(self, iteration: Callable[[], None]) -> Replay | None:
        """Nothing is."""
        return None


class Pinned:
    """Copies in pinned memory, and the event behind them on their device's stream."""

    def __init__(self, values: tuple[Tensor, ...], stream: torch.cuda.Stream) -> None:
        self.copies = tuple(
            torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(
                value, non_blocking=True
            )
            for value in values
        )
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def arrived(self) -> bool:
        """Whether the device has come past the event."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> tuple[Tensor, ...]:
        """The copies, once it has."""
        self.event.synchronize()
        return self.copies


class CUDA:
    """One GPU, which need not be the thread's current one."""

    synchronous = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def attacking(self) -> AbstractContextManager[object]:
        """Nothing: torch keeps freed memory."""
        return contextlib.nullcontext()

    def current(self) -> AbstractContextManager[object]:
        """The device is the current one, of models' own kernels too."""
        return torch.cuda.device(self.device)

    def beside(self) -> AbstractContextManager[object]:
        """The device, on the calling thread's stream."""
        return torch.cuda.stream(torch.cuda.current_stream(self.device))

    def kept(self, value: Tensor) -> Tensor:
        """A copy, which the device can fetch by itself: in pinned memory."""
        value = value.detach()
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_pinned():
            return value.clone()  # pinning what is pinned would be no copy
        return value.pin_memory()

    def moved(self, value: Tensor) -> Tensor:
        """On its way there."""
        return value.to(self.device, non_blocking=True)

    def read(self, *values: Tensor) -> Copy:
        """Copies behind all that is on the device's stream."""
        return Pinned(values, torch.cuda.current_stream(self.device))

    def captured(self, iteration: Callable[[], None]) -> Replay | None:
        """A CUDA graph, captured on a stream of this device."""
        graph = torch.cuda.CUDAGraph()
        with _capturing:
            stream = _capture_stream(self.device)
            pool = torch.cuda.graph_pool_handle()
            try:
                # The outer block puts the thread's stream back where a capture that fails does
                # not. Other threads, which load images, may go on calling CUDA meanwhile.
                with (
                    torch.cuda.stream(stream),
                    torch.cuda.graph(
                        graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                    ),
                ):
                    iteration()
            except BaseException:
                _give_up(graph, self.device, pool)
                raise
        return graph.replay


_capturing = threading.Lock()  # torch allows one capture at a time in a process
_refused: list[torch.cuda.CUDAGraph] = []


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that a device's graphs are captured on: one, as each has a workspace of cuBLAS.

    torch's own stream for it belongs to the device that was current at the first capture of all.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _give_up(graph: torch.cuda.CUDAGraph, device: torch.device, pool: tuple[int, int]) -> None:
    """Undo a capture that has failed.

    torch does so only in part, and has no public way to do the rest: until the allocator is told
    that the capture has ended, it frees no memory that several streams have used.
    """
    graph.reset()  # generators of random numbers go on
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:
        return  # the capture itself ended well, and the graph has given back its memory
    torch._C._cuda_releasePool(device.index, pool)
    _refused.append(graph)  # the allocator of pinned memory goes on asking whether it captures


KINDS: dict[str, Callable[[torch.device], Device]] = {"cuda": CUDA}


def device_for(device: torch.device | None) -> Device:
    """The object of a device; None for one that is not known, as of a function's scores."""
    return Host(None) if device is None else KINDS.get(device.type, Host)(device)

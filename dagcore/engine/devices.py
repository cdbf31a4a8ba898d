"""Devices as the engine sees them: threads, transfers and captured iterations.

`device_for` returns the object of a device; the rest of the engine never asks for its kind. To
support another kind of device, add a class to `KINDS`.
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
"""Runs the captured iteration once."""


class Copy(Protocol):
    """Values on their way to the host."""

    def arrived(self) -> bool:
        """Return whether `wait` would return at once."""

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the values, and return them on the host."""


class Device(Protocol):
    """A device, as the engine sees it."""

    @property
    def synchronous(self) -> bool:
        """Whether reading values does not stall the device, so that the host may branch on them."""

    def attacking(self) -> AbstractContextManager[object]:
        """Return a context for a whole attack; the caller may do other work while it is open."""

    def current(self) -> AbstractContextManager[object]:
        """Return a context in which a thread uses the device, closed before the caller goes on."""

    def beside(self) -> AbstractContextManager[object]:
        """Return `current` for a helper thread, whose work is ordered with that of this thread."""

    def kept(self, value: Tensor) -> Tensor:
        """Copy a sample's tensor to where it waits for its slot."""

    def moved(self, value: Tensor) -> Tensor:
        """Move a sample's tensor to the device."""

    def read(self, *values: Tensor) -> Copy:
        """Start copying values to the host, as they are after everything launched so far."""

    def captured(self, iteration: Callable[[], None]) -> Replay | None:
        """Capture an iteration for replay on the same memory, without running it.

        Returns:
            The replay, or None if the device has no captures.

        Raises:
            RuntimeError: the iteration cannot be captured. Everything is restored.
        """


class Arrived(tuple[Tensor, ...]):
    """Values that are already on the host."""

    def arrived(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> tuple[Tensor, ...]:
        """Return the values."""
        return self


class Host:
    """The CPU, or a device unknown to the engine: every read waits for the value."""

    synchronous = True

    def __init__(self, device: torch.device | None) -> None:
        self.device = device

    def attacking(self) -> AbstractContextManager[object]:
        """Keep freed memory in the process."""
        return freed_memory_kept()

    def current(self) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    beside = current

    def kept(self, value: Tensor) -> Tensor:
        """Return a copy."""
        return value.detach().clone()

    def moved(self, value: Tensor) -> Tensor:
        """Move a tensor to the device; leave it where it is if the device is unknown."""
        return value if self.device is None else value.to(self.device)

    def read(self, *values: Tensor) -> Copy:
        """Return copies, as the values keep changing."""
        return Arrived(value.clone() for value in values)

    def captured(self, iteration: Callable[[], None]) -> Replay | None:
        """Return None: the host has no captures."""
        return None


class Pinned:
    """Copies in pinned memory, with an event behind them on the device's stream."""

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
        """Return whether the device has passed the event."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the event, and return the copies."""
        self.event.synchronize()
        return self.copies


class CUDA:
    """A GPU, which need not be the current one of the thread."""

    synchronous = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def attacking(self) -> AbstractContextManager[object]:
        """Return a context that does nothing: torch keeps freed memory."""
        return contextlib.nullcontext()

    def current(self) -> AbstractContextManager[object]:
        """Make the device current, also for the model's own kernels."""
        return torch.cuda.device(self.device)

    def beside(self) -> AbstractContextManager[object]:
        """Use the device on the stream of the calling thread."""
        return torch.cuda.stream(torch.cuda.current_stream(self.device))

    def kept(self, value: Tensor) -> Tensor:
        """Copy to pinned memory, from which the device can fetch the tensor itself."""
        value = value.detach()
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_pinned():
            return value.clone()  # pin_memory does not copy pinned memory
        return value.pin_memory()

    def moved(self, value: Tensor) -> Tensor:
        """Start moving a tensor to the device."""
        return value.to(self.device, non_blocking=True)

    def read(self, *values: Tensor) -> Copy:
        """Start copies that follow all work on the device's stream."""
        return Pinned(values, torch.cuda.current_stream(self.device))

    def captured(self, iteration: Callable[[], None]) -> Replay | None:
        """Capture a CUDA graph on a stream of this device."""
        graph = torch.cuda.CUDAGraph()
        with _capturing:
            stream = _capture_stream(self.device)
            pool = torch.cuda.graph_pool_handle()
            try:
                # The outer block restores the thread's stream, which a failed capture does not.
                # Other threads, which load images, may keep calling CUDA meanwhile.
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


_capturing = threading.Lock()  # torch allows one capture at a time per process
_refused: list[torch.cuda.CUDAGraph] = []


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for a device's captures: a single one, as each has a cuBLAS workspace.

    The default stream of torch for captures belongs to the device that was current at the first
    capture of the process.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _give_up(graph: torch.cuda.CUDAGraph, device: torch.device, pool: tuple[int, int]) -> None:
    """Undo a capture that has failed.

    torch undoes only a part, and has no public way to do the rest: until the allocator is told that
    the capture has ended, it frees no memory that several streams have used.
    """
    graph.reset()  # random number generators leave the capture
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:
        return  # the capture itself ended, and the graph has released its memory
    torch._C._cuda_releasePool(device.index, pool)
    _refused.append(graph)  # the allocator of pinned memory keeps asking whether it captures


KINDS: dict[str, Callable[[torch.device], Device]] = {"cuda": CUDA}


def device_for(device: torch.device | None) -> Device:
    """Return the object of a device; None stands for an unknown one, as for a plain function."""
    return Host(None) if device is None else KINDS.get(device.type, Host)(device)

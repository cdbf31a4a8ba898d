"""torch.cuda without a GPU: two devices, their streams, events and captures, as torch has them.

It keeps what the engine relies on and what it has to mind: the current device and the current
streams belong to a thread; a copy to the host happens when its stream is waited for; torch's own
capture stream is made once, on the device that is current then; a capture that fails leaves its
stream and the allocator as they are at that point.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

GARBAGE = 77


class Stream:
    def __init__(self, index: int) -> None:
        self.index = index  # of its device
        self.waiting: list[Callable[[], object]] = []

    def run(self, until: int) -> None:
        for work in self.waiting[:until]:
            work()
        self.waiting[:until] = [lambda: None] * until


class FakeCUDA:
    """In the place of torch.cuda, with `patch`; what it is asked for, and what is left over."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.threads = threading.local()
        self.defaults = [Stream(0), Stream(1)]
        self.capturing: list[Stream] = []
        self.captured_on: list[Stream] = []
        self.allocating: set[Any] = set()  # pools that the allocator takes a capture's memory from
        self.pools: set[Any] = set()  # that are in use
        self.random_in_capture = False  # the generator's state
        self.invalid = False  # the capture under way
        fake, capture_stream = self, []

        class Graph:
            def __init__(self) -> None:
                self.ended = False
                self.pool: Any = None

            def replay(self) -> None:
                assert self.ended

            def reset(self) -> None:
                fake.random_in_capture = False
                if self.ended:
                    fake.pools.discard(self.pool)
                self.ended = False

        class Capture:
            def __init__(
                self,
                graph: Graph,
                pool: Any = None,
                stream: Any = None,
                capture_error_mode: str = "",
            ) -> None:
                if stream is None and not capture_stream:
                    capture_stream.append(fake.new_stream())
                self.graph, self.mode = graph, capture_error_mode
                self.stream = stream or capture_stream[0]
                graph.pool = pool or object()

            def __enter__(self) -> None:
                self.inner = fake.stream(self.stream)
                self.inner.__enter__()
                assert not fake.capturing, "one capture at a time"
                assert self.mode == "thread_local"
                fake.capturing.append(self.stream)
                fake.captured_on.append(self.stream)
                fake.allocating.add(self.graph.pool)
                fake.pools.add(self.graph.pool)
                fake.random_in_capture = True

            def __exit__(self, *_: object) -> None:
                fake.capturing.remove(self.stream)
                if fake.invalid:
                    fake.invalid = False
                    raise RuntimeError("operation failed due to a previous error during capture")
                fake.allocating.remove(self.graph.pool)
                fake.random_in_capture = False
                self.graph.ended = True
                self.inner.__exit__()

        def end_allocate(index: int, pool: Any) -> None:
            if pool not in self.allocating:
                raise RuntimeError("not currently recording to mempool_id")
            self.allocating.remove(pool)

        def release(index: int, pool: Any) -> None:
            self.pools.remove(pool)

        for name, value in {
            "device": self.device,
            "current_stream": self.current_stream,
            "Stream": self.new_stream,
            "stream": self.stream,
            "Event": self.event,
            "CUDAGraph": Graph,
            "graph": Capture,
            "graph_pool_handle": object,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
        patch.setattr(torch, "empty", self.empty)

    @property
    def current(self) -> int:
        """The thread's current device."""
        return getattr(self.threads, "device", 0)

    @property
    def streams(self) -> list[Stream]:
        """The thread's current streams."""
        if not hasattr(self.threads, "streams"):
            self.threads.streams = list(self.defaults)
        return self.threads.streams

    def index_of(self, device: Any) -> int:
        return self.current if device is None else torch.device(device).index

    def device(self, device: Any) -> Any:
        """A block in which a device is the current one."""
        return Block(self, lambda: setattr(self.threads, "device", self.index_of(device)))

    def stream(self, stream: Stream) -> Any:
        """A block in which a stream is current, and with it its device."""

        def select() -> None:
            self.streams[stream.index] = stream
            self.threads.device = stream.index

        return Block(self, select)

    def current_stream(self, device: Any = None) -> Stream:
        return self.streams[self.index_of(device)]

    def new_stream(self, device: Any = None) -> Stream:
        return Stream(self.index_of(device))

    def event(self) -> Any:
        """An event: what is on its stream happens when it is waited for."""
        made = SimpleNamespace()

        def record(stream: Stream | None = None) -> None:
            made.stream = stream or self.current_stream()
            made.at = len(made.stream.waiting)

        made.record = record
        made.synchronize = lambda: made.stream.run(made.at)
        made.query = lambda: False
        return made

    def empty(self, shape: Any, *, dtype: torch.dtype, pin_memory: bool) -> Any:
        """Pinned memory, to which a tensor of cuda:1 is copied on that device's stream."""
        assert pin_memory
        memory = torch.full(shape, GARBAGE, dtype=dtype)

        def copy(value: Tensor, non_blocking: bool) -> Tensor:
            assert non_blocking
            self.streams[1].waiting.append(functools.partial(memory.copy_, value))
            return memory

        return SimpleNamespace(copy_=copy)


class Block:
    """A `with` block that puts back the thread's device and streams."""

    def __init__(self, fake: FakeCUDA, begin: Callable[[], None]) -> None:
        self.fake, self.begin = fake, begin

    def __enter__(self) -> None:
        self.before = self.fake.current, list(self.fake.streams)
        self.begin()

    def __exit__(self, *_: object) -> None:
        self.fake.threads.device = self.before[0]
        self.fake.threads.streams = self.before[1]

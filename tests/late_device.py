"""A device on the CPU whose values come late, for the engine's asynchronous path without a GPU.

`LateDevice` runs everything at once and hides it from the host:

- What has been moved to it, and all that is computed from that, cannot be read but through
  `read`: any other way in which the host would wait for the device is an AssertionError.
- A copy arrives after as many further copies as `late` says. Until then it is garbage.
- A captured iteration is a record of operations, which are run again on the same memory.
- Whoever asks for anything outside of `current` has forgotten which device is the current one.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dagcore import checks
from dagcore.engine import devices, scores
from dagcore.engine.loop import Slots
from dagcore.losses import DAGObjective, LossObjective

GARBAGE = 77
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2")


class Hidden(TorchDispatchMode):
    """Follows hidden memory through every operation, and raises where the host reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, Any] = {}  # held, so that no address comes twice
        self.aside = False

    def add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            self.memory[storage._cdata] = storage

    def has(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self.memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs or {}))
        hidden = not self.aside and any(map(self.has, given))
        name = func.overloadpacket.__name__
        reads = name in READS or (name == "index" and _has_mask(args[1]))
        assert not (hidden and reads), f"the host waits for the device, in {name}"
        out = func(*args, **(kwargs or {}))
        if hidden:
            written = [
                value
                for value, argument in zip(args, func._schema.arguments, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            for value in [*tree_leaves(out), *written]:
                self.add(value)
        return out


class Tape(TorchDispatchMode):
    """Operations on the memory that they were recorded with, and nothing of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for there, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(there, Tensor) and there.data_ptr() != value.data_ptr():
                    there.copy_(value)


class LateCopy:
    def __init__(self, device: LateDevice, values: tuple[Tensor, ...], late: int) -> None:
        self.device, self.due = device, device.clock + late
        self.values = [value.clone() for value in values]
        self.copies = tuple(torch.full_like(value, GARBAGE) for value in values)

    def arrived(self) -> bool:
        return self.device.clock >= self.due

    def wait(self) -> tuple[Tensor, ...]:
        self.device.clock = max(self.device.clock, self.due)
        with self.device.unhidden():
            for copy, value in zip(self.copies, self.values, strict=True):
                copy.copy_(value)
        return self.copies


class LateDevice:
    """See above.

    Args:
        late: how many copies later each copy arrives, again from the first when they are used up.
        refuses: whether nothing can be captured.
        dead: whether replays do nothing.
    """

    synchronous = False

    def __init__(
        self, late: Sequence[int] = (3,), *, refuses: bool = False, dead: bool = False
    ) -> None:
        self.late = itertools.cycle(late)
        self.refuses, self.dead = refuses, dead
        self.clock = 0  # copies that were begun
        self.hidden = Hidden()
        self.capturing = False
        self.copies: list[weakref.ref[Tensor]] = []  # of samples, here and there
        self.threads = threading.local()

    @property
    def is_current(self) -> bool:
        """Whether it is the calling thread's current device."""
        return getattr(self.threads, "current", False)

    def require(self) -> None:
        assert self.is_current, "the device is not the thread's current one"

    def attacking(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        if self.is_current:
            yield
            return
        with self.beside(), self.hidden:
            yield

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        self.threads.current = True
        try:
            yield
        finally:
            self.threads.current = False

    @contextlib.contextmanager
    def unhidden(self) -> Iterator[None]:
        """Where the host may read what it likes."""
        before, self.hidden.aside = self.hidden.aside, True
        try:
            yield
        finally:
            self.hidden.aside = before

    def kept(self, value: Tensor) -> Tensor:
        self.require()
        copy = value.detach().clone()
        self.copies.append(weakref.ref(copy))
        return copy

    def moved(self, value: Tensor) -> Tensor:
        self.require()
        there = value.clone()
        self.hidden.add(there)
        self.copies.append(weakref.ref(there))
        return there

    def read(self, *values: Tensor) -> LateCopy:
        self.require()
        self.clock += 1
        with self.unhidden():
            return LateCopy(self, values, next(self.late))

    def captured(self, iteration: Callable[[], None]) -> devices.Replay:
        self.require()
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        slots: Slots = iteration.__self__  # type: ignore[attr-defined]
        states = [slots.state, *slots.evaluator.states]
        tape = Tape()
        with self.unhidden():
            before = [{name: rows.clone() for name, rows in state.items()} for state in states]
            self.capturing = True
            with tape:
                iteration()
            self.capturing = False
            slots.counts.fill_(GARBAGE)  # a capture runs nothing
            for state, rows in zip(states, before, strict=True):
                assert state.keys() == rows.keys(), "a captured iteration makes rows"
                for name in rows:
                    state[name].copy_(rows[name])

        def replay() -> None:
            self.require()
            if not self.dead:
                tape.play()

        return replay

    @contextlib.contextmanager
    def installed(self) -> Iterator[LateDevice]:
        """In the place of the CPU."""

        def aside(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                with self.unhidden():
                    return function(*args, **kwargs)

            return called

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(devices.KINDS, "cpu", lambda _: self)
            patch.setattr(checks, "at_hand", lambda _: False)
            # These may wait: one looks at a network's first scores, one has found an error.
            patch.setattr(scores, "warn_of_probabilities", aside(scores.warn_of_probabilities))
            for objective in (DAGObjective, LossObjective):
                patch.setattr(objective, "refuse", aside(objective.refuse))
            yield self


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)

"""Models held in eval mode, and put back as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class _Held:
    """A module or a parameter, as it was before the first attack, and the attacks that hold it."""

    def __init__(self, thing: nn.Module | nn.Parameter) -> None:
        self.thing = thing
        self.before = thing.training if isinstance(thing, nn.Module) else thing.requires_grad
        self.holders: set[object] = set()

    def put_back(self) -> None:
        if isinstance(self.thing, nn.Module):
            self.thing.training = self.before
        else:
            self.thing.requires_grad_(self.before)


# A generator that is collected may end its block in a thread that holds the lock.
_lock = threading.RLock()
_held: dict[int, _Held] = {}  # by id


@contextmanager
def frozen(model: object) -> Iterator[None]:
    """Eval mode and parameters without gradients, both put back by the last that ends.

    Attacks in several threads may share a model, or modules of several models.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    holder = object()
    things: list[nn.Module | nn.Parameter] = [*model.modules(), *model.parameters()]
    try:
        with _lock:
            for thing in things:
                while True:  # what ends meanwhile, in this very thread, may have let go of it
                    held = _held.setdefault(id(thing), _Held(thing))
                    held.holders.add(holder)
                    if _held.get(id(thing)) is held:
                        break
            model.eval()
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        yield
    finally:
        with _lock:
            for thing in things:
                let_go = _held.get(id(thing))
                if let_go is None or holder not in let_go.holders:
                    continue
                let_go.holders.remove(holder)
                if not let_go.holders:
                    del _held[id(thing)]
                    let_go.put_back()

"""Models held in eval mode during attacks, and restored afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


class _Held:
    """A module or parameter, its state before the first attack, and the attacks that hold it."""

    def __init__(self, thing: nn.Module | nn.Parameter) -> None:
        self.thing = thing
        self.before = _mode(thing) if isinstance(thing, nn.Module) else thing.requires_grad
        self.holders: set[object] = set()
        # An overridden `train` may do more than set the mode, such as merging weights. That of an
        # exported graph raises.
        self.hooked = (
            isinstance(thing, nn.Module)
            and not isinstance(thing, torch.fx.GraphModule)
            and getattr(thing.train, "__func__", None) is not nn.Module.train
        )

    def put_back(self) -> None:
        if isinstance(self.thing, nn.Parameter):
            if self.thing.requires_grad != self.before:
                # A tensor created in inference mode can only be changed there.
                with torch.inference_mode(self.thing.is_inference()):
                    self.thing.requires_grad_(self.before)
        elif _mode(self.thing) != self.before:
            try:
                if self.hooked:
                    self.thing.train(self.before)
            finally:
                self.thing.training = self.before


def _mode(module: nn.Module) -> bool:
    """Return whether a module is in training mode; modules frozen by torch.jit never are."""
    return bool(getattr(module, "training", False))


def to_eval(model: nn.Module) -> None:
    """Put a model into eval mode, even a graph of torch.export, which refuses `eval`."""
    try:
        model.eval()
    except NotImplementedError:
        for module in model.modules():
            if _mode(module):
                module.training = False


# A garbage-collected generator may end its block in a thread that holds the lock, between any two
# lines: so the table is read as a list.
_lock = threading.RLock()
_held: dict[int, _Held] = {}  # by id


@contextmanager
def frozen(model: object) -> Iterator[None]:
    """Hold a model in eval mode without parameter gradients; the last block to end restores both.

    Attacks in several threads may share a model, or modules of several models. A module that
    overrides `train` is restored by calling it.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    holder = object()
    things: list[nn.Module | nn.Parameter] = [*model.modules(), *model.parameters()]
    try:
        with _lock:
            for thing in things:
                while True:  # a block that ends meanwhile, even in this thread, may drop it
                    held = _held.setdefault(id(thing), _Held(thing))
                    held.holders.add(holder)
                    if _held.get(id(thing)) is held:
                        break
            to_eval(model)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        yield
    finally:
        with _lock, ExitStack() as last_first:  # each is restored, even if another's hook raises
            for held in list(_held.values()):
                held.holders.discard(holder)
            for held in reversed(_released()):
                if _held.pop(id(held.thing), None) is held:
                    last_first.callback(held.put_back)


def _released() -> list[_Held]:
    """Return what no attack holds any more, in the order in which to restore it.

    An overridden `train` recurses into the modules inside, so it comes before theirs, and waits
    until no attack holds any of them.
    """
    everything = list(_held.values())
    free = [held for held in everything if not held.holders]
    inside = {
        id(held.thing): {id(module) for module in held.thing.modules()}
        for held in free
        if held.hooked and isinstance(held.thing, nn.Module)
    }
    busy = {id(held.thing) for held in everything if held.holders}
    waiting = {key for keys in inside.values() if keys & busy for key in keys}
    ready = [held for held in free if id(held.thing) not in waiting]
    return sorted(ready, key=lambda held: -len(inside.get(id(held.thing), ())))

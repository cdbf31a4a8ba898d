"""Modules of a network at which a gradient ends, or whose output is random, by name."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

DETACHED, ZERO = "detached", "zero"


@dataclasses.dataclass
class _Call:
    """What is seen of one call of a module: of tensors of floating point, and their gradients."""

    name: str
    into: bool = False
    """Whether an input required a gradient."""
    out_of: bool = False
    """Whether an output did."""
    arrives: bool = False
    """Whether a gradient other than zero came to an output in the backward pass."""
    leaves: bool = False
    """Whether one went on to an input."""
    given: tuple[str, ...] = ()
    """Checksums of the inputs."""
    made: tuple[str, ...] = ()
    """Checksums of the outputs."""


def without_gradient(model: nn.Module, run: Callable[[], tuple[Tensor, Tensor]]) -> dict[str, str]:
    """The innermost modules at which every gradient ends.

    Args:
        model: the network.
        run: runs it on images that require a gradient, and returns them with the loss.

    Returns:
        For each module "detached", where an input required a gradient and no output does, or
        "zero", where gradients of the output are not zero and those of all inputs are, as of
        torch.round. Only of modules that are so in every call.
    """
    calls: list[_Call] = []

    def enter(call: _Call, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        call.into = True
        # A copy has a gradient of its own, apart from those of whatever else reads the tensor.
        copy = tensor.clone()
        _on_gradient(copy, call, "leaves")
        return copy

    def leave(call: _Call, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                call.out_of = True
                _on_gradient(tensor, call, "arrives")

    with torch.enable_grad(), _watched(model, calls, enter, leave):
        images, loss = run()
        if loss.requires_grad:
            torch.autograd.grad(loss, images, allow_unused=True)
    kinds: dict[str, set[str | None]] = {}
    for call in calls:
        if call.into and not call.out_of:
            kinds.setdefault(call.name, set()).add(DETACHED)
        elif call.arrives:
            kinds.setdefault(call.name, set()).add(ZERO if call.into and not call.leaves else None)
    ends = {name: str(kind.pop()) for name, kind in kinds.items() if kind in ({DETACHED}, {ZERO})}
    return {name: ends[name] for name in _innermost(ends)}


def random_modules(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """The innermost modules that made other outputs of the same inputs in a second run."""
    runs: list[list[_Call]] = []
    for _ in range(2):
        calls: list[_Call] = []

        def enter(call: _Call, tensor: Tensor) -> Tensor:
            call.given += (_checksum(tensor),)
            return tensor

        def leave(call: _Call, output: Any) -> None:
            call.made = tuple(map(_checksum, _tensors(output)))

        with torch.no_grad(), _watched(model, calls, enter, leave):
            run()
        runs.append(calls)
    return _innermost(
        dict.fromkeys(
            a.name
            for a, b in zip(*runs, strict=False)
            if (a.name, a.given) == (b.name, b.given) and a.made != b.made
        )
    )


@contextlib.contextmanager
def _watched(
    model: nn.Module,
    calls: list[_Call],
    enter: Callable[[_Call, Tensor], Tensor],
    leave: Callable[[_Call, Any], None],
) -> Iterator[None]:
    """Tell of the tensors that go into modules, which may be replaced, and come out of them."""
    open_calls: list[_Call] = []

    def before(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            open_calls.append(call := _Call(name))
            return _mapped(args, call, enter), _mapped(kwargs, call, enter)

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        call = open_calls.pop()
        leave(call, output)
        calls.append(call)

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        yield


def _on_gradient(tensor: Tensor, call: _Call, which: str) -> None:
    """Note of a call when a gradient other than zero comes to a tensor."""

    def note(gradient: Tensor) -> None:
        if bool((gradient != 0).any()):
            setattr(call, which, True)

    tensor.register_hook(note)  # type: ignore[no-untyped-call]


def _mapped(value: Any, call: _Call, enter: Callable[[_Call, Tensor], Tensor]) -> Any:
    """Arguments with every tensor of floating point replaced."""
    if isinstance(value, Tensor):
        return enter(call, value) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_mapped(one, call, enter) for one in value)
    if type(value) is dict:
        return {key: _mapped(one, call, enter) for key, one in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in what a module returns."""
    if isinstance(value, Tensor):
        return [value]
    parts: Any = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, (Mapping, tuple, list)):
        return []
    return [tensor for part in parts for tensor in _tensors(part)]


def _checksum(tensor: Tensor) -> str:
    """The sum as a string, in which a NaN equals a NaN."""
    return str(float(tensor.detach().sum(dtype=torch.float64)))


def _innermost(names: Mapping[str, object]) -> list[str]:
    """The modules that have no others of these inside; "" is the network itself."""
    return [
        name
        for name in names
        if not any(other != name and (not name or other.startswith(f"{name}.")) for other in names)
    ]

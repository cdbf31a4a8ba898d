"""Find the modules of a network at which gradients end, or whose output is random."""

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
    """Observations of one call of a module: its floating-point tensors and their gradients."""

    name: str
    into: bool = False
    """Whether an input required a gradient."""
    out_of: bool = False
    """Whether an output required a gradient."""
    arrives: bool = False
    """Whether a nonzero gradient reached an output in the backward pass."""
    leaves: bool = False
    """Whether a nonzero gradient reached an input in the backward pass."""
    given: tuple[str, ...] = ()
    """Checksums of the inputs."""
    made: tuple[str, ...] = ()
    """Checksums of the outputs."""


def without_gradient(model: nn.Module, run: Callable[[], tuple[Tensor, Tensor]]) -> dict[str, str]:
    """Return the innermost modules at which every gradient ends.

    Args:
        model: network.
        run: function that runs the network on images that require a gradient, and returns the
            images and the loss.

    Returns:
        For each module "detached" if an input requires a gradient and no output does, or "zero" if
        gradients of the output are nonzero and those of all inputs are zero, as with torch.round.
        Only modules for which this holds in every call are listed.
    """
    calls: list[_Call] = []

    def enter(call: _Call, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        call.into = True
        # A copy's gradient is separate from the gradients of other uses of the tensor.
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
    """Return the innermost modules whose outputs change in a second run with the same inputs."""
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
    """Call `enter` for the inputs of all modules, which it may replace, and `leave` for outputs."""
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
    """Set the attribute `which` of a call when a nonzero gradient reaches a tensor."""

    def note(gradient: Tensor) -> None:
        if bool((gradient != 0).any()):
            setattr(call, which, True)

    tensor.register_hook(note)  # type: ignore[no-untyped-call]


def _mapped(value: Any, call: _Call, enter: Callable[[_Call, Tensor], Tensor]) -> Any:
    """Return arguments with every floating-point tensor replaced by `enter`."""
    if isinstance(value, Tensor):
        return enter(call, value) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_mapped(one, call, enter) for one in value)
    if type(value) is dict:
        return {key: _mapped(one, call, enter) for key, one in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a module's output."""
    if isinstance(value, Tensor):
        return [value]
    parts: Any = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, (Mapping, tuple, list)):
        return []
    return [tensor for part in parts for tensor in _tensors(part)]


def _checksum(tensor: Tensor) -> str:
    """Return the sum of a tensor as a string, so that NaN equals NaN."""
    return str(float(tensor.detach().sum(dtype=torch.float64)))


def _innermost(names: Mapping[str, object]) -> list[str]:
    """Return the modules that contain none of the others. "" is the network itself."""
    return [
        name
        for name in names
        if not any(other != name and (not name or other.startswith(f"{name}.")) for other in names)
    ]

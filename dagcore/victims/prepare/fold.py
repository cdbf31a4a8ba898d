"""Fold batch norms into the convolutions before them, wherever that changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Call(NamedTuple):
    """An operation that ran, with its arguments."""

    name: str
    arguments: tuple[Any, ...]


class Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which operation made each tensor, and which operations read it, in a network's run.

    It works below autograd and torch.nn, so that functional calls, in-place operations and views
    are seen like modules. Tensors are identified by their ids, and kept so that no id is reused.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.maker: dict[int, Call] = {}
        self.readers: dict[int, list[Call]] = defaultdict(list)
        self.kept: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        call = Call(func.name(), args)
        self.read((args, kwargs), call)
        for tensor in tensors(result):
            self.maker[id(tensor)] = call
        self.kept.append((args, kwargs, result))
        return result

    def read(self, values: Any, call: Call) -> None:
        """Record that an operation reads the tensors among some values."""
        for tensor in tensors(values):
            self.readers[id(tensor)].append(call)


def tensors(values: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested tuples, lists and dictionaries."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def fold(
    network: nn.Module, run: Callable[[], Any]
) -> tuple[Sequence[tuple[nn.Module, nn.Module]], dict[str, str]]:
    """Fold batch norms into convolutions, in place, and say which were left and why.

    A pair is folded if a run of the network shows that only the batch norm reads the convolution's
    output, that the convolution runs once, and that its weight is a module's own parameter (neither
    standardised nor tied). The folded weights are computed in float64 and rounded once.

    Args:
        network: a network in eval mode; see `thaw`.
        run: runs the network, for example on an image of noise, and returns its output.

    Returns:
        The folded pairs of convolution and batch norm, and the reason for each batch norm left, by
        its name.
    """
    uses = Uses()
    with torch.no_grad(), uses:
        output = run()
    uses.read(output, Call("output", ()))
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(module)
    norms = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    found = {name: _convolution_before(norm, uses, owners) for name, norm in norms.items()}
    folded = [(one, norms[name]) for name, one in found.items() if isinstance(one, nn.Module)]
    for convolution, norm in folded:
        _merge(convolution, norm)
    return folded, {name: reason for name, reason in found.items() if isinstance(reason, str)}


def _convolution_before(
    norm: nn.Module, uses: Uses, owners: dict[int, list[nn.Module]]
) -> nn.Module | str:
    """Return the convolution that a batch norm can be folded into, or why there is none."""
    if not (type(norm) in BATCH_NORMS or _normalises_and_activates(norm)):
        return f"a {type(norm).__name__} may do more than normalise"
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return "it uses the statistics of the batch"
    calls = uses.readers[id(norm.running_mean)]
    if len(calls) != 1 or "batch_norm" not in calls[0].name:
        return f"it runs {len(calls)} times" if calls else "it does not run"
    source = calls[0].arguments[0]
    maker = uses.maker.get(id(source))
    if maker is None or maker.name != "aten::convolution":
        return "no convolution comes before it"
    if len(uses.readers[id(source)]) != 1:
        return "something else reads the convolution's output"
    weight, bias, transposed, groups = (maker.arguments[i] for i in (1, 2, 6, 8))
    if transposed and groups != 1:
        return "the convolution before it is transposed and grouped"
    for parameter in (weight, bias):
        if parameter is None:
            continue
        if len(owners[id(parameter)]) != 1:
            return "the convolution's weight or bias is not a module's own parameter"
        if len(uses.readers[id(parameter)]) != 1:
            return "the convolution's weight or bias is used more than once"
    owner = owners[id(weight)][0]
    if getattr(owner, "weight", None) is not weight or getattr(owner, "bias", None) is not bias:
        return "the convolution's parameters are not the weight and bias of a module"
    return owner


def _merge(convolution: Any, norm: Any) -> None:
    """Move a batch norm into the convolution before it, changing both in place."""
    weight = convolution.weight
    for name, value in zip(("weight", "bias"), merged(convolution, norm), strict=True):
        setattr(convolution, name, nn.Parameter(value, weight.requires_grad))
    # The norm itself becomes the identity, since several modules or lists may hold it.
    norm._parameters.clear()
    norm._buffers.clear()
    norm.__class__ = NormActivation if _normalises_and_activates(norm) else nn.Identity


def merged(convolution: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return a convolution's weight and bias with its batch norm folded, in the weight's dtype."""
    weight, bias = convolution.weight, convolution.bias
    exact = fuse_conv_bn_weights(
        _exact(weight),
        None if bias is None else _exact(bias),
        _exact(norm.running_mean),
        _exact(norm.running_var),
        norm.eps,
        None if norm.weight is None else _exact(norm.weight),
        None if norm.bias is None else _exact(norm.bias),
        transpose=isinstance(convolution, nn.modules.conv._ConvTransposeNd),
    )
    return exact[0].detach().to(weight), exact[1].detach().to(weight)


def _exact(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)  # not every device has float64


class NormActivation(nn.Module):
    """timm's batch norm with an activation after the norm is folded: only the activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, features: Tensor) -> Tensor:
        """Apply the activation to features."""
        activated: Tensor = self.act(self.drop(features))
        return activated


def _normalises_and_activates(norm: nn.Module) -> bool:
    kind = type(norm)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")


def replace(network: nn.Module, made: Callable[[Any], nn.Module | None]) -> int:
    """Replace each submodule by what `made` makes of it, in place, and return how many changed.

    A submodule stays if `made` returns None.
    """
    count = 0
    for module in list(network.modules()):
        for name, child in module._modules.items():
            if (new := made(child)) is not None:
                module._modules[name] = new
                count += 1
    return count


def thaw(network: nn.Module) -> None:
    """Replace torchvision's FrozenBatchNorm2d by ordinary batch norms, in place."""
    replace(network, _thawed)


def _thawed(frozen: Any) -> nn.BatchNorm2d | None:
    kind = type(frozen)
    if kind.__name__ != "FrozenBatchNorm2d" or not kind.__module__.startswith("torchvision."):
        return None
    norm = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps).to(frozen.weight).eval()
    norm.load_state_dict({**norm.state_dict(), **frozen.state_dict()})
    return norm.requires_grad_(False)

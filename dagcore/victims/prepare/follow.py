"""Prepared copies that follow the weights of their original network."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from .fold import merged


class Follower:
    """The map from the modules of a copy to those of its original network.

    The original modules are known as long as someone else holds them, each on its own: a wrapper
    around them, such as a `Detector`, may be gone. Copies and pickles of a prepared network do not
    follow.

    Args:
        copy: the copy before it is rewritten, with the same modules in the same order as the
            original.
        network: the original.
    """

    def __init__(self, copy: nn.Module, network: nn.Module) -> None:
        self.modules: list[Any] = list(copy.modules())
        self.sources = [weakref.ref(module) for module in network.modules()]
        self.norms: dict[int, int] = {}  # index of a convolution -> index of its folded batch norm
        self.merged = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "sources": []}

    @property
    def alive(self) -> bool:
        """Whether any original module with weights is still there."""
        originals = (ref() for ref in self.sources)
        return any(one is not None and bool(one._parameters) for one in originals)

    def take(self, folded: Iterable[tuple[nn.Module, nn.Module]], merged: int) -> None:
        """Record which batch norms were folded and how many heads were merged."""
        places = {id(module): k for k, module in enumerate(self.modules)}
        self.norms = {places[id(one)]: places[id(norm)] for one, norm in folded}
        self.merged = merged

    @torch.no_grad()
    def follow(self) -> None:
        """Copy the original network's weights and buffers."""
        if not self.alive:
            raise ArgumentError(
                "prepared must be a copy of a network that still exists in this process, which it "
                "does not: call prepare again"
            )
        if self.merged:
            raise ArgumentError(
                "prepared must not have merged linear layers, got a merged decode head: "
                "use prepare(network, merge_linear=False)"
            )
        sources: list[Any] = [ref() for ref in self.sources]
        gone = [k for k, own in enumerate(self.modules) if sources[k] is None and _state(own)]
        if gone or (sources[0] is not None and [*sources[0].modules()] != sources):
            raise ArgumentError(
                "prepared must have the modules of the original network, which has others now: "
                "call prepare again"
            )
        for k, (own, source) in enumerate(zip(self.modules, sources, strict=True)):
            if k in self.norms:
                weight, bias = merged(source, sources[self.norms[k]])
                own.weight.copy_(weight)
                own.bias.copy_(bias)
                continue
            # A folded batch norm has neither parameters nor buffers left.
            for name, value in _state(own).items():
                value.copy_(getattr(source, name))


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and buffers."""
    own = {**module._parameters, **module._buffers}
    return {name: value for name, value in own.items() if value is not None}

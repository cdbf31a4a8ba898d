"""SegFormer's decode head with its linear layers merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fold import replace


class MergedHead(nn.Module):
    """transformers' SegformerDecodeHead, computed at the size of each level.

    The head projects each level to H channels, enlarges all levels to the size of the first, and
    mixes them by a 1 x 1 convolution. The projection and the convolution are linear per pixel, and
    the enlargement is linear per channel. They commute, so projection and convolution become one
    convolution for each level.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        fuse = head.linear_fuse
        # The head concatenates the levels last to first.
        levels = getattr(head, "linear_projections", None) or head.linear_c  # transformers 5, 4
        mixers = fuse.weight[:, :, 0, 0].double().chunk(len(levels), dim=1)[::-1]
        bias = torch.zeros_like(fuse.weight[:, 0, 0, 0], dtype=torch.float64)
        if fuse.bias is not None:
            bias = bias + fuse.bias
        self.levels = nn.ModuleList()
        for mixer, level in zip(mixers, levels, strict=True):
            weight = mixer @ level.proj.weight.double()
            bias = bias + mixer @ level.proj.bias.double()  # enlarging does not change a constant
            convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False, device="meta")
            weight = weight[:, :, None, None].to(fuse.weight)
            convolution.weight = nn.Parameter(weight, requires_grad=False)
            self.levels.append(convolution)
        self.levels[0].bias = nn.Parameter(bias.to(fuse.weight), requires_grad=False)
        self.rest = nn.Sequential(head.batch_norm, head.activation, head.dropout, head.classifier)

    def forward(self, encoder_hidden_states: Sequence[Tensor], **_: Any) -> Tensor:
        """Return scores (N, C, h, w) of the levels' features, (N, c, h, w) and smaller."""
        first, *others = (
            level(features)
            for level, features in zip(self.levels, encoder_hidden_states, strict=True)
        )
        for other in others:
            first = first + nn.functional.interpolate(other, first.shape[2:], mode="bilinear")
        scores: Tensor = self.rest(first)
        return scores


def merge(network: nn.Module) -> int:
    """Replace each decode head of SegFormer by a `MergedHead`, and return how many there are."""
    with torch.no_grad():
        return replace(network, lambda head: MergedHead(head) if is_mergeable(head) else None)


def is_mergeable(head: Any) -> bool:
    """Return whether a module is a decode head that `MergedHead` can replace."""
    kind = type(head)
    return (
        kind.__name__ == "SegformerDecodeHead"
        and kind.__module__.startswith("transformers.")
        and not any(m._forward_hooks or m._forward_pre_hooks for m in head.modules())
        and "forward" not in vars(head)
        # Otherwise the last level is a sequence.
        and head.config.reshape_last_stage is not False
    )

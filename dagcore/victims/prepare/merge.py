"""SegFormer's decode head with its linear layers multiplied out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fold import replace


class MergedHead(nn.Module):
    """What transformers' SegformerDecodeHead computes, at the size of each level.

    The head projects each level to H channels, enlarges all to the first level's size, and mixes
    them by a convolution 1 x 1: linear maps per pixel before and after a linear map per channel.
    The former two commute with the latter, and become one convolution of each level.
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
            bias = bias + mixer @ level.proj.bias.double()  # enlarging leaves a constant as it is
            convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False, device="meta")
            weight = weight[:, :, None, None].to(fuse.weight)
            convolution.weight = nn.Parameter(weight, requires_grad=False)
            self.levels.append(convolution)
        self.levels[0].bias = nn.Parameter(bias.to(fuse.weight), requires_grad=False)
        self.rest = nn.Sequential(head.batch_norm, head.activation, head.dropout, head.classifier)

    def forward(self, encoder_hidden_states: Sequence[Tensor], **_: Any) -> Tensor:
        """Scores (N, C, h, w) of the levels' features, (N, c, h, w) and smaller."""
        first, *others = (
            level(features)
            for level, features in zip(self.levels, encoder_hidden_states, strict=True)
        )
        for other in others:
            first = first + nn.functional.interpolate(other, first.shape[2:], mode="bilinear")
        scores: Tensor = self.rest(first)
        return scores


def merge(network: nn.Module) -> int:
    """Put a `MergedHead` in the place of each decode head of SegFormer, and count them."""
    with torch.no_grad():
        return replace(network, lambda head: MergedHead(head) if is_mergeable(head) else None)


def is_mergeable(head: Any) -> bool:
    """Whether a module is a decode head that `MergedHead` can stand in for."""
    kind = type(head)
    return (
        kind.__name__ == "SegformerDecodeHead"
        and kind.__module__.startswith("transformers.")
        and not any(m._forward_hooks or m._forward_pre_hooks for m in head.modules())
        and "forward" not in vars(head)
        # Otherwise its last level comes as a sequence.
        and head.config.reshape_last_stage is not False
    )

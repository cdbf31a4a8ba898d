"""A faster victim in a network's place."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..engine import read_scores
from ..errors import ArgumentError, ArgumentTypeError
from . import fold
from .low_resolution import find
from .low_resolution import low_resolution as stop_early
from .merge import is_mergeable, merge

CASTABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
EXAMPLE_SIDE = 224


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What `prepare` did to a network."""

    low_resolution: bool
    """Whether the scores come before the last enlargement."""
    folded: int
    """Batch norms folded into the convolutions before them."""
    left: dict[str, str]
    """Batch norms that stay, by name, and why."""
    merged: int
    """Decode heads of SegFormer whose linear layers were multiplied out."""
    channels_last: bool
    bf16: bool
    compiled: bool


class Prepared(nn.Module):
    """A network as `prepare` made it: always in eval mode, its parameters without gradients."""

    def __init__(self, network: nn.Module, preparation: Preparation, *, like: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.preparation = preparation
        self.align_corners = bool(getattr(like, "align_corners", False))
        self.classes: tuple[str, ...] | None = getattr(like, "classes", None)
        self.palette: tuple[tuple[int, int, int], ...] | None = getattr(like, "palette", None)
        self.cells = bool(getattr(like, "cells", False))
        super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, C, *T) of images (N, 3, H, W), in the images' dtype."""
        lower = self.preparation.bf16
        x = images.float() if lower else images  # autocast leaves float64 alone
        with torch.autocast(x.device.type, torch.bfloat16) if lower else nullcontext():
            output = self.network(x)
        return read_scores(output, images).to(images.dtype)

    def train(self, mode: bool = True) -> Prepared:
        """Stay in eval mode: a folded network cannot be trained."""
        return self

    def extra_repr(self) -> str:
        """What was done."""
        return str(self.preparation)


class ChannelsLast(nn.Module):
    """A network that computes with the channels last in memory."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Any:
        """What the network returns."""
        return self.network(images.contiguous(memory_format=torch.channels_last))


def prepare(
    model: nn.Module,
    *,
    low_resolution: bool | None = None,
    fold_batch_norm: bool = True,
    merge_linear: bool = True,
    channels_last: bool | None = None,
    bf16: bool = False,
    compile: bool = False,
    example: Tensor | None = None,
) -> Prepared:
    """A faster copy of a network, to be attacked in its place.

    With the defaults the scores and their gradients stay within float32 rounding of the network's
    own. The network itself is never changed, and later changes to it do not reach the copy. What
    was done stands in the result's `preparation`.

    Args:
        model: any nn.Module that an attack takes: images (N, 3, H, W) -> scores.
        low_resolution: hand out the scores before the last enlargement, as
            `victims.low_resolution` does, so that the result's scores have another size than the
            network's; None: where the network is understood, True: or raise, False: never.
        fold_batch_norm: fold each batch norm into the convolution before it, where a run on
            `example` shows that this changes nothing; the network is run three times for it.
        merge_linear: multiply out the linear layers of SegFormer's decode head, so that they work
            at the size of each level; other networks are left as they are.
        channels_last: lay out weights and images with the channels last in memory; None: where
            convolutions hold at least half of the weights (it slows other networks), and for a
            merged SegFormer.
        bf16: run under autocast to bfloat16, convolution and linear weights kept in it. The
            scores come back in the images' dtype, so that they are interpolated and compared in
            that, but carry bfloat16's 8 bits: near-ties may fall the other way. Slower than float32
            on a processor without AVX512-BF16 or AMX.
        compile: through torch.compile, once for each image size; the first run takes its time.
        example: images (N, 3, H, W) that the network takes, to fold and merge by; one square
            image of noise by default, at the size in the network's transformers config, else 224.

    Returns:
        A module: images (N, 3, H, W) -> scores (N, C, *T) as a tensor, whose `align_corners` is
        how scores below the labels' resolution are to be enlarged.

    Raises:
        TypeError: `model` is no nn.Module, `example` no floating tensor, or low_resolution=True
            and the network is not understood.
        ValueError: the network does not run on the example, or ends in an activation.
        RuntimeError: folding or merging changed the scores (a layer that is not what it seems).
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if example is not None:
        checks.tensor("example", example, checks.FLOAT_DTYPES)
    network = copy.deepcopy(model).eval().requires_grad_(False)
    shallow = None
    if low_resolution is not False:
        shallow = stop_early(network) if low_resolution else find(network)
    like = network = network if shallow is None else shallow
    folded, left, merged = _rewrite(network, example, fold_batch_norm, merge_linear)
    if channels_last is None:
        channels_last = merged > 0 or _mostly_convolutions(network)
    if channels_last:
        network = ChannelsLast(network)
    if bf16:
        _hold_weights(network, torch.bfloat16)
    if compile:
        network.compile()
    done = Preparation(shallow is not None, folded, left, merged, channels_last, bf16, compile)
    return Prepared(network, done, like=like)


def _rewrite(
    network: nn.Module, example: Tensor | None, fold_batch_norm: bool, merge_linear: bool
) -> tuple[int, dict[str, str], int]:
    """`fold.fold` and `merge`, checked by the scores before and after."""
    if fold_batch_norm:
        fold.thaw(network)
        fold_batch_norm = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()
        )
    merge_linear = merge_linear and any(is_mergeable(m) for m in network.modules())
    if not (fold_batch_norm or merge_linear):
        return 0, {}, 0
    images = _example(network) if example is None else example
    try:
        before = _scores(network, images)
    except Exception as error:
        raise ArgumentError(
            f"example must be images that the network takes, {tuple(images.shape)} fails: "
            f"{type(error).__name__}: {error} (give example=images, or fold_batch_norm=False and "
            "merge_linear=False)"
        ) from error
    folded, left = fold.fold(network, images) if fold_batch_norm else (0, {})
    merged = merge(network) if merge_linear else 0
    after = _scores(network, images)
    difference = float((after - before).norm() / before.norm().clamp_min(1e-30))
    allowed = 1e4 * torch.finfo(before.dtype).eps
    if difference > allowed:
        raise RuntimeError(
            f"folding and merging must not change the scores, they differ by {difference:.1e} of "
            f"their norm (allowed: {allowed:.1e}): use fold_batch_norm=False, merge_linear=False"
        )
    return folded, left, merged


def _scores(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return read_scores(network(images), images).nan_to_num()


def _example(network: nn.Module) -> Tensor:
    """One image of noise, where and as the network's parameters are."""
    sizes = [
        getattr(getattr(module, "config", None), "image_size", None) for module in network.modules()
    ]
    side = next((size for size in sizes if size is not None), EXAMPLE_SIDE)
    height, width = (side, side) if isinstance(side, int) else side
    like = next(itertools.chain(network.parameters(), network.buffers()))
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return noise.to(like)


def _mostly_convolutions(network: nn.Module) -> bool:
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    convolutions, linear = (
        sum(m.weight.numel() for m in network.modules() if isinstance(m, kind)) for kind in kinds
    )
    return convolutions >= max(linear, 1)


def _hold_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights that autocast would convert anew in each run.

    Not those of subclasses with a forward of their own, which may compute with them first.
    """
    for module in network.modules():
        if any(type(module).forward is kind.forward for kind in CASTABLE):
            module.to(dtype)

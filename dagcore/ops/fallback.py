"""Kernels of the ops in PyTorch, for devices that have no native one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..levels import shown
from . import native

CONVERGED, BUDGET, STALLED = range(3)  # why an image stopped

_warned: set[str] = set()


def warned(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that says once per device that it is in use."""

    def run(*args: Any) -> Any:
        device = args[0].device.type
        if device not in _warned:
            _warned.add(device)
            why = (
                "dagcore's native module is not built"
                if native.module is None
                else f"dagcore's native module was built without kernels for {device}"
            )
            warnings.warn(
                f"{why}: running slower PyTorch code (see README, Building)",
                RuntimeWarning,
                stacklevel=2,
            )
        return kernel(*args)

    return run


def dag_seed(
    scores: Tensor,
    labels: Tensor,
    adversarial: Tensor | None,
    objective: str,
    ignore_index: int,
    margin: float,
) -> tuple[Tensor, Tensor]:
    """See `dagcore.ops.dag_seed`."""
    checks.choice("objective", objective, checks.GOALS)
    seed = torch.zeros_like(scores)
    if scores.numel() == 0:
        return seed, scores.new_zeros(len(scores), dtype=torch.int32)
    classes = scores.shape[1]
    checks.target_labels(classes, labels, adversarial, ignore_index)
    counted = labels.long() != ignore_index
    label = torch.where(counted, labels.long(), 0)
    best, winner = scores.max(1)
    second, rest = scores.scatter(1, winner.unsqueeze(1), -math.inf).max(1)
    rest = torch.where(rest == winner, min(1, classes - 1), rest)  # all others are -inf
    if adversarial is None:
        plus = torch.where(winner == label, rest, winner)
        counted = counted & (classes > 1)
    else:
        void = (adversarial.long() == ignore_index) & (not 0 <= ignore_index < classes)
        counted = counted & ~void
        plus = torch.where(counted, adversarial.long(), 0)
    if objective == "leave":
        minus, won = label, winner != label
        rival = scores.gather(1, label.unsqueeze(1)).squeeze(1)
        counted = counted & (plus != label)
    else:
        minus, won, rival = winner, winner == plus, second
    near = torch.zeros_like(won)
    if margin and (objective == "leave" or classes > 1):
        near = best.to(real(scores)) - rival.to(real(scores)) < margin
    if objective == "reach":
        minus = torch.where(won & near, rest, winner)
    active = counted & (~won | near | best.isnan())
    one = active.unsqueeze(1).to(seed.dtype)
    seed.scatter_add_(1, plus.unsqueeze(1), one).scatter_add_(1, minus.unsqueeze(1), -one)
    return seed, active.reshape(len(active), -1).sum(1, dtype=torch.int32)


def dag_seed_bilinear(
    scores: Tensor,
    labels: Tensor,
    adversarial: Tensor | None,
    objective: str,
    ignore_index: int,
    margin: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """See `dagcore.ops.dag_seed_bilinear`."""
    if labels.numel() == 0:
        return torch.zeros_like(scores), scores.new_zeros(len(scores), dtype=torch.int32)
    size = labels.shape[1:]
    high = _enlarged(scores, size[0], size[1], align_corners)
    seed, active = dag_seed(high, labels, adversarial, objective, ignore_index, margin)
    gradient = torch.ops.aten.upsample_bilinear2d_backward(seed, size, scores.shape, align_corners)
    return torch.empty_like(scores).copy_(gradient), active


def argmax_bilinear(scores: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """See `dagcore.ops.argmax_bilinear`."""
    if not len(scores) * height * width:
        return scores.new_zeros((len(scores), height, width), dtype=torch.int64)
    return _enlarged(scores, height, width, align_corners).argmax(1)


def _enlarged(scores: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    high: Tensor = torch.ops.aten.upsample_bilinear2d(
        scores.detach().to(real(scores)), (height, width), align_corners
    )
    return high


def linf_step_(
    images: Tensor,
    origin: Tensor,
    gradient: Tensor,
    active: Tensor,
    gamma: float,
    lower: float,
    upper: float,
    epsilon: float,
    grid: Tensor | None,
    levels: int,
) -> tuple[Tensor, Tensor]:
    """See `dagcore.ops.linf_step_`; also tells which images were stepped, (N,) bool."""
    dtype = real(images)
    if images.numel() == 0:
        norms = images.new_zeros(len(images), dtype=dtype)
        return norms, norms.bool()
    x, x0, r = (t.detach().to(dtype) for t in (images, origin, gradient))
    norms = torch.where(active > 0, r.abs().flatten(1).amax(1) if r.dim() > 1 else r.abs(), 0)
    scale = step_scale(norms, gamma).view(-1, *[1] * (x.dim() - 1))
    moved = (x + scale * r).clamp(x0 - epsilon, x0 + epsilon).clamp(lower, upper)
    images.detach().copy_(torch.where(scale > 0, moved, x))
    if grid is not None:
        image = shown(images.detach().to(dtype), x0, (lower, upper), levels, epsilon)
        grid.detach().copy_(torch.where(scale > 0, image, grid.to(dtype)))
    return norms, scale.flatten() > 0


def settle_(
    running: Tensor,
    may_move: Tensor,
    updates: Tensor,
    stuck: Tensor,
    status: Tensor,
    history: Tensor,
    active: Tensor,
    wanted: Tensor,
    moved: Tensor,
    done: Tensor | None,
    max_iter: int,
    patience: int,
) -> Tensor:
    """See `dagcore.ops.settle_`."""
    ready = ~wanted if done is None else done
    budget = updates < max_iter
    row = updates[:, None, None].expand(-1, 1, active.shape[1])
    now = torch.where(running[:, None, None], active[:, None], history.gather(1, row))
    history.scatter_(1, row, now)
    counts = active.masked_fill(~running[:, None], -1)
    stalled = running & budget & wanted & ~moved
    stuck.copy_(torch.where(moved, 0, stuck + stalled))
    stalled = stalled & (stuck >= patience)
    status.masked_fill_(running & ready, CONVERGED)
    status.masked_fill_(running & ~ready & ~budget, BUDGET)
    status.masked_fill_(stalled, STALLED)
    running.copy_(running & ~ready & budget & ~stalled)
    updates.add_(moved)
    may_move.copy_(running & (updates < max_iter))
    return counts


def step_scale(norms: Tensor, gamma: float) -> Tensor:
    """gamma / norm, (N,), by which `linf_step_` has moved the images; 0 where they stayed.

    That is where the norm is 0 or not finite, or the quotient is infinite.
    """
    gamma = gamma if gamma <= torch.finfo(norms.dtype).max else math.inf
    scale = torch.full_like(norms, gamma) / norms
    return torch.where(scale < math.inf, scale, 0)  # a NaN is not below it


def real(values: Tensor) -> torch.dtype:
    """The dtype in which values are compared and stepped, and norms returned."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32

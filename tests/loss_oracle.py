"""The dense losses by autograd in float64, from their formulas."""

from __future__ import annotations

from typing import Any

import torch
from support import INF
from torch import Tensor

SETTINGS = {"blend": 0.3, "q": 0.7, "kappa": 0.5}
Result = tuple[Tensor, Tensor, Tensor]


def aims(loss: str, adversarial: Tensor) -> tuple[Tensor | str | None, ...]:
    """The adversarial labels that a loss can have."""
    return ("runner-up" if loss == "dag" else None, adversarial)


def values(
    loss: str,
    z: Tensor,
    y: Tensor,
    aim: Tensor | None,
    blend: float | Tensor,
    q: float,
    kappa: float,
) -> Tensor:
    """The losses (K,) of scores z (K, C), labels y and adversarial labels (K,)."""
    targeted = aim is not None and loss != "dag"
    t = aim if targeted else y
    rows = torch.arange(len(z))
    ln_p = z.log_softmax(1)[rows, t]
    p = z.softmax(1)
    sign = -1 if targeted else 1
    right = z.argmax(1) == t
    others = z.scatter(1, t[:, None], -INF)
    rival = others.max(1).values
    if loss == "cross-entropy":
        return sign * -ln_p
    if loss == "masked-cross-entropy":
        return sign * torch.where(right ^ targeted, -ln_p, 0)
    if loss == "blended-cross-entropy":
        return sign * torch.where(right ^ targeted, (1 - blend) * -ln_p, blend * -ln_p)
    if loss == "cosine":
        weight = p[rows, t].detach() / p.detach().norm(dim=1)
        return sign * (1 - weight if targeted else weight) * -ln_p
    if loss == "jensen-shannon":
        one_hot = torch.nn.functional.one_hot(t, z.shape[1]).double()
        mean = (p + one_hot) / 2
        return sign * (torch.xlogy(p, p / mean).sum(1) - mean[rows, t].log()) / 2
    if loss == "tsallis":
        return sign * (1 - p[rows, t] ** (1 - q)) / (1 - q)
    if loss == "margin":
        ahead = z[rows, t] - rival
        return -(-ahead if targeted else ahead).clamp(min=-kappa)
    if loss == "dag":
        assert aim is not None
        return torch.where(z[rows, y] - rival > -kappa, z[rows, aim] - z[rows, y], 0)
    if loss == "masked-spherical":
        return -sign * torch.where(right ^ targeted, z[rows, t] / z.norm(dim=1), 0)
    assert loss == "dlr"
    top = z.sort(dim=1, descending=True, stable=True).values
    low = (top[:, 2] + top[:, 3]) / 2 if targeted else top[:, 2]
    rival = z[rows, t] if targeted else rival
    return -(z[rows, y] - rival) / (top[:, 0] - low + 1e-12)


def by_formula(
    loss: str,
    scores: Tensor,
    labels: Tensor,
    adversarial: Tensor | str | None,
    *,
    class_weights: Tensor | None = None,
    blend: float | Tensor,
    **settings: Any,
) -> Result:
    """What loss_seed must return, in float64."""
    z = scores.detach().cpu().double().movedim(1, -1).clone().requires_grad_()
    counted = labels.long() != 255
    if isinstance(adversarial, Tensor):
        counted = counted & (adversarial.long() != 255)
    rows, y = z[counted], labels.long()[counted]
    if adversarial == "runner-up":
        aim = rows.scatter(1, y[:, None], -INF).argmax(1)
    else:
        aim = None if adversarial is None else adversarial.long()[counted]
    if isinstance(blend, Tensor):
        blend = blend.view(-1, *[1] * (labels.dim() - 1)).expand(labels.shape)[counted]
    found = values(loss, rows, y, aim, blend, **settings)
    if class_weights is not None:
        found = found * class_weights.double()[y]
    (seed,) = torch.autograd.grad(found.sum(), z)
    every = torch.zeros(labels.shape, dtype=torch.float64)
    every[counted] = found.detach()
    hits = (scores.cpu().argmax(1) == labels) & counted
    sums = every.reshape(len(labels), -1).sum(1)
    return seed.movedim(-1, 1), sums, hits.reshape(len(labels), -1).sum(1).int()


def by_formula_enlarged(
    loss: str,
    scores: Tensor,  # (N, C, h, w)
    labels: Tensor,  # (N, H, W)
    adversarial: Tensor | str | None,
    *,
    align_corners: bool,
    **settings: Any,
) -> Result:
    """What loss_seed_bilinear must return, in float64, by autograd of interpolate."""
    low = scores.detach().cpu().double().requires_grad_()
    size = tuple(labels.shape[1:])
    high = torch.nn.functional.interpolate(low, size, mode="bilinear", align_corners=align_corners)
    seed, sums, hits = by_formula(loss, high, labels, adversarial, **settings)
    (gradient,) = torch.autograd.grad(high, low, seed)
    return gradient, sums, hits

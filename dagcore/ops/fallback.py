"""PyTorch kernels of the ops, for devices that have no native one."""

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
    """Make a kernel warn once per device that it is in use."""

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
                f"{why}: running slower PyTorch code (see docs/building.md)",
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
    rest = torch.where(rest == winner, min(1, classes - 1), rest)  # all other classes are at -inf
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
    return seed, _rows(active).sum(1, dtype=torch.int32)


def loss_seed(
    scores: Tensor,
    labels: Tensor,
    adversarial: Tensor | None,
    loss: str,
    blend: Tensor | None,
    q: float,
    kappa: float,
    class_weights: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dagcore.ops.loss_seed`."""
    checks.choice("loss", loss, checks.LOSSES)
    sums = scores.new_zeros(len(scores), dtype=torch.float64)
    if scores.numel() == 0:
        return torch.zeros_like(scores), sums, sums.int()
    classes, targeted = scores.shape[1], adversarial is not None
    checks.target_labels(classes, labels, adversarial, ignore_index)
    counted = labels.long() != ignore_index
    if adversarial is not None and not 0 <= ignore_index < classes:
        counted = counted & (adversarial.long() != ignore_index)
    label = torch.where(counted, labels.long(), 0)
    aim = label if adversarial is None else torch.where(counted, adversarial.long(), 0)
    best, winner = scores.max(1)
    whole = counted & best.isfinite()
    z = torch.where(whole.unsqueeze(1), scores.to(real(scores)), 0)
    if loss in ("margin", "dag", "dlr"):
        seed, values = _difference(loss, z, label, aim if targeted else None, kappa)
    elif loss == "masked-spherical":
        counts = (winner == aim) != targeted
        size = torch.linalg.vector_norm(z, dim=1)
        inverse = torch.where(counts & (size > 0), 1 / size, 0)
        unit = torch.where(inverse.unsqueeze(1) > 0, z, 0) * inverse.unsqueeze(1)
        values = -unit.gather(1, aim.unsqueeze(1))
        seed = (unit * -values).scatter_add_(1, aim.unsqueeze(1), -torch.ones_like(values))
        seed, values = seed * inverse.unsqueeze(1), values.squeeze(1)
        if targeted:
            seed, values = -seed, -values
    else:
        p = z.softmax(1)
        ln_p = z.log_softmax(1).gather(1, aim.unsqueeze(1)).squeeze(1)
        weight, values = _softmax_weight(loss, p, ln_p, winner == aim, blend, q, targeted)
        weight, values = (-weight, -values) if targeted else (weight, values)
        weight = weight.unsqueeze(1)
        seed = p.mul_(weight).scatter_add_(1, aim.unsqueeze(1), -weight)
    if class_weights is not None:
        omega = class_weights[label]
        seed, values = seed * omega.unsqueeze(1), values * omega
    seed = torch.where(whole.unsqueeze(1), seed, 0)
    limit = torch.finfo(scores.dtype)
    seed = torch.empty_like(scores).copy_(seed.clamp(limit.min, limit.max))
    values = torch.where(whole, values.double(), torch.where(counted, math.nan, 0.0))
    hits = counted & ((winner == label) | best.isnan())
    return seed, _rows(values).sum(1), _count(hits)


def _softmax_weight(
    loss: str,
    p: Tensor,
    ln_p: Tensor,
    right: Tensor,
    blend: Tensor | None,
    q: float,
    targeted: bool,
) -> tuple[Tensor, Tensor]:
    """Return w of the gradient w (p - e_y), and the loss, (N, *T)."""
    own = ln_p.exp()
    if loss == "jensen-shannon":
        weight = own * (own.log1p() - ln_p.clamp(min=-1e30)) / 2
        return weight, math.log(2) - own.log1p() / 2 - weight
    if loss == "tsallis" and q != 1:
        weight = ((1 - q) * ln_p).exp()
        return weight, -torch.expm1((1 - q) * ln_p) / (1 - q)
    weight = torch.ones_like(own)
    if loss == "cosine":
        weight = own / torch.linalg.vector_norm(p, dim=1)
        weight = 1 - weight if targeted else weight
    elif loss in ("masked-cross-entropy", "blended-cross-entropy"):
        other = torch.zeros_like(own)
        if loss == "blended-cross-entropy" and blend is not None:
            other = other + blend.to(own.dtype).view(-1, *[1] * (own.dim() - 1))
        weight = torch.where(right != targeted, 1 - other, other)
    return weight, torch.where(weight == 0, 0, -ln_p) * weight


def _difference(
    loss: str, z: Tensor, label: Tensor, aim: Tensor | None, kappa: float
) -> tuple[Tensor, Tensor]:
    """Return seed and values of a loss whose gradient lies at only a few classes per target."""
    classes = z.shape[1]
    order = z.sort(dim=1, descending=True, stable=True).indices.unbind(1)

    def at(c: Tensor) -> Tensor:
        return z.gather(1, c.unsqueeze(1)).squeeze(1)

    def rival(c: Tensor) -> Tensor:
        return torch.where(order[0] == c, order[min(1, classes - 1)], order[0])

    if loss == "dlr":
        other = rival(label) if aim is None else aim
        lowest = order[2:3] if aim is None else order[2:4]
        above = at(other) - at(label)
        below = (at(order[0]) - at(lowest[0]) + (at(order[0]) - at(lowest[-1]))) / 2 + 1e-12
        finite = above.isfinite() & below.isfinite()
        one = torch.where(finite, 1 / below, 0)
        values = torch.where(finite, above, 0) * one
        terms = [(other, one), (label, -one), (order[0], -values * one)]
        terms += [(c, values * one / len(lowest)) for c in lowest]
    else:
        own = aim if loss == "margin" and aim is not None else label
        plus = aim if loss == "dag" and aim is not None else rival(own)
        if loss == "margin" and aim is not None:
            active = (order[0] != own) | (at(order[0]) - at(plus) < kappa)
            plus, minus = own, plus
        else:
            active = (order[0] == own) | (at(order[0]) - at(own) < kappa)
            minus = own
        active = active & (classes > 1)
        one = active.to(z.dtype)
        rest = kappa if loss == "margin" and classes > 1 else 0.0
        values = torch.where(active, at(plus) - at(minus), rest)
        terms = [(plus, one), (minus, -one)]
    seed = torch.zeros_like(z)
    for c, value in terms:
        seed.scatter_add_(1, c.unsqueeze(1), value.unsqueeze(1))
    return seed, values


def _rows(values: Tensor) -> Tensor:
    """Reshape (N, *) to (N, P), where N may be 0."""
    return values.reshape(len(values), values.shape[1:].numel())


def _count(which: Tensor) -> Tensor:
    """Count the marked targets of each image, (N,) int32."""
    return _rows(which).sum(1, dtype=torch.int32)


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


def loss_seed_bilinear(
    scores: Tensor,
    labels: Tensor,
    adversarial: Tensor | None,
    loss: str,
    blend: Tensor | None,
    q: float,
    kappa: float,
    class_weights: Tensor | None,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dagcore.ops.loss_seed_bilinear`."""
    if labels.numel() == 0:
        sums = scores.new_zeros(len(scores), dtype=torch.float64)
        return torch.zeros_like(scores), sums, sums.int()
    size = labels.shape[1:]
    high = _enlarged(scores, size[0], size[1], align_corners)
    seed, sums, hits = loss_seed(
        high, labels, adversarial, loss, blend, q, kappa, class_weights, ignore_index
    )
    gradient = torch.ops.aten.upsample_bilinear2d_backward(seed, size, scores.shape, align_corners)
    limit = torch.finfo(scores.dtype)
    return torch.empty_like(scores).copy_(gradient.clamp(limit.min, limit.max)), sums, hits


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
    """See `dagcore.ops.linf_step_`; also returns which images were stepped, (N,) bool."""
    dtype = real(images)
    if images.numel() == 0:
        norms = images.new_zeros(len(images), dtype=dtype)
        return norms, norms.bool()
    x, x0, r = (t.detach().to(dtype) for t in (images, origin, gradient))
    norms = torch.where(active > 0, _rows(r.abs()).amax(1), 0)
    scale = step_scale(norms, gamma).view(-1, *[1] * (x.dim() - 1))
    moved = (x + scale * r).clamp(x0 - epsilon, x0 + epsilon).clamp(lower, upper)
    images.detach().copy_(torch.where(scale > 0, moved, x))
    if grid is not None:
        image = shown(images.detach().to(dtype), x0, (lower, upper), levels, epsilon)
        grid.detach().copy_(torch.where(scale > 0, image, grid.to(dtype)))
    return norms, scale.flatten() > 0


def pgd_step_(
    images: Tensor,
    origin: Tensor,
    gradient: Tensor,
    active: Tensor,
    norm: str,
    alpha: Tensor,
    epsilon: Tensor,
    lower: float,
    upper: float,
    momentum: Tensor | None,
    decay: float,
    previous: Tensor | None,
    share: Tensor | None,
    grid: Tensor | None,
    levels: int,
) -> Tensor:
    """See `dagcore.ops.pgd_step_`."""
    checks.choice("norm", norm, checks.NORMS)
    dtype = real(images)
    if images.numel() == 0:
        return images.new_zeros(len(images), dtype=torch.bool)
    x, x0, d = (t.detach().to(dtype) for t in (images, origin, gradient))

    def each(numbers: Tensor) -> Tensor:  # (N,)
        return numbers.reshape(-1, *[1] * (x.dim() - 1)).to(dtype)

    def size(values: Tensor, order: int) -> Tensor:  # (N,), float64
        flat = _rows(values.double())
        norms: Tensor = torch.linalg.vector_norm(flat, order, dim=1)
        return norms

    def inverse(of: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        """Return of / by, and where it is finite and above 0."""
        quotient = (of / by).to(dtype)
        return quotient, (quotient > 0) & (quotient < math.inf)

    def project(values: Tensor) -> Tensor:
        if norm == "linf":
            ball = each(epsilon)
            return values.clamp(x0 - ball, x0 + ball).clamp(lower, upper)
        length = size(values - x0, 2)
        inside = x0 + each(epsilon / length) * (values - x0)
        return torch.where(each(length) > each(epsilon), inside, values).clamp(lower, upper)

    moved = (active > 0) & (epsilon > 0)
    if share is not None:
        moved = moved & (share >= 0) & (share <= 1)
    if momentum is not None:
        length = size(d, 1)
        scale, usable = inverse(torch.ones_like(length), length)
        moved = moved & (usable | (length == 0))
        d = decay * momentum + torch.where(each(length) == 0, 0, each(scale) * d)
    moved = moved & _rows(gradient.isfinite()).all(1)
    moved = moved & _rows(d != 0).any(1)
    lengths, usable = inverse(alpha, size(d, 2) if norm == "l2" else torch.ones_like(alpha))
    moved = moved & usable
    z = x + each(lengths) * (d if norm == "l2" else d.sign())
    z = project(z)
    if previous is not None and share is not None:
        part = each(share)
        z = project(x + part * (z - x) + (1 - part) * (x - previous.to(dtype)))
    mask = moved.reshape(-1, *[1] * (x.dim() - 1))
    for written, values in ((momentum, d), (previous, x), (images, z)):
        if written is not None:
            written.copy_(torch.where(mask, values, written.to(values.dtype)))
    if grid is not None:
        image = shown(images.to(dtype), x0, (lower, upper), levels, epsilon, norm)
        grid.copy_(torch.where(mask, image, grid.to(dtype)))
    return moved


def linf_prox_(
    images: Tensor,
    origin: Tensor,
    gradient: Tensor,
    metric: Tensor,
    active: Tensor,
    alpha: Tensor,
    epsilon: Tensor,
    weight: float,
    lower: float,
    upper: float,
) -> Tensor:
    """See `dagcore.ops.linf_prox_`."""
    dtype = real(images)
    if images.numel() == 0:
        return torch.zeros_like(active, dtype=torch.bool)
    x, x0, g = (_rows(t.detach().to(dtype)) for t in (images, origin, gradient))
    h = metric.detach().reshape(x.shape)
    d = x - x0 + alpha.to(dtype)[:, None] * g / h
    inside = d.clamp(lower - x0, upper - x0)
    moved = (active > 0) & (alpha > 0) & (epsilon > 0) & d.isfinite().all(1) & (d != 0).any(1)
    # If the k largest are above t, then t is (sum of H |d| over them - alpha weight) / sum of H.
    size, order = inside.abs().double().sort(1, descending=True)
    h = h.double().gather(1, order)
    sums = (h * d.abs().double().gather(1, order)).cumsum(1) - weight * alpha[:, None]
    t = torch.minimum(size, sums / h.cumsum(1)).amax(1, keepdim=True).clamp(min=0)
    t = torch.minimum(t, epsilon[:, None]).to(dtype)
    stepped = (x0 + inside.clamp(-t, t)).clamp(lower, upper)
    images.detach().copy_(torch.where(moved[:, None], stepped, x).view(images.shape))
    return moved


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
    """Return gamma / norm, (N,), the factor of the step of `linf_step_`; 0 for images that stay.

    Images stay if their norm is 0 or not finite, or the quotient is infinite.
    """
    gamma = gamma if gamma <= torch.finfo(norms.dtype).max else math.inf
    scale = torch.full_like(norms, gamma) / norms
    return torch.where(scale < math.inf, scale, 0)  # a NaN is not below it


def real(values: Tensor) -> torch.dtype:
    """Return the dtype in which values are compared and stepped, and norms returned."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32

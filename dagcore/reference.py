"""Dense Adversary Generation in plain PyTorch: the reference and baseline of the native code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .errors import ArgumentError
from .labels import assign


class Trace(NamedTuple):
    """The result of the attack, for N images and at most M updates."""

    images: Tensor  # (N, *) attacked images
    iterations: Tensor  # (N,) int32, updates applied
    status: list[str]  # N of "converged", "budget" or "stalled"
    active: Tensor  # (M + 1, N) int32, active targets at each evaluation, -1 once stopped
    targets: Tensor  # (N,) int32, number of targets that count
    adversarial_labels: Tensor | str  # (N, *T), or "runner-up"


def dag(
    scores_of: Callable[..., Tensor],
    images: Tensor,  # (N, *)
    labels: Tensor,  # (N, *T)
    adversarial_labels: Tensor | str,  # (N, *T)
    *,
    gamma: float = 0.5 / 255,
    max_iter: int = 200,
    goal: str = "leave",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    epsilon: float | None = None,
    tolerance: float = 0.0,
    ignore_index: int = 255,
    margin: float = 0.0,
    levels: int | None = None,
    align_corners: bool = False,
    generator: torch.Generator | None = None,
    boxes: Tensor | None = None,  # (N, *)
    start: Tensor | None = None,  # (N, *)
) -> Trace:
    """Run Algorithm 1 for each image of a batch on its own. Arguments are those of `dagcore.DAG`.

    `scores_of` maps images (N, *) to scores (N, C, *T), or to smaller maps (N, C, h, w) that are
    enlarged to the size of the labels. If there are boxes, they are its second argument.
    """
    lower, upper = bounds or (None, None)
    begin = images if start is None else start
    x = begin.detach().clone(memory_format=torch.contiguous_format)
    shadow = None if levels is None else x.clone()
    fixed = False
    if levels is not None:
        assert bounds is not None
        ball = math.inf if epsilon is None else epsilon
        x = on_levels(x, images, levels, *bounds, ball)
        fixed = ball * (levels - 1) / (bounds[1] - bounds[0]) * (1 + 1e-6) < 1  # no other level
    iterations = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    status = ["budget"] * len(x)
    history = torch.full((max_iter + 1, len(x)), -1, dtype=torch.int32, device=x.device)
    live = torch.arange(len(x), device=x.device)  # images that still run
    total = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    l_adv = adversarial_labels

    for m in range(max_iter + 1 if len(x) else 0):
        x_m = x[live]
        with torch.enable_grad():
            x_m.requires_grad_()
            scores = scores_of(x_m) if boxes is None else scores_of(x_m, boxes[live])
        if m == 0:
            l_adv = assign(adversarial_labels, labels, scores.shape[1], ignore_index, generator)
            given = None if isinstance(l_adv, str) else l_adv
            counts = _counted(scores.shape[1], labels, given, ignore_index)
            if goal == "leave" and given is not None:
                counts = counts & (given != labels)
            total = counts.flatten(1).sum(1) if counts.dim() > 1 else counts.long()
        # line 3: T_m = {t : argmax_c f_c(X_m, t) = l_t}
        arguments = (scores, labels[live], l_adv if isinstance(l_adv, str) else l_adv[live])
        if scores.shape[2:] == labels.shape[1:]:
            seed, active = dag_seed(*arguments, goal=goal, ignore_index=ignore_index, margin=margin)
        else:
            seed, active = dag_seed_bilinear(
                *arguments,
                goal=goal,
                ignore_index=ignore_index,
                margin=margin,
                align_corners=align_corners,
            )
        history[m, live] = active
        done = active / total[live].clamp(min=1).double() <= tolerance
        for n in live[done].tolist():
            status[n] = "converged"
        if m == max_iter or done.all():
            break
        # line 4: r_m = sum over T_m of grad f_l' - grad f_l
        r = _gradient(scores, x_m, seed)
        # lines 5 to 7: X_{m+1} = X_m + gamma / ||r_m||_inf r_m
        x_m = x_m.detach()
        accumulated = x_m if shadow is None else shadow[live]
        norms = linf_step_(
            accumulated,
            images[live],
            r,
            torch.where(done, 0, active),
            gamma=gamma,
            lower=lower,
            upper=upper,
            epsilon=epsilon,
            grid=None if shadow is None else x_m,
            levels=levels,
        )
        x[live] = x_m
        if shadow is not None:
            shadow[live] = accumulated
        moved = (_scale(norms, gamma) > 0) & (not fixed)
        for n in live[~done & ~moved].tolist():
            status[n] = "stalled"
        live = live[moved]
        iterations[live] += 1
        if not len(live):
            break
    return Trace(x, iterations, status, history, total.int(), l_adv)


def dag_seed(
    scores: Tensor,  # (N, C, *T)
    labels: Tensor,  # (N, *T)
    adversarial_labels: Tensor | str,  # (N, *T)
    *,
    goal: str = "leave",
    ignore_index: int = 255,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute `dagcore.ops.dag_seed` by autograd. Same arguments, results and errors."""
    adversarial = checks.seed_arguments(
        scores, labels, adversarial_labels, goal, ignore_index, margin
    )
    if scores.numel() == 0:
        return torch.empty_like(scores), scores.new_zeros(len(scores), dtype=torch.int32)
    with torch.inference_mode(False), torch.enable_grad():
        plus, minus, active = verdicts(
            scores.detach(), labels, adversarial, goal, ignore_index, margin
        )
        f = _leaf(scores)
        f_plus, f_minus = f.gather(1, torch.stack([plus, minus], dim=1)).unbind(1)
        (seed,) = torch.autograd.grad(((f_plus - f_minus) * active).sum(), f)
    return _like(scores, seed), _rows(active).sum(1, dtype=torch.int32)


def verdicts(
    scores: Tensor,  # (N, C, *T)
    labels: Tensor,  # (N, *T)
    adversarial: Tensor | None,  # (N, *T)
    goal: str,
    ignore_index: int,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each target seeds, (N, *T): the class of +1, that of -1, whether it is active."""
    counted = _counted(scores.shape[1], labels, adversarial, ignore_index)
    true = torch.where(counted, labels, 0).long()
    top, winner = scores.max(dim=1)
    if adversarial is None:
        plus = _runner_up(scores, true)
    else:
        plus = torch.where(counted, adversarial, 0).long()
    if goal == "leave":
        held = (winner == true) | top.isnan() | _within(margin, top, scores, true)
        return plus, true, counted & (plus != true) & held
    rival = _runner_up(scores, plus)  # the strongest class except the adversarial label
    near = (winner == plus) & (rival != plus) & _within(margin, top, scores, rival)
    return plus, torch.where(near, rival, winner), counted & ((winner != plus) | top.isnan() | near)


def _within(margin: float, top: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
    """Return whether the scores of classes (N, *T) are less than a margin behind the largest."""
    real = norm_dtype(scores)
    lead = top.to(real) - scores.gather(1, classes.unsqueeze(1)).squeeze(1).to(real)
    return lead < _representable(margin, real)


def loss_seed(
    scores: Tensor,  # (N, C, *T)
    labels: Tensor,  # (N, *T)
    adversarial_labels: Tensor | str | None = None,  # (N, *T)
    *,
    loss: str,
    blend: float | Tensor = 0.0,  # (N,)
    q: float = 0.5,
    kappa: float = 0.0,
    class_weights: Tensor | None = None,  # (C,)
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `dagcore.ops.loss_seed` by autograd in float64. Same arguments and errors."""
    adversarial = checks.loss_arguments(
        scores, labels, adversarial_labels, loss, blend, q, kappa, class_weights, ignore_index
    )
    sums = scores.new_zeros(len(scores), dtype=torch.float64)
    if scores.numel() == 0:
        return torch.empty_like(scores), sums, sums.int()
    num_classes, targeted = scores.shape[1], adversarial is not None
    checks.target_labels(num_classes, labels, adversarial, ignore_index)
    with torch.inference_mode(False), torch.enable_grad():
        counted = labels.long() != ignore_index
        if adversarial is not None and not 0 <= ignore_index < num_classes:
            counted = counted & (adversarial.long() != ignore_index)
        label = torch.where(counted, labels, 0).long()
        top, winner = scores.detach().max(dim=1)
        if adversarial is not None:
            aim = torch.where(counted, adversarial, 0).long()
        else:
            aim = _runner_up(scores.detach(), label) if loss == "dag" else label
        whole = counted & top.isfinite()
        z = _leaf(torch.where(whole.unsqueeze(1), scores.detach().double(), 0))
        if loss in ("margin", "dag"):
            values = _margin_loss(loss, z, scores.detach(), label, aim, kappa, targeted)
        elif loss == "masked-spherical":
            values = _spherical_loss(z, aim, (winner == aim) != targeted)
            values = values if targeted else -values
        elif loss == "dlr":
            values = _dlr_loss(z, label, aim if targeted else None)
        else:
            values = _softmax_loss(loss, z, aim, winner, blend, q, targeted)
        if class_weights is not None:
            values = values * class_weights.detach().to(norm_dtype(scores)).double()[label]
        values = torch.where(whole, values, 0)
        (seed,) = torch.autograd.grad(values.sum(), z)
    limit = torch.finfo(scores.dtype)
    seed = seed.clamp(limit.min, limit.max).to(scores.dtype)
    values = torch.where(whole == counted, values.detach(), math.nan)
    hits = counted & ((winner == label) | top.isnan())
    sums = _rows(values).sum(1)
    return _like(scores, seed), sums, _rows(hits).sum(1, dtype=torch.int32)


def _softmax_loss(
    loss: str,
    z: Tensor,
    aim: Tensor,
    winner: Tensor,
    blend: float | Tensor,
    q: float,
    targeted: bool,
) -> Tensor:
    """Return the losses of p_aim, (N, *T) float64; `aim` is the adversarial label if targeted."""
    ln_p = _at(z.log_softmax(1), aim)
    if loss == "jensen-shannon":
        ln_p = ln_p.clamp(min=-700)  # where the loss is flat, and p above 0
        p = ln_p.exp()
        values = math.log(2) + (p * ln_p - (1 + p) * p.log1p()) / 2
    elif loss == "tsallis" and q != 1:
        values = -torch.expm1((1 - q) * ln_p) / (1 - q)
    else:
        right = winner == aim
        if loss == "cosine":
            p = z.detach().softmax(1)
            weight = _at(p, aim) / torch.linalg.vector_norm(p, dim=1)
            weight = 1 - weight if targeted else weight
        elif loss in ("masked-cross-entropy", "blended-cross-entropy"):
            other = torch.zeros_like(ln_p)
            if loss == "blended-cross-entropy":
                of_image = torch.as_tensor(blend, dtype=z.dtype, device=z.device)
                other = other + of_image.detach().view(-1, *[1] * (ln_p.dim() - 1))
            weight = torch.where(right != targeted, 1 - other, other)
        else:
            weight = torch.ones_like(ln_p)
        values = torch.where(weight == 0, 0, -ln_p) * weight
    return -values if targeted else values


def _margin_loss(
    loss: str,
    z: Tensor,
    scores: Tensor,
    label: Tensor,
    aim: Tensor,
    kappa: float,
    targeted: bool,
) -> Tensor:
    """Return "margin" or "dag", (N, *T) float64; the original scores decide which targets count."""
    aims = loss == "margin" and targeted
    own = aim if aims else label
    top, winner = scores.max(1)
    rival = _runner_up(scores, own)
    if aims:
        active = (winner != own) | _within(kappa, top, scores, rival)
        values = _at(z, own) - _at(z, rival)
    else:
        active = (winner == own) | _within(kappa, top, scores, own)
        values = _at(z, aim if loss == "dag" else rival) - _at(z, own)
    values = torch.where(active, values, kappa if loss == "margin" else 0.0)
    return torch.where(rival == own, 0, values)  # of a single class


def _spherical_loss(z: Tensor, aim: Tensor, counts: Tensor) -> Tensor:
    """Return z_aim / |z| for the targets that count, else 0, (N, *T) float64."""
    size = torch.linalg.vector_norm(z.detach(), dim=1)
    counts = counts & (size > 0) & size.isfinite()
    z = torch.where(counts.unsqueeze(1), z, 1)
    return torch.where(counts, _at(z, aim) / torch.linalg.vector_norm(z, dim=1), 0)


def _dlr_loss(z: Tensor, label: Tensor, aim: Tensor | None) -> Tensor:
    """Return the loss "dlr", (N, *T) float64."""
    order = z.detach().sort(dim=1, descending=True, stable=True).indices

    def ratio(z: Tensor) -> tuple[Tensor, Tensor]:
        first, second, third = order[:, 0], order[:, 1], order[:, 2]
        rival = torch.where(first == label, second, first) if aim is None else aim
        low = _at(z, third) if aim is None else (_at(z, third) + _at(z, order[:, 3])) / 2
        return _at(z, label) - _at(z, rival), _at(z, first) - low + 1e-12

    above, below = ratio(z.detach())
    finite = above.isfinite() & below.isfinite()
    above, below = ratio(torch.where(finite.unsqueeze(1), z, 0))
    return torch.where(finite, -above / below, 0)


def _at(values: Tensor, classes: Tensor) -> Tensor:
    """Return the values of classes (N, *T) in (N, C, *T)."""
    return values.gather(1, classes.unsqueeze(1)).squeeze(1)


def dag_seed_bilinear(
    scores: Tensor,  # (N, C, h, w)
    labels: Tensor,  # (N, H, W)
    adversarial_labels: Tensor | str,  # (N, H, W)
    *,
    goal: str = "leave",
    ignore_index: int = 255,
    margin: float = 0.0,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `dagcore.ops.dag_seed_bilinear` on enlarged scores. Same arguments and results."""
    checks.seed_arguments(
        scores, labels, adversarial_labels, goal, ignore_index, margin, bilinear=True
    )
    checks.boolean("align_corners", align_corners)
    if labels.numel() == 0:
        return torch.zeros_like(scores), scores.new_zeros(len(scores), dtype=torch.int32)
    with torch.inference_mode(False), torch.enable_grad():
        low = _leaf(scores)
        high = enlarge(low, labels.shape[1:], align_corners)
        seed, active = dag_seed(
            high, labels, adversarial_labels, goal=goal, ignore_index=ignore_index, margin=margin
        )
        (gradient,) = torch.autograd.grad(high, low, seed)
    return _like(scores, gradient), active


def loss_seed_bilinear(
    scores: Tensor,  # (N, C, h, w)
    labels: Tensor,  # (N, H, W)
    adversarial_labels: Tensor | str | None = None,  # (N, H, W)
    *,
    loss: str,
    blend: float | Tensor = 0.0,  # (N,)
    q: float = 0.5,
    kappa: float = 0.0,
    class_weights: Tensor | None = None,  # (C,)
    ignore_index: int = 255,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `dagcore.ops.loss_seed_bilinear` on enlarged scores. Same arguments and results."""
    numbers = (loss, blend, q, kappa, class_weights, ignore_index)
    checks.loss_arguments(scores, labels, adversarial_labels, *numbers, bilinear=True)
    checks.boolean("align_corners", align_corners)
    names = ("loss", "blend", "q", "kappa", "class_weights", "ignore_index")
    settings: dict[str, Any] = dict(zip(names, numbers, strict=True))
    if labels.shape[1:] == scores.shape[2:]:
        return loss_seed(scores, labels, adversarial_labels, **settings)
    if labels.numel() == 0:
        sums = scores.new_zeros(len(scores), dtype=torch.float64)
        return torch.zeros_like(scores), sums, sums.int()
    with torch.inference_mode(False), torch.enable_grad():
        low = _leaf(scores.to(norm_dtype(scores)))
        high = enlarge(low, labels.shape[1:], align_corners)
        seed, sums, hits = loss_seed(high, labels, adversarial_labels, **settings)
        (gradient,) = torch.autograd.grad(high, low, seed)
    limit = torch.finfo(scores.dtype)
    return _like(scores, gradient.clamp(limit.min, limit.max).to(scores.dtype)), sums, hits


def argmax_bilinear(
    scores: Tensor,  # (N, C, h, w)
    size: tuple[int, int],
    *,
    align_corners: bool = False,
) -> Tensor:
    """Compute `dagcore.ops.argmax_bilinear` on enlarged scores. Same arguments and results."""
    checks.score_maps(scores)
    height, width = checks.map_size(size)
    checks.boolean("align_corners", align_corners)
    if not len(scores) * height * width:
        return scores.new_zeros((len(scores), height, width), dtype=torch.int64)
    return enlarge(scores.detach(), (height, width), align_corners).argmax(dim=1)


def linf_step_(
    images: Tensor,  # (N, *)
    origin: Tensor,  # (N, *)
    gradient: Tensor,  # (N, *)
    active: Tensor,  # (N,)
    *,
    gamma: float,
    lower: float | None,
    upper: float | None,
    epsilon: float | None,
    grid: Tensor | None = None,  # (N, *)
    levels: int | None = None,
) -> Tensor:
    """Compute `dagcore.ops.linf_step_`. Same arguments, results and errors."""
    limits = checks.step_arguments(
        images, origin, gradient, active, gamma, lower, upper, epsilon, grid, levels
    )
    real = norm_dtype(images)
    low, high, ball = (_representable(limit, real) for limit in limits)
    if images.numel() == 0:
        return images.new_zeros(len(images), dtype=real)
    x, x0, r = images.detach().to(real), origin.detach().to(real), gradient.detach().to(real)
    norms = torch.where(active > 0, _rows(r.abs()).amax(1), 0)
    scale = _scale(norms, gamma).reshape(-1, *[1] * (x.dim() - 1))
    moved = x + scale * r
    moved = _clip(_clip(moved, x0 - ball, x0 + ball), low, high)
    images.detach().copy_(torch.where(scale > 0, moved, x))
    if grid is not None and levels is not None:
        shown = on_levels(images.detach(), origin.detach(), levels, *limits[:2], ball)
        grid.detach().copy_(torch.where(scale > 0, shown, grid.detach()))
    return norms


def pgd_step_(
    images: Tensor,  # (N, *)
    origin: Tensor,  # (N, *)
    gradient: Tensor,  # (N, *)
    active: Tensor,  # (N,)
    *,
    norm: str,
    alpha: float | Tensor,  # (N,)
    epsilon: float | Tensor | None,  # (N,)
    lower: float | None,
    upper: float | None,
    momentum: Tensor | None = None,  # (N, *)
    decay: float = 0.0,
    previous: Tensor | None = None,  # (N, *)
    share: float | Tensor | None = None,  # (N,)
    grid: Tensor | None = None,  # (N, *)
    levels: int | None = None,
) -> Tensor:
    """Compute `dagcore.ops.pgd_step_` image by image. Same arguments, results and errors."""
    alphas, epsilons, shares, low, high = checks.pgd_arguments(
        images,
        origin,
        gradient,
        active,
        norm,
        alpha,
        epsilon,
        lower,
        upper,
        momentum,
        decay,
        previous,
        share,
        grid,
        levels,
    )
    real = norm_dtype(images)
    moved = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for n in range(len(images) if images.numel() else 0):
        x, x0, d = (t[n].detach().to(real) for t in (images, origin, gradient))
        length, ball = float(alphas[n]), float(epsilons[n])
        if not (active[n] > 0 and d.isfinite().all()):
            continue

        def project(x: Tensor, x0: Tensor = x0, ball: float = ball) -> Tensor:
            if norm == "linf":
                radius = _representable(ball, real)
                x = _clip(x, x0 - radius, x0 + radius)
            elif (distance := _norm(x - x0, 2)) > ball:
                x = x0 + (x - x0) * (ball / distance)
            return _clip(x, _representable(low, real), _representable(high, real))

        if momentum is not None:
            inverse = 0.0
            if bool(d.any()):
                inverse = _quotient(1.0, _norm(d, 1), real)
                if not 0 < inverse < math.inf:
                    continue
            d = momentum[n].detach() * decay + d * inverse
        if not bool(d.any()):
            continue
        size = 1.0 if norm == "linf" else _norm(d, 2)
        scale = _quotient(length, size, real)
        if not 0 < scale < math.inf:
            continue
        if norm == "linf":
            z = torch.where(d > 0, x + scale, torch.where(d < 0, x - scale, x))
        else:
            z = x + d * scale
        z = project(z)
        if previous is not None and shares is not None:
            part = shares[n].to(real)
            z = project(x + part * (z - x) + (1 - part) * (x - previous[n].detach().to(real)))
            previous.detach()[n] = x.to(images.dtype)
        if momentum is not None:
            momentum.detach()[n] = d
        images.detach()[n] = z.to(images.dtype)
        moved[n] = True
        if grid is not None and levels is not None:
            image = images.detach()[n : n + 1], origin.detach()[n : n + 1]
            grid.detach()[n : n + 1] = on_levels(*image, levels, low, high, ball, norm)
    return moved


def _norm(values: Tensor, order: int) -> float:
    """Return the L1 or L2 norm, summed in float64."""
    magnitudes = values.double().abs()
    return float(magnitudes.sum()) if order == 1 else math.sqrt(float(magnitudes.square().sum()))


def _quotient(one: float, other: float, dtype: torch.dtype) -> float:
    """Return a quotient rounded to `dtype`: infinite if it overflows or is undefined."""
    exact = torch.tensor(one, dtype=torch.float64) / torch.tensor(other, dtype=torch.float64)
    return float(exact.to(dtype))


def linf_prox_(
    images: Tensor,  # (N, *)
    origin: Tensor,  # (N, *)
    gradient: Tensor,  # (N, *)
    metric: Tensor,  # (N, *)
    active: Tensor,  # (N,)
    *,
    alpha: float | Tensor,  # (N,)
    epsilon: float | Tensor | None = None,  # (N,)
    weight: float = 1.0,
    lower: float | None,
    upper: float | None,
) -> Tensor:
    """Compute `dagcore.ops.linf_prox_`. Same arguments, results and errors."""
    lengths, balls, *limits = checks.prox_arguments(
        images, origin, gradient, metric, active, alpha, epsilon, weight, lower, upper
    )
    real = norm_dtype(images)
    low, high = (_representable(limit, real) for limit in limits)
    moved = torch.zeros_like(active, dtype=torch.bool)
    for n in range(len(images) if images.numel() else 0):
        x, x0, g = (t[n].detach().to(real) for t in (images, origin, gradient))
        h = metric[n].detach()
        d = x - x0 + lengths[n].to(real) * g / h
        if active[n] <= 0 or not d.isfinite().all() or not d.any():
            continue
        inside = torch.minimum(torch.maximum(d, low - x0), high - x0)
        t = _largest_left(inside.flatten(), d.flatten(), h.flatten(), weight * float(lengths[n]))
        t = _representable(min(t, float(balls[n])), real)
        moved[n] = True
        images.detach()[n] = (x0 + inside.clamp(-t, t)).clamp(low, high)
    return moved


def _largest_left(inside: Tensor, d: Tensor, h: Tensor, excess: float) -> float:
    """Return the t of the proximity operator, found piece by piece between successive |inside|.

    The sum of H (|d| - t) over the pixels above t falls as t rises: along a line in each piece, and
    with a jump where the bounds have cut a pixel off.
    """
    size, order = inside.abs().double().sort(descending=True)
    d, h = d.abs().double()[order], h.double()[order]
    lines = (h * d).cumsum(0) - excess
    t = lines / h.cumsum(0)
    ends = torch.cat([size[1:], size.new_zeros(1)])
    piece = int((t >= ends).nonzero()[0]) if bool((t >= ends).any()) else len(t) - 1
    return max(min(float(t[piece]), float(size[piece])), 0.0)


def on_levels(
    images: Tensor,  # (N, *)
    origin: Tensor,  # (N, *)
    levels: int,
    lower: float,
    upper: float,
    epsilon: float,
    norm: str = "linf",
) -> Tensor:
    """Move each pixel to a level, so that images stay within epsilon of the levels of their origin.

    In L-infinity, this is the nearest level within epsilon. In L2, it is the nearest level or, if
    images would leave the ball, one farther inward: see `dagcore.levels.shown`.
    """
    real = norm_dtype(images)
    last, width = levels - 1, upper - lower

    def nearest(values: Tensor) -> Tensor:
        return ((values.to(real) - lower) * (last / width)).round()

    if norm == "l2":
        middle = nearest(origin).clamp(0, last)
        away = (images.to(real) - lower) * (last / width) - middle
        away = torch.where(away.isnan(), last, away).clamp(-middle, last - middle)
        shown = away.clone()
        most = epsilon * last / width * (1 + 1e-6)
        for n in range(len(images)):
            for sixteenths in range(8, 17):
                whole = away[n].trunc()
                more = (away[n] - whole).abs() > sixteenths / 16
                shown[n] = whole + more * away[n].sign()
                if float(shown[n].double().square().sum()) <= most * most:
                    break
        level = middle + shown
        return (level * width / level.new_tensor(last) + lower).to(images.dtype)

    level = nearest(images)
    if math.isfinite(epsilon):
        reach = epsilon * last / width * (1 + 1e-6)  # 8/255 is 8 levels
        within = torch.tensor(reach, dtype=torch.float64).floor()
        level = _clip(level, nearest(origin) - within, nearest(origin) + within)
    level = level.clamp(0, last)
    return (level * width / level.new_tensor(last) + lower).to(images.dtype)


def _counted(
    num_classes: int, labels: Tensor, adversarial: Tensor | None, ignore_index: int
) -> Tensor:
    """Return which targets are not ignored, (N, *T) bool. Raises for a label out of range."""
    checks.target_labels(num_classes, labels, adversarial, ignore_index)
    counted = labels.long() != ignore_index  # a uint8 would be compared modulo 256
    if adversarial is None:
        return counted & (num_classes > 1)
    is_class = 0 <= ignore_index < num_classes
    return counted & ((adversarial.long() != ignore_index) | is_class)


def _runner_up(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the strongest class other than the label: (N, C, *T), (N, *T) -> (N, *T) int64."""
    others = scores.scatter(1, labels.unsqueeze(1), -math.inf).argmax(dim=1)
    # If all others are at -inf too, argmax may return the label itself, as class 0: take class 1.
    return torch.where(others == labels, min(1, scores.shape[1] - 1), others)


def enlarge(scores: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Enlarge scores (N, C, h, w) to a size, in the precision in which they are compared."""
    return torch.nn.functional.interpolate(
        scores.to(norm_dtype(scores)), tuple(size), mode="bilinear", align_corners=align_corners
    )


def _leaf(scores: Tensor) -> Tensor:
    """Return the scores as the leaf of a new graph."""
    return (scores.clone() if scores.is_inference() else scores.detach()).requires_grad_()


def _rows(values: Tensor) -> Tensor:
    """Reshape (N, *) to (N, P), where N may be 0."""
    return values.reshape(len(values), values.shape[1:].numel())


def _like(scores: Tensor, seed: Tensor) -> Tensor:
    """Return a seed with the memory layout of the scores."""
    laid_out = torch.empty_like(scores)
    return seed if laid_out.stride() == seed.stride() else laid_out.copy_(seed)


def _gradient(scores: Tensor, x: Tensor, seed: Tensor) -> Tensor:
    if not scores.requires_grad:
        raise ArgumentError(
            "model must compute its scores from the images differentiably, got scores without a "
            "gradient (does it run under torch.no_grad, or detach?)"
        )
    if scores.dtype == torch.float16:
        seed = seed / 1024  # the step length is unaffected, and sums over targets stay finite
    (gradient,) = torch.autograd.grad(scores, x, seed, allow_unused=True)
    if gradient is None:
        raise ArgumentError(
            "model must compute its scores from the images, got scores that do not depend on them"
        )
    return gradient


def _clip(values: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """Move values into [lower, upper]; a limit that is NaN is none."""
    values = torch.where(values < lower, lower, values)
    return torch.where(values > upper, upper, values)


def _scale(norms: Tensor, gamma: float) -> Tensor:
    """Return gamma / norm, (N,); 0 if the norm is 0 or not finite, or the quotient infinite."""
    scale = torch.full_like(norms, _representable(gamma, norms.dtype)) / norms
    return torch.where(norms.isfinite() & scale.isfinite(), scale, 0)


def _representable(value: float, dtype: torch.dtype) -> float:
    """Return a number as `dtype` holds it: infinite beyond its largest."""
    return value if abs(value) <= torch.finfo(dtype).max else math.copysign(math.inf, value)


def norm_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype in which values are compared and stepped."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32

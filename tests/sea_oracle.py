"""SEA in plain PyTorch, one image at a time, written from the paper: what sea-2024 is held against.

Croce, Singh, Hein: "Towards Reliable Evaluation and Fast Training of Robust Semantic Segmentation
Models" (ECCV 2024): Auto-PGD (Croce, Hein: ICML 2020, Algorithm 1) on three losses, in balls of
twice, one and a half times and once the radius, for 30, 30 and 40 % of the steps; steps are judged
by cross-entropy, and the most successful iterate of the last ball is returned.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

VOID = 255
LOSSES = ("MCE-bal", "MCE", "JS")
Model = Callable[[Tensor], Tensor]


def loss_of(name: str, scores: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """A loss of SEA's, summed over the pixels of one image."""
    counted = labels != VOID
    if name == "CE":
        return F.cross_entropy(scores, labels, reduction="sum", ignore_index=VOID)
    if name.startswith("MCE"):
        own = weights if name == "MCE-bal" else None
        losses = F.cross_entropy(scores, labels, own, reduction="none", ignore_index=VOID)
        return (losses * (scores.argmax(1) == labels)).sum()
    p = scores.softmax(1)
    true = F.one_hot(labels.where(counted, 0), scores.shape[1]).movedim(-1, 1).to(p.dtype)
    mean = (p + true) / 2
    tiny = torch.finfo(p.dtype).tiny
    of_p = p * (p.clamp(min=tiny).log() - mean.clamp(min=tiny).log())
    of_true = -(true * mean.clamp(min=tiny).log())
    return ((of_p + of_true).sum(1) / 2 * counted).sum()


def phase(
    look: Callable[[Tensor], tuple[float, Tensor, int]],
    start: Tensor,
    origin: Tensor,
    steps: int,
    epsilon: float,
) -> Tensor:
    """Auto-PGD in one ball: the iterate with the fewest right pixels."""

    def project(v: Tensor) -> Tensor:
        return (origin + (v - origin).clamp(-epsilon, epsilon)).clamp(0, 1)

    x = before = project(start)
    loss, g, right = look(x)
    best, best_g, best_loss, fewest, returned = x, g, loss, right, x
    losses, alpha, window, since = [loss], 2 * epsilon, max(int(0.22 * steps), 1), 0
    checked, halved = loss, True
    for t in range(steps):
        z = project(x + alpha * g.sign())
        share = 0.75 if t else 1.0
        x, before = project(x + share * (z - x) + (1 - share) * (x - before)), x
        loss, g, right = look(x)
        losses.append(loss)
        if right < fewest:
            fewest, returned = right, x
        if loss > best_loss:
            best, best_g, best_loss = x, g, loss
        since += 1
        if since == window:
            rises = sum(losses[k] > losses[k - 1] for k in range(-window, 0))
            halve = rises <= 0.75 * window or (not halved and best_loss <= checked)
            if halve:
                alpha, x, g = alpha / 2, best, best_g
            checked, halved, since = best_loss, halve, 0
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return returned


def attack(
    model: Model,
    image: Tensor,  # (3, H, W)
    labels: Tensor,  # (H, W) int64
    name: str,
    weights: Tensor | None,
    epsilon: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """The example (3, H, W) that SEA finds by one of its losses."""

    def look(x: Tensor) -> tuple[float, Tensor, int]:
        leaf = x.clone().requires_grad_()
        scores = scores_of(model, leaf, labels)
        (g,) = torch.autograd.grad(loss_of(name, scores, labels[None], weights), leaf)
        with torch.no_grad():
            tracked = float(loss_of("CE", scores, labels[None], None))
            return tracked, g, int((scores.argmax(1)[0] == labels).sum())

    x = image + (2 * torch.rand_like(image) - 1) * 2 * epsilon if start is None else start
    early = int(0.3 * steps + 1e-9)
    for count, factor in ((early, 2.0), (early, 1.5), (steps - 2 * early, 1.0)):
        x = phase(look, x, image, count, factor * epsilon)
    return x


def scores_of(model: Model, image: Tensor, labels: Tensor) -> Tensor:
    """Scores (1, C, H, W) of an image, at the size of its labels."""
    scores = model(image[None])
    if scores.shape[2:] != labels.shape:
        corners = bool(getattr(model, "align_corners", False))
        scores = F.interpolate(scores, labels.shape, mode="bilinear", align_corners=corners)
    return scores


def table(model: Model, image: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Pixels rightly seen, seen, and true, of each class: (C, 3)."""
    with torch.no_grad():
        seen = scores_of(model, image, labels)[0].argmax(0)
    counted = labels != VOID
    seen, labels = seen[counted], labels[counted]
    columns = (seen[seen == labels], seen, labels)
    return torch.stack([torch.bincount(x, minlength=classes) for x in columns], 1)


def miou(tables: Sequence[Tensor]) -> float:
    """Mean IoU of a data set in percent."""
    hits, seen, true = torch.stack(list(tables)).sum(0).double().unbind(1)
    unions = seen + true - hits
    return 100 * float((hits / unions)[unions > 0].mean())


def worst_miou(tables: Sequence[Sequence[Tensor]]) -> float:
    """SEA's search, begun with its first loss: tables[attack][image]."""
    count = len(tables[0])
    choice, now, before = [0] * count, miou(tables[0]), 1000.0
    while before - now > 1e-4:  # percent
        before = now
        for n in random.sample(range(count), count):
            for a in range(len(tables)):
                tried = [*choice[:n], a, *choice[n + 1 :]]
                score = miou([tables[b][m] for m, b in enumerate(tried)])
                if score < now:
                    choice, now = tried, score
    return now


def class_weights(labels: Sequence[Tensor], classes: int) -> Tensor:
    """1 over the pixels of each class that occurs, adding up to 1."""
    counts = sum(torch.bincount(one[one != VOID], minlength=classes) for one in labels)
    assert isinstance(counts, Tensor)
    weights = torch.where(counts > 0, 1 / counts.double(), 0)
    return (weights / weights.sum()).float()

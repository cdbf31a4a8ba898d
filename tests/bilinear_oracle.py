"""The bilinear ops without pruning, in exactly their own arithmetic; and score maps to try."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from support import generator
from torch import Tensor

from dagcore import reference

# (N, C), (h, w), (H, W)
SIZES = {
    "1": ((2, 21), (5, 7), (5, 7)),
    "4": ((2, 21), (9, 5), (36, 20)),
    "8": ((1, 300), (4, 5), (32, 40)),
    "16": ((2, 21), (3, 4), (48, 64)),
    "32": ((1, 21), (3, 2), (96, 64)),
    "40": ((1, 5), (2, 3), (80, 120)),
    "32 rows of cells": ((1, 3), (35, 3), (70, 12)),
    "one row": ((2, 5), (1, 6), (100, 30)),
    "one column": ((1, 2), (6, 1), (45, 100)),
    "two by two": ((1, 21), (2, 2), (100, 100)),
    "one by one": ((2, 21), (1, 1), (7, 5)),
    "one by one to one": ((3, 21), (1, 1), (1, 1)),
    "fractional": ((2, 21), (20, 31), (33, 29)),
    "smaller": ((2, 21), (9, 8), (4, 3)),
    "much smaller": ((2, 21), (40, 50), (7, 3)),
    "to one": ((3, 21), (6, 5), (1, 1)),
    "to one row": ((2, 5), (6, 5), (1, 13)),
    "one class": ((2, 1), (4, 5), (17, 13)),
    "two classes": ((2, 2), (4, 5), (17, 13)),
    "every fourth row": ((1, 3), (160, 4), (40, 5)),  # several to each part that a thread takes
}
WHOLE = ("1", "4", "8", "16", "32")  # weights, and the sums of them, are exact in float32
KINDS = ("random", "smooth")
CORNERS = pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
# Of a sum of weights, relative to the largest that there can be; 1e-5 where none is named.
ROUNDING = {torch.float64: 1e-10}


def axis(length: int, size: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pixel: the two indices that it reads, and the weight of the second."""
    pixel = np.arange(size, dtype=np.float64)
    if align_corners:
        at = pixel * (length - 1) / (size - 1) if size > 1 else np.zeros(size)
    else:
        at = np.maximum((pixel + 0.5) * length / size - 0.5, 0)
    if length == size:
        at = pixel
    low = np.minimum(at.astype(np.int64), length - 1)
    if length == size:
        return low, low, at - low
    weight = np.minimum(at - low, 1)
    return low, np.minimum(low + 1, length - 1), weight


def corners(
    low: tuple[int, int], size: tuple[int, int], align_corners: bool
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows (H, 1), columns (1, W) and weights (H, W) of the pixels' corners, in the ops' order."""
    top, bottom, v = (a[:, None] for a in axis(low[0], size[0], align_corners))
    left, right, u = (a[None, :] for a in axis(low[1], size[1], align_corners))
    return [
        (top, left, (1 - v) * (1 - u)),
        (top, right, (1 - v) * u),
        (bottom, left, v * (1 - u)),
        (bottom, right, v * u),
    ]


def enlarged(scores: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Every class at every pixel (N, C, H, W), rounded as the ops round."""
    s = scores.cpu().to(reference.norm_dtype(scores)).numpy()
    total = None
    with np.errstate(all="ignore"):  # 0 * inf
        for rows, columns, weight in corners(s.shape[2:], size, align_corners):
            term = weight.astype(s.dtype) * s[:, :, rows, columns]
            total = term if total is None else total + term
    return torch.from_numpy(total)


def unpruned(
    scores: Tensor,  # (N, C, h, w)
    labels: Tensor,  # (N, H, W)
    adversarial: Tensor | str,
    goal: str,
    align_corners: bool,
    ignore_index: int = 255,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What `dag_seed_bilinear` returns if pruning changes nothing; the seed's sums in float64."""
    labels = labels.cpu()
    size = tuple(labels.shape[1:])
    other = None if isinstance(adversarial, str) else adversarial.cpu()
    high = enlarged(scores, size, align_corners)
    plus, minus, active = reference.verdicts(high, labels, other, goal, ignore_index, margin)
    real = high.numpy().dtype
    num_images, num_classes, *low = scores.shape
    image = np.arange(num_images)[:, None, None]
    where = active.numpy()
    sums = np.zeros(scores.numel())
    for rows, columns, weight in corners(tuple(low), size, align_corners):
        share = np.broadcast_to(weight.astype(real).astype(np.float64), where.shape)[where]
        for classes, sign in ((plus, 1), (minus, -1)):
            at = ((image * num_classes + classes.numpy()) * low[0] + rows) * low[1] + columns
            sums += sign * np.bincount(at[where], share, minlength=sums.size)
    return torch.from_numpy(sums).view(scores.shape), active.flatten(1).sum(1, dtype=torch.int32)


@functools.cache
def capacity(low: tuple[int, int], size: tuple[int, int], align_corners: bool) -> float:
    """The largest sum that a seed can hold: all weights of a low-resolution pixel."""
    total = np.zeros(low)
    for rows, columns, weight in corners(low, size, align_corners):
        np.add.at(total, (rows, columns), weight)
    return float(total.max())


def beyond_rounding(
    seed: Tensor, sums: Tensor, size: tuple[int, int], align_corners: bool
) -> Tensor:
    """How much of a seed's distance to float64 sums neither summing nor one rounding explains."""
    largest = capacity(tuple(seed.shape[2:]), tuple(size), align_corners)
    slack = ROUNDING.get(seed.dtype, 1e-5) * largest
    slack = slack + 0.51 * torch.finfo(seed.dtype).eps * sums.abs()
    return ((seed.cpu().double() - sums).abs() - slack).clamp(min=0)


def assert_seed(
    got: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    scores: Tensor,
    size: tuple[int, int],
    align_corners: bool,
) -> None:
    """A seed equals what `unpruned` gives but for rounding, its counts to the last."""
    seed, active = got
    assert seed.dtype == scores.dtype
    assert seed.shape == scores.shape
    assert seed.stride() == torch.empty_like(scores).stride()
    assert active.dtype == torch.int32
    assert active.device == seed.device == scores.device
    assert torch.equal(active.cpu(), expected[1])
    assert not bool(beyond_rounding(seed, expected[0], size, align_corners).any())


def adjoint(pixels: Tensor, low: tuple[int, int], align_corners: bool) -> Tensor:
    """The gradients of pixels (N, C, H, W), float64, summed at the low-resolution scores."""
    found = np.zeros((*pixels.shape[:2], *low))
    for rows, columns, weight in corners(low, tuple(pixels.shape[2:]), align_corners):
        np.add.at(found, (..., rows, columns), weight * pixels.numpy())
    return torch.from_numpy(found)


def assert_near(seed: Tensor, exact: Tensor, slack: float) -> None:
    """A seed is what float64 sums are, but for slack, one rounding, and what it cannot hold."""
    info = torch.finfo(seed.dtype)
    assert seed.isfinite().all()
    rounding = 0.51 * info.eps * (exact.abs() + info.smallest_normal)
    error = (seed.cpu().double() - exact.clamp(info.min, info.max)).abs()
    assert not bool((error > slack + rounding).any())


def score_maps(
    shape: tuple[int, ...], seed: int, kind: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Scores (N, C, h, w): noise, or noise enlarged as in a segmentation network's output."""
    rng = generator(seed)
    if kind == "random":
        return (3 * torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)
    assert kind == "smooth"
    coarse = [math.ceil(extent / 8) + 1 for extent in shape[2:]]
    noise = 3 * torch.randn(*shape[:2], *coarse, generator=rng, dtype=torch.float64)
    return torch.nn.functional.interpolate(noise, shape[2:], mode="bicubic").to(dtype)


def label_maps(
    scores: Tensor, size: tuple[int, int], align_corners: bool, seed: int, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Labels that are mostly the argmax, and adversarial labels; some of either are ignored."""
    rng = generator(seed)
    shape = (len(scores), *size)
    winners = enlarged(scores, size, align_corners).argmax(1)
    labels, adversarial = torch.randint(0, scores.shape[1], (2, *shape), generator=rng)
    labels = torch.where(torch.rand(shape, generator=rng) < 0.6, winners, labels)
    adversarial = torch.where(torch.rand(shape, generator=rng) < 0.2, winners, adversarial)
    labels[torch.rand(shape, generator=rng) < 0.1] = ignore_index
    adversarial[torch.rand(shape, generator=rng) < 0.05] = ignore_index
    return labels, adversarial


def _ulps(base: Tensor, steps: Tensor) -> Tensor:
    """`base` moved by so many floating-point numbers (no sign change)."""
    return (base.view(torch.int32 if base.dtype == torch.float32 else torch.int64) + steps).view(
        base.dtype
    )


def close_calls(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Score maps whose classes are as close as classes can be, or at the ends of the range."""
    rng = generator(0)
    info = torch.finfo(dtype)
    word = torch.int32 if dtype == torch.float32 else torch.int64
    num_images, num_classes, *low = shape

    def integers(least: int, most: int, size: tuple[int, ...] = shape) -> Tensor:
        return torch.randint(least, most + 1, size, generator=rng)

    def normal(size: tuple[int, ...] = shape) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64).to(dtype)

    def stacked(values: list[float]) -> Tensor:
        column = torch.tensor(values, dtype=dtype)[:, None, None]
        return column.expand(shape).contiguous()

    one_map = (num_images, 1, *low)
    base = normal(one_map).expand(shape).contiguous()
    ladder = _ulps(
        torch.full(shape, 0.1, dtype=dtype),
        torch.arange(num_classes, dtype=word)[:, None, None].expand(shape),
    )
    smallest = info.smallest_normal * info.eps
    return {
        "all equal": torch.full(shape, 0.1, dtype=dtype),
        "zeros of both signs": torch.where(integers(0, 1) == 0, 0.0, -0.0).to(dtype),
        "same map in every class": base,
        "a few maps, several times": normal((num_images, 3, *low))[:, integers(0, 2)[0, :, 0, 0]],
        "maps an ulp apart": _ulps(base, integers(-1, 1).to(word)),
        "maps some ulps apart": _ulps(base, integers(-30, 30).to(word)),
        "constants an ulp apart, rising": ladder,
        "constants an ulp apart, falling": ladder.flip(1).contiguous(),
        "negative constants an ulp apart": -ladder,
        "constants some ulps apart": _ulps(
            torch.full(shape, -0.7, dtype=dtype),
            integers(0, 50, (num_classes, 1, 1)).to(word).expand(shape),
        ),
        "huge offset": 1e6 + normal() / 8,
        "huge offset, one ulp": _ulps(torch.full(shape, 1e6, dtype=dtype), integers(0, 1).to(word)),
        "denormals": integers(-5, 5).to(dtype) * smallest,
        "rising denormal constants": torch.arange(num_classes)
        .to(dtype)[:, None, None]
        .expand(shape)
        .contiguous()
        * smallest,
        "small normals": info.smallest_normal * (1 + integers(0, 40).to(dtype) * info.eps),
        "nearly overflowing": info.max * (normal().clamp(-4, 4) / 4),
        "largest and lowest": integers(0, 1).mul(2).sub(1).to(dtype) * info.max,
        "every magnitude": normal() * 10.0 ** integers(-30, 30).to(dtype),
        "one corner far below": torch.where(integers(0, 9) == 0, -1e30, normal()).to(dtype),
        "one class far above": stacked([1e30] + [0.5] * (num_classes - 1)),
    }

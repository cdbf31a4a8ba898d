"""One small case that comes to every CUDA kernel, to compare what two devices make of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import DTYPES, arguments, lay_out, on
from torch import Tensor

from dagcore import ops
from dagcore.checks import LOSSES
from dagcore.ops import fallback

SIZES = ((16, 24), (9, 13))
CASES = [
    pytest.mark.parametrize("layout", ["contiguous", "class-last", "gaps"]),
    pytest.mark.parametrize("mode", ["leave", "reach", "runner-up"]),
    pytest.mark.parametrize(
        ("dtype", "size"),
        [*zip(DTYPES, itertools.cycle(SIZES), strict=False), (torch.float32, SIZES[1])],
        ids=str,
    ),
]
Case = tuple[str, str, torch.dtype, tuple[int, int]]


def in_every_case(test: object) -> object:
    """Decorator of a test that takes layout, mode, dtype and size."""
    for case in CASES:
        test = case(test)
    return test


def results(
    device: torch.device, layout: str, mode: str, dtype: torch.dtype, size: tuple[int, int]
) -> tuple[list[Tensor], list[Tensor]]:
    """What the ops return: that which is the same to the bit everywhere, and nearly so."""
    rng = torch.Generator().manual_seed(1)
    scores = lay_out(torch.randn(2, 40, *size, generator=rng).to(dtype), layout)
    labels = scores.float().argmax(1)
    labels[0, 1:3] = 255
    high = torch.randint(0, 40, (2, 43, 24), generator=rng)
    tensors = torch.rand(3, 3, 3, *size, generator=rng).to(dtype)
    images, origin, gradient = (lay_out(tensor, layout) for tensor in tensors)
    counts = torch.tensor([3, 0, 1], dtype=torch.int32)
    scores, labels, high, images, origin, gradient, counts = on(
        device, scores, labels, high, images, origin, gradient - 0.5, counts
    )
    low = scores[:, :, :5, :7]
    exact, near = [ops.argmax_bilinear(low, (43, 24))], []
    high = torch.where(high % 3 == 0, high, exact[0])
    for margin in (0.0, 0.3):
        other, goal = arguments(mode, (labels + 1) % 40)
        exact += ops.dag_seed(scores, labels, other, goal=goal, margin=margin)
        other, goal = arguments(mode, (high + 1) % 40)
        seed, active = ops.dag_seed_bilinear(low, high, other, goal=goal, margin=margin)
        exact.append(active)
        near.append(seed)
    blend = torch.tensor([0.3, 0.8], dtype=torch.float64, device=device)
    for loss in LOSSES:
        other = "runner-up" if loss == "dag" else (labels + 1) % 40 if mode == "reach" else None
        seed, sums, hits = ops.loss_seed(scores, labels, other, loss=loss, blend=blend)
        exact += [seed, hits]
        near.append(sums)
        few, fewer = low[:, :5], high % 5  # with 40 classes these would take minutes on the host
        other = "runner-up" if loss == "dag" else (fewer + 1) % 5 if mode == "reach" else None
        seed, sums, hits = ops.loss_seed_bilinear(few, fewer, other, loss=loss, blend=blend)
        exact.append(hits)
        near += [seed, sums]
    for epsilon, levels in ((None, None), (0.01, None), (None, 256), (0.03, 256)):
        moved, shown = images.clone(), torch.zeros_like(images) if levels else None
        settings = {"gamma": 0.02, "lower": 0.0, "upper": 1.0, "epsilon": epsilon}
        exact.append(
            ops.linf_step_(moved, origin, gradient, counts, **settings, grid=shown, levels=levels)
        )
        exact += [moved] if shown is None else [moved, shown]
    for norm, with_momentum, with_levels in itertools.product(("linf", "l2"), (0, 1), (0, 1)):
        moved, *others = (images.clone() for _ in range(3))
        settings = {
            "norm": norm,
            "alpha": 0.02 if norm == "linf" else 0.5,
            "lower": 0.0,
            "upper": 1.0,
        }
        settings |= {
            "epsilon": 0.03 if norm == "linf" else 0.9,
            "previous": others[0],
            "share": 0.75,
        }
        if with_momentum:
            others.append(torch.zeros_like(images, dtype=fallback.real(images)))
            settings |= {"momentum": others[-1], "decay": 0.9}
        if with_levels:
            settings |= {"grid": others[1], "levels": 256}
        exact.append(ops.pgd_step_(moved, origin, gradient, counts, **settings))
        (near if norm == "l2" or with_momentum else exact).extend([moved, *others])
    alpha = torch.tensor([0.05, 0.05, 0.01], dtype=torch.float64, device=device)
    metric = 0.1 + gradient.abs().to(torch.promote_types(dtype, torch.float32))
    for weight in (0.0, 30.0):
        moved, settings = images.clone(), {"weight": weight, "lower": 0.0, "upper": 1.0}
        settings |= {"epsilon": 0.5 * alpha if weight else None}
        exact.append(
            ops.linf_prox_(moved, origin, gradient, metric, counts, alpha=alpha, **settings)
        )
        (near if weight else exact).append(moved)
    count = 70  # more images than a block of settle_ has threads
    flags = torch.rand(5, count, generator=rng) < 0.6
    numbers = torch.randint(0, 4, (3, count), generator=rng)
    history = torch.full((count, 4, 2), -1, dtype=torch.int32)
    active = torch.randint(0, 9, (count, 2), generator=rng).int()
    rows = [*flags[:2], *numbers[:2], numbers[2].to(torch.int8), history]
    rows = [row.to(device) for row in rows]
    told = [row.to(device) for row in (active, *flags[2:])]
    exact += [ops.settle_(*rows, *told, 3, 2), *rows]
    return [value.cpu() for value in exact], [value.cpu() for value in near]


def assert_same_results(
    got: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]]
) -> None:
    for value, wanted in zip(got[0], expected[0], strict=True):
        assert torch.equal(value, wanted)
    for value, wanted in zip(got[1], expected[1], strict=True):
        rtol = max(1e-6, torch.finfo(wanted.dtype).eps)  # 16 bits can round to either side
        atol = 2e-6 * float(wanted.abs().max())
        torch.testing.assert_close(value, wanted, rtol=rtol, atol=atol)

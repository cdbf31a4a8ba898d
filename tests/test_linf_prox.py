"""linf_prox_ against an oracle in float64, on every kernel."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import (
    BOTH,
    DTYPES,
    INF,
    LAYOUTS,
    NAN,
    UNPACKED,
    bits,
    generator,
    lay_out,
    same_bits,
    unpacked,
)
from torch import Tensor

from dagcore import ops

pytestmark = pytest.mark.cuda_on_host

WRITABLE = tuple(layout for layout in LAYOUTS if layout != "expanded")
BOUNDS = ((None, None), (0.0, 1.0), (0.0, None), (None, 0.9))
NAMES = ("images", "origin", "gradient", "metric")
# Of the largest |d|: of the search, of rounding.
CLOSE = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float32: 3e-7,
    torch.float64: 1e-14,
}


def case(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Images up to 0.05 from their origin, some at their bounds; a gradient and a metric."""
    rng = generator(seed)
    origin = torch.rand(shape, generator=rng, dtype=torch.float64).mul(1.2).sub(0.1).clamp(0, 0.9)
    away = 0.05 * (2 * torch.rand(shape, generator=rng, dtype=torch.float64) - 1)
    metric = torch.rand(shape, generator=rng, dtype=torch.float64) ** 3 + 1e-3
    gradient = metric * torch.randn(shape, generator=rng, dtype=torch.float64)
    exact = torch.promote_types(dtype, torch.float32)
    values = [(origin + away).clamp(0, 0.9), origin, gradient]
    return [*(t.to(device, dtype) for t in values), metric.to(device, exact)]


def row(values: list[float], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def counts(values: list[int], device: torch.device | str = "cpu") -> Tensor:
    return row(values, device, torch.int32)


def lengths(values: list[float], device: torch.device | str = "cpu") -> Tensor:
    return row(values, device, torch.float64)


def oracle(
    tensors: list[Tensor], n: int, excess: float, alpha: float, lower, upper, epsilon: float
) -> tuple[Tensor, float]:
    """What becomes of image n, in float64, and its t: halved until nothing changes any more."""
    x, origin, g, h = (t[n].double().cpu().flatten() for t in tensors)
    d = x - origin + alpha * g / h
    low = origin - origin - INF if lower is None else lower - origin
    high = origin - origin + INF if upper is None else upper - origin
    inside = d.clamp(low, high)

    def left(t: float) -> float:
        return math.fsum((h * (d.abs() - t))[inside.abs() > t].tolist())

    below, above = 0.0, float(inside.abs().max())
    if excess == 0:
        below = above
    elif left(0.0) <= excess:
        above = 0.0
    while below < (middle := (below + above) / 2) < above:
        below, above = (middle, above) if left(middle) > excess else (below, middle)
    above = min(above, epsilon)
    return origin + inside.clamp(-above, above), above


def check(
    tensors: list[Tensor], alphas: list[float], module: object = ops, weight: float = 1.0, **bounds
) -> Tensor:
    """One step on a device, whose images are those of the oracle; the images."""
    images, device = tensors[0], tensors[0].device
    ball = bounds.get("epsilon")
    balls = [INF] * len(images) if ball is None else ball.tolist()
    before = [bits(t) for t in tensors[1:]]
    expected = [
        oracle(tensors, n, weight * alpha, alpha, bounds["lower"], bounds["upper"], balls[n])
        for n, alpha in enumerate(alphas)
    ]
    moved = module.linf_prox_(
        *tensors,
        counts([1] * len(images), device),
        alpha=lengths(alphas, device),
        weight=weight,
        **bounds,
    )
    assert moved.dtype == torch.bool
    assert moved.tolist() == [True] * len(images)
    for n, (wanted, t) in enumerate(expected):
        close = CLOSE[images.dtype] * max(t, float(wanted.abs().max()))
        torch.testing.assert_close(
            images[n].double().cpu().flatten(), wanted, rtol=0, atol=max(close, 1e-30)
        )
    for own, was in zip(tensors[1:], before, strict=True):
        assert torch.equal(bits(own), was), "an argument was written to"
    return images


# --- against the oracle


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_proximity_operator(module: object, device: torch.device, dtype) -> None:
    for (k, shape), (lower, upper) in itertools.product(
        enumerate(((3, 3, 33, 41), (3, 1, 1, 1), (3, 2, 7, 151), (3, 1), (3, 4, 3, 5, 2))), BOUNDS
    ):
        tensors = case(shape, k, dtype, device)
        check(tensors, [0.003, 0.05, 0.4], module, lower=lower, upper=upper)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stays_within_a_ball_of_each_image(module: object, device: torch.device, dtype) -> None:
    """Balls that are smaller than t, larger, and none."""
    for shape in ((4, 3, 9, 17), (4, 1)):
        tensors = case(shape, 8, dtype, device)
        origin, balls = tensors[1], lengths([0.004, 1.0, INF, 0.03], device)
        images = check(tensors, [0.05] * 4, module, lower=0.0, upper=1.0, epsilon=balls)
        apart = (images.double() - origin.double()).abs().flatten(1).amax(1)
        assert bool((apart <= balls * (1 + 1e-3) + torch.finfo(dtype).eps).all())
        one = case(shape, 8, dtype, device)
        module.linf_prox_(
            *one, counts([1] * 4, device), alpha=0.05, epsilon=0.004, lower=0.0, upper=1.0
        )
        assert same_bits(one[0][0], images[0])
        assert float((one[0].double() - origin.double()).abs().max()) < 0.01


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    for k, (first, second) in enumerate(itertools.product(LAYOUTS, LAYOUTS)):
        shape = ((2, 3, 13, 17), (2, 2, 7, 51), (2, 4, 3, 5, 2))[k % 3]
        images, origin, gradient, metric = case(shape, k, dtype, device)
        if first == "expanded":
            images = origin.clone()  # the origin is another image's
        tensors = [
            lay_out(images, layout),
            lay_out(origin, first),
            lay_out(gradient, second),
            lay_out(metric, LAYOUTS[k % len(LAYOUTS)]),
        ]
        check(tensors, [0.01, 0.1], lower=-1.0, upper=2.0)


@pytest.mark.parametrize("where", UNPACKED)
@pytest.mark.parametrize("which", [*NAMES, "all"])
def test_pixels_that_cannot_be_read_several_at_once(
    kernels: torch.device, which: str, where: str
) -> None:
    shape = (2, 2, 5, 13) if where == "rows" else (2, 2, 5, 16)
    for k, dtype in enumerate(DTYPES):
        tensors = [
            unpacked(tensor, where) if which in (name, "all") else tensor
            for name, tensor in zip(NAMES, case(shape, k, dtype, kernels), strict=True)
        ]
        check(tensors, [0.01, 0.1], lower=0.0, upper=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_those_of_vectors_and_tasks(kernels: torch.device, dtype) -> None:
    for k, size in enumerate((1, 15, 16, 17, 129, 1023, 1025, 16383, 16385)):
        check(case((2, size), k, dtype, kernels), [0.02, 0.3], lower=0.0, upper=1.0)


def test_vectors_change_no_bit(simd_levels: tuple[str, ...]) -> None:
    for dtype, layout in itertools.product(DTYPES, ("contiguous", "gaps")):
        results = []
        for level in simd_levels:
            ops.native.module.use_simd(level)
            tensors = [lay_out(t, layout) for t in case((2, 3, 33, 41), 3, dtype)]
            ops.linf_prox_(
                *tensors, counts([1, 1]), alpha=lengths([0.01, 0.2]), lower=0.0, upper=1.0
            )
            results.append(tensors[0])
        assert all(same_bits(result, results[0]) for result in results)


def test_thread_count_changes_no_bit(one_and_two_threads: tuple[int, int]) -> None:
    results = []
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        tensors = case((2, 3, 129, 151), 2, torch.float32)
        ops.linf_prox_(*tensors, counts([1, 1]), alpha=lengths([0.01, 0.2]), lower=0.0, upper=1.0)
        results.append(tensors[0])
    assert same_bits(*results)


def test_an_image_does_not_depend_on_the_others(device: torch.device) -> None:
    tensors = case((5, 3, 33, 41), 4, torch.float32, device)
    alphas = [0.01, 0.3, 1e-6, 0.1, 2.0]
    alone = [[t[n : n + 1].clone() for t in tensors] for n in range(5)]
    settings = {"lower": 0.0, "upper": 1.0}
    ops.linf_prox_(*tensors, counts([1] * 5, device), alpha=lengths(alphas, device), **settings)
    for n, own in enumerate(alone):
        ops.linf_prox_(
            *own, counts([1], device), alpha=lengths(alphas[n : n + 1], device), **settings
        )
        torch.testing.assert_close(own[0][0], tensors[0][n], rtol=0, atol=1e-7)


# --- what is special


@BOTH
def test_by_hand(module: object, device: torch.device) -> None:
    """d = 1, -2, 4 with H = 1, 1, 2: the excess is 2 (4 - t) from 2 on, then 10 - 3 t to 1."""
    for alpha, t in ((1.0, 3.5), (4.0, 2.0), (7.0, 1.0), (5.5, 1.5), (11.0, 0.0), (50.0, 0.0)):
        images = torch.tensor([[1.0, -2.0, 4.0]], device=device)
        metric = torch.tensor([[1.0, 1.0, 2.0]], device=device)
        zeros = torch.zeros_like(images)
        expected = images.clamp(-t, t)
        moved = module.linf_prox_(
            images,
            zeros,
            zeros,
            metric,
            counts([1], device),
            alpha=lengths([alpha], device),
            lower=None,
            upper=None,
        )
        assert moved.tolist() == [True]
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_bounds_cut_off_counts_in_full(module: object, device, dtype) -> None:
    """A pixel that is free to 3 and cut off at 1 has an excess of 3 - t below, none above.

    So for any excess up to 2 the bound is t.
    """
    for alpha, t in ((0.5, 1.0), (1.99, 1.0), (2.5, 0.5), (3.5, 0.0)):
        images = torch.tensor([[1.0, 0.0]], dtype=dtype, device=device)
        zeros = torch.zeros_like(images)
        gradient = torch.tensor([[2 / alpha, 0.0]], dtype=dtype, device=device)
        metric = torch.ones_like(images, dtype=torch.promote_types(dtype, torch.float32))
        module.linf_prox_(
            images,
            zeros,
            gradient,
            metric,
            counts([1], device),
            alpha=lengths([alpha], device),
            lower=0.0,
            upper=1.0,
        )
        close = 0.02 if dtype.itemsize == 2 else 1e-6
        assert images.tolist()[0] == pytest.approx([t, 0.0], abs=close)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_weight_it_is_a_step_of_gradient_descent(module, device, dtype) -> None:
    images, origin, gradient, metric = case((2, 3, 9, 17), 7, dtype, device)
    exact = [t.to(metric.dtype) for t in (images, origin, gradient)]
    d = exact[0] - exact[1] + images.new_tensor(0.05, dtype=metric.dtype) * exact[2] / metric
    expected = (exact[1] + d.clamp(0 - exact[1], 1 - exact[1])).clamp(0, 1).to(dtype)
    moved = module.linf_prox_(
        *(images, origin, gradient, metric, counts([1, 1], device)),
        alpha=0.05,
        weight=0.0,
        lower=0.0,
        upper=1.0,
    )
    assert moved.tolist() == [True, True]
    assert same_bits(images, expected)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_useless_gradients_leave_the_image(module, device, dtype) -> None:
    images, origin, gradient, metric = case((6, 3, 9, 17), 1, dtype, device)
    images[0], gradient[0] = origin[0], 0
    gradient[1, 1, 3, 4] = NAN
    gradient[2, 1, 3, 4] = INF
    gradient[3, 2, 8, 16] = -INF
    gradient[4, 0, 0, 0], gradient[4, 2, 8, 16] = INF, NAN
    images[:, 0, 0, 1] = 5  # out of bounds: must stay too
    images[0] = origin[0]
    before = bits(images)
    moved = module.linf_prox_(
        images,
        origin,
        gradient,
        metric,
        counts([1] * 6, device),
        alpha=lengths([0.01] * 6, device),
        lower=0.0,
        upper=1.0,
    )
    assert moved.tolist() == [False] * 5 + [True]
    assert torch.equal(bits(images)[:5], before[:5])
    assert not torch.equal(bits(images)[5], before[5])


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_images_are_not_touched(device, dtype, layout: str) -> None:
    tensors = case((4, 3, 9, 17), 0, dtype, device)
    tensors[0][0, 0, 0, :3] = torch.tensor([NAN, INF, 7.0])
    tensors[2][2, 1, 1, 1] = NAN
    tensors = [lay_out(t, layout) for t in tensors]
    before = bits(tensors[0])
    moved = ops.linf_prox_(
        *tensors,
        counts([0, 4, -1, 1], device),
        alpha=lengths([0.01] * 4, device),
        lower=0.2,
        upper=0.8,
    )
    assert moved.tolist() == [False, True, False, True]
    for n, is_moved in enumerate(moved.tolist()):
        assert torch.equal(bits(tensors[0])[n], before[n]) != is_moved


@BOTH
def test_tiny_and_huge_perturbations(module, device) -> None:
    for dtype, scales in (
        (torch.float32, (1e-44, 1e-30, 1e-10, 1e10, 1e30)),
        (torch.float64, (5e-324, 1e-290, 1e-20, 1e20, 1e290)),
    ):
        for scale in scales:
            images = torch.tensor([[1.0, -2.0, 4.0]], dtype=dtype, device=device) * scale
            zeros, ones = torch.zeros_like(images), torch.ones_like(images)
            expected = images.clamp(-3 * scale, 3 * scale)
            module.linf_prox_(
                images,
                zeros,
                zeros,
                ones,
                counts([1], device),
                alpha=lengths([scale], device),
                lower=None,
                upper=None,
            )
            close = 1e-6 * scale if scale > 1e-29 else 4 * scale  # too small for a search
            torch.testing.assert_close(images, expected, rtol=0, atol=close)


def test_metrics_of_any_size(device: torch.device) -> None:
    """One pixel of the largest perturbation has nearly no weight in the metric."""
    images = torch.full((1, 3, 20, 30), 0.25, device=device)
    images[0, 1, 3, 4] = 0.75
    metric = torch.full_like(images, 1e20)
    metric[0, 1, 3, 4] = 1e-8
    zeros = torch.zeros_like(images)
    check([images, zeros, zeros.clone(), metric], [0.001], lower=0.0, upper=1.0)
    assert float(images.max()) == pytest.approx(0.25)


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5), (0,), (2, 0)])
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    images = torch.zeros(shape, device=device)
    moved = ops.linf_prox_(
        images,
        images.clone(),
        images.clone(),
        images.clone(),
        counts([1] * shape[0], device),
        alpha=lengths([0.1] * shape[0], device),
        lower=None,
        upper=None,
    )
    assert moved.tolist() == [False] * shape[0]


numbers = st.floats(-1, 1, width=32)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(numbers, numbers, st.floats(0.0009765625, 8, width=32)), min_size=1, max_size=12
    ),
    st.floats(0.0009765625, 8),
)
@example([(0.5, 0.0, 1.0)] * 5, 1.0)
def test_no_other_perturbation_is_better(pixels: list[tuple[float, float, float]], alpha: float):
    """The sentence that defines it, with perturbations that are a little smaller and larger."""
    x, g, h = torch.tensor(pixels, dtype=torch.float64).T[:, None].contiguous()
    d = x + alpha * g / h

    def value(p: Tensor) -> float:
        return alpha * float(p.abs().max()) + float((h * (p - d).square()).sum()) / 2

    images = x.clone().clamp(-1, 1)
    zeros = torch.zeros_like(images)
    moved = ops.linf_prox_(
        images, zeros, g, h, counts([1]), alpha=lengths([alpha]), lower=-1.0, upper=1.0
    )
    assert bool(moved) == bool((d != 0).any())
    best, size = value(images), float(images.abs().max())
    for t in (0.0, 0.5 * size, size - 1e-4, size + 1e-4, size + 0.1):
        other = d.clamp(-1, 1).clamp(-max(t, 0), max(t, 0))
        assert best <= value(other) + 1e-9


# --- arguments


@BOTH
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": torch.zeros(2, 3, dtype=torch.int32)}, "images must be float16, .* got int32"),
        ({"images": torch.zeros(())}, "images must have a batch dimension, got a scalar"),
        ({"images": torch.zeros(1, 3).expand(2, 3)}, "images must not be an expanded tensor"),
        ({"origin": torch.zeros(2, 4)}, r"origin must have shape \(2, 3\) .* got \(2, 4\)"),
        ({"gradient": torch.zeros(2, 3).double()}, "gradient must be float32, got float64"),
        ({"metric": torch.ones(2, 3).half()}, "metric must be float32, got float16"),
        ({"active": torch.ones(2)}, "active must be int32, got float32"),
        ({"alpha": torch.ones(2)}, "alpha must be float64, got float32"),
        ({"alpha": torch.ones(3).double()}, r"alpha must have shape \(2,\)"),
        ({"alpha": 0.0}, "alpha must be a finite number above 0, got 0.0"),
        ({"epsilon": 0.0}, "epsilon must be a number above 0, got 0.0"),
        ({"epsilon": torch.ones(2)}, "epsilon must be float64, got float32"),
        ({"weight": -1.0}, "weight must be a finite number of at least 0, got -1.0"),
        ({"lower": 1.0, "upper": 0.0}, "lower must be below upper, got 1.0 and 0.0"),
    ],
)
def test_what_is_wrong_is_named(module: object, change: dict, told: str) -> None:
    arguments = {
        "images": torch.zeros(2, 3),
        "origin": torch.zeros(2, 3),
        "gradient": torch.zeros(2, 3),
        "metric": torch.ones(2, 3),
        "active": counts([1, 1]),
        "alpha": lengths([0.1, 0.1]),
        "weight": 1.0,
        "lower": None,
        "upper": None,
    } | change
    with pytest.raises((TypeError, ValueError), match=told):
        module.linf_prox_(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("origin", torch.zeros(2, 4), "origin must have the shape of images"),
        ("gradient", torch.zeros(2, 3).double(), "gradient must have the dtype of images"),
        ("metric", torch.ones(2, 3).double(), "metric must be float32"),
        ("active", counts([1]), r"active must be int32 of shape \(2\), got \(1\)"),
        ("alpha", torch.ones(2), r"alpha must be contiguous float64 of shape \(2\)"),
        ("epsilon", lengths([1.0]), r"epsilon must be contiguous float64 of shape \(2\)"),
        ("images", torch.zeros(1, 3).expand(2, 3), "images must not be an expanded tensor"),
    ],
)
def test_the_kernels_check_too(cpu_or_cuda_on_host: None, name: str, value, told: str) -> None:
    tensors = {
        "images": torch.zeros(2, 3),
        "origin": torch.zeros(2, 3),
        "gradient": torch.zeros(2, 3),
        "metric": torch.ones(2, 3),
        "active": counts([1, 1]),
        "alpha": lengths([0.1, 0.1]),
        "epsilon": lengths([0.1, 0.1]),
    } | {name: value}
    with pytest.raises(RuntimeError, match=told):
        torch.ops.dagcore.linf_prox_(*tensors.values(), 1.0, -INF, INF)


def test_autograd_is_told_of_the_write() -> None:
    tensors = case((2, 3, 5, 5), 0, torch.float32)
    version = tensors[0]._version
    ops.linf_prox_(*tensors, counts([1, 1]), alpha=lengths([0.1, 0.1]), lower=None, upper=None)
    assert tensors[0]._version > version

from __future__ import annotations

import functools
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from bilinear_oracle import (
    KINDS,
    SIZES,
    WHOLE,
    capacity,
    close_calls,
    enlarged,
    label_maps,
    score_maps,
    unpruned,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DTYPES,
    LABEL_DTYPES,
    LAYOUTS,
    MODES,
    SIMD_LEVELS,
    arguments,
    bits,
    crop,
    lay_out,
    lay_out_labels,
    random_case,
)
from torch import Tensor

from dagcore import ops, reference
from dagcore.ops import native

GOALS = ("leave", "reach")
NAN, INF = math.nan, math.inf
BOTH = pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
CORNERS = pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
# Of a sum of weights, relative to the largest that there can be.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def beyond_rounding(
    seed: Tensor, sums: Tensor, size: tuple[int, ...], align_corners: bool
) -> Tensor:
    """How much of a seed's distance to float64 sums neither summing nor one rounding explains."""
    largest = capacity(tuple(seed.shape[2:]), tuple(size), align_corners)
    slack = ROUNDING[seed.dtype] * largest + 0.51 * torch.finfo(seed.dtype).eps * sums.abs()
    return ((seed.cpu().double() - sums).abs() - slack).clamp(min=0)


def assert_seed(
    got: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    scores: Tensor,
    size: tuple[int, ...],
    align_corners: bool,
) -> None:
    seed, active = got
    assert seed.dtype == scores.dtype
    assert seed.shape == scores.shape
    assert seed.stride() == torch.empty_like(scores).stride()
    assert active.dtype == torch.int32
    assert active.device == seed.device == scores.device
    assert torch.equal(active.cpu(), expected[1])
    assert not bool(beyond_rounding(seed, expected[0], size, align_corners).any())


def moved(device: torch.device, *values: Tensor | str) -> list[Tensor | str]:
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


# --- against interpolate + loss + autograd in float64


def in_band(high: Tensor, labels: Tensor, mode: str, width: float) -> Tensor:
    """Pixels where rounding can change the winner, or with "runner-up" the strongest other."""
    ranked = [high]
    if mode == "runner-up":
        label = torch.where(labels == 255, 0, labels).long().unsqueeze(1)
        ranked.append(high.scatter(1, label, -INF))
    band = torch.zeros(labels.shape, dtype=torch.bool)
    if high.shape[1] == 1:
        return band
    for values in ranked:
        first, second = values.topk(2, dim=1).values.unbind(1)
        band |= first - second <= width
    return band & (labels != 255)


@functools.cache
def against_float64(
    name: str, mode: str, kind: str, dtype: torch.dtype, align_corners: bool
) -> tuple[Tensor, ...]:
    """Scores, labels, adversarial labels; the float64 seed and counts; the boundary band."""
    batch, low, size = SIZES.get(name, ((1, 21), (33, 41), (513, 641)))
    scores = score_maps((*batch, *low), len(name), kind, dtype)
    labels, adversarial = label_maps(scores, size, align_corners, len(name))
    other, goal = arguments(mode, adversarial)
    expected = reference.dag_seed_bilinear(
        scores.double(), labels, other, goal=goal, align_corners=align_corners
    )
    width = 8 * torch.finfo(reference.norm_dtype(scores)).eps * float(scores.abs().max())
    high = reference.enlarge(scores.double(), size, align_corners)
    return scores, labels, adversarial, *expected, in_band(high, labels, mode, width)


def assert_near_float64(
    kernels: torch.device,
    name: str,
    mode: str,
    kind: str,
    dtype: torch.dtype,
    align_corners: bool,
) -> tuple[int, int]:
    scores, labels, adversarial, sums, active, band = against_float64(
        name, mode, kind, dtype, align_corners
    )
    scores, labels, other = moved(kernels, scores, labels, arguments(mode, adversarial)[0])
    got, count = ops.dag_seed_bilinear(
        scores, labels, other, goal=arguments(mode, adversarial)[1], align_corners=align_corners
    )
    flips = band.flatten(1).sum(1)
    assert bool(((count.cpu() - active).abs() <= flips).all())
    # A pixel moves at most four weights of 1 in all when its verdict changes.
    excess = beyond_rounding(got, sums, tuple(labels.shape[1:]), align_corners)
    assert bool((excess.flatten(1).sum(1) <= 4 * flips).all())
    return int(flips.sum()), band.numel()


@CORNERS
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64_reference_but_for_the_boundary_band(
    kernels: torch.device, dtype: torch.dtype, mode: str, align_corners: bool
) -> None:
    flips = pixels = without = 0
    for k, name in enumerate(SIZES):
        kind = KINDS[(k // 2 + MODES.index(mode) + align_corners) % 2]  # in turns
        band, count = assert_near_float64(kernels, name, mode, kind, dtype, align_corners)
        flips, pixels, without = flips + band, pixels + count, without + (band == 0)
    assert flips < 0.01 * pixels
    assert without >= len(SIZES) / 2  # there the comparison is tight


@pytest.mark.parametrize(
    ("kind", "mode", "dtype", "align_corners"),
    [
        ("smooth", "leave", torch.float32, False),
        ("random", "reach", torch.float32, False),
        ("smooth", "runner-up", torch.bfloat16, True),
    ],
    ids=str,
)
def test_ragged_enlargement(
    kernels: torch.device, kind: str, mode: str, dtype: torch.dtype, align_corners: bool
) -> None:
    flips, pixels = assert_near_float64(kernels, "513x641", mode, kind, dtype, align_corners)
    assert flips < 0.001 * pixels


def test_cases_have_active_and_inactive_pixels() -> None:
    for name, mode in itertools.product(("8", "fractional", "513x641"), MODES):
        *_, active, band = against_float64(name, mode, "smooth", torch.float32, False)
        pixels = band[0].numel()
        assert bool(((active > pixels / 10) & (active < pixels * 9 / 10)).all())


# --- against the same arithmetic without pruning


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_unpruned_evaluation(
    kernels: torch.device, dtype: torch.dtype, layout: str, mode: str
) -> None:
    for k in range(len(SIZES)):
        align_corners = (k + MODES.index(mode) + LAYOUTS.index(layout)) % 2 == 1  # in turns
        values, labels, adversarial, *expected = prepared(
            k, dtype, mode, align_corners, layout == "expanded"
        )
        scores = lay_out(values.to(kernels), layout)
        other, goal = arguments(mode, adversarial)
        on_device, other = moved(kernels, labels, other)
        got = ops.dag_seed_bilinear(
            scores, on_device, other, goal=goal, align_corners=align_corners
        )
        assert_seed(got, expected, scores, labels.shape[1:], align_corners)
        assert torch.equal(bits(scores).cpu(), bits(values)), "scores were written to"


@functools.cache
def prepared(
    k: int, dtype: torch.dtype, mode: str, align_corners: bool, expanded: bool
) -> tuple[Tensor, ...]:
    """Scores, labels, adversarial labels; the unpruned seed's sums and counts."""
    batch, low, size = list(SIZES.values())[k]
    scores = score_maps((*batch, *low), k, KINDS[k % 2], dtype)
    if expanded:
        scores = lay_out(scores, "expanded").contiguous()
    labels, adversarial = label_maps(scores, size, align_corners, k)
    other, goal = arguments(mode, adversarial)
    expected = unpruned(scores, labels, other, goal, align_corners)
    return scores, labels, adversarial, *expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_factors_are_exact(
    kernels: torch.device, name: str, dtype: torch.dtype, mode: str, kind: str
) -> None:
    """Weights are multiples of a power of two, so that no order of summing can round."""
    batch, low, size = SIZES[name]
    scores = score_maps((*batch, *low), 3, kind, dtype)
    labels, adversarial = label_maps(scores, size, False, 3)
    other, goal = arguments(mode, adversarial)
    sums, active = unpruned(scores, labels, other, goal, False)
    on_device, labels, other = moved(kernels, scores, labels, other)
    got = ops.dag_seed_bilinear(on_device, labels, other, goal=goal)
    assert torch.equal(got[0].cpu(), sums.to(dtype))
    assert torch.equal(got[1].cpu(), active)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", close_calls((1, 2, 1, 1), torch.float32))
def test_pruning_is_exact_where_classes_are_close(
    kernels: torch.device, name: str, dtype: torch.dtype
) -> None:
    """The runner-up, seen in the seed: every label is the winner, so that every pixel is active."""
    for num_classes, low, size, align_corners in (
        (2, (3, 2), (24, 16), False),
        (7, (5, 6), (40, 48), False),
        (40, (3, 9), (100, 40), True),
        (7, (9, 17), (5, 17), True),
    ):
        scores = close_calls((2, num_classes, *low), dtype)[name]
        labels = enlarged(scores, size, align_corners).argmax(1)
        expected = unpruned(scores, labels, "runner-up", "leave", align_corners)
        on_device = scores.to(kernels)
        got = ops.dag_seed_bilinear(
            on_device, labels.to(kernels), "runner-up", align_corners=align_corners
        )
        assert got[1].tolist() == [size[0] * size[1]] * 2
        assert_seed(got, expected, on_device, size, align_corners)


@CORNERS
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_scores(
    kernels: torch.device, dtype: torch.dtype, mode: str, align_corners: bool
) -> None:
    for k, (batch, low, size) in enumerate(SIZES.values()):
        broken = (0.01, 0.3, 1.0)[k % 3]
        scores, *_ = random_case((*batch, *low), k, dtype=dtype, broken=broken)
        labels, adversarial = label_maps(scores, size, align_corners, k)
        other, goal = arguments(mode, adversarial)
        expected = unpruned(scores, labels, other, goal, align_corners)
        on_device, labels, other = moved(kernels, scores, labels, other)
        got = ops.dag_seed_bilinear(
            on_device, labels, other, goal=goal, align_corners=align_corners
        )
        assert_seed(got, expected, on_device, size, align_corners)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*WHOLE, "one row", "one by one"])
def test_equals_reference_where_nothing_rounds(kernels: torch.device, name: str, mode: str) -> None:
    """Scores in quarters at a whole factor: even ties are interpolate's."""
    scores, labels, adversarial = in_quarters(name, None)
    other, goal = arguments(mode, adversarial)
    expected = reference.dag_seed_bilinear(scores, labels, other, goal=goal)
    on_device, labels, other = moved(kernels, scores, labels, other)
    got = ops.dag_seed_bilinear(on_device, labels, other, goal=goal)
    assert torch.equal(got[1].cpu(), expected[1])
    assert torch.equal(got[0].cpu(), expected[0])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("factor", ["one", "larger"])
def test_not_finite_scores_spread_as_in_interpolate(
    device: torch.device, factor: str, value: float
) -> None:
    """Also at the map's edges, and at the size of the scores, where interpolate copies."""
    names = ("1",) if factor == "one" else (*WHOLE[1:], "one row", "one by one")
    for name, mode in itertools.product(names, MODES):
        scores, labels, adversarial = in_quarters(name, value)
        other, goal = arguments(mode, adversarial)
        expected = reference.dag_seed_bilinear(scores, labels, other, goal=goal)
        scores, labels, other = moved(device, scores, labels, other)
        got = ops.dag_seed_bilinear(scores, labels, other, goal=goal)
        assert torch.equal(got[1].cpu(), expected[1])
        assert torch.equal(got[0].cpu(), expected[0])


def in_quarters(name: str, value: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores that blend exactly, some of them replaced by `value`; labels for them."""
    batch, low, size = SIZES[name]
    size = (16 * low[0], 8 * low[1]) if name.startswith("one") else size
    scores, *_ = random_case((*batch, *low), 1)
    labels, adversarial = label_maps(scores, size, False, 1)
    if value is not None:
        scores[0, 1 % batch[1], low[0] // 2, low[1] // 2] = value
        scores[-1, 0, -1, -1] = value
        scores[-1, -1, 0, 0] = value
    return scores, labels, adversarial


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_size(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(*limits)) for limits in ((1, 2), (1, 9), (1, 9), (1, 9)))
    size = data.draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
    dtype, mode = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(MODES))
    align_corners = data.draw(st.booleans())
    seed = data.draw(st.integers(0, 2**31))
    if data.draw(st.booleans()):
        scores, *_ = random_case(shape, seed, dtype=dtype)  # with many ties
    else:
        scores = score_maps(shape, seed, "random", dtype)
    labels, adversarial = label_maps(scores, size, align_corners, seed)
    other, goal = arguments(mode, adversarial)
    expected = unpruned(scores, labels, other, goal, align_corners)
    got = ops.dag_seed_bilinear(scores, labels, other, goal=goal, align_corners=align_corners)
    assert_seed(got, expected, scores, size, align_corners)


# --- labels


@pytest.mark.parametrize("label_layout", LAYOUTS)
@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
@pytest.mark.parametrize("adversarial_dtype", LABEL_DTYPES, ids=str)
def test_label_dtypes_and_layouts(
    kernels: torch.device,
    label_dtype: torch.dtype,
    adversarial_dtype: torch.dtype,
    label_layout: str,
) -> None:
    for goal, size, dtype in (
        ("leave", (33, 29), torch.float32),
        ("reach", (40, 48), torch.float64),
    ):
        scores = score_maps((2, 21, 5, 6), 0, "random", dtype)
        maps = label_maps(scores, size, False, 0)
        labels, adversarial = (lay_out_labels(m, label_layout) for m in maps)  # may repeat one
        expected = unpruned(scores, labels, adversarial, goal, False)
        on_device = scores.to(kernels)
        labels = lay_out_labels(labels.to(label_dtype).to(kernels), label_layout)
        adversarial = adversarial.to(adversarial_dtype).to(kernels)
        for other_layout in (label_layout, "contiguous"):
            other = lay_out_labels(adversarial, other_layout)
            got = ops.dag_seed_bilinear(on_device, labels, other, goal=goal)
            assert_seed(got, expected, on_device, size, False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ignore_index", [255, -1, -100, 2])
def test_ignore_index(kernels: torch.device, ignore_index: int, mode: str) -> None:
    scores = score_maps((2, 5, 4, 6), 0, "random")
    labels, adversarial = label_maps(scores, (31, 50), False, 0, ignore_index)
    other, goal = arguments(mode, adversarial)
    expected = unpruned(scores, labels, other, goal, False, ignore_index)
    on_device, labels, other = moved(kernels, scores, labels, other)
    got = ops.dag_seed_bilinear(on_device, labels, other, goal=goal, ignore_index=ignore_index)
    assert_seed(got, expected, on_device, (31, 50), False)


@BOTH
@pytest.mark.parametrize("mode", MODES)
def test_all_ignored(module: object, device: torch.device, mode: str) -> None:
    scores = score_maps((2, 5, 4, 6), 0, "random").to(device)
    for ignore_index in (255, -1, 2):
        labels = torch.full((2, 31, 50), ignore_index, device=device)
        other, goal = arguments(mode, torch.full_like(labels, 9999))  # not read
        seed, active = module.dag_seed_bilinear(
            scores, labels, other, goal=goal, ignore_index=ignore_index
        )
        assert active.tolist() == [0, 0]
        assert torch.equal(seed, torch.zeros_like(scores))


@BOTH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 8, 9)])
def test_empty(module: object, device: torch.device, shape: tuple[int, ...], mode: str) -> None:
    scores = torch.ones(shape[0], 3, 4, 5, device=device)
    labels = torch.zeros(shape, dtype=torch.int64, device=device)
    other, goal = arguments(mode, labels)
    seed, active = module.dag_seed_bilinear(scores, labels, other, goal=goal)
    assert torch.equal(seed, torch.zeros_like(scores))
    assert active.dtype == torch.int32
    assert active.tolist() == [0] * shape[0]


# --- by hand


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(module: object, kernels: torch.device, dtype: torch.dtype) -> None:
    # Two pixels enlarged to four: read at 0, 1/4, 3/4 and 1. Class 0: 4 3 1 0, class 1: 3 2.5 1.5 1
    # and class 2: 2 2 2 2, so that the winners are 0 0 2 2.
    scores = torch.tensor([[4.0, 0], [3, 1], [2, 2]], dtype=dtype, device=kernels)[None, :, None]
    labels = torch.tensor([[[0, 0, 0, 2]]], device=kernels)
    adversarial = torch.tensor([[[1, 2, 1, 2]]], device=kernels)

    def seeds(other: Tensor | str, **options: object) -> tuple[list[list[float]], int]:
        seed, active = module.dag_seed_bilinear(scores, labels, other, **options)
        return seed[0, :, 0].tolist(), int(active)

    # Active: 0 -> 1 at weights (1, 0), 0 -> 2 at (3/4, 1/4).
    assert seeds(adversarial) == ([[-1.75, -0.25], [1, 0], [0.75, 0.25]], 2)
    # The winner is not the adversarial label at the first three: 1 - 0, 2 - 0, 1 - 2 at (1/4, 3/4).
    expected = [[-1.75, -0.25], [1.25, 0.75], [0.5, -0.5]]
    assert seeds(adversarial, goal="reach") == (expected, 3)
    # Runner-up: class 1 at the first two pixels and at the last.
    expected = [[-1.75, -0.25], [1.75, 1.25], [0, -1]]
    assert seeds("runner-up") == (expected, 3)
    # Read at 0, 1/3, 2/3 and 1; only the ends count.
    labels[0, 0, 1:3] = 255
    assert seeds("runner-up", align_corners=True) == ([[-1, 0], [1, 1], [0, -1]], 2)


@BOTH
@pytest.mark.parametrize("goal", GOALS)
def test_pixels_that_read_a_nan_are_active(
    module: object, kernels: torch.device, goal: str
) -> None:
    scores = torch.zeros(1, 3, 6, 6, device=kernels)
    scores[:, 2] = 9
    labels = torch.zeros(1, 24, 24, dtype=torch.int64, device=kernels)  # left, and 2 is reached
    for where in range(3):
        broken = scores.clone()
        broken[0, where, 2, 3] = NAN
        _, active = module.dag_seed_bilinear(broken, labels, labels + 2, goal=goal)
        assert active.tolist() == [8 * 8]


@pytest.mark.parametrize("size", [(4, 4), (32, 32), (33, 29)], ids=str)
def test_class_that_is_masked_with_minus_infinity(
    device: torch.device, size: tuple[int, int]
) -> None:
    """An enlarged -inf is -inf or, as interpolate does it, 0 * -inf = NaN; no pixel more is NaN."""
    scores = torch.zeros(1, 3, 4, 4, device=device)
    scores[:, 0] = -INF
    scores[:, 2] = 9
    labels = torch.ones(1, *size, dtype=torch.int64, device=device)
    active = [
        int(module.dag_seed_bilinear(scores, labels, labels + 1)[1]) for module in (ops, reference)
    ]
    assert active[0] == active[1]


@BOTH
def test_seed_at_the_size_of_the_scores_is_dag_seeds(module: object, kernels: torch.device) -> None:
    scores, labels, adversarial = moved(kernels, *random_case((2, 21, 9, 13), 0))
    for mode, align_corners in itertools.product(MODES, (False, True)):
        other, goal = arguments(mode, adversarial)
        got = module.dag_seed_bilinear(
            scores, labels, other, goal=goal, align_corners=align_corners
        )
        for value, expected in zip(
            got, ops.dag_seed(scores, labels, other, goal=goal), strict=True
        ):
            assert torch.equal(value, expected)


# --- autograd's state, bits


def test_scores_that_require_grad(device: torch.device) -> None:
    scores = score_maps((2, 5, 4, 6), 0, "random")
    labels, adversarial = label_maps(scores, (31, 50), False, 0)
    expected = unpruned(scores, labels, adversarial, "leave", False)
    leaf, labels, adversarial = moved(device, scores, labels, adversarial)
    leaf = leaf.clone().requires_grad_()
    seed, active = ops.dag_seed_bilinear(leaf, labels, adversarial)
    assert not seed.requires_grad
    assert_seed((seed, active), expected, leaf, (31, 50), False)
    (leaf * 2).backward(seed)
    assert torch.equal(leaf.grad, 2 * seed)


@BOTH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(module: object, device: torch.device, mode: type) -> None:
    scores = score_maps((2, 5, 4, 6), 0, "random")
    labels, adversarial = label_maps(scores, (31, 50), False, 0)
    expected = unpruned(scores, labels, adversarial, "leave", False)
    scores, labels, adversarial = moved(device, scores, labels, adversarial)
    with mode():
        got = module.dag_seed_bilinear(scores.clone(), labels, adversarial)
    assert_seed(got, expected, scores, (31, 50), False)


def test_views_with_pending_negation() -> None:
    scores = score_maps((2, 5, 4, 6), 0, "random")
    labels, adversarial = label_maps(-scores, (31, 50), False, 0)
    got = ops.dag_seed_bilinear(torch._neg_view(scores), labels, adversarial)
    expected = unpruned(-scores, labels, adversarial, "leave", False)
    assert_seed(got, expected, scores, (31, 50), False)


@pytest.fixture
def simd_levels() -> Iterator[tuple[str, ...]]:
    """The SIMD levels that this processor has."""
    before = native.module.simd_in_use()
    yield SIMD_LEVELS[: 1 + SIMD_LEVELS.index(native.module.simd_supported())]
    native.module.use_simd(before)


@CORNERS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simd_level_and_thread_count_change_no_bit(
    simd_levels: tuple[str, ...],
    one_and_two_threads: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    align_corners: bool,
) -> None:
    scores = score_maps((2, 13, 37, 19), 0, kind, dtype)
    size = (211, 173)
    labels, adversarial = label_maps(scores, size, align_corners, 0)
    for mode in MODES:
        other, goal = arguments(mode, adversarial)
        results = []
        for level, threads in itertools.product(simd_levels, one_and_two_threads):
            native.module.use_simd(level)
            torch.set_num_threads(threads)
            seed, active = ops.dag_seed_bilinear(
                scores, labels, other, goal=goal, align_corners=align_corners
            )
            results.append((bits(seed), active))
        for seed, active in results[1:]:
            assert torch.equal(seed, results[0][0])
            assert torch.equal(active, results[0][1])


def test_runs_on_cuda_repeat_to_the_bit(cuda: torch.device) -> None:
    scores = score_maps((2, 13, 37, 19), 0, "random")
    labels, adversarial = label_maps(scores, (511, 473), False, 0)
    given = moved(cuda, scores, labels, adversarial)
    first = ops.dag_seed_bilinear(*given)
    for _ in range(10):
        again = ops.dag_seed_bilinear(*given)
        assert torch.equal(bits(again[0]), bits(first[0]))
        assert torch.equal(again[1], first[1])


# --- memory

LITTLE_MEMORY = """
import resource, sys
import torch
from dagcore import ops, reference

num_classes, low, high, mebibytes = 150, 64, 4096, 512
rng = torch.Generator().manual_seed(0)
scores = torch.randn(1, num_classes, low, low, generator=rng)
labels = torch.randint(0, num_classes, (1, high, high), dtype=torch.uint8, generator=rng)
adversarial = (labels + 1) % num_classes
with open("/proc/self/statm") as file:
    in_use = int(file.read().split()[0]) * resource.getpagesize()
limit = in_use + mebibytes * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

winners = ops.argmax_bilinear(scores, (high, high))
won = winners.amax(), winners.amin()
del winners
for goal, other in (("leave", adversarial), ("reach", adversarial), ("leave", "runner-up")):
    seed, active = ops.dag_seed_bilinear(scores, labels, other, goal=goal)
    assert int(active) > 0 and bool(seed.any())
try:  # the limit does hold
    reference.enlarge(scores, (high, high), False)
except RuntimeError as error:
    assert "memory" in str(error), error
    print("enlarging does not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_nothing_of_the_enlarged_size_is_allocated() -> None:
    """150 x 4096 x 4096 scores would take 9.4 GiB; half a GiB is enough for all else."""
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "enlarging does not fit"


def test_no_cuda_memory_of_the_enlarged_size(cuda: torch.device) -> None:
    scores = torch.randn(1, 150, 64, 64, device=cuda)
    labels = torch.zeros(1, 2048, 2048, dtype=torch.uint8, device=cuda)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.dag_seed_bilinear(scores, labels, labels + 1)
    ops.argmax_bilinear(scores, (2048, 2048))
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20  # enlarged: 2400 MiB


# --- labels out of range


def spoiled(name: str, value: int, device: torch.device) -> dict[str, Tensor]:
    given = {"labels": torch.zeros(2, 11, 50), "adversarial_labels": torch.ones(2, 11, 50)}
    given = {k: v.to(torch.int64).to(device) for k, v in given.items()}
    given[name][1, 2, 41] = value
    return given


@BOTH
@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("value", [4, 300, -1, 2**40, 2**32, -(2**40)])
@pytest.mark.parametrize("name", ["labels", "adversarial_labels"])
def test_label_out_of_range_on_the_cpu(module: object, name: str, value: int, goal: str) -> None:
    given = spoiled(name, value, torch.device("cpu"))
    message = (
        rf"^{name} must lie in \[0, 4\) or equal ignore_index=255, got {value} at \(1, 2, 41\)"
    )
    for dtype in DTYPES:
        with pytest.raises(ValueError, match=message):
            module.dag_seed_bilinear(torch.zeros(2, 4, 3, 5, dtype=dtype), **given, goal=goal)


@BOTH
def test_label_out_of_range_beside_the_runner_up(module: object) -> None:
    given = spoiled("labels", 7, torch.device("cpu"))["labels"]
    with pytest.raises(ValueError, match=r"^labels must lie in \[0, 4\).* got 7 at \(1, 2, 41\)"):
        module.dag_seed_bilinear(torch.zeros(2, 4, 3, 5), given, "runner-up")


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("name", ["labels", "adversarial_labels"])
def test_label_out_of_range_makes_the_ops_count_negative(
    device: torch.device, name: str, goal: str
) -> None:
    """What CUDA users see, and what the wrapper builds its message on."""
    scores = torch.zeros(2, 4, 3, 5, device=device)
    scores[:, 2] = 1  # every target of goal "reach" is active, so that the count is large
    given = spoiled(name, 4, device)
    seed, active = torch.ops.dagcore.dag_seed_bilinear(
        scores, given["labels"], given["adversarial_labels"], goal, 255, False
    )
    assert int(active[0]) == (550 if goal == "reach" else 0)
    assert int(active[1]) < 0
    counted = 549 if goal == "reach" else 0  # the bad one is left out of the seed
    assert float(seed[1].abs().sum()) == pytest.approx(2 * counted)


# --- wrong arguments: what is replaced, the error, its message

S, L = torch.zeros(2, 4, 3, 5), torch.zeros(2, 6, 11, dtype=torch.int64)
WRONG = {
    "scores type": ({"scores": [[1.0]]}, TypeError, "scores must be a torch.Tensor, got list"),
    "scores dtype": (
        {"scores": S.long()},
        TypeError,
        "scores must be float16, bfloat16, float32 or float64, got int64",
    ),
    "scores dims": (
        {"scores": S[:, :, 0]},
        ValueError,
        r"scores must have shape \(N, C, h, w\).*got \(2, 4, 5\)",
    ),
    "scores a vector": ({"scores": S[0, 0, 0]}, ValueError, r"scores must have.*got \(5,\)"),
    "zero classes": ({"scores": S[:, :0]}, ValueError, r"scores must have.*got \(2, 0, 3, 5\)"),
    "no rows": ({"scores": S[:, :, :0]}, ValueError, r"scores must have.*got \(2, 4, 0, 5\)"),
    "no columns": ({"scores": S[..., :0]}, ValueError, r"scores must have.*got \(2, 4, 3, 0\)"),
    "labels type": ({"labels": None}, TypeError, "labels must be a torch.Tensor, got NoneType"),
    "labels dtype": (
        {"labels": L.float()},
        TypeError,
        "labels must be uint8, int32 or int64, got float32",
    ),
    "labels dims": (
        {"labels": L[0]},
        ValueError,
        r"labels must have shape \(2, H, W\) to match scores \(2, 4, 3, 5\), got \(6, 11\)",
    ),
    "labels batch": (
        {"labels": L[:1]},
        ValueError,
        r"labels must have shape \(2, H, W\).*got \(1, 6, 11\)",
    ),
    "labels device": (
        {"labels": L.to("meta")},
        ValueError,
        r"labels must be on the device of scores \(cpu\), got meta",
    ),
    "adversarial type": (
        {"adversarial_labels": 3},
        TypeError,
        "adversarial_labels must be a torch.Tensor, got int",
    ),
    "adversarial kind": (
        {"adversarial_labels": "strongest"},
        ValueError,
        "adversarial_labels must be a tensor or 'runner-up', got 'strongest'",
    ),
    "adversarial runner-up for reach": (
        {"adversarial_labels": "runner-up", "goal": "reach"},
        ValueError,
        "adversarial_labels must be a tensor for goal='reach', got 'runner-up'",
    ),
    "adversarial dtype": (
        {"adversarial_labels": L.double()},
        TypeError,
        "adversarial_labels must be uint8, int32 or int64, got float64",
    ),
    "adversarial shape": (
        {"adversarial_labels": L[..., :10]},
        ValueError,
        r"adversarial_labels must have shape \(2, 6, 11\) to match labels, got \(2, 6, 10\)",
    ),
    "goal": ({"goal": "flee"}, ValueError, "goal must be 'leave' or 'reach', got 'flee'"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
}


@BOTH
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(module: object, case: str) -> None:
    changed, error, message = WRONG[case]
    given = {"scores": S, "labels": L, "adversarial_labels": L, **changed}
    with pytest.raises(error, match=f"^{message}"):
        module.dag_seed_bilinear(**given)


@BOTH
def test_hyper_parameters_are_keyword_only(module: object) -> None:
    with pytest.raises(TypeError, match="positional"):
        module.dag_seed_bilinear(S, L, L, "leave")


PAST_THE_WRAPPER = {
    "scores dtype": ((S.int(), L, L, "leave"), "scores must be float16"),
    "scores dims": ((S[0], L, L, "leave"), "scores must have shape (N, C, h, w)"),
    "zero classes": ((S[:, :0], L, L, "leave"), "got (2, 0, 3, 5)"),
    "no rows": ((S[:, :, :0], L, L, "leave"), "got (2, 4, 0, 5)"),
    "labels dtype": ((S, L.short(), L, "leave"), "labels must be uint8, int32 or int64"),
    "labels dims": ((S, L[0], L[0], "leave"), "labels must have shape (2, H, W), got (6, 11)"),
    "labels batch": ((S, L[:1], L, "leave"), "labels must have shape (2, H, W), got (1, 6, 11)"),
    "adversarial dtype": ((S, L, L.double(), "leave"), "adversarial_labels must be uint8"),
    "adversarial dims": ((S, L, L[0], "leave"), "adversarial_labels must have shape"),
    "adversarial shape": ((S, L, L[:, :5], "leave"), "adversarial_labels must have shape"),
    "nothing to reach": ((S, L, None, "reach"), "adversarial_labels must be given"),
    "objective": ((S, L, L, "stay"), "objective must be one of leave, reach, got stay"),
}


@pytest.mark.parametrize("case", PAST_THE_WRAPPER)
def test_wrong_arguments_past_the_wrapper(device: torch.device, case: str) -> None:
    given, message = PAST_THE_WRAPPER[case]
    given = (a.to(device) if isinstance(a, Tensor) else a for a in given)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.dagcore.dag_seed_bilinear(*given, 255, False)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_mixed_devices_past_the_wrapper(which: int) -> None:
    given = [S, L, L]
    given[which] = given[which].to("meta")
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.dagcore.dag_seed_bilinear(*given, "leave", 255, False)


def test_weights_beyond_the_room_of_the_fixed_point(device: torch.device) -> None:
    """2^24 pixels read one low-resolution pixel; in units of 2^-40 CUDA has room for 2^23."""
    scores = torch.zeros(1, 2, 1, 1, device=device)
    labels = torch.zeros(1, 4096, 4096, dtype=torch.uint8, device=device)
    seed, active = ops.dag_seed_bilinear(scores, labels, labels + 1)
    assert seed.flatten().tolist() == [-(2.0**24), 2.0**24]
    assert active.tolist() == [2**24]


def test_garbage_between_the_scores_is_not_read(kernels: torch.device) -> None:
    """Rows that are cut out of a larger tensor of NaN, at every width next to a vector's."""
    for width in (1, 7, 8, 9, 15, 16, 17, 33):
        scores = score_maps((1, 3, 3, width), width, "random")
        labels, adversarial = label_maps(scores, (7, 2 * width + 1), False, width)
        expected = unpruned(scores, labels, adversarial, "leave", False)
        cut, labels, adversarial = (crop(t.to(kernels)) for t in (scores, labels, adversarial))
        got = ops.dag_seed_bilinear(cut, labels, adversarial)
        assert_seed(got, expected, cut, labels.shape[1:], False)

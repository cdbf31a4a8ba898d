"""What only `dag_seed_bilinear` does; see test_seed_ops.py."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys

import pytest
import torch
from bilinear_oracle import (
    KINDS,
    SIZES,
    WHOLE,
    assert_seed,
    beyond_rounding,
    close_calls,
    enlarged,
    label_maps,
    score_maps,
    unpruned,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    BOTH,
    DTYPES,
    GOALS,
    INF,
    MARGINS,
    MODES,
    NAN,
    arguments,
    bits,
    crop,
    on,
    random_case,
)
from torch import Tensor

from dagcore import ops, reference

pytestmark = pytest.mark.cuda_on_host

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
    device: torch.device,
    name: str,
    mode: str,
    kind: str,
    dtype: torch.dtype,
    align_corners: bool,
) -> tuple[int, int]:
    scores, labels, adversarial, sums, active, band = against_float64(
        name, mode, kind, dtype, align_corners
    )
    scores, labels, other = on(device, scores, labels, arguments(mode, adversarial)[0])
    got, count = ops.dag_seed_bilinear(
        scores, labels, other, goal=arguments(mode, adversarial)[1], align_corners=align_corners
    )
    flips = band.flatten(1).sum(1)
    assert bool(((count.cpu() - active).abs() <= flips).all())
    # A pixel moves at most four weights of 1 in all when its verdict changes.
    excess = beyond_rounding(got, sums, tuple(labels.shape[1:]), align_corners)
    assert bool((excess.flatten(1).sum(1) <= 4 * flips).all())
    return int(flips.sum()), band.numel()


@pytest.mark.cuda_on_host(False)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64_reference_but_for_the_boundary_band(
    device: torch.device, dtype: torch.dtype
) -> None:
    flips = pixels = without = 0
    for (k, name), (m, mode) in itertools.product(enumerate(SIZES), enumerate(MODES)):
        kind, align_corners = KINDS[(k // 2 + m) % 2], (k + m) % 2 == 1  # in turns
        band, count = assert_near_float64(device, name, mode, kind, dtype, align_corners)
        flips, pixels, without = flips + band, pixels + count, without + (band == 0)
    assert flips < 0.01 * pixels
    assert without >= len(SIZES) * len(MODES) / 2  # there the comparison is tight


@pytest.mark.cuda_on_host(False)
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
    device: torch.device, kind: str, mode: str, dtype: torch.dtype, align_corners: bool
) -> None:
    flips, pixels = assert_near_float64(device, "513x641", mode, kind, dtype, align_corners)
    assert flips < 0.001 * pixels


def test_cases_have_active_and_inactive_pixels() -> None:
    for name, mode in itertools.product(("8", "fractional", "513x641"), MODES):
        *_, active, band = against_float64(name, mode, "smooth", torch.float32, False)
        pixels = band[0].numel()
        assert bool(((active > pixels / 10) & (active < pixels * 9 / 10)).all())


# --- against the same arithmetic without pruning


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_whole_factors_are_exact(kernels: torch.device, dtype: torch.dtype) -> None:
    """Weights are multiples of a power of two, so that no order of summing can round."""
    for (k, name), (m, mode) in itertools.product(enumerate(WHOLE), enumerate(MODES)):
        batch, low, size = SIZES[name]
        scores = score_maps((*batch, *low), 3, KINDS[(k + m) % 2], dtype)
        labels, adversarial = label_maps(scores, size, False, 3)
        other, goal = arguments(mode, adversarial)
        margin = MARGINS[(k + m) % 3]
        sums, active = unpruned(scores, labels, other, goal, False, margin=margin)
        given = on(kernels, scores, labels, other)
        got = ops.dag_seed_bilinear(*given, goal=goal, margin=margin)
        assert torch.equal(got[0].cpu(), sums.to(dtype)), (name, mode)
        assert torch.equal(got[1].cpu(), active), (name, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("num_classes", "low", "size", "align_corners"),
    [
        (2, (3, 2), (24, 16), False),
        (7, (5, 6), (40, 48), False),
        (40, (3, 9), (100, 40), True),
        (7, (9, 17), (5, 17), True),
    ],
)
def test_pruning_is_exact_where_classes_are_close(
    kernels: torch.device,
    num_classes: int,
    low: tuple[int, int],
    size: tuple[int, int],
    align_corners: bool,
    dtype: torch.dtype,
) -> None:
    """The runner-up, seen in the seed: every label is the winner, so that every pixel is active."""
    for scores, labels, expected in close_calls_seeded(
        num_classes, low, size, align_corners, dtype
    ):
        on_device, labels = on(kernels, scores, labels)
        got = ops.dag_seed_bilinear(on_device, labels, "runner-up", align_corners=align_corners)
        assert got[1].tolist() == [size[0] * size[1]] * 2
        assert_seed(got, expected, on_device, size, align_corners)


@functools.cache
def close_calls_seeded(
    num_classes: int,
    low: tuple[int, int],
    size: tuple[int, int],
    align_corners: bool,
    dtype: torch.dtype,
) -> list[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Score maps, their winners as labels, and the unpruned seed that aims at the runners-up."""
    found = []
    for scores in close_calls((2, num_classes, *low), dtype).values():
        labels = enlarged(scores, size, align_corners).argmax(1)
        expected = unpruned(scores, labels, "runner-up", "leave", align_corners)
        found.append((scores, labels, expected))
    return found


def test_every_width_next_to_a_vectors(kernels: torch.device) -> None:
    """Whole maps, and maps that are cut out of a larger tensor of NaN."""
    for width in (1, 7, 8, 9, 15, 16, 17, 33):
        maps = score_maps((1, 3, 3, width), width, "random")
        labels, adversarial = label_maps(maps, (7, 2 * width + 1), False, width)
        expected = unpruned(maps, labels, adversarial, "leave", False)
        for lay in (Tensor.contiguous, crop):
            scores, *given = (lay(t.to(kernels)) for t in (maps, labels, adversarial))
            got = ops.dag_seed_bilinear(scores, *given)
            assert_seed(got, expected, scores, labels.shape[1:], False)


def test_equals_reference_where_nothing_rounds(kernels: torch.device) -> None:
    """Scores in quarters at a whole factor: even ties are interpolate's."""
    names = (*WHOLE, "one row", "one by one")
    for name, mode, margin in itertools.product(names, MODES, MARGINS[:2]):
        scores, labels, adversarial = in_quarters(name, None)
        other, goal = arguments(mode, adversarial)
        rule = {"goal": goal, "margin": margin}
        expected = reference.dag_seed_bilinear(scores, labels, other, **rule)
        got = ops.dag_seed_bilinear(*on(kernels, scores, labels, other), **rule)
        assert torch.equal(got[1].cpu(), expected[1]), (name, mode)
        assert torch.equal(got[0].cpu(), expected[0]), (name, mode)


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
        scores, labels, other = on(device, scores, labels, other)
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


@settings(max_examples=100)
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
    margin = data.draw(st.sampled_from((0.0, 1e-6, *MARGINS, 30.0)))
    expected = unpruned(scores, labels, other, goal, align_corners, margin=margin)
    rule = {"goal": goal, "margin": margin, "align_corners": align_corners}
    got = ops.dag_seed_bilinear(scores, labels, other, **rule)
    assert_seed(got, expected, scores, size, align_corners)


# --- by hand


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(module: object, device: torch.device, dtype: torch.dtype) -> None:
    # Two pixels enlarged to four: read at 0, 1/4, 3/4 and 1. Class 0: 4 3 1 0, class 1: 3 2.5 1.5 1
    # and class 2: 2 2 2 2, so that the winners are 0 0 2 2.
    scores = torch.tensor([[4.0, 0], [3, 1], [2, 2]], dtype=dtype, device=device)[None, :, None]
    labels = torch.tensor([[[0, 0, 0, 2]]], device=device)
    adversarial = torch.tensor([[[1, 2, 1, 2]]], device=device)

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
def test_pixels_that_read_a_nan_are_active(module: object, kernels: torch.device) -> None:
    scores = torch.zeros(1, 3, 6, 6, device=kernels)
    scores[:, 2] = 9
    labels = torch.zeros(1, 24, 24, dtype=torch.int64, device=kernels)  # left, and 2 is reached
    for where, goal in itertools.product(range(3), GOALS):
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
    scores, labels, adversarial = on(kernels, *random_case((2, 21, 9, 13), 0))
    for mode, align_corners in itertools.product(MODES, (False, True)):
        other, goal = arguments(mode, adversarial)
        got = module.dag_seed_bilinear(
            scores, labels, other, goal=goal, align_corners=align_corners
        )
        for value, expected in zip(
            got, ops.dag_seed(scores, labels, other, goal=goal), strict=True
        ):
            assert torch.equal(value, expected)


# --- the same again, and memory


def test_runs_on_cuda_repeat_to_the_bit(cuda: torch.device) -> None:
    scores = score_maps((2, 13, 37, 19), 0, "random")
    labels, adversarial = label_maps(scores, (511, 473), False, 0)
    given = on(cuda, scores, labels, adversarial)
    first = ops.dag_seed_bilinear(*given)
    for _ in range(10):
        again = ops.dag_seed_bilinear(*given)
        assert torch.equal(bits(again[0]), bits(first[0]))
        assert torch.equal(again[1], first[1])


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


# --- wrong arguments: what is replaced, and the message

S, L = torch.zeros(2, 4, 3, 5), torch.zeros(2, 6, 11, dtype=torch.int64)
WRONG = {
    "scores dims": ({"scores": S[:, :, 0]}, r"scores must have shape \(N, C, h, w\).*\(2, 4, 5\)"),
    "scores a vector": ({"scores": S[0, 0, 0]}, r"scores must have.*got \(5,\)"),
    "no rows": ({"scores": S[:, :, :0]}, r"scores must have.*got \(2, 4, 0, 5\)"),
    "no columns": ({"scores": S[..., :0]}, r"scores must have.*got \(2, 4, 3, 0\)"),
}


@BOTH
@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes(module: object, case: str) -> None:
    changed, message = WRONG[case]
    given = {"scores": S, "labels": L, "adversarial_labels": L, **changed}
    with pytest.raises(ValueError, match=f"^{message}"):
        module.dag_seed_bilinear(**given)


PAST_THE_WRAPPER = {
    "scores dims": (S[0], "scores must have shape (N, C, h, w)"),
    "no rows": (S[:, :, :0], "got (2, 4, 0, 5)"),
    "no columns": (S[..., :0], "got (2, 4, 3, 0)"),
}


@pytest.mark.parametrize("case", PAST_THE_WRAPPER)
def test_wrong_shapes_past_the_wrapper(device: torch.device, case: str) -> None:
    scores, message = PAST_THE_WRAPPER[case]
    scores, labels = on(device, scores, L)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.dagcore.dag_seed_bilinear(scores, labels, labels, "leave", 255, 0.0, False)


@pytest.mark.cuda_on_host("every-order")
def test_weights_beyond_the_room_of_the_fixed_point(device: torch.device) -> None:
    """Above 2^23 pixels read one low-resolution pixel: CUDA has room for 2^23 units of 2^-40."""
    scores = torch.zeros(1, 2, 1, 1, device=device)
    labels = torch.zeros(1, 2049, 4096, dtype=torch.uint8, device=device)
    seed, active = ops.dag_seed_bilinear(scores, labels, labels + 1)
    assert seed.flatten().tolist() == [-2049 * 4096, 2049 * 4096]
    assert active.tolist() == [2049 * 4096]

from __future__ import annotations

import functools
import itertools
import re

import pytest
import torch
from bilinear_oracle import CORNERS, KINDS, SIZES, close_calls, enlarged, score_maps
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BOTH, DTYPES, INF, LAYOUTS, NAN, lay_out, random_case
from torch import Tensor

from dagcore import ops, reference

pytestmark = pytest.mark.cuda_on_host


def assert_labels(got: Tensor, expected: Tensor, scores: Tensor) -> None:
    assert got.dtype == torch.int64
    assert got.device == scores.device
    assert torch.equal(got.cpu(), expected)


def gap(high: Tensor) -> Tensor:  # (N, C, H, W) -> (N, H, W)
    """How far the best class is ahead of the next."""
    if high.shape[1] == 1:
        return torch.full_like(high[:, 0], INF)
    first, second = high.topk(2, dim=1).values.unbind(1)
    return first - second


@CORNERS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64_reference_outside_the_boundary_band(
    device: torch.device, dtype: torch.dtype, align_corners: bool
) -> None:
    """Only pixels whose two best classes are within rounding of one another may differ."""
    in_band = pixels = 0
    for (k, (batch, low, size)), kind in itertools.product(enumerate(SIZES.values()), KINDS):
        scores = score_maps((*batch, *low), k, kind, dtype)
        high = reference.enlarge(scores.double(), size, align_corners)
        epsilon = torch.finfo(reference.norm_dtype(scores)).eps
        band = gap(high) <= 8 * epsilon * scores.abs().max()
        got = ops.argmax_bilinear(scores.to(device), size, align_corners=align_corners)
        assert not bool(((got.cpu() != high.argmax(1)) & ~band).any())
        in_band += int(band.sum())
        pixels += band.numel()
    assert in_band < 0.01 * pixels


@functools.cache
def prepared(
    k: int, dtype: torch.dtype, align_corners: bool, expanded: bool, broken: float
) -> tuple[Tensor, Tensor]:
    """Scores, and their winners at the k-th size, evaluated without pruning."""
    batch, low, size = list(SIZES.values())[k]
    if broken:
        scores, *_ = random_case((*batch, *low), k, dtype=dtype, broken=broken)
    else:
        scores = score_maps((*batch, *low), k, KINDS[k % 2], dtype)
    if expanded:
        scores = lay_out(scores, "expanded").contiguous()
    return scores, enlarged(scores, size, align_corners).argmax(1)


def assert_winners(
    device: torch.device,
    k: int,
    dtype: torch.dtype,
    align_corners: bool,
    layout: str = "contiguous",
    broken: float = 0.0,
) -> None:
    values, expected = prepared(k, dtype, align_corners, layout == "expanded", broken)
    scores = lay_out(values.to(device), layout)
    got = ops.argmax_bilinear(scores, tuple(expected.shape[1:]), align_corners=align_corners)
    assert_labels(got, expected, scores)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    for k in range(len(SIZES)):
        assert_winners(device, k, dtype, (k + LAYOUTS.index(layout)) % 2 == 1, layout)  # in turns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_simd_level(kernels: torch.device, dtype: torch.dtype) -> None:
    for k, align_corners in itertools.product(range(len(SIZES)), (False, True)):
        layout = "contiguous" if (k + align_corners) % 2 else LAYOUTS[1 + k % 3]
        assert_winners(kernels, k, dtype, align_corners, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_scores(kernels: torch.device, dtype: torch.dtype) -> None:
    """NaN wins, as for torch.argmax; infinities win, lose and cancel as they do in a sum."""
    for k, align_corners in itertools.product(range(len(SIZES)), (False, True)):
        broken = (0.01, 0.3, 1.0)[(k + align_corners) % 3]
        assert_winners(kernels, k, dtype, align_corners, broken=broken)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("smooth", torch.float32), ("random", torch.bfloat16)], ids=str
)
def test_ragged_enlargement(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    scores = score_maps((1, 21, 33, 41), 0, kind, dtype)
    got = ops.argmax_bilinear(scores.to(device), (513, 641))
    assert_labels(got, enlarged(scores, (513, 641), False).argmax(1), scores.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("num_classes", "low", "size", "align_corners"),
    [
        (2, (3, 2), (24, 16), False),
        (7, (5, 6), (37, 29), False),
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
    for scores, expected in close_winners(num_classes, low, size, align_corners, dtype):
        on_device = scores.to(kernels)
        got = ops.argmax_bilinear(on_device, size, align_corners=align_corners)
        assert_labels(got, expected, on_device)


@functools.cache
def close_winners(
    num_classes: int,
    low: tuple[int, int],
    size: tuple[int, int],
    align_corners: bool,
    dtype: torch.dtype,
) -> list[tuple[Tensor, Tensor]]:
    maps = close_calls((2, num_classes, *low), dtype).values()
    return [(scores, enlarged(scores, size, align_corners).argmax(1)) for scores in maps]


@settings(max_examples=100)
@given(st.data())
def test_any_size(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(*limits)) for limits in ((1, 2), (1, 9), (1, 9), (1, 9)))
    size = data.draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
    dtype, align_corners = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    seed = data.draw(st.integers(0, 2**31))
    if data.draw(st.booleans()):
        scores, *_ = random_case(shape, seed, dtype=dtype)  # with many ties
    else:
        scores = score_maps(shape, seed, "random", dtype)
    got = ops.argmax_bilinear(scores, size, align_corners=align_corners)
    assert_labels(got, enlarged(scores, size, align_corners).argmax(1), scores)


# --- by hand


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(module: object, device: torch.device, dtype: torch.dtype) -> None:
    # One row of two pixels, enlarged to four: read at 0, 1/4, 3/4 and 1.
    scores = torch.tensor([[4.0, 0], [3, 1], [2.5, 2.5], [2, 2]], dtype=dtype)[None, :, None]
    for rows in (1, 2, 5):
        got = module.argmax_bilinear(scores.to(device), (rows, 4))
        # 4 3 1 0 | 3 2.5 1.5 1 | 2.5 | 2
        assert_labels(got, torch.tensor([[[0, 0, 2, 2]] * rows]), scores.to(device))
    # Read at 0, 1/3, 2/3 and 1, and at 0 and 1 alone.
    got = module.argmax_bilinear(scores.to(device), (1, 4), align_corners=True)
    assert got.tolist() == [[[0, 0, 2, 2]]]
    got = module.argmax_bilinear(scores.to(device), (3, 2), align_corners=True)
    assert got.tolist() == [[[0, 2]] * 3]


@BOTH
def test_ties_go_to_the_lowest_class(module: object, kernels: torch.device) -> None:
    scores = torch.tensor([0.0, 1, -1, 1, 1], device=kernels)[None, :, None, None]
    scores = scores.repeat(2, 1, 3, 4)
    got = module.argmax_bilinear(scores, (24, 32))
    assert torch.equal(got.cpu(), torch.ones(2, 24, 32, dtype=torch.int64))


@BOTH
@pytest.mark.parametrize("value", [NAN, INF])
def test_one_pixel_that_is_not_finite(module: object, kernels: torch.device, value: float) -> None:
    """The pixels that read it, and no others, are won by its class."""
    scores = torch.zeros(1, 3, 6, 6, device=kernels)
    scores[:, 0] = 9
    scores[0, 2, 2, 3] = value
    got = module.argmax_bilinear(scores, (24, 24))
    expected = torch.zeros(1, 24, 24, dtype=torch.int64)
    expected[0, 6:14, 10:18] = 2  # read between 1 and 3, and between 2 and 4
    assert torch.equal(got.cpu(), expected)


@BOTH
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_no_pixels(module: object, device: torch.device, size: tuple[int, int]) -> None:
    got = module.argmax_bilinear(torch.zeros(2, 3, 4, 5, device=device), size)
    assert got.shape == (2, *size)
    assert got.dtype == torch.int64


@BOTH
def test_no_images(module: object, device: torch.device) -> None:
    got = module.argmax_bilinear(torch.zeros(0, 3, 4, 5, device=device), (8, 9))
    assert got.shape == (0, 8, 9)
    assert got.dtype == torch.int64


@BOTH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inside_and_outside_autograd(module: object, device: torch.device, mode: type) -> None:
    scores = score_maps((2, 5, 4, 6), 0, "random").to(device)
    expected = enlarged(scores, (9, 13), False).argmax(1)
    with mode():
        leaf = scores.clone().requires_grad_(mode is torch.enable_grad)
        assert_labels(module.argmax_bilinear(leaf, (9, 13)), expected, scores)


def test_thread_count_changes_nothing(one_and_two_threads: tuple[int, int]) -> None:
    scores = score_maps((2, 7, 33, 21), 0, "random")
    results = []
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        results.append(ops.argmax_bilinear(scores, (101, 87)))
    assert torch.equal(*results)


# --- wrong arguments

S = torch.zeros(2, 4, 3, 5)
WRONG = {
    "scores type": ({"scores": [1.0]}, TypeError, "scores must be a torch.Tensor, got list"),
    "scores dtype": ({"scores": S.int()}, TypeError, "scores must be float16.*, got int32"),
    "scores dims": (
        {"scores": S[0]},
        ValueError,
        r"scores must have shape \(N, C, h, w\).*got \(4, 3, 5\)",
    ),
    "no classes": ({"scores": S[:, :0]}, ValueError, r"scores must have.*got \(2, 0, 3, 5\)"),
    "no rows": ({"scores": S[:, :, :0]}, ValueError, r"scores must have.*got \(2, 4, 0, 5\)"),
    "no columns": ({"scores": S[..., :0]}, ValueError, r"scores must have.*got \(2, 4, 3, 0\)"),
    "size of one": ({"size": (4,)}, ValueError, r"size must be \(height, width\), got \(4,\)"),
    "size of three": ({"size": (1, 2, 3)}, ValueError, r"size must be \(height, width\)"),
    "size a number": ({"size": 4}, ValueError, r"size must be \(height, width\), got 4"),
    "size not whole": ({"size": (4, 5.5)}, TypeError, r"size\[1\] must be an integer, got 5.5"),
    "size negative": ({"size": (-4, 5)}, ValueError, r"size\[0\] must be at least 0, got -4"),
}


@BOTH
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(module: object, case: str) -> None:
    changed, error, message = WRONG[case]
    given = {"scores": S, "size": (6, 7), **changed}
    with pytest.raises(error, match=f"^{message}"):
        module.argmax_bilinear(**given)


@BOTH
def test_align_corners_is_keyword_only(module: object) -> None:
    with pytest.raises(TypeError, match="positional"):
        module.argmax_bilinear(S, (6, 7), True)


PAST_THE_WRAPPER = {
    "scores dtype": ((S.int(), 6, 7), "scores must be float16, bfloat16, float32 or float64"),
    "scores dims": ((S[0], 6, 7), "scores must have shape (N, C, h, w)"),
    "no classes": ((S[:, :0], 6, 7), "got (2, 0, 3, 5)"),
    "no rows": ((S[:, :, :0], 6, 7), "got (2, 4, 0, 5)"),
    "size": ((S, -6, 7), "size must not be negative, got (-6, 7)"),
}


@pytest.mark.parametrize("case", PAST_THE_WRAPPER)
def test_wrong_arguments_past_the_wrapper(device: torch.device, case: str) -> None:
    (scores, *size), message = PAST_THE_WRAPPER[case]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.dagcore.argmax_bilinear(scores.to(device), *size, False)

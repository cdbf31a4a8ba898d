"""`loss_seed_bilinear` against interpolate, formulas (loss_oracle.py) and autograd in float64."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from bilinear_oracle import SIZES, WHOLE, capacity, enlarged, label_maps, score_maps
from loss_oracle import Result, aims, by_formula, by_formula_enlarged
from support import (
    BOTH,
    DTYPES,
    INF,
    LABEL_DTYPES,
    LAYOUTS,
    NAN,
    bits,
    generator,
    lay_out,
    lay_out_labels,
    on,
    opcheck,
    random_case,
    same_bits,
)
from torch import Tensor

from dagcore import ops, reference
from dagcore.checks import LOSSES
from dagcore.ops import fallback

pytestmark = pytest.mark.cuda_on_host
SETTINGS = {"blend": 0.3, "q": 0.7, "kappa": 0.47}  # no difference of 16-bit scores is kappa
SMALL = ("1", "4", "one row", "one by one", "fractional", "smaller", "one class", "two classes")


def sizes_for(loss: str, targeted: bool, names: tuple[str, ...]) -> list[str]:
    """Names of sizes whose scores have as many classes as a loss's formula needs."""
    least = {"margin": 2, "dag": 2, "dlr": 4 if targeted else 3}.get(loss, 1)
    return [name for name in names if SIZES[name][0][1] >= least]


@functools.cache
def case(name: str, align_corners: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, low, size = SIZES[name]
    scores = score_maps((*batch, *low), len(name), "random", dtype)
    return scores, *label_maps(scores, size, align_corners, len(name))


@functools.cache
def expected_of(
    name: str, align_corners: bool, dtype: torch.dtype, loss: str, targeted: bool, weighted: bool
) -> tuple[Result, float]:
    """The float64 answer, and the largest weight times the largest gradient of a pixel."""
    scores, labels, adversarial = case(name, align_corners, dtype)
    other = aims(loss, adversarial)[targeted]
    weights = class_weights(scores) if weighted else None
    settings = SETTINGS | {"class_weights": weights}
    high = enlarged(scores.double(), tuple(labels.shape[1:]), align_corners)
    pixels, *_ = by_formula(loss, high, labels, other, **settings)
    found = by_formula_enlarged(
        loss, scores, labels, other, align_corners=align_corners, **settings
    )
    largest = float(pixels.abs().max().clamp(min=1))
    return found, largest * capacity(
        tuple(scores.shape[2:]), tuple(labels.shape[1:]), align_corners
    )


def class_weights(scores: Tensor) -> Tensor:
    return torch.rand(scores.shape[1], generator=generator(scores.shape[1]))


def assert_close(
    got: Result, expected: Result, largest: float, scores: Tensor, loss: str, rounding: float = 1e-6
) -> None:
    """Within rounding of the precision in which the dtype is computed, and of the dtype itself.

    The quotients of "dlr" multiply the roundings of the blended scores.
    """
    seed, sums, hits = got
    assert seed.dtype == scores.dtype
    assert seed.shape == scores.shape
    assert seed.stride() == torch.empty_like(scores).stride()
    assert (sums.dtype, hits.dtype) == (torch.float64, torch.int32)
    assert seed.device == sums.device == hits.device == scores.device
    assert torch.equal(hits.cpu(), expected[2])
    wide = scores.dtype == torch.float64
    more = 100 if loss == "dlr" else 1
    rounding = (1e-14 if wide else rounding) * more
    exact, info = expected[0], torch.finfo(scores.dtype)
    of_dtype = 0 if wide else 0.51 * info.eps * (exact.abs() + info.smallest_normal)
    error = (seed.cpu().double() - exact).abs() - of_dtype
    assert float(error.max()) <= rounding * largest
    rtol = (1e-13 if wide else 2e-6) * more
    torch.testing.assert_close(sums.cpu(), expected[1], rtol=rtol, atol=1e-4)


# --- against the formulas


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_formula(kernels: torch.device, loss: str) -> None:
    for k, name in enumerate(SIZES):
        dtype, align_corners, weighted = DTYPES[k % 4], k // 4 % 2 == 1, k % 3 == 1
        targeted = k % 2 == 1
        if name not in sizes_for(loss, targeted, tuple(SIZES)):
            continue
        key = (name, align_corners, dtype)
        scores, labels, adversarial = case(*key)
        expected, largest = expected_of(*key, loss, targeted, weighted)
        weights = class_weights(scores).to(kernels) if weighted else None
        given = on(kernels, scores, labels, aims(loss, adversarial)[targeted])
        settings = SETTINGS | {"class_weights": weights, "align_corners": align_corners}
        got = ops.loss_seed_bilinear(*given, loss=loss, **settings)
        assert_close(got, expected, largest, given[0], loss)


@pytest.mark.cuda_on_host(False)
@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_dtype_targeted_and_not(
    kernels: torch.device, loss: str, align_corners: bool
) -> None:
    for dtype, targeted in itertools.product(DTYPES, (False, True)):
        for name in sizes_for(loss, targeted, ("4", "fractional")):
            key = (name, align_corners, dtype)
            scores, labels, adversarial = case(*key)
            expected, largest = expected_of(*key, loss, targeted, False)
            given = on(kernels, scores, labels, aims(loss, adversarial)[targeted])
            got = ops.loss_seed_bilinear(*given, loss=loss, align_corners=align_corners, **SETTINGS)
            assert_close(got, expected, largest, given[0], loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_reference_and_fallback_equal_the_formula(loss: str) -> None:
    numbers = SETTINGS["q"], SETTINGS["kappa"]
    for (k, dtype), targeted in itertools.product(enumerate(DTYPES), (False, True)):
        align_corners = k % 2 == 1
        for name in sizes_for(loss, targeted, SMALL):
            key = (name, align_corners, dtype)
            scores, labels, adversarial = case(*key)
            scores = lay_out(scores, LAYOUTS[k])
            expected, largest = expected_of(*key, loss, targeted, True)
            weights = class_weights(scores)
            other = aims(loss, adversarial)[targeted]
            settings = SETTINGS | {"class_weights": weights, "align_corners": align_corners}
            got = reference.loss_seed_bilinear(scores, labels, other, loss=loss, **settings)
            # interpolate takes the weights themselves in float32
            assert_close(got, expected, largest, scores, loss, 1e-5)
            blend = torch.full(scores.shape[:1], SETTINGS["blend"], dtype=torch.float64)
            given = None if isinstance(other, str) else other
            weights = weights.to(fallback.real(scores))
            got = fallback.loss_seed_bilinear(
                scores, labels, given, loss, blend, *numbers, weights, 255, align_corners
            )
            assert_close(got, expected, largest, scores, loss, 1e-5)


@BOTH
def test_blend_of_each_image(module: Any, kernels: torch.device) -> None:
    scores, labels, _ = on(kernels, *case("4", False, torch.float32))
    blend = torch.tensor([0.2, 0.9], dtype=torch.float64, device=kernels)
    got = module.loss_seed_bilinear(scores, labels, loss="blended-cross-entropy", blend=blend)
    for n, value in enumerate(blend.tolist()):
        alone = module.loss_seed_bilinear(
            scores[n : n + 1], labels[n : n + 1], loss="blended-cross-entropy", blend=value
        )
        for together, single in zip(got, alone, strict=True):
            assert torch.equal(together[n : n + 1], single)


# --- against the other ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dag_is_dag_seed_bilinear(kernels: torch.device, dtype: torch.dtype) -> None:
    """To the bit at whole factors, where no sum rounds."""
    for name, margin in itertools.product(WHOLE, (0.0, 0.5)):
        scores, labels, adversarial = on(kernels, *case(name, False, dtype))
        for other in ("runner-up", adversarial):
            expected, _ = ops.dag_seed_bilinear(scores, labels, other, margin=margin)
            seed, *_ = ops.loss_seed_bilinear(scores, labels, other, loss="dag", kappa=margin)
            assert torch.equal(seed, expected)


def test_what_argmax_bilinear_predicts_is_a_hit(kernels: torch.device) -> None:
    for name, align_corners in itertools.product(SIZES, (False, True)):
        scores, labels, _ = on(kernels, *case(name, align_corners, torch.float16))
        won = ops.argmax_bilinear(scores, labels.shape[1:], align_corners=align_corners)
        *_, hits = ops.loss_seed_bilinear(scores, won, loss="margin", align_corners=align_corners)
        assert hits.tolist() == [won[0].numel()] * len(won)


@BOTH
@pytest.mark.parametrize("loss", LOSSES)
def test_at_the_size_of_the_scores_it_is_loss_seed(
    module: Any, kernels: torch.device, loss: str
) -> None:
    scores, labels, adversarial = on(kernels, *random_case((2, 21, 9, 13), 0))
    for other, align_corners in itertools.product(aims(loss, adversarial), (False, True)):
        expected = module.loss_seed(scores, labels, other, loss=loss, **SETTINGS)
        got = module.loss_seed_bilinear(
            scores, labels, other, loss=loss, align_corners=align_corners, **SETTINGS
        )
        for value, wanted in zip(got, expected, strict=True):
            assert torch.equal(value, wanted)


# --- memory, threads, vector widths


@pytest.mark.parametrize("loss", LOSSES)
def test_every_layout(kernels: torch.device, loss: str) -> None:
    for k, layout in enumerate(LAYOUTS):
        dtype = DTYPES[(k + LOSSES.index(loss)) % len(DTYPES)]
        scores, labels, adversarial = case("4", False, dtype)
        scores = lay_out(scores[:, :, :5], layout)
        labels, adversarial = labels[:, :19, :20], adversarial[:, :19, :20]
        other = aims(loss, adversarial)[k % 2]
        there = lay_out(scores.to(kernels), layout)
        expected = ops.loss_seed_bilinear(
            *on(kernels, scores.contiguous(), labels, other), loss=loss, **SETTINGS
        )
        maps = [
            lay_out_labels(m.to(LABEL_DTYPES[k % 3]), "gaps") if isinstance(m, Tensor) else m
            for m in on(kernels, labels, other)
        ]
        got = ops.loss_seed_bilinear(there, *maps, loss=loss, **SETTINGS)
        assert got[0].stride() == torch.empty_like(there).stride()
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits_at_every_vector_width_and_number_of_threads(
    loss: str, simd_levels: tuple[str, ...], one_and_two_threads: tuple[int, int]
) -> None:
    for (name, align_corners), dtype in itertools.product(
        (("8", False), ("fractional", True), ("much smaller", False)), DTYPES
    ):
        scores, labels, adversarial = case(name, align_corners, dtype)
        settings = SETTINGS | {"loss": loss, "align_corners": align_corners}
        found = []
        for level, threads in itertools.product(simd_levels, one_and_two_threads):
            ops.native.module.use_simd(level)
            torch.set_num_threads(threads)
            found.append(ops.loss_seed_bilinear(scores, labels, adversarial, **settings))
        for got in found[1:]:
            assert same_bits(got[0], found[0][0])
            assert torch.equal(got[1], found[0][1])
            assert torch.equal(got[2], found[0][2])


def test_many_pixels_of_one_low_resolution_pixel(device: torch.device) -> None:
    """A sum of 2^20 gradients, most of one sign."""
    rng = generator(0)
    scores = torch.randn(1, 3, 1, 1, generator=rng)
    labels = (torch.rand(1, 512, 2048, generator=rng) < 0.9).long()
    expected = by_formula_enlarged(
        "cross-entropy", scores, labels, None, align_corners=False, **SETTINGS
    )
    given = on(device, scores, labels)
    got = ops.loss_seed_bilinear(*given, loss="cross-entropy")
    assert_close(got, expected, labels.numel(), given[0], "cross-entropy")


@BOTH
def test_nothing_to_do(module: Any, device: torch.device) -> None:
    for images, size in ((0, (4, 9)), (2, (0, 9)), (2, (4, 0))):
        scores = torch.zeros(images, 4, 3, 5, device=device)
        labels = torch.zeros(images, *size, dtype=torch.int64, device=device)
        seed, sums, hits = module.loss_seed_bilinear(scores, labels, loss="cross-entropy")
        assert seed.shape == scores.shape
        assert not seed.any()
        assert sums.tolist() == [0.0] * images
        assert hits.tolist() == [0] * images


LITTLE_MEMORY = """
import resource
import torch
from dagcore import ops

torch.set_num_threads(1)
rng = torch.Generator().manual_seed(0)
scores = torch.randn(SHAPE, generator=rng).to(torch.DTYPE)
labels = torch.randint(0, SHAPE[1], (SHAPE[0], *SIZE), dtype=torch.int32, generator=rng)
ops.loss_seed_bilinear(scores[:, :4, :2, :2], labels[:, :4, :4] % 4, loss="dlr")
size = scores.numel() * scores.element_size()
with open("/proc/self/statm") as file:
    in_use = int(file.read().split()[0]) * resource.getpagesize()
limit = in_use + 3 * size + 2**22  # the seed, and twice as much as the scores take
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for loss in ("cosine", "dlr", "margin"):
    seed, sums, hits = ops.loss_seed_bilinear(scores, labels, loss=loss)
    assert bool(seed.any()) and bool(sums.isfinite().all())
    del seed
try:  # the limit does hold
    [scores.clone() for _ in range(4)]
except RuntimeError as error:
    assert "memory" in str(error), error
    print("four more score tensors do not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize(
    ("shape", "size", "dtype"),
    [
        ((1, 150, 192, 192), (640, 640), "float32"),
        ((1, 150, 256, 256), (640, 640), "bfloat16"),
        ((2, 2500, 33, 33), (130, 130), "float16"),
    ],
    ids=str,
)
def test_two_score_tensors_are_memory_enough(
    shape: tuple[int, ...], size: tuple[int, int], dtype: str
) -> None:
    code = LITTLE_MEMORY.replace("SHAPE", str(shape)).replace("SIZE", str(size))
    code = code.replace("DTYPE", dtype)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "four more score tensors do not fit"


# --- scores far apart, ties, infinities, NaN


@BOTH
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_apart(
    module: Any, kernels: torch.device, loss: str, dtype: torch.dtype
) -> None:
    """Nine pixels alike: the seed of one of them at each of four, times 9/4."""
    one = torch.tensor([[0.0, 1e4, -1e4, 30.0]], device=kernels).to(dtype)
    scores = one[:, :, None, None].expand(1, 4, 2, 2)
    for label, aim in itertools.product(range(4), (None, 0, 2)):
        labels = torch.tensor([label], device=kernels)
        other = "runner-up" if loss == "dag" else None
        other = other if aim is None else torch.tensor([aim], device=kernels)
        seed, sums, hits = module.loss_seed(one, labels, other, loss=loss, **SETTINGS)
        maps = [
            m[:, None, None].expand(1, 3, 3) if isinstance(m, Tensor) else m
            for m in (labels, other)
        ]
        got = module.loss_seed_bilinear(scores, *maps, loss=loss, **SETTINGS)
        assert got[0].isfinite().all()
        wanted = (seed.double() * 9 / 4)[:, :, None, None].expand(1, 4, 2, 2)
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps + 2e-5, "atol": 1e-6}
        torch.testing.assert_close(got[0].double(), wanted, **tolerance)
        torch.testing.assert_close(got[1], 9 * sums, rtol=2e-5, atol=1e-6)
        assert torch.equal(got[2], 9 * hits)


@pytest.mark.parametrize("loss", LOSSES)
def test_ties_are_interpolates(kernels: torch.device, loss: str) -> None:
    """Scores in quarters at a whole factor blend exactly: ties are the reference's too."""
    for low, size in (((5, 7), (40, 28)), ((1, 1), (6, 5)), ((4, 7), (16, 7))):
        scores, *_ = random_case((2, 5, *low), 1)
        labels, adversarial = label_maps(scores, size, False, 1)
        for other in aims(loss, adversarial):
            expected = reference.loss_seed_bilinear(
                scores.double(), labels, other, loss=loss, **SETTINGS
            )
            given = on(kernels, scores, labels, other)
            seed, sums, hits = ops.loss_seed_bilinear(*given, loss=loss, **SETTINGS)
            assert torch.equal(hits.cpu(), expected[2])
            torch.testing.assert_close(sums.cpu(), expected[1], rtol=1e-6, atol=1e-5)
            atol = 1e-6 * float(expected[0].abs().max().clamp(min=16))
            torch.testing.assert_close(seed.cpu().double(), expected[0], rtol=1e-6, atol=atol)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("loss", LOSSES)
def test_scores_that_are_not_finite(kernels: torch.device, loss: str, value: float) -> None:
    """They spread as in interpolate: nothing is seeded there, and the image's loss is NaN."""
    for low, size in (((5, 7), (40, 28)), ((3, 4), (3, 16)), ((9, 8), (3, 4))):
        scores, *_ = random_case((3, 5, *low), 1)
        scores[0, 1, low[0] // 2, low[1] // 2] = value
        scores[1, 4, -1, -1] = value
        labels, adversarial = label_maps(scores, size, False, 1)
        for other in aims(loss, adversarial):
            expected = reference.loss_seed_bilinear(scores, labels, other, loss=loss, **SETTINGS)
            given = on(kernels, scores, labels, other)
            seed, sums, hits = ops.loss_seed_bilinear(*given, loss=loss, **SETTINGS)
            assert torch.equal(hits.cpu(), expected[2])
            assert seed.isfinite().all()
            tolerance = {"rtol": 2e-6, "atol": 1e-5, "equal_nan": True}
            torch.testing.assert_close(sums.cpu(), expected[1], **tolerance)
            atol = 2e-6 * float(expected[0].abs().max().clamp(min=16))
            torch.testing.assert_close(seed.cpu(), expected[0], rtol=2e-6, atol=atol)


@BOTH
def test_seeds_that_cannot_be_held(module: Any, kernels: torch.device) -> None:
    """The denominator of dlr is 1e-12 where three scores are equal, that of a tiny z infinite."""
    scores = torch.tensor([2.0, 2.0, 2.0, 0.0], device=kernels, dtype=torch.float16)
    scores = scores[None, :, None, None].expand(1, 4, 2, 2)
    labels = torch.full((1, 4, 4), 3, device=kernels)
    seed, sums, _ = module.loss_seed_bilinear(scores, labels, loss="dlr")
    assert seed[0, :, 0, 0].tolist() == [-65504, 0, 65504, -65504]
    assert bool((seed == seed[:, :, :1, :1]).all())
    torch.testing.assert_close(sums.item(), 16 * 2e12, rtol=1e-6, atol=0)
    tiny = torch.tensor([2e-39, 1e-39, 0.0], device=kernels)[None, :, None, None]
    labels = torch.zeros((1, 4, 4), dtype=torch.int64, device=kernels)
    seed, sums, _ = module.loss_seed_bilinear(
        tiny.expand(1, 3, 2, 2), labels, loss="masked-spherical"
    )
    assert seed.isfinite().all()
    assert seed.any()


# --- which targets count


@BOTH
def test_targets_that_do_not_count(module: Any, kernels: torch.device) -> None:
    scores = torch.randn(1, 3, 2, 2, generator=generator(0)).to(kernels)
    labels = torch.tensor([[[255, 1, 1, 2]]], device=kernels).expand(1, 4, 4).clone()
    adversarial = torch.tensor([[[77, 255, 0, 0]]], device=kernels).expand(1, 4, 4)
    got = module.loss_seed_bilinear(scores, labels, adversarial, loss="cosine")
    labels[:, :, :2] = 255
    expected = module.loss_seed_bilinear(scores, labels, torch.zeros_like(labels), loss="cosine")
    assert all(map(torch.equal, got, expected))
    assert bool(got[0].any())
    got = module.loss_seed_bilinear(scores, torch.full_like(labels, 255), loss="cosine")
    assert not got[0].any()
    assert (got[1].tolist(), got[2].tolist()) == ([0.0], [0])


def test_out_of_range_labels_are_named(device: torch.device) -> None:
    scores = torch.zeros(2, 4, 3, 3)
    labels = torch.zeros(2, 6, 7, dtype=torch.int64)
    for module, wrong in itertools.product((ops, reference), (4, -1)):
        labels[1, 3, 5] = wrong
        with pytest.raises(ValueError, match=rf"^labels must lie .* got {wrong} at \(1, 3, 5\)"):
            module.loss_seed_bilinear(scores, labels, loss="margin")
        with pytest.raises(ValueError, match=rf"^adversarial_labels must lie .* got {wrong} at"):
            module.loss_seed_bilinear(scores, torch.zeros_like(labels), labels, loss="margin")


def test_out_of_range_label_is_a_negative_count(kernels: torch.device) -> None:
    scores = torch.zeros(2, 4, 3, 3, device=kernels)
    labels = torch.zeros(2, 6, 7, dtype=torch.int64, device=kernels)
    aim = torch.ones_like(labels)
    for bad in (labels, aim):
        bad[1, 3, 5] = 4
        seed, _, hits = torch.ops.dagcore.loss_seed_bilinear(
            scores, labels, aim, "cross-entropy", None, 0.5, 0.0, None, 255, False
        )
        bad[1, 3, 5] = 0
        assert int(hits[0]) == 42
        assert int(hits[1]) < 0
        assert seed.isfinite().all()


# --- arguments

S, L = torch.zeros(2, 4, 3, 5), torch.zeros(2, 6, 11, dtype=torch.int64)
WRONG = [
    ({"scores": S[:, :, 0]}, ValueError, r"scores must have shape \(N, C, h, w\).*\(2, 4, 5\)"),
    ({"scores": S[..., :0]}, ValueError, r"scores must have.*got \(2, 4, 3, 0\)"),
    ({"scores": S.long()}, TypeError, "scores must be float16, bfloat16, float32 or float64"),
    ({"labels": L[:, 0]}, ValueError, r"labels must have shape \(2, H, W\) to match scores"),
    ({"labels": L[:1]}, ValueError, r"labels must have shape \(2, H, W\) to match scores"),
    ({"labels": L.float()}, TypeError, "labels must be uint8, int32 or int64"),
    (
        {"adversarial_labels": L[:, 1:]},
        ValueError,
        r"adversarial_labels must have shape \(2, 6, 11\) to match labels",
    ),
    ({"adversarial_labels": "runner-up"}, ValueError, "adversarial_labels must be a tensor or N"),
    ({"loss": "hinge"}, ValueError, "loss must be 'cross-entropy'"),
    ({"blend": torch.rand(3).double()}, ValueError, r"blend must have shape \(2,\)"),
    ({"class_weights": torch.ones(5)}, ValueError, r"class_weights must have shape \(4,\)"),
    ({"align_corners": 1}, TypeError, "align_corners must be True or False, got 1"),
]


@BOTH
@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG, ids=lambda value: "")
def test_wrong_arguments_are_named(
    module: Any, wrong: dict[str, Any], kind: type[Exception], message: str
) -> None:
    right = {"scores": S, "labels": L, "loss": "cosine"}
    module.loss_seed_bilinear(**right)
    with pytest.raises(kind, match=f"^{message}"):
        module.loss_seed_bilinear(**right | wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: S[0]}, r"scores must have shape \(N, C, h, w\)"),
        ({0: S[:, :, :0]}, r"got \(2, 4, 0, 5\)"),
        ({1: L[0]}, r"labels must have shape \(2, H, W\), got \(6, 11\)"),
        ({2: L[:, 1:]}, r"adversarial_labels must have shape \(2, H, W\), got \(2, 5, 11\)"),
        ({4: torch.rand(2)}, r"blend must be contiguous, float64 and of shape \(2\)"),
    ],
)
def test_the_native_op_checks_by_itself(
    cpu_or_cuda_on_host: None, change: dict[int, Any], message: str
) -> None:
    arguments: list[Any] = [S, L, None, "cosine", None, 0.5, 0.0, None, 255, False]
    for at, value in change.items():
        arguments[at] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dagcore.loss_seed_bilinear(*arguments)


# --- torch


@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck(device: torch.device, loss: str) -> None:
    k = LOSSES.index(loss) % 4
    dtype, layout = DTYPES[k], LAYOUTS[k]
    scores, labels, adversarial = case("fractional", False, dtype)
    scores, labels, adversarial = scores[:, :5, :4, :6], labels[:, :9] % 5, adversarial[:, :9]
    adversarial = adversarial % 5
    weights = torch.ones(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    blend = torch.rand(2, generator=generator(0), dtype=torch.float64)
    tensors = on(device, scores, labels, adversarial, weights, blend)
    scores, labels, adversarial, weights, blend = tensors
    for rest in ((None, None, None), (adversarial, weights, blend)):
        arguments = (lay_out(scores, layout), labels, rest[0], loss, rest[2], 0.7, 0.5)
        arguments += (rest[1], 255, layout == "gaps")
        opcheck("loss_seed_bilinear", arguments)


def every_loss(scores: Tensor, labels: Tensor, adversarial: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    for loss in LOSSES:
        for other in aims(loss, adversarial):
            found += ops.loss_seed_bilinear(scores * 2, labels, other, loss=loss, **SETTINGS)
    blend = scores.new_full(scores.shape[:1], 0.5, dtype=torch.float64)
    return [
        *found,
        *ops.loss_seed_bilinear(
            scores, labels, loss="blended-cross-entropy", blend=blend, align_corners=True
        ),
    ]


def compile_arguments(
    device: torch.device, low: tuple[int, ...] = (2, 5, 4, 6), size: tuple[int, int] = (9, 13)
) -> list[Tensor]:
    scores, *_ = random_case(low, 0)
    _, labels, adversarial = random_case((*low[:2], *size), 0)
    most = low[1] - 1
    return [t.to(device) for t in (scores, labels.clamp(max=most), adversarial.clamp(max=most))]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_equals_eager(device: torch.device, backend: str) -> None:
    arguments = compile_arguments(device)
    compiled = torch.compile(every_loss, fullgraph=True, backend=backend)
    for got, wanted in zip(compiled(*arguments), every_loss(*arguments), strict=True):
        assert torch.equal(got, wanted)


def test_compiled_with_dynamic_shapes(device: torch.device) -> None:
    compiled = torch.compile(every_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for low, size in (((2, 5, 4, 6), (9, 13)), ((3, 4, 7, 3), (56, 24)), ((2, 6, 9, 8), (4, 3))):
        arguments = compile_arguments(device, low, size)
        for got, wanted in zip(compiled(*arguments), every_loss(*arguments), strict=True):
            assert torch.equal(got, wanted)


def test_compiled_out_of_range_label_is_a_negative_count(device: torch.device) -> None:
    def hits(scores: Tensor, labels: Tensor) -> Tensor:
        return ops.loss_seed_bilinear(scores, labels, loss="cosine")[2]

    labels = torch.zeros(2, 9, 9, dtype=torch.int64, device=device)
    labels[1, 3, 2] = 4
    compiled = torch.compile(hits, fullgraph=True, backend="aot_eager")
    got = compiled(torch.zeros(2, 4, 3, 3, device=device), labels)
    assert int(got[0]) == 81
    assert int(got[1]) < 0


@BOTH
def test_scores_of_inference_and_of_a_graph(module: Any, device: torch.device) -> None:
    scores, labels, _ = on(device, *case("4", False, torch.float32))
    expected = module.loss_seed_bilinear(scores, labels, loss="cosine")
    with torch.inference_mode():
        got = module.loss_seed_bilinear(scores * 1, labels, loss="cosine")
        assert torch.equal(got[0], expected[0])
    graph = scores.clone().requires_grad_() * 1
    got = module.loss_seed_bilinear(graph, labels, loss="cosine")
    assert torch.equal(bits(got[0]), bits(expected[0]))
    assert not got[0].requires_grad


def test_runs_on_cuda_repeat_to_the_bit(cuda: torch.device) -> None:
    scores = score_maps((2, 13, 37, 19), 0, "random")
    labels, adversarial = label_maps(scores, (211, 173), False, 0)
    given = on(cuda, scores, labels, adversarial)
    first = ops.loss_seed_bilinear(*given, loss="cosine")
    for _ in range(10):
        again = ops.loss_seed_bilinear(*given, loss="cosine")
        assert torch.equal(bits(again[0]), bits(first[0]))
        assert all(map(torch.equal, again[1:], first[1:]))

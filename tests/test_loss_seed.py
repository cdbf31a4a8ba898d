"""`loss_seed` against autograd in float64 of the formulas; see loss_oracle.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from loss_oracle import SETTINGS, Result, aims, by_formula
from support import (
    BOTH,
    DTYPES,
    INF,
    LABEL_DTYPES,
    LAYOUTS,
    MARGINS,
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

from dagcore import losses, ops, reference
from dagcore.checks import LOSSES
from dagcore.ops import fallback

SHAPES = ((2, 5), (2, 4, 9), (1, 21, 33, 41), (2, 7, 3, 4, 5), (1, 300, 7), (1, 5, 1025))


def case(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scores without ties but for rounding, labels, adversarial labels; some are ignored."""
    _, labels, adversarial = random_case(shape, seed)
    scores = 3 * torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    right = torch.rand(labels.shape, generator=generator(seed + 1)) < 0.5
    return (
        scores.to(dtype),
        torch.where(right & (labels != 255), scores.argmax(1), labels),
        (adversarial),
    )


def assert_close(got: Result, expected: Result, scores: Tensor) -> None:
    """Within rounding of the precision in which the dtype is computed, and of the dtype itself."""
    seed, sums, hits = got
    assert seed.dtype == scores.dtype
    assert seed.stride() == torch.empty_like(scores).stride()
    assert sums.dtype == torch.float64
    assert hits.dtype == torch.int32
    assert seed.device == sums.device == hits.device == scores.device
    assert torch.equal(hits.cpu(), expected[2])
    wide = scores.dtype == torch.float64
    exact, largest = expected[0], expected[0].abs().max().clamp(min=1)
    rounding = 0 if scores.element_size() > 2 else torch.finfo(scores.dtype).eps / 2
    error = (seed.cpu().double() - exact).abs() - rounding * exact.abs()
    smallest = torch.finfo(scores.dtype).smallest_normal * rounding
    assert error.max() <= (1e-14 if wide else 1e-6) * largest + smallest
    torch.testing.assert_close(sums.cpu(), expected[1], rtol=1e-13 if wide else 2e-6, atol=1e-5)


# --- against the formulas


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_formula(kernels: torch.device, loss: str) -> None:
    for (k, shape), dtype in itertools.product(enumerate(SHAPES), DTYPES):
        scores, labels, adversarial = case(shape, k, dtype)
        weights = torch.rand(shape[1], generator=generator(k)) if k % 2 else None
        for other in aims(loss, adversarial):
            expected = by_formula(loss, scores, labels, other, class_weights=weights, **SETTINGS)
            given = on(kernels, scores, labels, other)
            there = None if weights is None else weights.to(kernels)
            got = ops.loss_seed(*given, loss=loss, class_weights=there, **SETTINGS)
            assert_close(got, expected, given[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_reference_and_fallback_equal_the_formula(loss: str) -> None:
    for (k, shape), dtype in itertools.product(enumerate(SHAPES), DTYPES):
        scores, labels, adversarial = case(shape, k, dtype)
        scores = lay_out(scores, ("contiguous", "class-last", "transposed")[k % 3])
        blend = torch.full(shape[:1], SETTINGS["blend"], dtype=torch.float64)
        numbers = SETTINGS["q"], SETTINGS["kappa"]
        weights = torch.rand(shape[1], generator=generator(k)) if k % 2 else None
        for other in aims(loss, adversarial):
            expected = by_formula(loss, scores, labels, other, class_weights=weights, **SETTINGS)
            got = reference.loss_seed(
                scores, labels, other, loss=loss, class_weights=weights, **SETTINGS
            )
            assert_close(got, expected, scores)
            given = None if isinstance(other, str) else other
            got = fallback.loss_seed(scores, labels, given, loss, blend, *numbers, weights, 255)
            assert_close(got, expected, scores)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blend_of_each_image(module: Any, kernels: torch.device, dtype: torch.dtype) -> None:
    blend = torch.tensor([0.0, 0.3, 1.0, 0.5], dtype=torch.float64)
    scores, labels, adversarial = case((4, 5, 9, 11), 0, dtype)
    for other in (None, adversarial):
        settings = SETTINGS | {"blend": blend}
        expected = by_formula("blended-cross-entropy", scores, labels, other, **settings)
        given = on(kernels, scores, labels, other)
        for there in (blend.to(kernels), blend.repeat_interleave(2).to(kernels)[::2]):
            got = module.loss_seed(*given, loss="blended-cross-entropy", blend=there)
            assert_close(got, expected, given[0])
        second = (value if value is None else value[1:2] for value in given)
        alone = module.loss_seed(*second, loss="blended-cross-entropy", blend=0.3)
        assert torch.equal(bits(alone[0]), bits(got[0][1:2]))


@pytest.mark.parametrize("name", LOSSES)
def test_the_name_of_a_loss_stands_for_the_loss(name: str) -> None:
    assert repr(losses.named(name)) == repr(getattr(losses, name.replace("-", "_")))


def test_q_of_1_is_cross_entropy(kernels: torch.device) -> None:
    scores, labels, _ = (value.to(kernels) for value in case((2, 5, 40), 0, torch.float32))
    expected = ops.loss_seed(scores, labels, loss="cross-entropy")
    got = ops.loss_seed(scores, labels, loss="tsallis", q=1)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    near, *_ = ops.loss_seed(scores, labels, loss="tsallis", q=1 - 1e-5)
    torch.testing.assert_close(near, expected[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dag_is_dag_seed(kernels: torch.device, dtype: torch.dtype) -> None:
    """To the bit, with many ties."""
    for k, margin in itertools.product(range(3), MARGINS):
        shape = ((2, 5, 9, 31), (2, 2, 40), (2, 1, 5))[k]
        scores, labels, adversarial = on(kernels, *random_case(shape, k, dtype=dtype))
        for other in ("runner-up", adversarial):
            expected, _ = ops.dag_seed(scores, labels, other, margin=margin)
            seed, *_ = ops.loss_seed(scores, labels, other, loss="dag", kappa=margin)
            assert torch.equal(bits(seed), bits(expected))


# --- memory, threads, vector widths


@pytest.mark.parametrize("loss", LOSSES)
def test_every_layout(kernels: torch.device, loss: str) -> None:
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        scores, labels, adversarial = case((2, 7, 19, 35), 3, dtype)
        scores = lay_out(scores, layout)
        for k, other in enumerate(aims(loss, adversarial)):
            expected = by_formula(loss, scores, labels, other, **SETTINGS)
            there = lay_out(scores.to(kernels), layout)
            maps = [
                lay_out_labels(m.to(LABEL_DTYPES[k]), LAYOUTS[k]) if isinstance(m, Tensor) else m
                for m in on(kernels, labels, other)
            ]
            assert_close(ops.loss_seed(there, *maps, loss=loss, **SETTINGS), expected, there)


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_label_types(kernels: torch.device, dtype: torch.dtype) -> None:
    scores, labels, adversarial = (t.to(kernels) for t in case((2, 5, 40), 0, torch.float32))
    expected = ops.loss_seed(scores, labels, adversarial, loss="dlr")
    got = ops.loss_seed(scores, labels.to(dtype), adversarial.to(dtype), loss="dlr")
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits_at_every_vector_width_and_number_of_threads(
    loss: str, simd_levels: tuple[str, ...], one_and_two_threads: tuple[int, int]
) -> None:
    for dtype, layout in itertools.product(DTYPES, ("contiguous", "class-last")):
        scores, labels, adversarial = case((2, 19, 97, 31), 5, dtype)
        scores = lay_out(scores, layout)
        found = []
        for level, threads in itertools.product(simd_levels, one_and_two_threads):
            ops.native.module.use_simd(level)
            torch.set_num_threads(threads)
            found.append(ops.loss_seed(scores, labels, adversarial, loss=loss, **SETTINGS))
        for got in found[1:]:
            assert same_bits(got[0], found[0][0])
            assert torch.equal(got[1], found[0][1])
            assert torch.equal(got[2], found[0][2])


@BOTH
def test_nothing_to_do(module: Any, device: torch.device) -> None:
    for shape in ((0, 4, 9), (2, 4, 0), (0, 4), (2, 4, 3, 0)):
        scores = torch.zeros(shape, device=device)
        labels = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
        seed, sums, hits = module.loss_seed(scores, labels, loss="cross-entropy")
        assert seed.shape == scores.shape
        assert sums.tolist() == [0.0] * shape[0]
        assert hits.tolist() == [0] * shape[0]


# --- scores far apart, ties, infinities, NaN

FAR = {  # loss, seed for label 0; loss, seed for label 1
    "cross-entropy": (1e4, (-1.0, 1.0), 0.0, (0.0, 0.0)),
    "masked-cross-entropy": (0.0, (0.0, 0.0), 0.0, (0.0, 0.0)),
    "blended-cross-entropy": (3e3, (-0.3, 0.3), 0.0, (0.0, 0.0)),
    "cosine": (0.0, (0.0, 0.0), 0.0, (0.0, 0.0)),
    "jensen-shannon": (math.log(2), (0.0, 0.0), 0.0, (0.0, 0.0)),
    "tsallis": (1 / 0.3, (0.0, 0.0), 0.0, (0.0, 0.0)),
    "margin": (0.5, (0.0, 0.0), -1e4, (1.0, -1.0)),
    "dag": (0.0, (0.0, 0.0), -1e4, (1.0, -1.0)),
    "masked-spherical": (0.0, (0.0, 0.0), -1.0, (0.0, 0.0)),
}


@BOTH
@pytest.mark.parametrize("loss", FAR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_apart(
    module: Any, kernels: torch.device, loss: str, dtype: torch.dtype
) -> None:
    other = "runner-up" if loss == "dag" else None
    for label in (0, 1):
        scores = torch.tensor([[0.0, 1e4]], device=kernels).to(dtype)
        gap = scores[0, 1].double() / 1e4  # as 16 bits hold it
        labels = torch.tensor([label], device=kernels)
        seed, sums, hits = module.loss_seed(scores, labels, other, loss=loss, **SETTINGS)
        value, wanted = FAR[loss][2 * label : 2 * label + 2]
        value = value * gap if abs(value) > 1e3 else torch.tensor(value)
        torch.testing.assert_close(sums, value.expand(1).double(), rtol=1e-6, atol=1e-6)
        expected = torch.tensor([wanted], device=kernels)
        torch.testing.assert_close(seed.float(), expected, rtol=4e-3, atol=1e-6)
        assert hits.tolist() == [label]


@BOTH
def test_far_apart_and_targeted(module: Any, kernels: torch.device) -> None:
    scores = torch.tensor([[0.0, 1e4, -1e4, 30.0]], device=kernels)
    labels = torch.tensor([1], device=kernels)
    for loss, aim in itertools.product(LOSSES, range(4)):
        given = torch.tensor([aim], device=kernels)
        seed, sums, hits = module.loss_seed(scores, labels, given, loss=loss, **SETTINGS)
        assert seed.isfinite().all()
        assert sums.isfinite().all()
        assert hits.tolist() == [1]


@BOTH
def test_ties_go_to_the_lowest_class(module: Any, kernels: torch.device) -> None:
    scores = torch.tensor([[2.0, 3.0, 3.0, 3.0]], device=kernels)
    for label, hit in ((1, 1), (2, 0)):
        labels = torch.tensor([label], device=kernels)
        seed, sums, hits = module.loss_seed(scores, labels, loss="margin")
        assert hits.tolist() == [hit]
        assert sums.tolist() == [0.0]
        assert seed.tolist() == [[0.0, -1.0, 1.0, 0.0] if hit else [0.0] * 4]
        seed, _, _ = module.loss_seed(scores, labels, loss="masked-cross-entropy")
        assert bool(seed.any()) == bool(hit)
    scores = torch.tensor([[1.0, 4.0, 4.0, 2.0]], device=kernels)
    seed, sums, _ = module.loss_seed(scores, labels, loss="dlr")  # of label 2; class 1 is the rival
    assert sums.tolist() == [0.0]
    assert seed.tolist() == [[0.0, 0.5, -0.5, 0.0]]


@BOTH
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_without_a_finite_maximum(
    module: Any, kernels: torch.device, loss: str, dtype: torch.dtype
) -> None:
    """Nothing is seeded there, the loss is NaN; what has a NaN counts as a hit."""
    good = (0.5, 1.0, -1.0, 0.0)
    other = "runner-up" if loss == "dag" else None
    for bad, hit in (
        ((NAN, 1.0, 2.0, 3.0), 1),
        ((0.0, 1.0, 2.0, NAN), 1),
        ((0.0, INF, 2.0, 3.0), 0),
        ((INF, INF, INF, INF), 1),
        ((-INF, -INF, -INF, -INF), 1),
    ):
        scores = torch.tensor([[good, bad], [good, good]], device=kernels).to(dtype).movedim(2, 1)
        labels = torch.tensor([[1, 0], [1, 1]], device=kernels)
        for aim in (other, torch.full_like(labels, 3)):
            seed, sums, hits = module.loss_seed(scores, labels, aim, loss=loss, **SETTINGS)
            assert sums.isnan().tolist() == [True, False]
            assert hits.tolist() == [1 + hit, 2]
            assert torch.equal(seed[0, :, 0], seed[1, :, 0])
            assert not seed[0, :, 1].any()


@BOTH
@pytest.mark.parametrize("loss", LOSSES)
def test_classes_at_minus_infinity_have_probability_0(
    module: Any, kernels: torch.device, loss: str
) -> None:
    scores = torch.tensor([[0.5, 1.0, -INF, 0.0, -INF]], device=kernels)
    other = "runner-up" if loss == "dag" else None
    for label in range(5):
        labels = torch.tensor([label], device=kernels)
        for aim in (other, torch.tensor([0], device=kernels), torch.tensor([2], device=kernels)):
            got = module.loss_seed(scores, labels, aim, loss=loss, **SETTINGS)
            assert got[0].isfinite().all()
            assert not got[1].isnan().any()
            if loss == "cross-entropy" and aim is None and label in (0, 1, 3):
                few = scores[:, [0, 1, 3]]
                expected = module.loss_seed(few, labels.clamp(max=2), loss=loss)
                torch.testing.assert_close(got[1], expected[1])
                torch.testing.assert_close(got[0][:, [0, 1, 3]], expected[0])


@BOTH
@pytest.mark.parametrize("value", [0.0, 1e30, 1e-30])
def test_spherical_loss_of_any_size(module: Any, kernels: torch.device, value: float) -> None:
    scores = torch.tensor([[0.6, 0.8, 0.0]], device=kernels) * value
    seed, sums, _ = module.loss_seed(scores, scores.argmax(1), loss="masked-spherical")
    torch.testing.assert_close(sums.item(), -0.8 if value else 0.0)
    expected = torch.tensor([[0.48, -0.36, 0.0]], device=kernels) / (value or INF)
    torch.testing.assert_close(seed, expected, atol=0, rtol=1e-5)


@BOTH
def test_seeds_that_16_bits_cannot_hold(module: Any, kernels: torch.device) -> None:
    """The denominator of dlr is 1e-12 where three scores are equal."""
    scores = torch.tensor([[2.0, 2.0, 2.0, 0.0]], device=kernels, dtype=torch.float16)
    seed, sums, _ = module.loss_seed(scores, torch.tensor([3], device=kernels), loss="dlr")
    assert seed.isfinite().all()
    assert seed.tolist() == [[-65504, 0, 65504, -65504]]
    torch.testing.assert_close(sums.item(), 2e12, rtol=1e-6, atol=0)


# --- which targets count


@BOTH
def test_targets_that_do_not_count(module: Any, kernels: torch.device) -> None:
    scores = torch.randn(1, 3, 4, generator=generator(0)).to(kernels)
    labels = torch.tensor([[255, 1, 1, 2]], device=kernels)
    adversarial = torch.tensor([[77, 255, 0, 0]], device=kernels)  # the first is not read
    seed, sums, hits = module.loss_seed(scores, labels, adversarial, loss="cross-entropy")
    assert not seed[:, :, :2].any()
    alone = module.loss_seed(scores[:, :, 2:], labels[:, 2:], adversarial[:, 2:], loss="cosine")
    assert seed[:, :, 2:].any(1).all()
    assert torch.equal(hits, alone[2])
    seed, sums, _ = module.loss_seed(scores, labels, adversarial, loss="cosine")
    assert torch.equal(seed[:, :, 2:], alone[0])
    torch.testing.assert_close(sums, alone[1])


@BOTH
def test_a_class_can_be_the_ignore_label(module: Any, kernels: torch.device) -> None:
    scores = torch.randn(1, 3, 2, generator=generator(0)).to(kernels)
    labels = torch.tensor([[0, 1]], device=kernels)
    aim = torch.zeros_like(labels)
    seed, *_ = module.loss_seed(scores, labels, aim, loss="cross-entropy", ignore_index=0)
    assert seed.any(1).tolist() == [[False, True]]


def test_out_of_range_labels_are_named(device: torch.device) -> None:
    scores = torch.zeros(2, 4, 9)
    labels = torch.zeros(2, 9, dtype=torch.int64)
    for module, wrong in itertools.product((ops, reference), (4, -1)):
        labels[1, 3] = wrong
        with pytest.raises(ValueError, match=rf"^labels must lie .* got {wrong} at \(1, 3\)"):
            module.loss_seed(scores, labels, loss="margin")
        with pytest.raises(ValueError, match=rf"^adversarial_labels must lie .* got {wrong} at"):
            module.loss_seed(scores, torch.zeros_like(labels), labels, loss="margin")


def test_out_of_range_label_is_a_negative_count(kernels: torch.device) -> None:
    scores = torch.zeros(2, 4, 9, device=kernels)
    labels = torch.zeros(2, 9, dtype=torch.int64, device=kernels)
    aim = torch.ones_like(labels)
    for bad in (labels, aim):
        bad[1, 3] = 4
        seed, sums, hits = torch.ops.dagcore.loss_seed(
            scores, labels, aim, "cross-entropy", None, 0.5, 0.0, None, 255
        )
        bad[1, 3] = 0
        assert int(hits[0]) == 9
        assert int(hits[1]) < 0
        assert seed.isfinite().all()
        torch.testing.assert_close(sums.cpu() / -math.log(4), torch.tensor([9.0, 8.0]).double())


# --- arguments

WRONG = [
    ({"loss": "hinge"}, ValueError, "loss must be 'cross-entropy', .* got 'hinge'"),
    ({"blend": 1.5}, ValueError, "blend must be between 0 and 1, got 1.5"),
    ({"blend": NAN}, ValueError, "blend must be a finite number, got nan"),
    ({"blend": torch.rand(2)}, TypeError, "blend must be float64, got float32"),
    (
        {"blend": torch.rand(3).double()},
        ValueError,
        r"blend must have shape \(2,\) to match scores",
    ),
    (
        {"blend": torch.tensor([0.5, NAN], dtype=torch.float64)},
        ValueError,
        "blend must be between 0 and 1, got nan",
    ),
    ({"q": 2}, ValueError, "q must be at most 1, got 2"),
    ({"kappa": -1.0}, ValueError, "kappa must be a number of at least 0, got -1"),
    ({"kappa": "1"}, TypeError, "kappa must be a number, got '1'"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer"),
    ({"class_weights": torch.ones(5)}, ValueError, r"class_weights must have shape \(4,\)"),
    ({"class_weights": [1.0] * 4}, TypeError, "class_weights must be a torch.Tensor"),
    ({"labels": torch.zeros(2, 8).long()}, ValueError, r"labels must have shape \(2, 9\)"),
    ({"labels": torch.zeros(2, 9)}, TypeError, "labels must be uint8, int32 or int64"),
    ({"scores": torch.zeros(2)}, ValueError, r"scores must have shape \(N, C, \*targets\)"),
    ({"scores": torch.zeros(2, 2, 9), "loss": "dlr"}, ValueError, "scores must have at least 3"),
    (
        {
            "scores": torch.zeros(2, 3, 9),
            "loss": "dlr",
            "adversarial_labels": torch.ones(2, 9).int(),
        },
        ValueError,
        "scores must have at least 4 classes for targeted 'dlr'",
    ),
    (
        {"adversarial_labels": "runner-up"},
        ValueError,
        "adversarial_labels must be a tensor or None",
    ),
    ({"loss": "dag"}, ValueError, "adversarial_labels must be a tensor or 'runner-up' for 'dag'"),
    (
        {"loss": "dag", "adversarial_labels": "least-likely"},
        ValueError,
        "adversarial_labels must be a tensor or 'runner-up' for 'dag', got 'least-likely'",
    ),
    (
        {"adversarial_labels": torch.zeros(2).int()},
        ValueError,
        r"adversarial_labels must have shape \(2, 9\)",
    ),
]


@BOTH
@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG, ids=lambda value: "")
def test_wrong_arguments_are_named(
    module: Any, wrong: dict[str, Any], kind: type[Exception], message: str
) -> None:
    right = {"scores": torch.zeros(2, 4, 9), "labels": torch.zeros(2, 9).long(), "loss": "cosine"}
    module.loss_seed(**right)
    with pytest.raises(kind, match=f"^{message}"):
        module.loss_seed(**right | wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: "hinge"}, "loss must be one of cross-entropy, .*, dlr, got hinge"),
        ({4: torch.rand(2)}, r"blend must be contiguous, float64 and of shape \(2\), got \(2\)"),
        ({4: torch.rand(4).double()[::2]}, "blend must be contiguous"),
        ({5: 1.5}, "q must be a finite number, at most 1, got 1.5"),
        ({6: -1.0}, "kappa must be at least 0, got -1"),
        ({7: torch.ones(4).double()}, "class_weights must be contiguous, float32"),
        ({7: torch.ones(3)}, r"class_weights must be .* of shape \(4\), got \(3\)"),
        ({1: torch.zeros(2, 8).long()}, r"labels must have the shape of scores \(2, 4, 9\)"),
        ({2: torch.zeros(2, 9)}, "adversarial_labels must be uint8, int32 or int64"),
        ({0: torch.zeros(2, 2, 9), 3: "dlr"}, "scores must have at least 3 classes for dlr"),
    ],
)
def test_the_native_op_checks_by_itself(
    cpu_or_cuda_on_host: None, change: dict[int, Any], message: str
) -> None:
    arguments = [torch.zeros(2, 4, 9), torch.zeros(2, 9).long(), None, "cosine", None, 0.5, 0.0]
    arguments += [None, 255]
    for at, value in change.items():
        arguments[at] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dagcore.loss_seed(*arguments)


# --- torch


@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck(device: torch.device, loss: str) -> None:
    k = LOSSES.index(loss) % 4
    dtype, layout = DTYPES[k], LAYOUTS[k]
    scores, labels, adversarial = case((2, 5, 7, 9), 0, dtype)
    weights = torch.ones(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    blend = torch.rand(2, generator=generator(0), dtype=torch.float64)
    tensors = on(device, scores, labels, adversarial, weights, blend)
    scores, labels, adversarial, weights, blend = tensors
    for rest in ((None, None, None), (adversarial, weights, blend)):
        arguments = (
            lay_out(scores, layout),
            labels,
            rest[0],
            loss,
            rest[2],
            0.7,
            0.5,
            rest[1],
            255,
        )
        opcheck("loss_seed", arguments)


def every_loss(scores: Tensor, labels: Tensor, adversarial: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    for loss in LOSSES:
        for other in aims(loss, adversarial):
            found += ops.loss_seed(scores * 2, labels, other, loss=loss, **SETTINGS)
    blend = scores.new_full(scores.shape[:1], 0.5, dtype=torch.float64)
    found += ops.loss_seed(scores, labels, loss="blended-cross-entropy", blend=blend)
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_equals_eager(device: torch.device, backend: str) -> None:
    arguments = on(device, *case((2, 5, 9, 11), 0, torch.float32))
    compiled = torch.compile(every_loss, fullgraph=True, backend=backend)
    for got, wanted in zip(compiled(*arguments), every_loss(*arguments), strict=True):
        assert torch.equal(got, wanted)


def test_compiled_out_of_range_label_is_a_negative_count(device: torch.device) -> None:
    def hits(scores: Tensor, labels: Tensor) -> Tensor:
        return ops.loss_seed(scores, labels, loss="cosine")[2]

    labels = torch.zeros(2, 9, dtype=torch.int64, device=device)
    labels[1, 3] = 4
    compiled = torch.compile(hits, fullgraph=True, backend="aot_eager")
    got = compiled(torch.zeros(2, 4, 9, device=device), labels)
    assert int(got[0]) == 9
    assert int(got[1]) < 0


@BOTH
def test_scores_of_inference_and_of_a_graph(module: Any, device: torch.device) -> None:
    scores, labels, _ = on(device, *case((2, 5, 9), 0, torch.float32))
    expected = module.loss_seed(scores, labels, loss="cosine")
    with torch.inference_mode():
        got = module.loss_seed(scores * 1, labels, loss="cosine")
        assert torch.equal(got[0], expected[0])
    got = module.loss_seed(scores.requires_grad_() * 1, labels, loss="cosine")
    assert torch.equal(got[0], expected[0])
    assert not got[0].requires_grad

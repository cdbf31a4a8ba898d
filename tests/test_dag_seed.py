"""What only `dag_seed` does, or can be told of it exactly; see test_seed_ops.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    BOTH,
    DTYPES,
    GOALS,
    INF,
    LAYOUTS,
    MARGINS,
    MODES,
    NAN,
    UNPACKED,
    arguments,
    assert_same_seed,
    lay_out,
    on,
    random_case,
    unpacked,
)
from torch import Tensor

from dagcore import ops, reference

pytestmark = pytest.mark.cuda_on_host


def first_largest(scores: list[float]) -> int:
    """argmax: the first NaN if there is one, else the first of the largest."""
    best = 0
    for c, score in enumerate(scores):
        if score != score:
            return c
        if score > scores[best]:
            best = c
    return best


def by_hand(
    scores: Tensor,
    labels: Tensor,
    adversarial: Tensor | str,
    goal: str,
    ignore_index: int,
    margin: float,
) -> tuple[Tensor, Tensor]:
    """Section 2 of DESIGN.md in Python loops, one target after another."""
    num_images, num_classes = scores.shape[:2]
    seed, active = torch.zeros(scores.shape, dtype=scores.dtype), [0] * num_images
    rows = scores.double().movedim(1, -1).reshape(-1, num_classes).tolist()
    given = None if isinstance(adversarial, str) else adversarial.flatten().tolist()
    positions = itertools.product(*map(range, labels.shape))
    for k, ((n, *t), label) in enumerate(zip(positions, labels.flatten().tolist(), strict=True)):
        values, winner = rows[k], first_largest(rows[k])
        if label == ignore_index:
            continue
        if given is None:
            others = [c for c in range(num_classes) if c != label]
            if not others:
                continue
            other = others[first_largest([values[c] for c in others])]
        else:
            other = given[k]
        if other == ignore_index and not 0 <= other < num_classes:
            continue
        broken = any(math.isnan(v) for v in values)
        if goal == "leave":
            minus, holds = label, winner == label or values[winner] - values[label] < margin
        else:
            minus, holds = winner, winner != other
            rivals = [c for c in range(num_classes) if c != other]
            if not holds and rivals:
                rival = rivals[first_largest([values[c] for c in rivals])]
                holds = values[winner] - values[rival] < margin
                minus = rival if holds else winner
        if (goal == "leave" and other == label) or not (holds or broken):
            continue
        active[n] += 1
        seed[(n, other, *t)] += 1
        seed[(n, minus, *t)] -= 1
    return seed, torch.tensor(active, dtype=torch.int32)


# --- against the oracle written by hand


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_hand_written_oracle(
    module: object, device: torch.device, dtype: torch.dtype
) -> None:
    shapes = ((2, 3), (2, 5, 9), (1, 1, 6), (2, 2, 3, 4), (1, 4, 2, 2, 3))
    for ignore_index, mode, (k, shape) in itertools.product(
        (255, -1, -100, 1, 0), MODES, enumerate(shapes)
    ):
        if ignore_index >= shape[1]:
            continue
        scores, labels, adversarial = random_case(
            shape, k, dtype=dtype, broken=k % 2 * 0.05, ignore_index=ignore_index
        )
        other, goal = arguments(mode, adversarial)
        given = on(device, scores, labels, other)
        for margin in MARGINS:
            expected = by_hand(scores, labels, other, goal, ignore_index, margin)
            got = module.dag_seed(*given, goal=goal, ignore_index=ignore_index, margin=margin)
            assert_same_seed(got, expected, given[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_in_every_layout(device: torch.device, layout: str) -> None:
    for (k, shape), dtype in itertools.product(
        enumerate(((2, 3), (2, 5, 9), (2, 2, 3, 4), (2, 4, 2, 2, 3))), DTYPES
    ):
        scores, labels, adversarial = random_case(shape, k, dtype=dtype, broken=k % 2 * 0.05)
        scores = lay_out(scores, layout)
        other, goal = arguments(MODES[(k + DTYPES.index(dtype)) % 3], adversarial)
        margin = MARGINS[k % 3]
        expected = by_hand(scores, labels, other, goal, 255, margin)
        there, labels, other = on(device, scores, labels, other)
        there = lay_out(there, layout)
        got = reference.dag_seed(there, labels, other, goal=goal, margin=margin)
        assert_same_seed(got, expected, there)


@pytest.mark.parametrize("where", UNPACKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_that_cannot_be_read_several_at_once(
    kernels: torch.device, dtype: torch.dtype, where: str
) -> None:
    """Through the vectors or packs of a kernel, which are aligned and within a row."""
    size = (6, 13) if where == "rows" else (6, 16)
    for k, mode in enumerate(MODES):
        scores, labels, adversarial = random_case((3, 16, *size), k, dtype=dtype)
        other, goal = arguments(mode, adversarial)
        expected = by_hand(scores, labels, other, goal, 255, MARGINS[k])
        scores, labels, other = on(kernels, scores, labels, other)
        scores = unpacked(scores, where)
        got = ops.dag_seed(scores, labels, other, goal=goal, margin=MARGINS[k])
        assert_same_seed(got, expected, scores)


special = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1.5, 2.0**-24, -(2.0**-24)])


@settings(max_examples=100)
@given(st.lists(special, min_size=1, max_size=5), st.integers(0, 5), st.integers(0, 5), st.data())
def test_one_target_of_special_scores(
    values: list[float], label: int, adversarial: int, data: st.DataObject
) -> None:
    mode = data.draw(st.sampled_from(MODES))
    dtype = data.draw(st.sampled_from(DTYPES))
    label, adversarial = label % len(values), adversarial % len(values)
    scores = torch.tensor(values, dtype=torch.float64).to(dtype)[None]
    other, goal = arguments(mode, torch.tensor([adversarial]))
    labels = torch.tensor([label])
    margin = data.draw(st.sampled_from((0.0, 2.0**-24, 1.0, 2.5)))
    expected = by_hand(scores, labels, other, goal, 255, margin)
    for module in (ops, reference):
        got = module.dag_seed(scores, labels, other, goal=goal, margin=margin)
        assert_same_seed(got, expected, scores)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from(MODES))
def test_seed_sums_to_zero_and_inactive_targets_add_nothing(seed: int, mode: str) -> None:
    scores, labels, adversarial = random_case((2, 4, 6), seed)
    other, goal = arguments(mode, adversarial)
    got, active = ops.dag_seed(scores, labels, other, goal=goal)
    assert torch.equal(got.sum(1), torch.zeros(2, 6))
    touched = (got != 0).any(1)
    assert torch.equal(touched.sum(1, dtype=torch.int32), active)
    assert not bool((touched & (labels == 255)).any())
    if goal == "leave":
        assert torch.equal(scores.argmax(1)[touched], labels[touched])


# --- cases made by hand: (scores of one target, label, adversarial, goal, expected seed)

ONE_TARGET = {
    "active": ([3, 1, 2], 0, 2, "leave", [-1, 0, 1]),
    "left": ([3, 1, 2], 1, 2, "leave", [0, 0, 0]),
    "tie goes to the lowest class": ([2, 2, 1], 0, 2, "leave", [-1, 0, 1]),
    "tie lost by the higher class": ([2, 2, 1], 1, 2, "leave", [0, 0, 0]),
    "negative zero ties with zero": ([-0.0, 0.0], 0, 1, "leave", [-1, 1]),
    "zero ties with negative zero": ([0.0, -0.0], 1, 0, "leave", [0, 0]),
    "all minus infinity": ([-INF, -INF], 0, 1, "leave", [-1, 1]),
    "infinity wins": ([1, INF, 2], 1, 0, "leave", [1, -1, 0]),
    "two infinities tie": ([INF, INF], 1, 0, "leave", [0, 0]),
    "NaN at the label": ([NAN, 1], 0, 1, "leave", [-1, 1]),
    "NaN elsewhere is no success": ([1, NAN, 2], 2, 0, "leave", [1, 0, -1]),
    "NaN at the last class": ([5, 1, NAN], 1, 0, "leave", [1, -1, 0]),
    "all NaN": ([NAN, NAN], 1, 0, "leave", [1, -1]),
    "adversarial is the label": ([3, 1], 0, 0, "leave", [0, 0]),
    "adversarial is the label, NaN": ([NAN, 1], 0, 0, "leave", [0, 0]),
    "one class": ([3], 0, 0, "leave", [0]),
    "not reached": ([1, 3, 2], 1, 2, "reach", [0, -1, 1]),
    "not reached from elsewhere": ([3, 1, 2], 1, 2, "reach", [-1, 0, 1]),
    "reached": ([1, 2, 3], 0, 2, "reach", [0, 0, 0]),
    "tie is not reached by the higher": ([2, 2], 0, 1, "reach", [-1, 1]),
    "tie is reached by the lower": ([2, 2], 1, 0, "reach", [0, 0]),
    "reach where label is adversarial": ([3, 1], 1, 1, "reach", [-1, 1]),
    "reach, NaN elsewhere": ([1, NAN, 2], 0, 2, "reach", [0, -1, 1]),
    "reach, one class": ([3], 0, 0, "reach", [0]),
    "runner-up": ([3, 1, 2], 0, "runner-up", "leave", [-1, 0, 1]),
    "runner-up of a tie": ([3, 2, 2], 0, "runner-up", "leave", [-1, 1, 0]),
    "runner-up ties with the winner": ([3, 3], 0, "runner-up", "leave", [-1, 1]),
    "runner-up, others minus infinity": ([3, -INF, -INF], 0, "runner-up", "leave", [-1, 1, 0]),
    "runner-up, all minus infinity": ([-INF, -INF, -INF], 0, "runner-up", "leave", [-1, 1, 0]),
    "runner-up already left": ([1, 3, 2], 0, "runner-up", "leave", [0, 0, 0]),
    "runner-up is NaN": ([3, 1, NAN], 0, "runner-up", "leave", [-1, 0, 1]),
    "runner-up of one class": ([3], 0, "runner-up", "leave", [0]),
    "runner-up of one class, NaN": ([NAN], 0, "runner-up", "leave", [0]),
}


@pytest.mark.parametrize("case", ONE_TARGET)
def test_one_target(device: torch.device, case: str) -> None:
    for module, dtype, layout in itertools.product(
        (ops, reference), DTYPES, ("contiguous", "class-last")
    ):
        assert_one_target(module, device, case, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_target_at_every_simd_level(kernels: torch.device, dtype: torch.dtype) -> None:
    for case in ONE_TARGET:
        assert_one_target(ops, kernels, case, dtype, "contiguous")


def assert_one_target(
    module: object, device: torch.device, case: str, dtype: torch.dtype, layout: str
) -> None:
    """The same target 40 times: in a vector's lanes and in what is left over."""
    values, label, other, goal, expected = ONE_TARGET[case]
    scores = torch.tensor(values, dtype=dtype, device=device)[None, :, None].repeat(1, 1, 40)
    labels = torch.full((1, 40), label, device=device)
    if not isinstance(other, str):
        other = torch.full((1, 40), other, device=device)
    seed, active = module.dag_seed(lay_out(scores, layout), labels, other, goal=goal)
    wanted = torch.tensor(expected, dtype=dtype)[None, :, None].repeat(1, 1, 40)
    assert torch.equal(seed.cpu(), wanted), f"{case}: {seed[0, :, 0].tolist()}"
    if NAN not in values and goal == "leave":
        assert int(active) == (40 if any(expected) else 0), case


@BOTH
def test_nan_target_is_always_active(module: object, kernels: torch.device) -> None:
    for dtype, where, goal in itertools.product(DTYPES, range(3), GOALS):
        scores = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, device=kernels)[None, :, None]
        scores = scores.repeat(1, 1, 21)
        scores[0, where, 5] = NAN
        labels = torch.zeros(1, 21, dtype=torch.int64, device=kernels)
        adversarial = torch.full((1, 21), 2, device=kernels)  # without the NaN: left and reached
        _, active = module.dag_seed(scores, labels, adversarial, goal=goal)
        assert active.tolist() == [1]


# --- labels


@BOTH
def test_ignore_index_inside_the_class_range(module: object, device: torch.device) -> None:
    scores = torch.tensor([[[1.0, 9, 9], [2, 0, 0], [3, 1, 1]]], device=device)  # argmax 2, 0, 0
    labels = torch.tensor([[2, 0, 0]], device=device)
    adversarial = torch.tensor([[0, 1, 2]], device=device)
    # Class 2 is ignored as a label, and is still a class that can be aimed at.
    seed, active = module.dag_seed(scores, labels, adversarial, ignore_index=2)
    assert active.tolist() == [2]
    assert seed[0].T.tolist() == [[0, 0, 0], [-1, 1, 0], [-1, 0, 1]]


@BOTH
def test_ignore_index_that_a_uint8_label_cannot_hold(module: object, device: torch.device) -> None:
    # -1 and 511 are 255 modulo 256, and 255 is a class like any other here.
    scores = torch.zeros(1, 256, 2, device=device)
    scores[0, 255] = 1
    labels = torch.tensor([[255, 0]], dtype=torch.uint8, device=device)
    adversarial = torch.tensor([[3, 3]], dtype=torch.uint8, device=device)
    for ignore_index in (-1, 511):
        _, active = module.dag_seed(scores, labels, adversarial, ignore_index=ignore_index)
        assert active.tolist() == [1]


@BOTH
def test_adversarial_label_that_is_ignored_excludes_the_target(
    module: object, device: torch.device
) -> None:
    scores = torch.tensor([[[3.0, 3, 3], [1, 1, 1]]], device=device)
    labels = torch.tensor([[0, 0, 255]], device=device)
    for goal, ignore_index in itertools.product(GOALS, (255, -1)):
        marked = torch.where(labels == 255, ignore_index, labels)
        adversarial = torch.tensor([[ignore_index, 1, 1]], device=device)
        seed, active = module.dag_seed(
            scores, marked, adversarial, goal=goal, ignore_index=ignore_index
        )
        assert active.tolist() == [1]
        assert seed[0].T.tolist() == [[0, 0], [-1, 1], [0, 0]]


@BOTH
@pytest.mark.parametrize("num_classes", [241, 256, 257, 1000])
def test_uint8_labels_of_more_classes_than_they_can_name(
    module: object, device: torch.device, num_classes: int
) -> None:
    """A uint8 label below 255 is in range however many classes there are."""
    scores = torch.zeros(1, num_classes, 2, device=device)
    scores[0, 240] = 1
    labels = torch.tensor([[0, 240]], dtype=torch.uint8, device=device)
    adversarial = torch.tensor([[5, 5]], dtype=torch.uint8, device=device)
    for goal, expected in (("leave", 1), ("reach", 2)):
        _, active = module.dag_seed(scores, labels, adversarial, goal=goal)
        assert active.tolist() == [expected]


@pytest.mark.parametrize("num_classes", [32766, 32767, 32768, 40000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_more_classes_than_16_bits_count(
    device: torch.device, dtype: torch.dtype, num_classes: int
) -> None:
    scores = torch.zeros(1, num_classes, 4, dtype=dtype, device=device)
    scores[0, num_classes - 1] = 2
    scores[0, num_classes - 2] = 1
    labels = torch.tensor([[num_classes - 1, num_classes - 1, num_classes - 2, 255]], device=device)
    adversarial = torch.tensor([[0, num_classes - 2, 1, 2]], device=device)
    for mode, layout in itertools.product(MODES, ("contiguous", "class-last")):
        other, goal = arguments(mode, adversarial)
        laid_out = lay_out(scores, layout)
        got = ops.dag_seed(laid_out, labels, other, goal=goal)
        assert_same_seed(got, by_hand_fast(scores.cpu(), labels.cpu(), other, goal), laid_out)


def by_hand_fast(
    scores: Tensor, labels: Tensor, adversarial: Tensor | str, goal: str
) -> tuple[Tensor, Tensor]:
    """One-hot arithmetic of section 2 for scores without NaN, ignore_index 255."""
    num_classes, winner = scores.shape[1], scores.argmax(1)
    counted = labels != 255
    true = labels.masked_fill(~counted, 0)
    one_hot = torch.nn.functional.one_hot
    if isinstance(adversarial, str):
        hidden = scores.float().masked_fill(one_hot(true, num_classes).movedim(-1, 1) == 1, -INF)
        other = hidden.argmax(1)
    else:
        other = adversarial.cpu()
    if goal == "leave":
        active, minus = counted & (winner == true) & (other != true), true
    else:
        active, minus = counted & (winner != other), winner
    seed = (one_hot(other, num_classes) - one_hot(minus, num_classes)) * active[..., None]
    return seed.movedim(-1, 1).to(scores.dtype), active.flatten(1).sum(1, dtype=torch.int32)


def test_seed_is_the_gradient_of_the_objective(device: torch.device) -> None:
    scores, labels, adversarial = (t.to(device) for t in random_case((2, 5, 33), 1, ignored=0))
    leaf = scores.double().requires_grad_()
    seed, _ = ops.dag_seed(leaf, labels, adversarial)
    holds = (leaf.argmax(1) == labels).double()
    objective = leaf.gather(1, adversarial[:, None]) - leaf.gather(1, labels[:, None])
    (objective[:, 0] * holds).sum().backward()
    assert torch.equal(seed, leaf.grad)

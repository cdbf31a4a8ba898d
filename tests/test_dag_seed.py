from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DTYPES,
    LABEL_DTYPES,
    LAYOUTS,
    MODES,
    arguments,
    bits,
    lay_out,
    lay_out_labels,
    random_case,
)
from torch import Tensor

from dagcore import ops, reference

GOALS = ("leave", "reach")
SHAPES = (
    (3, 7),
    (1, 1, 1),
    (2, 1, 5),
    (2, 21, 33, 41),
    (1, 4, 129),
    (2, 3, 151),
    (1, 5, 1023),
    (1, 5, 1024),
    (2, 5, 1025),
    (2, 3, 4, 5, 6),
    (1, 300, 7),
    (1, 2, 2, 3, 2, 2, 2),
)
NAN, INF = math.nan, math.inf
BOTH = pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])


def assert_same_seed(
    got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], scores: Tensor
) -> None:
    seed, active = got
    assert seed.dtype == scores.dtype
    assert seed.shape == scores.shape
    assert seed.stride() == torch.empty_like(scores).stride()
    assert active.dtype == torch.int32
    assert active.device == seed.device == scores.device
    assert torch.equal(active.cpu(), expected[1].cpu())
    assert torch.equal(bits(seed.cpu()), bits(expected[0].cpu()))


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
    scores: Tensor, labels: Tensor, adversarial: Tensor | str, goal: str, ignore_index: int
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
        minus = label if goal == "leave" else winner
        holds = winner == label if goal == "leave" else winner != other
        if (goal == "leave" and other == label) or not (holds or broken):
            continue
        active[n] += 1
        seed[(n, other, *t)] += 1
        seed[(n, minus, *t)] -= 1
    return seed, torch.tensor(active, dtype=torch.int32)


# --- native against the reference


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(
    kernels: torch.device, dtype: torch.dtype, layout: str, mode: str
) -> None:
    for k in range(len(SHAPES)):
        values, labels, adversarial, *expected = prepared(k, dtype, mode, layout == "expanded")
        scores = lay_out(values.to(kernels), layout)
        labels, adversarial = labels.to(kernels), adversarial.to(kernels)
        other, goal = arguments(mode, adversarial)
        got = ops.dag_seed(scores, labels, other, goal=goal)
        assert_same_seed(got, expected, scores)
        assert torch.equal(bits(scores).cpu(), bits(values)), "scores were written to"
        again = ops.dag_seed(scores, labels, other, goal=goal)
        assert_same_seed(again, expected, scores)


@functools.cache
def prepared(k: int, dtype: torch.dtype, mode: str, expanded: bool) -> tuple[Tensor, ...]:
    """Scores, labels, adversarial labels; and the reference's seed and counts for them."""
    scores, labels, adversarial = random_case(SHAPES[k], k, dtype=dtype, broken=(k % 2) * 0.02)
    if expanded:
        scores = lay_out(scores, "expanded").contiguous()
    other, goal = arguments(mode, adversarial)
    expected = reference.dag_seed(scores, labels, other, goal=goal)
    return scores, labels, adversarial, *expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_in_every_layout(device: torch.device, layout: str, mode: str) -> None:
    for k, dtype in itertools.product(range(len(SHAPES)), (torch.float32, torch.bfloat16)):
        values, labels, adversarial, *expected = prepared(k, dtype, mode, layout == "expanded")
        scores = lay_out(values.to(device), layout)
        other, goal = arguments(mode, adversarial.to(device))
        got = reference.dag_seed(scores, labels.to(device), other, goal=goal)
        assert_same_seed(got, expected, scores)


def test_cases_have_active_and_inactive_targets() -> None:
    for mode in MODES:
        scores, labels, adversarial = random_case((2, 21, 33, 41), 3)
        other, goal = arguments(mode, adversarial)
        _, active = reference.dag_seed(scores, labels, other, goal=goal)
        assert bool(((active > 100) & (active < 33 * 41 - 100)).all())


@pytest.mark.parametrize("label_layout", LAYOUTS)
@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
@pytest.mark.parametrize("adversarial_dtype", LABEL_DTYPES, ids=str)
def test_label_dtypes_and_layouts(
    kernels: torch.device,
    label_dtype: torch.dtype,
    adversarial_dtype: torch.dtype,
    label_layout: str,
) -> None:
    for goal, layout, shape in (
        ("leave", "contiguous", (2, 21, 13, 41)),
        ("reach", "class-last", (2, 21, 13, 41)),
        ("reach", "contiguous", (3, 7)),
        ("leave", "class-last", (2, 5, 1025)),
    ):
        scores, labels, adversarial = random_case(shape, 11)
        scores = lay_out(scores.to(kernels), layout)
        labels = lay_out_labels(labels.to(label_dtype).to(kernels), label_layout)
        for other_layout in (label_layout, "contiguous"):
            other = lay_out_labels(adversarial.to(adversarial_dtype).to(kernels), other_layout)
            got = ops.dag_seed(scores, labels, other, goal=goal)
            expected = reference.dag_seed(scores, labels.long(), other.long(), goal=goal)
            assert_same_seed(got, expected, scores)


@pytest.mark.parametrize("num_classes", [32766, 32767, 32768, 40000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_more_classes_than_16_bits_count(
    device: torch.device, dtype: torch.dtype, num_classes: int, mode: str
) -> None:
    scores = torch.zeros(1, num_classes, 4, dtype=dtype, device=device)
    scores[0, num_classes - 1] = 2
    scores[0, num_classes - 2] = 1
    labels = torch.tensor([[num_classes - 1, num_classes - 1, num_classes - 2, 255]], device=device)
    adversarial = torch.tensor([[0, num_classes - 2, 1, 2]], device=device)
    other, goal = arguments(mode, adversarial)
    for layout in ("contiguous", "class-last"):
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


# --- native and reference against the oracle written by hand


@BOTH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_hand_written_oracle(
    module: object, device: torch.device, dtype: torch.dtype, mode: str
) -> None:
    shapes = ((2, 3), (2, 5, 9), (1, 1, 6), (2, 2, 3, 4), (1, 4, 2, 2, 3))
    for ignore_index, broken, (k, shape) in itertools.product(
        (255, -1, -100, 1, 0), (0.0, 0.05), enumerate(shapes)
    ):
        if ignore_index >= shape[1]:
            continue
        scores, labels, adversarial = random_case(
            shape, k, dtype=dtype, broken=broken, ignore_index=ignore_index
        )
        other, goal = arguments(mode, adversarial)
        expected = by_hand(scores, labels, other, goal, ignore_index)
        on_device = scores.to(device)
        other = other if isinstance(other, str) else other.to(device)
        got = module.dag_seed(
            on_device, labels.to(device), other, goal=goal, ignore_index=ignore_index
        )
        assert_same_seed(got, expected, on_device)


special = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1.5, 2.0**-24, -(2.0**-24)])


@settings(max_examples=100, deadline=None)
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
    expected = by_hand(scores, labels, other, goal, 255)
    assert_same_seed(ops.dag_seed(scores, labels, other, goal=goal), expected, scores)
    assert_same_seed(reference.dag_seed(scores, labels, other, goal=goal), expected, scores)


@settings(max_examples=50, deadline=None)
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


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ONE_TARGET)
def test_one_target(module: object, kernels: torch.device, dtype: torch.dtype, case: str) -> None:
    values, label, other, goal, expected = ONE_TARGET[case]
    # The same target 40 times: in a vector's lanes and in what is left over.
    scores = torch.tensor(values, dtype=dtype, device=kernels)[None, :, None].repeat(1, 1, 40)
    labels = torch.full((1, 40), label, device=kernels)
    if not isinstance(other, str):
        other = torch.full((1, 40), other, device=kernels)
    for layout in ("contiguous", "class-last"):
        seed, active = module.dag_seed(lay_out(scores, layout), labels, other, goal=goal)
        wanted = torch.tensor(expected, dtype=dtype)[None, :, None].repeat(1, 1, 40)
        assert torch.equal(seed.cpu(), wanted)
        if NAN not in values and goal == "leave":
            assert int(active) == (40 if any(expected) else 0)


@BOTH
@pytest.mark.parametrize("goal", GOALS)
def test_nan_target_is_always_active(module: object, kernels: torch.device, goal: str) -> None:
    for dtype, where in itertools.product(DTYPES, range(3)):
        scores = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, device=kernels)[None, :, None]
        scores = scores.repeat(1, 1, 21)
        scores[0, where, 5] = NAN
        labels = torch.zeros(1, 21, dtype=torch.int64, device=kernels)
        adversarial = torch.full((1, 21), 2, device=kernels)  # without the NaN: left and reached
        _, active = module.dag_seed(scores, labels, adversarial, goal=goal)
        assert active.tolist() == [1]


@BOTH
@pytest.mark.parametrize("mode", MODES)
def test_all_ignored(module: object, device: torch.device, mode: str) -> None:
    scores, _, adversarial = random_case((2, 4, 9), 0)
    scores, adversarial = scores.to(device), adversarial.to(device)
    other, goal = arguments(mode, adversarial)
    for ignore_index in (255, -1, 2):
        labels = torch.full((2, 9), ignore_index, device=device)
        wild = other if isinstance(other, str) else torch.full_like(other, 9999)  # not read
        seed, active = module.dag_seed(scores, labels, wild, goal=goal, ignore_index=ignore_index)
        assert active.tolist() == [0, 0]
        assert torch.equal(seed, torch.zeros_like(scores))


@BOTH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 4, 9), (2, 4, 0), (0, 4), (2, 4, 3, 0), (0, 4, 0)])
def test_empty(module: object, device: torch.device, shape: tuple[int, ...], mode: str) -> None:
    scores, labels, adversarial = (t.to(device) for t in random_case(shape, 0))
    other, goal = arguments(mode, adversarial)
    seed, active = module.dag_seed(scores, labels, other, goal=goal)
    assert seed.shape == scores.shape
    assert active.dtype == torch.int32
    assert active.tolist() == [0] * shape[0]


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


def test_scores_that_require_grad(device: torch.device) -> None:
    scores, labels, adversarial = (t.to(device) for t in random_case((2, 5, 33), 0))
    leaf = scores.clone().requires_grad_()
    seed, active = ops.dag_seed(leaf, labels, adversarial)
    assert not seed.requires_grad
    assert_same_seed((seed, active), reference.dag_seed(scores, labels, adversarial), scores)
    (leaf * 2).backward(seed)
    assert torch.equal(leaf.grad, 2 * seed)


def test_seed_is_the_gradient_of_the_objective(device: torch.device) -> None:
    scores, labels, adversarial = (t.to(device) for t in random_case((2, 5, 33), 1, ignored=0))
    leaf = scores.double().requires_grad_()
    seed, _ = ops.dag_seed(leaf, labels, adversarial)
    holds = (leaf.argmax(1) == labels).double()
    objective = leaf.gather(1, adversarial[:, None]) - leaf.gather(1, labels[:, None])
    (objective[:, 0] * holds).sum().backward()
    assert torch.equal(seed, leaf.grad)


def test_views_with_pending_negation() -> None:
    scores, labels, adversarial = random_case((2, 5, 33), 1)
    negated = torch._neg_view(scores)
    got = ops.dag_seed(negated, labels, adversarial)
    assert_same_seed(got, reference.dag_seed(-scores, labels, adversarial), scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_thread_count_changes_no_bit(
    one_and_two_threads: tuple[int, int], dtype: torch.dtype, layout: str
) -> None:
    scores, labels, adversarial = random_case((2, 19, 97, 131), 5, dtype=dtype, broken=0.01)
    scores = lay_out(scores, layout)
    for mode in MODES:
        other, goal = arguments(mode, adversarial)
        results = []
        for threads in one_and_two_threads:
            torch.set_num_threads(threads)
            results.append(ops.dag_seed(scores, labels, other, goal=goal))
        assert_same_seed(results[1], results[0], scores)


# --- labels out of range


def spoiled(name: str, value: int, device: torch.device) -> dict[str, Tensor]:
    given = {"labels": torch.zeros(2, 3, 50), "adversarial_labels": torch.ones(2, 3, 50)}
    given = {k: v.to(torch.int64).to(device) for k, v in given.items()}
    given[name][1, 2, 41] = value
    return given


@BOTH
@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("value", [4, 300, -1, 2**40, 2**32, -(2**40), 65536])
@pytest.mark.parametrize("name", ["labels", "adversarial_labels"])
def test_label_out_of_range_on_the_cpu(module: object, name: str, value: int, goal: str) -> None:
    given = spoiled(name, value, torch.device("cpu"))
    message = (
        rf"^{name} must lie in \[0, 4\) or equal ignore_index=255, got {value} at \(1, 2, 41\)"
    )
    for dtype in DTYPES:
        with pytest.raises(ValueError, match=message):
            module.dag_seed(torch.zeros(2, 4, 3, 50, dtype=dtype), **given, goal=goal)


@BOTH
def test_label_out_of_range_beside_the_runner_up(module: object) -> None:
    given = spoiled("labels", 7, torch.device("cpu"))["labels"]
    with pytest.raises(ValueError, match=r"^labels must lie in \[0, 4\).* got 7 at \(1, 2, 41\)"):
        module.dag_seed(torch.zeros(2, 4, 3, 50), given, "runner-up")


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("name", ["labels", "adversarial_labels"])
def test_label_out_of_range_makes_the_ops_count_negative(
    device: torch.device, name: str, goal: str
) -> None:
    """What CUDA users see, and what the wrapper builds its message on."""
    scores = torch.zeros(2, 4, 3, 50, device=device)
    scores[:, 2] = 1  # every target of goal "reach" is active, so that the count is large
    given = spoiled(name, 4, device)
    seed, active = torch.ops.dagcore.dag_seed(
        scores, given["labels"], given["adversarial_labels"], goal, 255
    )
    assert int(active[0]) == (150 if goal == "reach" else 0)
    assert int(active[1]) < 0
    assert not bool(seed[1, :, 2, 41].any())


def test_label_out_of_range_on_cuda_is_a_negative_count(cuda: torch.device) -> None:
    given = spoiled("labels", 4, cuda)
    _, active = ops.dag_seed(torch.zeros(2, 4, 3, 50, device=cuda), **given)
    assert [int(n) >= 0 for n in active] == [True, False]


# --- wrong arguments: what is replaced, the error, its message

S, L = torch.zeros(2, 4, 3, 5), torch.zeros(2, 3, 5, dtype=torch.int64)
WRONG = {
    "scores type": ({"scores": [[1.0]]}, TypeError, "scores must be a torch.Tensor, got list"),
    "scores dtype": (
        {"scores": S.long()},
        TypeError,
        "scores must be float16, bfloat16, float32 or float64, got int64",
    ),
    "scores complex": ({"scores": S.to(torch.complex64)}, TypeError, "scores must be.*complex64"),
    "scores without classes": (
        {"scores": torch.zeros(3)},
        ValueError,
        r"scores must have shape \(N, C, \*targets\).*got \(3,\)",
    ),
    "zero classes": (
        {"scores": torch.zeros(2, 0, 3, 5)},
        ValueError,
        r"scores must have.*at least one class, got \(2, 0, 3, 5\)",
    ),
    "labels type": ({"labels": None}, TypeError, "labels must be a torch.Tensor, got NoneType"),
    "labels dtype": (
        {"labels": L.float()},
        TypeError,
        "labels must be uint8, int32 or int64, got float32",
    ),
    "labels bool": ({"labels": L.bool()}, TypeError, "labels must be.* got bool"),
    "labels int16": ({"labels": L.short()}, TypeError, "labels must be.* got int16"),
    "labels shape": (
        {"labels": L[:, :, :4]},
        ValueError,
        r"labels must have shape \(2, 3, 5\) to match scores \(2, 4, 3, 5\), got \(2, 3, 4\)",
    ),
    "labels batch": ({"labels": L[:1]}, ValueError, r"labels must have.*got \(1, 3, 5\)"),
    "labels with classes": (
        {"labels": L[:, None]},
        ValueError,
        r"labels must have shape \(2, 3, 5\).*got \(2, 1, 3, 5\)",
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
    "adversarial None": ({"adversarial_labels": None}, TypeError, "adversarial_labels must be"),
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
        {"adversarial_labels": L[..., 0]},
        ValueError,
        r"adversarial_labels must have shape \(2, 3, 5\).*got \(2, 3\)",
    ),
    "adversarial device": (
        {"adversarial_labels": L.to("meta")},
        ValueError,
        r"adversarial_labels must be on the device of scores \(cpu\), got meta",
    ),
    "goal": ({"goal": "flee"}, ValueError, "goal must be 'leave' or 'reach', got 'flee'"),
    "goal type": ({"goal": None}, ValueError, "goal must be 'leave' or 'reach', got None"),
    "ignore_index": (
        {"ignore_index": 1.5},
        TypeError,
        "ignore_index must be an integer, got 1.5",
    ),
    "ignore_index bool": ({"ignore_index": True}, TypeError, "ignore_index must be.*got True"),
}


@BOTH
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(module: object, case: str) -> None:
    changed, error, message = WRONG[case]
    given = {"scores": S, "labels": L, "adversarial_labels": L, **changed}
    with pytest.raises(error, match=f"^{message}"):
        module.dag_seed(**given)


def test_hyper_parameters_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        ops.dag_seed(S, L, L, "leave")


PAST_THE_WRAPPER = {
    "scores dtype": ((S.int(), L, L, "leave"), "scores must be float16"),
    "scores shape": ((torch.zeros(3), L, L, "leave"), r"scores must have shape .* got \(3\)"),
    "scores scalar": ((torch.zeros(()), L, L, "leave"), "scores must have shape"),
    "zero classes": ((S[:, :0], L, L, "leave"), "scores must have at least one class"),
    "labels dtype": ((S, L.short(), L, "leave"), "labels must be uint8, int32 or int64"),
    "labels float": ((S, L.float(), L, "leave"), "labels must be uint8, int32 or int64"),
    "labels shape": ((S, L[..., :4], L, "leave"), r"labels must have the shape .*got \(2, 3, 4\)"),
    "labels dims": ((S, L[..., 0], L, "leave"), r"labels must have the shape .*got \(2, 3\)"),
    "labels scalar": ((S, L[0, 0, 0], L, "leave"), "labels must have the shape"),
    "adversarial dtype": ((S, L, L.double(), "leave"), "adversarial_labels must be uint8"),
    "adversarial shape": ((S, L, L[:1], "leave"), r"adversarial_labels must have the shape"),
    "nothing to reach": ((S, L, None, "reach"), "adversarial_labels must be given"),
    "objective": ((S, L, L, "stay"), "objective must be one of leave, reach, got stay"),
}


@pytest.mark.parametrize("case", PAST_THE_WRAPPER)
def test_wrong_arguments_past_the_wrapper(device: torch.device, case: str) -> None:
    given, message = PAST_THE_WRAPPER[case]
    moved = (a.to(device) if isinstance(a, Tensor) else a for a in given)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dagcore.dag_seed(*moved, 255)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_mixed_devices_past_the_wrapper(which: int) -> None:
    given = [S, L, L]
    given[which] = given[which].to("meta")
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.dagcore.dag_seed(*given, "leave", 255)


def test_mixed_devices_with_cuda(cuda: torch.device) -> None:
    with pytest.raises(ValueError, match=r"labels must be on the device of scores \(cuda:0\)"):
        ops.dag_seed(S.to(cuda), L, L.to(cuda))
    with pytest.raises(RuntimeError, match="adversarial_labels must be on the device of scores"):
        torch.ops.dagcore.dag_seed(S.to(cuda), L.to(cuda), L, "leave", 255)


@BOTH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(module: object, device: torch.device, mode: type) -> None:
    scores, labels, adversarial = (t.to(device) for t in random_case((2, 5, 33), 0))
    expected = ops.dag_seed(scores, labels, adversarial)
    with mode():
        got = module.dag_seed(scores.clone(), labels, adversarial)
    assert_same_seed(got, expected, scores)


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

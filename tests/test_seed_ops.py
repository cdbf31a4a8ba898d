"""Both seed ops: `dag_seed`, and `dag_seed_bilinear` through an enlargement of the scores.

What only one of them does is in the test module of its name.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from bilinear_oracle import KINDS, SIZES, assert_seed, label_maps, score_maps, unpruned
from support import (
    BOTH,
    DTYPES,
    GOALS,
    LABEL_DTYPES,
    LAYOUTS,
    MARGINS,
    MODES,
    arguments,
    assert_same_seed,
    bits,
    lay_out,
    lay_out_labels,
    on,
    random_case,
)
from torch import Tensor

from dagcore import ops, reference
from dagcore.ops import native

pytestmark = pytest.mark.cuda_on_host


class Case(NamedTuple):
    scores: Tensor
    labels: Tensor
    adversarial: Tensor
    options: dict[str, Any]  # beside the goal and ignore_index


class AtFullSize:
    """`dag_seed`, whose result is the reference's to the bit."""

    name = "dag_seed"
    shapes = (
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
    count = len(shapes)
    many = (2, 19, 97, 131)  # targets enough for several threads
    # Scores and labels to spoil, and labels with nothing in them.
    blank = ((2, 4, 3, 50), (2, 3, 50))
    empty = (((0, 4, 9), (0, 9)), ((2, 4, 0), (2, 0)), ((0, 4), (0,)), ((0, 4, 0), (0, 0)))
    empty += (((2, 4, 3, 0), (2, 3, 0)),)
    needs_labels = r"\(2, 3, 50\) to match scores \(2, 4, 3, 50\)"
    flags: tuple[float | bool, ...] = (0.0,)  # at the end of the op's arguments

    def case(
        self, k: int | None, turn: int, dtype: torch.dtype, broken: float, **ignore: int
    ) -> Case:
        """The k-th shape, or many targets; every second case holds a few that are not finite."""
        shape = self.many if k is None else self.shapes[k]
        broken = broken or (k or 0) % 2 * 0.02
        return Case(*random_case(shape, k or 0, dtype=dtype, broken=broken, **ignore), {})

    def expected(self, case: Case, scores: Tensor, other: Tensor | str, **settings: Any) -> Any:
        return reference.dag_seed(scores, case.labels, other, **settings)

    def check(self, got: Any, expected: Any, scores: Tensor, case: Case) -> None:
        assert_same_seed(got, expected, scores)


class Enlarged:
    """`dag_seed_bilinear`, whose counts are the unpruned evaluation's and its seed nearly so."""

    name = "dag_seed_bilinear"
    shapes = tuple(SIZES.values())
    count = len(shapes)
    many = ((2, 13), (37, 19), (211, 173))
    blank = ((2, 4, 3, 5), (2, 11, 50))
    empty = tuple(((n, 3, 4, 5), (n, *size)) for n, *size in ((2, 0, 5), (2, 5, 0), (0, 8, 9)))
    needs_labels = r"\(2, H, W\) to match scores \(2, 4, 3, 5\)"
    flags = (0.0, False)

    def case(
        self, k: int | None, turn: int, dtype: torch.dtype, broken: float, **ignore: int
    ) -> Case:
        """The k-th size, or many pixels; kinds of scores and places of the corners in turns."""
        batch, low, size = self.many if k is None else self.shapes[k]
        k, align_corners = k or 0, (turn + (k or 0)) % 2 == 1
        if broken:
            scores, *_ = random_case((*batch, *low), k, dtype=dtype, broken=broken)
        else:
            scores = score_maps((*batch, *low), k, KINDS[(k + turn) // 2 % 2], dtype)
        maps = label_maps(scores, size, align_corners, k, *ignore.values())
        return Case(scores, *maps, {"align_corners": align_corners})

    def expected(self, case: Case, scores: Tensor, other: Tensor | str, **settings: Any) -> Any:
        goal, ignored = settings["goal"], settings.get("ignore_index", 255)
        corners, margin = case.options["align_corners"], settings.get("margin", 0.0)
        return unpruned(scores, case.labels, other, goal, corners, ignored, margin)

    def check(self, got: Any, expected: Any, scores: Tensor, case: Case) -> None:
        corners = case.options["align_corners"]
        assert_seed(got, expected, scores, tuple(case.labels.shape[1:]), corners)


OPS = pytest.mark.parametrize("op", [AtFullSize(), Enlarged()], ids=lambda op: op.name)
Op = AtFullSize | Enlarged
TURNS = len(MODES)


def call(module: object, op: Op, *given: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = getattr(module, op.name)(*given, **settings)
    return result


@functools.cache
def prepared(
    op: Op,
    k: int,
    turn: int,
    dtype: torch.dtype,
    expanded: bool = False,
    broken: float = 0.0,
    **ignore: int,
) -> tuple[Case, Tensor | str, dict[str, Any], tuple[Tensor, Tensor]]:
    """A case, its adversarial labels, goal and margin, which take turns, and what is right."""
    case = op.case(k, turn, dtype, broken, **ignore)
    if expanded:
        case = case._replace(scores=lay_out(case.scores, "expanded").contiguous())
    other, goal = arguments(MODES[turn % TURNS], case.adversarial)
    settings = {"goal": goal, "margin": MARGINS[(turn + k) % len(MARGINS)], **ignore}
    return case, other, settings, op.expected(case, case.scores, other, **settings)


def assert_right(
    module: object,
    op: Op,
    device: torch.device,
    layout: str,
    *which: Any,
    broken: float = 0.0,
    **ignore: int,
) -> None:
    """A case of `prepared`, its scores in a memory layout on a device."""
    case, other, settings, expected = prepared(op, *which, layout == "expanded", broken, **ignore)
    scores, labels, other = on(device, case.scores, case.labels, other)
    scores = lay_out(scores, layout)
    got = call(module, op, scores, labels, other, **settings, **case.options)
    op.check(got, expected, scores, case)
    assert torch.equal(bits(scores).cpu(), bits(case.scores)), "scores were written to"


# --- against the oracle


@pytest.mark.cuda_on_host(False)
@OPS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout(
    device: torch.device, op: Op, dtype: torch.dtype, layout: str
) -> None:
    for k in range(op.count):
        for turn in (k + LAYOUTS.index(layout), k + LAYOUTS.index(layout) + 1):
            assert_right(ops, op, device, layout, k, turn % (2 * TURNS), dtype)


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_simd_level(kernels: torch.device, op: Op, dtype: torch.dtype) -> None:
    for k in range(op.count):
        mode = (k + DTYPES.index(dtype)) % TURNS
        turn = (mode + k % 2 * TURNS) % (2 * TURNS)
        layout = "contiguous" if (k + mode) % 2 else LAYOUTS[1 + (k + mode) % 3]
        assert_right(ops, op, kernels, layout, k, turn, dtype)


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_scores(kernels: torch.device, op: Op, dtype: torch.dtype) -> None:
    for k in range(op.count):
        mode = (k + DTYPES.index(dtype)) % TURNS
        turn = (mode + (k + mode) % 2 * TURNS) % (2 * TURNS)
        broken = (0.01, 0.3, 1.0)[(k + mode) % 3]
        assert_right(ops, op, kernels, "contiguous", k, turn, dtype, broken=broken)


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simd_level_and_thread_count_change_no_bit(
    simd_levels: tuple[str, ...], one_and_two_threads: tuple[int, int], op: Op, dtype: torch.dtype
) -> None:
    layouts = itertools.cycle(LAYOUTS)
    for turn, broken in itertools.product(range(2 * TURNS), (0.0, 0.01)):
        case = op.case(None, turn, dtype, broken)
        other, goal = arguments(MODES[turn % TURNS], case.adversarial)
        scores, results = lay_out(case.scores, next(layouts)), []
        for level, threads in itertools.product(simd_levels, one_and_two_threads):
            native.module.use_simd(level)
            torch.set_num_threads(threads)
            margin = MARGINS[turn % len(MARGINS) - (broken > 0)]
            seed, active = call(
                ops, op, scores, case.labels, other, goal=goal, margin=margin, **case.options
            )
            results.append((bits(seed), active))
        for seed, active in results[1:]:
            assert torch.equal(seed, results[0][0])
            assert torch.equal(active, results[0][1])


# --- labels

LABEL_SHAPES = {"dag_seed": (0, 3, 8), "dag_seed_bilinear": (3, 12)}  # whole, fractional


@OPS
@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
def test_label_dtypes_and_layouts(kernels: torch.device, op: Op, label_dtype: torch.dtype) -> None:
    """Each of the two maps has a dtype and a layout of its own."""
    first = LABEL_DTYPES.index(label_dtype)
    for (i, layout), goal, k in itertools.product(enumerate(LAYOUTS), GOALS, LABEL_SHAPES[op.name]):
        other_dtype = LABEL_DTYPES[(first + i + GOALS.index(goal)) % len(LABEL_DTYPES)]
        case = op.case(k, 0, DTYPES[(i + k) % len(DTYPES)], 0.0)
        scores = lay_out(case.scores.to(kernels), ("contiguous", "class-last")[i % 2])
        labels = lay_out_labels(case.labels.to(label_dtype).to(kernels), layout)  # may repeat one
        other_layout = (layout, "contiguous")[(i + k + GOALS.index(goal)) % 2]
        other = lay_out_labels(case.adversarial.to(other_dtype).to(kernels), other_layout)
        same = case._replace(labels=labels.long().cpu())
        expected = op.expected(same, case.scores, other.long().cpu(), goal=goal)
        got = call(ops, op, scores, labels, other, goal=goal, **case.options)
        op.check(got, expected, scores, case)


@OPS
@pytest.mark.parametrize("ignore_index", [255, -1, -100, 2])
def test_ignore_index(kernels: torch.device, op: Op, ignore_index: int) -> None:
    for k, mode in itertools.product((3, 9), range(TURNS)):
        which = (k, mode, torch.float32)
        assert_right(ops, op, kernels, "contiguous", *which, ignore_index=ignore_index)


@BOTH
@OPS
def test_all_ignored(module: object, device: torch.device, op: Op) -> None:
    shape, targets = op.blank
    scores, *_ = random_case(shape, 0)
    for ignore_index, mode in itertools.product((255, -1, 2), MODES):
        labels = torch.full(targets, ignore_index)
        other, goal = arguments(mode, torch.full(targets, 9999))  # not read
        given = on(device, scores, labels, other)
        seed, active = call(module, op, *given, goal=goal, ignore_index=ignore_index)
        assert active.tolist() == [0, 0]
        assert torch.equal(seed.cpu(), torch.zeros(shape))


@BOTH
@OPS
def test_empty(module: object, device: torch.device, op: Op) -> None:
    for (shape, targets), mode in itertools.product(op.empty, MODES):
        scores = torch.ones(shape, device=device)
        labels = torch.zeros(targets, dtype=torch.int64, device=device)
        other, goal = arguments(mode, labels)
        seed, active = call(module, op, scores, labels, other, goal=goal)
        assert torch.equal(seed, torch.zeros_like(scores))
        assert active.dtype == torch.int32
        assert active.tolist() == [0] * shape[0]


@BOTH
@OPS
@pytest.mark.parametrize("name", ["labels", "adversarial_labels"])
def test_label_out_of_range_on_the_cpu(module: object, op: Op, name: str) -> None:
    for value, goal in itertools.product((4, 300, -1, 2**40, 2**32, -(2**40), 65536), GOALS):
        given = with_one(op, name, value)
        message = (
            rf"^{name} must lie in \[0, 4\) or equal ignore_index=255, got {value} at \(1, 2, 41\)"
        )
        for dtype in DTYPES:
            scores = torch.zeros(op.blank[0], dtype=dtype)
            with pytest.raises(ValueError, match=message):
                call(module, op, scores, **given, goal=goal)


def with_one(op: Op, name: str, value: int) -> dict[str, Tensor]:
    """Labels 0 and adversarial labels 1, of which one has another value."""
    labels = torch.zeros(op.blank[1], dtype=torch.int64)
    given = {"labels": labels, "adversarial_labels": labels + 1}
    given[name][1, 2, 41] = value
    return given


@BOTH
@OPS
@pytest.mark.parametrize("name", ["labels", "adversarial_labels"])
def test_map_of_one_label_that_is_out_of_range(module: object, op: Op, name: str) -> None:
    """With one class far ahead, so that nothing needs to be evaluated."""
    scores = torch.zeros(op.blank[0])
    scores[:, 2] = 9
    given = with_one(op, name, 4)
    given[name].fill_(4)
    message = rf"^{name} must lie in \[0, 4\).*got 4 at \(0, 0, 0\)"
    for goal in GOALS:
        with pytest.raises(ValueError, match=message):
            call(module, op, scores, **given, goal=goal)


@BOTH
@OPS
def test_label_out_of_range_beside_the_runner_up(module: object, op: Op) -> None:
    labels = with_one(op, "labels", 7)["labels"]
    with pytest.raises(ValueError, match=r"^labels must lie in \[0, 4\).* got 7 at \(1, 2, 41\)"):
        call(module, op, torch.zeros(op.blank[0]), labels, "runner-up")


@OPS
@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("name", ["labels", "adversarial_labels"])
def test_label_out_of_range_makes_the_ops_count_negative(
    device: torch.device, op: Op, name: str, goal: str
) -> None:
    """What CUDA users see, and what the wrapper builds its message on."""
    scores = torch.zeros(op.blank[0], device=device)
    scores[:, 2] = 1  # every target of goal "reach" is active, so that the count is large
    given = on(device, *with_one(op, name, 4).values())
    seed, active = getattr(torch.ops.dagcore, op.name)(scores, *given, goal, 255, *op.flags)
    targets = given[0][0].numel()
    assert int(active[0]) == (targets if goal == "reach" else 0)
    assert int(active[1]) < 0
    counted = targets - 1 if goal == "reach" else 0  # the bad one is left out of the seed
    assert float(seed[1].abs().sum()) == pytest.approx(2 * counted)


@OPS
def test_label_out_of_range_on_cuda_is_a_negative_count(cuda: torch.device, op: Op) -> None:
    given = on(cuda, torch.zeros(op.blank[0]), *with_one(op, "labels", 4).values())
    _, active = call(ops, op, *given)
    assert [int(n) >= 0 for n in active] == [True, False]


# --- autograd's state


@OPS
def test_scores_that_require_grad(device: torch.device, op: Op) -> None:
    case, other, settings, expected = prepared(op, 3, 0, torch.float32)
    leaf, labels, other = on(device, case.scores, case.labels, other)
    leaf = leaf.clone().requires_grad_()
    seed, active = call(ops, op, leaf, labels, other, **settings, **case.options)
    assert not seed.requires_grad
    op.check((seed, active), expected, leaf, case)
    (leaf * 2).backward(seed)
    assert torch.equal(leaf.grad, 2 * seed)


@BOTH
@OPS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(module: object, device: torch.device, op: Op, mode: type) -> None:
    case, other, settings, expected = prepared(op, 9, 0, torch.float64)
    scores, labels, other = on(device, case.scores, case.labels, other)
    with mode():
        got = call(module, op, scores.clone(), labels, other, **settings, **case.options)
    op.check(got, expected, scores, case)


@OPS
def test_views_with_pending_negation(op: Op) -> None:
    case, other, settings, expected = prepared(op, 3, 0, torch.float32)
    negated = torch._neg_view(-case.scores)
    got = call(ops, op, negated, case.labels, other, **settings, **case.options)
    op.check(got, expected, case.scores, case)


# --- wrong arguments: which, what takes its place, the error, its message

NOT_LABELS = "must be uint8, int32 or int64, got"
WRONG = {
    "scores type": ("scores", lambda _: [[1.0]], TypeError, "must be a torch.Tensor, got list"),
    "scores dtype": (
        "scores",
        lambda s: s.long(),
        TypeError,
        "must be float16, bfloat16, float32 or float64, got int64",
    ),
    "scores complex": ("scores", lambda s: s.to(torch.complex64), TypeError, "must be.*complex64"),
    "zero classes": (
        "scores",
        lambda s: s[:, :0],
        ValueError,
        r"must have.*at least one class.*got \(2, 0, 3, ",
    ),
    "labels type": ("labels", lambda _: None, TypeError, "must be a torch.Tensor, got NoneType"),
    "labels dtype": ("labels", lambda m: m.float(), TypeError, f"{NOT_LABELS} float32"),
    "labels bool": ("labels", lambda m: m.bool(), TypeError, f"{NOT_LABELS} bool"),
    "labels int16": ("labels", lambda m: m.short(), TypeError, f"{NOT_LABELS} int16"),
    "labels dims": ("labels", lambda m: m[0], ValueError, r"must have shape {needs}, got \("),
    "labels batch": ("labels", lambda m: m[:1], ValueError, r"must have shape {needs}, got \(1, "),
    "labels with classes": (
        "labels",
        lambda m: m[:, None],
        ValueError,
        r"must have shape {needs}, got \(2, 1, ",
    ),
    "labels device": (
        "labels",
        lambda m: m.to("meta"),
        ValueError,
        r"must be on the device of scores \(cpu\), got meta",
    ),
    "adversarial type": (
        "adversarial_labels",
        lambda _: 3,
        TypeError,
        "must be a torch.Tensor, got int",
    ),
    "adversarial None": ("adversarial_labels", lambda _: None, TypeError, "must be"),
    "adversarial kind": (
        "adversarial_labels",
        lambda _: "strongest",
        ValueError,
        "must be a tensor or 'runner-up', got 'strongest'",
    ),
    "adversarial dtype": (
        "adversarial_labels",
        lambda m: m.double(),
        TypeError,
        f"{NOT_LABELS} float64",
    ),
    "adversarial shape": (
        "adversarial_labels",
        lambda m: m[..., :10],
        ValueError,
        r"must have shape \(2, \d+, 50\) to match .*, got \(2, \d+, 10\)",
    ),
    "adversarial dims": (
        "adversarial_labels",
        lambda m: m[..., 0],
        ValueError,
        r"must have shape \(2, \d+, 50\).*got \(2, \d+\)",
    ),
    "adversarial device": (
        "adversarial_labels",
        lambda m: m.to("meta"),
        ValueError,
        r"must be on the device of scores \(cpu\), got meta",
    ),
    "goal": ("goal", lambda _: "flee", ValueError, "must be 'leave' or 'reach', got 'flee'"),
    "goal type": ("goal", lambda _: None, ValueError, "must be 'leave' or 'reach', got None"),
    "ignore_index": ("ignore_index", lambda _: 1.5, TypeError, "must be an integer, got 1.5"),
    "ignore_index bool": ("ignore_index", lambda _: True, TypeError, "must be.*got True"),
}


def valid(op: Op) -> dict[str, Any]:
    labels = torch.zeros(op.blank[1], dtype=torch.int64)
    maps = {"scores": torch.zeros(op.blank[0]), "labels": labels, "adversarial_labels": labels}
    return maps | {"goal": "leave", "ignore_index": 255}


@BOTH
@OPS
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(module: object, op: Op, case: str) -> None:
    name, spoil, error, message = WRONG[case]
    given = valid(op)
    given[name] = spoil(given[name])
    with pytest.raises(error, match=f"^{name} {message.replace('{needs}', op.needs_labels)}"):
        call(module, op, **given)


@BOTH
@OPS
def test_runner_up_cannot_be_reached(module: object, op: Op) -> None:
    message = "^adversarial_labels must be a tensor for goal='reach', got 'runner-up'"
    with pytest.raises(ValueError, match=message):
        call(module, op, **valid(op) | {"adversarial_labels": "runner-up", "goal": "reach"})


@BOTH
@OPS
def test_hyper_parameters_are_keyword_only(module: object, op: Op) -> None:
    with pytest.raises(TypeError, match="positional"):
        call(module, op, *list(valid(op).values())[:4])


PAST_THE_WRAPPER = {
    "scores dtype": ("scores", lambda s: s.int(), "scores must be float16"),
    "scores vector": ("scores", lambda s: s[0, 0, 0], r"scores must have shape .*got \(\d+\)"),
    "scores scalar": ("scores", lambda s: s[0, 0, 0, 0], "scores must have shape"),
    "zero classes": ("scores", lambda s: s[:, :0], "scores must have .*at least one class"),
    "labels dtype": ("labels", lambda m: m.short(), "labels must be uint8, int32 or int64"),
    "labels float": ("labels", lambda m: m.float(), "labels must be uint8, int32 or int64"),
    "labels batch": ("labels", lambda m: m[:1], r"labels must have .*shape .*got \(1, \d+, 50\)"),
    "labels dims": ("labels", lambda m: m[..., 0], r"labels must have .*shape .*got \(2, \d+\)"),
    "labels scalar": ("labels", lambda m: m[0, 0, 0], "labels must have .*shape"),
    "adversarial dtype": ("adversarial_labels", lambda m: m.double(), "{name} must be uint8"),
    "adversarial dims": ("adversarial_labels", lambda m: m[0], "{name} must have .*shape"),
    "adversarial batch": ("adversarial_labels", lambda m: m[:1], "{name} must have .*shape"),
    "adversarial shape": ("adversarial_labels", lambda m: m[:, :2], "{name} must have .*shape"),
    "nothing to reach": ("adversarial_labels", lambda _: None, "{name} must be given"),
}


@OPS
@pytest.mark.parametrize("case", PAST_THE_WRAPPER)
def test_wrong_arguments_past_the_wrapper(device: torch.device, op: Op, case: str) -> None:
    name, spoil, message = PAST_THE_WRAPPER[case]
    given = valid(op)
    given[name] = spoil(given[name])
    objective = "reach" if case.startswith("nothing") else "leave"
    with pytest.raises(RuntimeError, match=message.replace("{name}", name)):
        past_the_wrapper(op, on(device, *list(given.values())[:3]), objective)


@OPS
def test_an_unknown_objective(device: torch.device, op: Op) -> None:
    with pytest.raises(RuntimeError, match="objective must be one of leave, reach, got stay"):
        past_the_wrapper(op, on(device, *list(valid(op).values())[:3]), "stay")


def past_the_wrapper(op: Op, tensors: list[Any], objective: str = "leave") -> None:
    getattr(torch.ops.dagcore, op.name)(*tensors, objective, 255, *op.flags)


@OPS
@pytest.mark.parametrize("which", [0, 1, 2])
def test_mixed_devices_past_the_wrapper(op: Op, which: int) -> None:
    given = list(valid(op).values())[:3]
    given[which] = given[which].to("meta")
    with pytest.raises(RuntimeError, match="device"):
        past_the_wrapper(op, given)


@OPS
def test_mixed_devices_with_cuda(cuda: torch.device, op: Op) -> None:
    scores, labels, adversarial = list(valid(op).values())[:3]
    with pytest.raises(ValueError, match=r"labels must be on the device of scores \(cuda:0\)"):
        call(ops, op, scores.to(cuda), labels, adversarial.to(cuda))
    with pytest.raises(RuntimeError, match="adversarial_labels must be on the device of scores"):
        past_the_wrapper(op, [scores.to(cuda), labels.to(cuda), adversarial])


# --- what the cases are


@OPS
def test_cases_have_active_and_inactive_targets(op: Op) -> None:
    for turn in range(2 * TURNS):
        case = op.case(None, turn, torch.float32, 0.0)
        other, goal = arguments(MODES[turn % TURNS], case.adversarial)
        _, active = op.expected(case, case.scores, other, goal=goal)
        targets = case.labels[0].numel()
        assert bool(((active > targets / 10) & (active < targets * 9 / 10)).all())

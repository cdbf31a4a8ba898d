"""The ops on generated input: the reference's answer, or an error that names the argument."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bilinear_oracle import (
    adjoint,
    assert_near,
    assert_seed,
    capacity,
    enlarged,
    score_maps,
    unpruned,
)
from fuzzing import ANYTHING, SEEDS, negated, one_in, strange_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DTYPES,
    INF,
    LABEL_DTYPES,
    LAYOUTS,
    MARGINS,
    MODES,
    NAN,
    arguments,
    assert_same_seed,
    bits,
    generator,
    lay_out,
    lay_out_labels,
    random_case,
    same_bits,
)
from torch import Tensor

from dagcore import ops, reference
from dagcore.checks import LOSSES, NORMS

PUBLIC = tuple(op for op in ops.OPS if op != "settle_")  # which is the loop's own, unchecked
ON_HOST = pytest.mark.usefixtures("cpu_or_cuda_on_host")
SELDOM = settings(max_examples=settings().max_examples // 3)
EXTENTS = st.sampled_from((0, 1, 1, 2, 3, 4, 7, 8, 17))
LARGE = ((129,), (1025,), (33, 41), (1, 130), (64, 65))
MOST = 20_000  # scores of an image
IGNORED = (255, 255, -1, 0, 2, 256, -(2**63), 2**63 - 1)
OUT_OF_RANGE = (-1, -2, 77, 254, 2**31 - 1, -(2**31), 2**40, -(2**63))


def as_labels(draw: st.DrawFn, labels: Tensor, num_classes: int, ignored: int) -> Tensor:
    """Labels of any integer type and layout, one in ten with one that is out of range."""
    dtype, layout = draw(st.sampled_from(LABEL_DTYPES)), draw(st.sampled_from(LAYOUTS))
    if labels.numel() and one_in(draw, 10):
        where = draw(st.integers(0, labels.numel() - 1))
        labels.view(-1)[where] = draw(st.sampled_from((*OUT_OF_RANGE, num_classes)))
    if dtype != torch.int64:  # what does not fit wraps around: another label, as good
        held = labels.to(dtype)
        fits = held.long() == labels
        labels = held if fits.all() else torch.where(fits, held, 0)
    return lay_out_labels(labels, layout) if labels.numel() else labels.contiguous()


@st.composite
def seed_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | str, dict[str, Any]]:
    """Arguments of `dag_seed`."""
    num_images = draw(st.sampled_from((0, 1, 1, 2, 3)))
    num_classes = draw(st.sampled_from((1, 2, 3, 5, 21, 300)))
    if one_in(draw, 15):
        targets = draw(st.sampled_from(LARGE))
    else:
        targets = tuple(draw(st.lists(EXTENTS, max_size=4)))
    while num_classes * math.prod(targets) > MOST:
        targets = targets[1:]
    ignored = draw(st.sampled_from(IGNORED))
    scores, labels, adversarial = random_case(
        (num_images, num_classes, *targets),
        draw(SEEDS),
        dtype=draw(st.sampled_from(DTYPES)),
        ignore_index=ignored,
        broken=draw(st.sampled_from((0, 0, 0.02, 0.3))),
    )
    if scores.numel():
        scores = lay_out(scores, draw(st.sampled_from(LAYOUTS)))
    if one_in(draw, 20):
        scores = negated(scores)
    labels = as_labels(draw, labels, num_classes, ignored)
    adversarial = as_labels(draw, adversarial, num_classes, ignored)
    other, goal = arguments(draw(st.sampled_from(MODES)), adversarial)
    margin = draw(st.sampled_from((*MARGINS, 1e-30, 1e300)))
    return scores, labels, other, {"goal": goal, "ignore_index": ignored, "margin": margin}


@st.composite
def bilinear_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | str, dict[str, Any]]:
    """Arguments of `dag_seed_bilinear`."""
    num_images, num_classes = draw(st.sampled_from((0, 1, 1, 2))), draw(st.sampled_from((1, 2, 5)))
    if one_in(draw, 15):
        num_classes = 40
    low = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    size = draw(st.tuples(st.integers(0, 24), st.integers(0, 24)))
    if one_in(draw, 15):
        size = draw(st.sampled_from(((1, 130), (70, 3), (65, 66), (48, 48))))
    shape, seed, dtype = (num_images, num_classes, *low), draw(SEEDS), draw(st.sampled_from(DTYPES))
    ignored, broken = draw(st.sampled_from(IGNORED)), draw(st.sampled_from((0, 0, 0.05, 0.5)))
    if draw(st.booleans()):
        scores, *_ = random_case(shape, seed, dtype=dtype, broken=broken)
    else:
        scores = score_maps(shape, seed, "random", dtype)
    if scores.numel():
        scores = lay_out(scores, draw(st.sampled_from(LAYOUTS)))
    _, labels, adversarial = random_case((*shape[:2], *size), seed + 1, ignore_index=ignored)
    align_corners = draw(st.booleans())
    if scores.numel() and labels.numel() and draw(st.booleans()):
        won = enlarged(scores, size, align_corners).argmax(1)
        labels = torch.where(labels == ignored, labels, won)
    labels = as_labels(draw, labels, num_classes, ignored)
    adversarial = as_labels(draw, adversarial, num_classes, ignored)
    other, goal = arguments(draw(st.sampled_from(MODES)), adversarial)
    settings = {"goal": goal, "ignore_index": ignored, "align_corners": align_corners}
    return scores, labels, other, settings | {"margin": draw(st.sampled_from((*MARGINS, 1e-30)))}


@st.composite
def loss_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | str | None, dict[str, Any]]:
    """Arguments of `loss_seed`."""
    scores, labels, other, settings = draw(seed_cases())
    return draw_loss(draw, scores, labels, other, settings["ignore_index"])


@st.composite
def bilinear_loss_cases(
    draw: st.DrawFn,
) -> tuple[Tensor, Tensor, Tensor | str | None, dict[str, Any]]:
    """Arguments of `loss_seed_bilinear`."""
    scores, labels, other, settings = draw(bilinear_cases())
    case = draw_loss(draw, scores, labels, other, settings["ignore_index"])
    case[3]["align_corners"] = settings["align_corners"]
    return case


def draw_loss(
    draw: st.DrawFn, scores: Tensor, labels: Tensor, other: Tensor | str | None, ignored: int
) -> tuple[Tensor, Tensor, Tensor | str | None, dict[str, Any]]:
    """A loss with its settings, and the adversarial labels that it can have."""
    loss = draw(st.sampled_from(LOSSES))
    if loss != "dag" and (isinstance(other, str) or draw(st.booleans())):
        other = None
    weights = None
    if draw(st.booleans()):
        dtype, rng = draw(st.sampled_from(DTYPES)), generator(draw(SEEDS))
        weights = torch.rand(scores.shape[1], generator=rng).to(dtype)
    unit = st.sampled_from((0, 0.0, 0.25, 1, 1.0))
    blend = draw(unit)
    if draw(st.booleans()):
        blend = torch.tensor([draw(unit) for _ in scores], dtype=torch.float64)
    kappa = draw(st.sampled_from((0, 1 / math.pi, INF)))  # no difference of two blended scores
    numbers = {"blend": blend, "q": draw(unit), "kappa": kappa}
    settings = {"loss": loss, "class_weights": weights, "ignore_index": ignored}
    return scores, labels, other, settings | numbers


@st.composite
def argmax_cases(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int], dict[str, Any]]:
    """Arguments of `argmax_bilinear`."""
    scores, labels, _, settings = draw(bilinear_cases())
    return scores, tuple(labels.shape[1:]), {"align_corners": settings["align_corners"]}


@st.composite
def step_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
    """Arguments of `linf_step_`."""
    num_images = draw(st.sampled_from((0, 1, 1, 2, 3)))
    pixels = tuple(draw(st.lists(EXTENTS, max_size=4)))
    if one_in(draw, 15):
        pixels = draw(st.sampled_from((*LARGE, (16383,), (3, 16385))))
    shape, rng = (num_images, *pixels), generator(draw(SEEDS))
    dtype = draw(st.sampled_from(DTYPES))
    broken = draw(st.sampled_from((0, 0, 0.01, 0.2)))
    magnitude = draw(st.sampled_from((1, 1, 1e-6, 1e-40, 1e4, 1e38)))

    def values(scale: float, broken: float) -> Tensor:
        drawn = torch.randn(shape, generator=rng, dtype=torch.float64) * scale
        for value in (NAN, INF, -INF, 0.0, -0.0):
            drawn[torch.rand(shape, generator=rng) < broken] = value
        return drawn.to(dtype)

    tensors = [values(0.5, broken), values(0.5, broken), values(magnitude, broken / 4)]
    if tensors[0].numel():
        layouts = LAYOUTS if len(shape) > 1 else ("contiguous", "gaps", "expanded")
        chosen = [draw(st.sampled_from(layouts)) for _ in tensors]
        chosen[0] = "gaps" if chosen[0] == "expanded" else chosen[0]
        tensors = [lay_out(t, layout) for t, layout in zip(tensors, chosen, strict=True)]
    if one_in(draw, 20):
        tensors[1:] = map(negated, tensors[1:])
    counts = st.sampled_from((0, 1, 1, 5, -1, -(2**31), 2**31 - 1))
    active = torch.tensor([draw(counts) for _ in range(num_images)], dtype=torch.int32)
    bound = st.sampled_from((None, -INF, -0.25, 0, 0.0))
    settings = {
        "gamma": draw(st.sampled_from((0.5 / 255, 1, 3e-5, 1e-30, 1e30, 1e300, 5e-324))),
        "lower": draw(bound),
        "upper": draw(st.sampled_from((None, INF, 1e-3, 0.75, 1, 1e300))),
        "epsilon": draw(st.sampled_from((None, INF, 0.01, 2, 1e-30, 1e300))),
    }
    ends = (settings["lower"], settings["upper"])
    if all(end is not None and abs(end) < 1e3 for end in ends) and draw(st.booleans()):
        grid = values(0.5, 0)
        layout = draw(st.sampled_from(("contiguous", "gaps")))
        settings["grid"] = lay_out(grid, layout) if grid.numel() else grid
        settings["levels"] = draw(st.sampled_from((2, 3, 256, 2**16)))
    return *tensors, active, settings


@st.composite
def pgd_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `pgd_step_`: those of `linf_step_`, and what else this step can have."""
    images, origin, gradient, active, step = draw(step_cases())
    given = {"images": images, "origin": origin, "gradient": gradient, "active": active}
    given |= {name: step[name] for name in ("lower", "upper", "grid", "levels") if name in step}
    given["norm"] = draw(st.sampled_from(NORMS))
    rng, shape = generator(draw(SEEDS)), images.shape
    layouts = st.sampled_from(("contiguous", "gaps"))

    def each(name: str, values: tuple[float | None, ...]) -> None:
        one = st.sampled_from(values)
        if draw(st.booleans()):
            given[name] = draw(one)
        else:
            drawn = [INF if value is None else value for value in (draw(one) for _ in images)]
            given[name] = torch.tensor(drawn, dtype=torch.float64)

    def written(scale: float, dtype: torch.dtype) -> Tensor:
        values = (torch.randn(shape, generator=rng, dtype=torch.float64) * scale).to(dtype)
        return lay_out(values, draw(layouts)) if values.numel() else values

    each("alpha", (0.5 / 255, 1, 3e-5, 1e30, 5e-324, 1e300))
    each("epsilon", (None, INF, 0.01, 2, 1e-30, 1e300))
    if draw(st.booleans()):
        real = torch.float64 if images.dtype == torch.float64 else torch.float32
        given["momentum"] = written(draw(st.sampled_from((0, 1e-3, 1))), real)
        given["decay"] = draw(st.sampled_from((0, 0.0, 0.9, 1)))
    if draw(st.booleans()):
        given["previous"] = written(0.5, images.dtype)
        each("share", (0, 0.75, 1, 1.0))
    return given


def result_or_error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or its TypeError or ValueError; any other exception goes through."""
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        return error


def assert_same_error(got: Any, expected: Any, names: tuple[str, ...]) -> None:
    assert type(got) is type(expected), (got, expected)
    assert str(got) == str(expected)
    assert str(got).startswith(names), f"{got} does not begin with an argument's name"


SEED_NAMES = ("scores", "labels", "adversarial_labels", "goal", "ignore_index", "align_corners")
SEED_NAMES += ("margin", "loss", "blend", "q", "kappa", "class_weights")
SIZE_NAMES = ("scores", "size", "align_corners")
STEP_NAMES = ("images", "origin", "gradient", "active", "gamma", "lower", "upper", "epsilon")
STEP_NAMES += ("grid", "levels", "norm", "alpha", "momentum", "decay", "previous", "share")
STEP_NAMES += ("metric", "weight")


@ON_HOST
@given(seed_cases())
def test_dag_seed(case: Any) -> None:
    scores, labels, other, settings = case
    before = bits(scores)
    got = result_or_error(ops.dag_seed, scores, labels, other, **settings)
    expected = result_or_error(reference.dag_seed, scores, labels, other, **settings)
    assert torch.equal(bits(scores), before), "scores were written to"
    if isinstance(expected, Exception):
        assert_same_error(got, expected, ("labels must lie", "adversarial_labels must lie"))
        return
    assert_same_seed(got, expected, scores)


@ON_HOST
@given(bilinear_cases())
def test_dag_seed_bilinear(case: Any) -> None:
    scores, labels, other, settings = case
    before = bits(scores)
    got = result_or_error(ops.dag_seed_bilinear, scores, labels, other, **settings)
    expected = result_or_error(reference.dag_seed_bilinear, scores, labels, other, **settings)
    assert torch.equal(bits(scores), before), "scores were written to"
    if isinstance(expected, Exception):
        assert_same_error(got, expected, ("labels must lie", "adversarial_labels must lie"))
        return
    seed, active = got
    if not labels.numel():
        assert (seed.dtype, seed.shape) == (scores.dtype, scores.shape)
        assert seed.stride() == torch.empty_like(scores).stride()
        assert not seed.any()
        assert not active.any()
        return
    size, corners = tuple(labels.shape[1:]), settings["align_corners"]
    rule = (settings["ignore_index"], settings["margin"])
    right = unpruned(scores, labels, other, settings["goal"], corners, *rule)
    assert_seed(got, right, scores, size, corners)


@ON_HOST
@given(loss_cases())
def test_loss_seed(case: Any) -> None:
    scores, labels, other, settings = case
    before = bits(scores)
    got = result_or_error(ops.loss_seed, scores, labels, other, **settings)
    expected = result_or_error(reference.loss_seed, scores, labels, other, **settings)
    assert torch.equal(bits(scores), before), "scores were written to"
    if isinstance(expected, Exception):
        assert_same_error(
            got, expected, ("labels must lie", "adversarial_labels must lie", "scores")
        )
        return
    for values, wanted in zip(got[:2], expected[:2], strict=True):
        assert values.dtype == wanted.dtype
        assert values.stride() == wanted.stride()
        finite = wanted.double().masked_fill(~wanted.isfinite(), 0)
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        rtol = 2e-3 if scores.dtype == torch.float16 else 1e-2
        rtol = rtol if values is got[0] and scores.element_size() == 2 else 2e-6
        atol = 1e-6 * max(largest, 1.0)
        torch.testing.assert_close(values, wanted, rtol=rtol, atol=atol, equal_nan=True)
    assert torch.equal(got[2], expected[2])


@ON_HOST
@given(bilinear_loss_cases())
def test_loss_seed_bilinear(case: Any) -> None:
    scores, labels, other, settings = case
    before = bits(scores)
    got = result_or_error(ops.loss_seed_bilinear, scores, labels, other, **settings)
    expected = result_or_error(reference.loss_seed_bilinear, scores, labels, other, **settings)
    assert torch.equal(bits(scores), before), "scores were written to"
    if isinstance(expected, Exception):
        assert_same_error(
            got, expected, ("labels must lie", "adversarial_labels must lie", "scores")
        )
        return
    seed, sums, hits = got
    assert (seed.dtype, seed.shape, seed.stride()) == (
        scores.dtype,
        scores.shape,
        torch.empty_like(scores).stride(),
    )
    if not labels.numel():
        assert not any(map(torch.any, got))
        return
    (exact, values, right), largest = enlarged_loss(scores, labels, other, settings)
    assert torch.equal(hits, right)
    torch.testing.assert_close(sums, values, rtol=2e-6, atol=1e-6 * largest, equal_nan=True)
    assert_near(seed, exact, 2e-6 * largest)


def enlarged_loss(
    scores: Tensor, labels: Tensor, other: Tensor | str | None, settings: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """The reference at scores that are blended as the ops do, in float64, and the adjoint; then
    the largest gradient of a pixel times the largest sum of weights."""
    size, align_corners = tuple(labels.shape[1:]), settings["align_corners"]
    rest = {name: value for name, value in settings.items() if name != "align_corners"}
    same = size == tuple(scores.shape[2:])
    high = scores if same else enlarged(scores, size, align_corners)
    if rest["class_weights"] is not None:
        rest["class_weights"] = rest["class_weights"].to(reference.norm_dtype(scores))
    pixels, sums, hits = reference.loss_seed(high.double(), labels, other, **rest)
    seed = adjoint(pixels, tuple(scores.shape[2:]), align_corners)
    most = float(pixels.abs().max().clamp(min=1))
    return (seed, sums, hits), most * capacity(tuple(scores.shape[2:]), size, align_corners)


@ON_HOST
@given(argmax_cases())
def test_argmax_bilinear(case: Any) -> None:
    scores, size, settings = case
    got = ops.argmax_bilinear(scores, size, **settings)
    assert got.dtype == torch.int64
    assert got.shape == (len(scores), *size)
    if got.numel():
        assert torch.equal(got, enlarged(scores, size, settings["align_corners"]).argmax(1))


@ON_HOST
@given(step_cases())
def test_linf_step(case: Any) -> None:
    images, origin, gradient, active, settings = case
    expected, before = images.clone(), [bits(origin), bits(gradient)]
    grid = settings.get("grid")
    on_grid = {} if grid is None else {"grid": grid.clone()}
    expected_norms = reference.linf_step_(expected, origin, gradient, active, **settings | on_grid)
    norms = ops.linf_step_(images, origin, gradient, active, **settings)
    assert grid is None or same_bits(grid, on_grid["grid"])
    assert same_bits(images, expected)
    assert same_bits(norms, expected_norms)
    assert torch.equal(bits(origin), before[0]), "origin was written to"
    assert torch.equal(bits(gradient), before[1]), "gradient was written to"


@ON_HOST
@given(pgd_cases())
def test_pgd_step(given: Any) -> None:
    """The same bits where no norm is summed up; elsewhere a norm may differ in its last place."""
    expected, before = {k: copied(v) for k, v in given.items()}, {}
    for name in ("images", "momentum", "previous", "grid", "origin", "gradient"):
        if name in given:
            before[name] = bits(given[name])
    wanted = reference.pgd_step_(**expected)
    moved = ops.pgd_step_(**given)
    assert torch.equal(moved, wanted)
    for name, old in before.items():
        stays = torch.ones_like(moved) if name in ("origin", "gradient") else ~moved
        assert torch.equal(bits(given[name])[stays], old[stays]), f"{name} was written to"
    exact = given["norm"] == "linf" and "momentum" not in given
    for name in ("images", "momentum", "previous", "grid"):
        if name in given and exact:
            assert same_bits(given[name], expected[name])
        elif name in given and name != "grid":  # which may be shown a level beside
            rtol = 1e-5 if given[name].element_size() > 2 else 1e-2
            close = {"rtol": rtol, "atol": rtol, "equal_nan": True}
            torch.testing.assert_close(given[name], expected[name], **close)


# --- arguments that are none


def valid_arguments(op: str) -> dict[str, Any]:
    if op in ("linf_step_", "pgd_step_", "linf_prox_"):
        images, origin, gradient = torch.rand(3, 2, 3, 4, generator=generator(0)).unbind(0)
        active = torch.ones(2, dtype=torch.int32)
        tensors = {"images": images, "origin": origin, "gradient": gradient, "active": active}
        limits = {"lower": 0.0, "upper": 1.0, "epsilon": 0.1}
        if op == "linf_prox_":
            tensors |= {"metric": 0.1 + gradient, "alpha": torch.full((2,), 0.01).double()}
            return tensors | limits | {"weight": 0.5}
        tensors |= {"grid": gradient.clone(), "levels": 256}
        if op == "linf_step_":
            return tensors | limits | {"gamma": 0.01}
        step = {"norm": "l2", "alpha": torch.ones(2, dtype=torch.float64) / 9, "decay": 0.9}
        step |= {"momentum": images.clone(), "previous": images.clone(), "share": 0.75}
        return tensors | limits | step
    scores, labels, adversarial = random_case((2, 3, 4, 5), 0)
    if op == "argmax_bilinear":
        return {"scores": scores, "size": (3, 7), "align_corners": False}
    maps = {"scores": scores, "labels": labels, "adversarial_labels": adversarial}
    if op in ("loss_seed", "loss_seed_bilinear"):
        blend = torch.tensor([0.5, 0.25], dtype=torch.float64)
        numbers = {"blend": blend, "q": 0.5, "kappa": 0.5, "class_weights": torch.rand(3)}
        more = {"align_corners": True} if op == "loss_seed_bilinear" else {}
        return maps | {"loss": "blended-cross-entropy", "ignore_index": 255} | numbers | more
    more = {"align_corners": True} if op == "dag_seed_bilinear" else {}
    return maps | {"goal": "leave", "ignore_index": 255, "margin": 0.5} | more


def same(got: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return all(map(same, got, expected))
    if expected.is_floating_point() and expected.device.type == "cpu":
        return torch.allclose(got, expected, equal_nan=True)
    return got.shape == expected.shape and got.dtype == expected.dtype


def in_place_of(value: Any) -> list[Any]:
    """What an argument is replaced with."""
    return [*ANYTHING, *(strange_tensors(value) if isinstance(value, Tensor) else ())]


@pytest.mark.parametrize("op", PUBLIC)
def test_one_wrong_argument(op: str) -> None:
    valid = valid_arguments(op)
    for name, value in valid.items():
        for other in in_place_of(value):
            assert_same_answer(op, valid | {name: other})


@pytest.mark.parametrize("op", PUBLIC)
@SELDOM
@given(data=st.data())
def test_two_wrong_arguments(op: str, data: st.DataObject) -> None:
    given, pools = pools_of(op)
    names = st.lists(st.sampled_from(sorted(given)), min_size=2, max_size=2, unique=True)
    wrong = {name: data.draw(st.sampled_from(pools[name])) for name in data.draw(names)}
    assert_same_answer(op, given | wrong)


@functools.cache
def pools_of(op: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    valid = valid_arguments(op)
    return valid, {name: in_place_of(value) for name, value in valid.items()}


def assert_same_answer(op: str, given: dict[str, Any]) -> None:
    mine, theirs = ({k: copied(v) for k, v in given.items()} for _ in range(2))
    got = result_or_error(getattr(ops, op), **mine)
    expected = result_or_error(getattr(reference, op), **theirs)
    if isinstance(expected, Exception) or isinstance(got, Exception):
        names = STEP_NAMES if op.endswith("_") else (*SEED_NAMES, *SIZE_NAMES)
        assert_same_error(got, expected, names)
        return
    assert same(got, expected)


def copied(value: Any) -> Any:
    """A tensor of its own, where that can be, as the ops write to some."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    return value.clone() if plain else value

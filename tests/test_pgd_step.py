from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
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

from dagcore import ops, reference
from dagcore.levels import nearest, shown
from dagcore.ops import fallback
from dagcore.perturbation import round_to_8_bits

pytestmark = pytest.mark.cuda_on_host

NORMS = ("linf", "l2")
KINDS = tuple(  # norm, with momentum, with previous, with levels
    itertools.product(NORMS, (False, True), (False, True), (False, True))
)
WRITABLE = tuple(layout for layout in LAYOUTS if layout != "expanded")
WRITTEN = ("images", "momentum", "previous", "grid")
FREE = {"norm": "linf", "alpha": 0.01, "epsilon": None, "lower": None, "upper": None}
ONE = torch.ones(1, dtype=torch.int32)


def real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def of_each(values: list[float], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def counts(values: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def case(
    shape: tuple[int, ...],
    seed: int,
    dtype: torch.dtype,
    kind: tuple[str, bool, bool, bool] = ("linf", False, False, False),
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments of a step: images around an origin of 8 bits, a step and a ball for each image.

    Every second ball is small enough for the step to leave it, and every fifth there is none.
    """
    norm, with_momentum, with_previous, with_levels = kind
    rng = generator(seed)
    count, size = shape[0], math.sqrt(max(1, math.prod(shape[1:]))) if norm == "l2" else 1.0
    origin = round_to_8_bits(torch.rand(shape, generator=rng))
    drawn = {"images": origin + 0.03 * torch.randn(shape, generator=rng), "origin": origin}
    drawn["images"] = drawn["images"].clamp(0, 1)
    drawn["gradient"] = torch.randn(shape, generator=rng) * 3
    numbers = {"lower": 0.0, "upper": 1.0}
    if with_previous:
        drawn["previous"] = origin + 0.01 * torch.randn(shape, generator=rng)
        numbers["share"] = of_each([(0.75, 1.0, 0.5)[n % 3] for n in range(count)], device)
    if with_levels:
        drawn["grid"] = torch.full(shape, 7.0)
        numbers["levels"] = 256
    tensors = {name: value.to(device, dtype) for name, value in drawn.items()}
    if with_momentum:
        momentum = torch.randn(shape, generator=rng) / max(1, math.prod(shape[1:]))
        tensors["momentum"] = momentum.to(device, real(dtype))
        numbers["decay"] = 0.9
    active = counts([(3, 0, 7, 1)[n % 4] for n in range(count)], device)
    alpha = of_each([0.01 * (1 + n % 3) * size for n in range(count)], device)
    balls = [INF if n % 5 == 3 else (0.01, 0.05)[n // 2 % 2] * size for n in range(count)]
    numbers |= {"norm": norm, "active": active, "alpha": alpha, "epsilon": of_each(balls, device)}
    return tensors | numbers


def tensors_of(given: dict[str, Any]) -> dict[str, Tensor]:
    return {k: given[k] for k in (*WRITTEN, "origin", "gradient") if k in given}


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return given | {name: value.clone() for name, value in tensors_of(given).items()}


def assert_close(got: Tensor, expected: Tensor, exact: bool) -> None:
    if exact:
        assert same_bits(got, expected)
        return
    # A norm may differ in its last place, and so then does what is rounded: by one of the dtype's.
    rtol = max(4 * torch.finfo(got.dtype).eps, 0.0)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol / 4, equal_nan=True)


def assert_steps_alike(given: dict[str, Any]) -> Tensor:
    """One step by ops and one by the reference: the same bits where no sum is involved."""
    expected = copied(given)
    read = {name: bits(given[name]) for name in ("origin", "gradient")}
    before = {name: bits(given[name]) for name in WRITTEN if name in given}
    wanted = reference.pgd_step_(**expected)
    moved = ops.pgd_step_(**given)
    assert moved.dtype == torch.bool
    assert torch.equal(moved, wanted)
    exact = given["norm"] == "linf" and "momentum" not in given
    for name, old in before.items():
        got = given[name]
        assert torch.equal(bits(got)[~moved], old[~moved]), f"{name} of an image that stays"
        if name != "grid":
            assert_close(got, expected[name], exact)
        elif bool(moved.any()):  # exactly what is to be shown of the shadow
            for n in moved.nonzero().flatten().tolist():
                pair = given["images"][n : n + 1], given["origin"][n : n + 1]
                limits = given["levels"], given["lower"], given["upper"], float(given["epsilon"][n])
                right = reference.on_levels(*pair, *limits, given["norm"])
                assert same_bits(got[n : n + 1], right)
    for name, old in read.items():
        assert torch.equal(bits(given[name]), old), f"{name} was written to"
    return moved


# --- native against the reference


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    others, writable = itertools.cycle(LAYOUTS), itertools.cycle(WRITABLE)
    shapes = ((4, 3, 33, 41), (4, 1, 1, 1), (4, 2, 7, 151), (4, 4, 3, 5, 2))
    for k, (kind, shape) in enumerate(zip(KINDS, itertools.cycle(shapes), strict=False)):
        given = case(shape, k, dtype, kind, device)
        for name, value in tensors_of(given).items():
            other = next(others if name in ("origin", "gradient") else writable)
            given[name] = lay_out(value, layout if name == "images" else other)
        assert_steps_alike(given)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_simd_level(
    kernels: torch.device, dtype: torch.dtype, kind: tuple[str, bool, bool, bool]
) -> None:
    layout = WRITABLE[(KINDS.index(kind) + DTYPES.index(dtype)) % len(WRITABLE)]
    given = case((4, 2, 7, 151), 0, dtype, kind, kernels)
    given |= {name: lay_out(value, layout) for name, value in tensors_of(given).items()}
    moved = assert_steps_alike(given)
    assert moved.tolist() == [True, False, True, True]


@pytest.mark.parametrize("where", UNPACKED)
@pytest.mark.parametrize(
    "which", ["images", "origin", "gradient", "momentum", "previous", "grid", "all"]
)
def test_pixels_that_cannot_be_read_several_at_once(
    kernels: torch.device, which: str, where: str
) -> None:
    """Tensors that do not go through the vectors or packs of a kernel, one of them or all."""
    shape = (4, 2, 5, 13) if where == "rows" else (4, 2, 5, 16)
    for (k, dtype), norm in itertools.product(enumerate(DTYPES), NORMS):
        given = case(shape, k, dtype, (norm, True, True, True), kernels)
        for name, value in tensors_of(given).items():
            given[name] = unpacked(value, where) if which in (name, "all") else value
        assert_steps_alike(given)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_sizes(kernels: torch.device, dtype: torch.dtype, norm: str) -> None:
    """Around a vector's width, around the pixels of a block and of a task."""
    sizes = ((4,), (2, 3), (1, 127), (1, 128), (3, 129), (2, 16383), (1, 16384), (2, 16385))
    for k, shape in enumerate((*sizes, (1, 3, 129, 151), (2, 3, 1, 1))):
        kind = (norm, k % 2 == 0, k % 3 == 0, k % 2 == 1)
        assert_steps_alike(case(shape, k, dtype, kind, kernels))


@pytest.mark.cuda_on_host("every-order")  # 66,000 blocks of fibers
def test_more_images_than_a_grid_has_rows(device: torch.device) -> None:
    """CUDA's grids have at most 65,535 blocks in every direction but the first."""
    given = case((66_000, 3), 0, torch.float32, device=device)
    right = copied(given)
    moved = ops.pgd_step_(**given)
    last = slice(65_000, None)
    per_image = ("active", "alpha", "epsilon")
    rows = {k: right[k][last] for k in (*tensors_of(right), *per_image)}
    assert torch.equal(moved[last], reference.pgd_step_(**right | rows))
    assert same_bits(given["images"][last], right["images"][last])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_threads_and_vectors_change_no_bit(
    one_and_two_threads: tuple[int, int],
    simd_levels: tuple[str, ...],
    kind: tuple[str, bool, bool, bool],
) -> None:
    from dagcore.ops import native

    for k, dtype in enumerate(DTYPES):
        results, layout = [], ("contiguous", "gaps")[(k + KINDS.index(kind)) % 2]
        for threads, level in itertools.product(one_and_two_threads, simd_levels):
            torch.set_num_threads(threads)
            native.module.use_simd(level)
            given = case((3, 3, 129, 151), 2, dtype, kind)
            given |= {name: lay_out(value, layout) for name, value in tensors_of(given).items()}
            moved = ops.pgd_step_(**given)
            results.append([moved.float(), *(given[k] for k in WRITTEN if k in given)])
        for result in results[1:]:
            assert all(map(same_bits, result, results[0]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_in_a_batch_is_the_image_alone(
    device: torch.device, dtype: torch.dtype, kind: tuple[str, bool, bool, bool]
) -> None:
    together = case((5, 3, 4, 5), 0, dtype, kind, device)
    before = copied(together)
    ops.pgd_step_(**together)
    for n in range(5):
        alone = {k: v[n : n + 1] if isinstance(v, Tensor) else v for k, v in before.items()}
        ops.pgd_step_(**alone)
        for name in WRITTEN:
            assert name not in alone or same_bits(alone[name][0], together[name][n])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fallback(dtype: torch.dtype, kind: tuple[str, bool, bool, bool]) -> None:
    given = case((5, 3, 9, 11), 0, dtype, kind)
    given["gradient"][0, 0, 0, 0], given["gradient"][3] = NAN, 0
    expected = copied(given)
    wanted = ops.pgd_step_(**expected)
    names = "images origin gradient active norm alpha epsilon lower upper momentum decay previous"
    rest = [given.get(name) for name in (*names.split(), "share", "grid", "levels")]
    rest[10], rest[-1] = given.get("decay", 0.0), given.get("levels", 0)
    assert torch.equal(fallback.pgd_step_(*rest), wanted)
    for name in WRITTEN:
        if name == "grid" and name in given:
            pair = (given["images"].to(real(dtype)), given["origin"].to(real(dtype)))
            right = shown(*pair, (0.0, 1.0), 256, given["epsilon"], given["norm"]).to(dtype)
            assert torch.equal(given["grid"][wanted], right[wanted])
            assert bool((given["grid"][~wanted] == 7).all())
        elif name in given:
            assert_close(given[name], expected[name], exact=False)


# --- what a step is, in float64


def oracle(given: dict[str, Any], n: int) -> dict[str, Tensor]:
    """One image's step in float64, by the formulas."""
    x, o, d = (given[k][n].double().clone() for k in ("images", "origin", "gradient"))
    alpha, epsilon = float(given["alpha"][n]), float(given["epsilon"][n])
    l2 = given["norm"] == "l2"
    found = {}

    def project(value: Tensor) -> Tensor:
        r = value - o
        r = r * min(1.0, epsilon / float(r.norm())) if l2 else r.clamp(-epsilon, epsilon)
        return (o + r).clamp(given["lower"], given["upper"])

    if "momentum" in given:
        d = given["decay"] * given["momentum"][n].double() + d / d.abs().sum()
        found["momentum"] = d
    z = project(x + alpha * (d / d.norm() if l2 else d.sign()))
    if "previous" in given:
        share = float(given["share"][n])
        z = project(x + share * (z - x) + (1 - share) * (x - given["previous"][n].double()))
        found["previous"] = x
    return found | {"images": z}


@BOTH
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind[3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_formulas_in_float64(
    module: Any, kernels: torch.device, dtype: torch.dtype, kind: tuple[str, bool, bool, bool]
) -> None:
    given = case((8, 3, 37, 50), 3, dtype, kind, kernels)
    given["active"].fill_(1)
    expected = [oracle(given, n) for n in range(8)]
    assert bool(module.pgd_step_(**given).all())
    atol = 1e-6 if dtype == torch.float32 else 1e-14
    for n, wanted in enumerate(expected):
        for name, value in wanted.items():
            torch.testing.assert_close(given[name][n].double(), value, rtol=1e-6, atol=atol)


@BOTH
@pytest.mark.parametrize("norm", NORMS)
def test_the_step_is_alpha_long(module: Any, device: torch.device, norm: str) -> None:
    given = case((3, 3, 30, 40), 0, torch.float64, (norm, False, False, False), device)
    given |= {"lower": None, "upper": None, "epsilon": None}
    before = given["images"].clone()
    moved = module.pgd_step_(**given)
    step = (given["images"] - before).flatten(1)
    length = step.norm(dim=1) if norm == "l2" else step.abs().amax(1)
    torch.testing.assert_close(length, given["alpha"] * moved)


@BOTH
def test_by_hand(module: Any, device: torch.device) -> None:
    def moved(norm: str, gradient: list[float], **settings: Any) -> list[float]:
        images = torch.tensor([[0.5, 0.5, 0.5, 0.5]], device=device)
        given = FREE | {"norm": norm, "alpha": 0.25} | settings
        gradients = torch.tensor([gradient], device=device)
        assert module.pgd_step_(images, images.clone(), gradients, ONE.to(device), **given)
        return images[0].tolist()

    assert moved("linf", [3.0, -1e-9, 0.0, -0.0]) == [0.75, 0.25, 0.5, 0.5]
    assert moved("linf", [3.0, -1.0, 0.0, 0.0], epsilon=0.125) == [0.625, 0.375, 0.5, 0.5]
    assert moved("linf", [3.0, -1.0, 1.0, 0.0], upper=0.625, lower=0.375) == [
        0.625,
        0.375,
        0.625,
        0.5,
    ]
    assert moved("l2", [0.0, 0.0, -7.0, 0.0]) == [0.5, 0.5, 0.25, 0.5]
    assert moved("l2", [1.0, 1.0, -1.0, 1.0]) == [0.625, 0.625, 0.375, 0.625]
    assert moved("l2", [1.0, 1.0, -1.0, 1.0], epsilon=0.125) == [0.5625, 0.5625, 0.4375, 0.5625]
    assert moved("l2", [1.0, 1.0, -1.0, 1.0], upper=0.5) == [0.5, 0.5, 0.375, 0.5]


@BOTH
def test_momentum_by_hand(module: Any, device: torch.device) -> None:
    images = torch.zeros(1, 3, device=device)
    momentum = torch.tensor([[0.5, -1.0, 0.0]], device=device)
    settings = FREE | {"alpha": 1.0, "momentum": momentum, "decay": 0.5}
    gradient, active = torch.tensor([[-3.0, 1.0, 0.0]], device=device), ONE.to(device)
    assert module.pgd_step_(images, images.clone(), gradient, active, **settings)
    assert momentum.tolist() == [[0.25 - 0.75, -0.5 + 0.25, 0.0]]
    assert images.tolist() == [[-1.0, -1.0, 0.0]]
    # A gradient of zero goes on in the old direction.
    assert module.pgd_step_(images, images.clone(), gradient * 0, active, **settings)
    assert momentum.tolist() == [[-0.25, -0.125, 0.0]]
    assert images.tolist() == [[-2.0, -2.0, 0.0]]


@BOTH
def test_apgd_by_hand(module: Any, device: torch.device) -> None:
    """x = 0.5, z = 1 (clipped), 0.75 of the way there and a quarter of the step before."""
    images, previous = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]], device=device).movedim(1, 0)
    gradient = torch.tensor([[1.0, 1.0]], device=device)
    settings = FREE | {"alpha": 0.75, "upper": 1.0, "share": 0.75, "previous": previous}
    assert module.pgd_step_(images, images.clone(), gradient, ONE.to(device), **settings)
    assert previous.tolist() == [[0.5, 0.5]]
    assert images.tolist() == [[0.5 + 0.375 + 0.0625, 0.5 + 0.375 - 0.0625]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_numbers_are_those_of_every_image(
    device: torch.device, norm: str, dtype: torch.dtype
) -> None:
    one = case((3, 2, 5, 7), 0, dtype, (norm, False, True, False), device)
    one |= {"alpha": 0.02, "epsilon": 0.05, "share": 0.75}
    other = copied(one)
    other |= {k: of_each([one[k]] * 3, device) for k in ("alpha", "epsilon", "share")}
    other["alpha"] = other["alpha"].repeat_interleave(2)[::2]  # with gaps
    assert torch.equal(ops.pgd_step_(**one), ops.pgd_step_(**other))
    assert same_bits(one["images"], other["images"])


# --- images that stay


def kept(given: dict[str, Any]) -> dict[str, Tensor]:
    return {name: bits(given[name]) for name in WRITTEN if name in given}


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inactive_images_are_not_touched(
    device: torch.device, dtype: torch.dtype, norm: str, layout: str
) -> None:
    given = case((5, 3, 9, 17), 0, dtype, (norm, True, True, True), device)
    given["images"][0, 0, 0, :3] = torch.tensor([NAN, INF, 7.0])  # a clip would show
    given["momentum"][2, 0, 0, :2] = torch.tensor([-0.0, NAN])
    given["gradient"][2, 1, 1, 1] = NAN
    given["active"] = counts([0, 4, -1, 1, -(2**31)], device)
    given |= {name: lay_out(value, layout) for name, value in tensors_of(given).items()}
    before = kept(given)
    assert ops.pgd_step_(**given).tolist() == [False, True, False, True, False]
    for name, old in before.items():
        for n, stays in enumerate([True, False, True, False, True]):
            assert torch.equal(bits(given[name])[n], old[n]) == stays


@BOTH
@pytest.mark.parametrize("with_momentum", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_useless_gradients_leave_the_image(
    module: Any, kernels: torch.device, dtype: torch.dtype, norm: str, with_momentum: bool
) -> None:
    given = case((8, 3, 9, 17), 1, dtype, (norm, with_momentum, True, True), kernels)
    given["active"].fill_(1)
    given["images"][:, 0, 0, 0] = 5  # out of bounds: must stay too
    gradient = given["gradient"]
    gradient[0] = 0
    gradient[1] = -0.0
    gradient[2, 1, 3, 4] = NAN
    gradient[3, 1, 3, 4] = INF
    gradient[4, 2, 8, 16] = -INF
    gradient[5, 0, 0, 0], gradient[5, 2, 8, 16] = INF, NAN
    gradient[6] = 0
    if with_momentum:
        given["momentum"][:2] = 0
    before = kept(given)
    wanted = [False] * 6 + [with_momentum, True]
    assert module.pgd_step_(**given).tolist() == wanted
    for name, old in before.items():
        for n, moves in enumerate(wanted):
            assert torch.equal(bits(given[name])[n], old[n]) != moves


@BOTH
def test_directions_that_cannot_be_normalised(module: Any, kernels: torch.device) -> None:
    """1e-45 has no inverse in float32, nor 1e-310 in float64; 1e-37 and 1e38 are gradients."""
    tiny, small, large = ([value, -value] for value in (1e-45, 1e-37, 1e38))
    for with_momentum, norm in itertools.product((False, True), NORMS):
        gradient = torch.tensor([tiny, small, large], device=kernels)
        images = torch.full_like(gradient, 0.5)
        settings = FREE | {"norm": norm, "alpha": 0.25}
        if with_momentum:
            settings |= {"momentum": torch.zeros_like(images), "decay": 1.0}
        active = counts([1, 1, 1], kernels)
        moved = module.pgd_step_(images, images.clone(), gradient, active, **settings)
        usable = norm == "linf" and not with_momentum  # a sign has no norm
        assert moved.tolist() == [usable, True, True]
        length = 0.25 if norm == "linf" else 0.25 / math.sqrt(2)
        wanted = images.new_tensor([[length * n, -length * n] for n in (usable, 1, 1)]) + 0.5
        torch.testing.assert_close(images, wanted, rtol=1e-3, atol=0)
    gradient = torch.tensor([[1e-310, 0.0], [1e-150, 1e-150]], dtype=torch.float64, device=kernels)
    images = torch.full_like(gradient, 0.5)
    settings = FREE | {"norm": "l2"}
    moved = module.pgd_step_(images, images.clone(), gradient, counts([1, 1], kernels), **settings)
    assert moved.tolist() == [False, True]


@BOTH
def test_momentum_that_cancels(module: Any, kernels: torch.device) -> None:
    """The next momentum is zero everywhere: no direction, and the old momentum is kept."""
    for norm in NORMS:
        images = torch.full((1, 300), 0.5, device=kernels)
        gradient = torch.zeros_like(images)
        gradient[0, 299] = 3
        momentum = torch.zeros_like(images)
        momentum[0, 299] = -1
        settings = FREE | {"norm": norm, "momentum": momentum, "decay": 1.0}
        active = ONE.to(kernels)
        assert not module.pgd_step_(images, images.clone(), gradient, active, **settings)
        assert float(momentum[0, 299]) == -1
        assert bool((images == 0.5).all())
        momentum[0, 299] = 2  # the only pixel with a direction is the last
        assert module.pgd_step_(images, images.clone(), gradient, active, **settings)
        assert float(momentum[0, 299]) == 3
        assert float(images[0, 299]) == pytest.approx(0.51)
        assert bool((images[0, :299] == 0.5).all())


def test_huge_gradients_of_float64(kernels: torch.device) -> None:
    gradient = torch.full((1, 40_000), 1.7e308, dtype=torch.float64, device=kernels)
    images = torch.zeros_like(gradient)
    assert ops.pgd_step_(images, images.clone(), gradient, ONE.to(kernels), **FREE)
    assert bool((images == 0.01).all())


@pytest.mark.parametrize("which", ["alpha", "epsilon", "share"])
@pytest.mark.parametrize("value", [NAN, -1.0, -INF])
def test_numbers_of_a_gpu_are_not_read_but_their_images_stay(
    device: torch.device, which: str, value: float
) -> None:
    given = case((2, 3, 4), 0, torch.float32, ("linf", False, True, False), device)
    given["active"].fill_(1)
    given[which][0] = value
    before = bits(given["images"])
    names = ["images", "origin", "gradient", "active", "norm", "alpha", "epsilon", "lower", "upper"]
    numbers = (None, 0.0, given["previous"], given["share"], None, 0)
    moved = torch.ops.dagcore.pgd_step_(*(given[name] for name in names), *numbers)
    assert moved.tolist() == [False, True]
    assert torch.equal(bits(given["images"])[0], before[0])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5), (0,), (2, 0)])
def test_empty(
    device: torch.device, shape: tuple[int, ...], kind: tuple[str, bool, bool, bool]
) -> None:
    for dtype in DTYPES:
        moved = assert_steps_alike(case(shape, 0, dtype, kind, device))
        assert moved.tolist() == [False] * shape[0]


@pytest.mark.parametrize("norm", NORMS)
def test_origin_may_be_the_images_themselves(device: torch.device, norm: str) -> None:
    given = case((2, 3, 33, 41), 5, torch.float32, (norm, False, False, True), device)
    given |= {"origin": given["images"], "images": given["images"].clone()}
    expected = copied(given)
    reference.pgd_step_(**expected)
    given["images"] = given["origin"]
    ops.pgd_step_(**given)
    assert_close(given["images"], expected["images"], exact=norm == "linf")


@pytest.mark.parametrize("norm", NORMS)
def test_origin_does_not_matter_without_a_ball(kernels: torch.device, norm: str) -> None:
    given = case((2, 4, 10), 0, torch.float32, (norm, False, False, False), kernels)
    given["epsilon"] = None
    expected = copied(given)
    given["origin"][:, 0, :3] = torch.tensor([NAN, INF, -INF])
    assert torch.equal(ops.pgd_step_(**given), ops.pgd_step_(**expected))
    assert same_bits(given["images"], expected["images"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_images(kernels: torch.device, dtype: torch.dtype) -> None:
    """NaN and infinity among the images, in L-infinity, where pixels do not touch one another."""
    values = [NAN, INF, -INF, -0.0, 0.0, 1.0, 0.5, 3.0]
    for epsilon, previous in itertools.product((None, 0.1), (False, True)):
        given = case((2, 88), 0, dtype, ("linf", False, previous, False), kernels)
        given["images"][:] = torch.tensor(values, dtype=dtype, device=kernels).repeat(11)
        given |= {"epsilon": epsilon, "lower": None}
        assert_steps_alike(given)


# --- levels

BOUNDS = ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0))


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_shown_is_on_the_levels_and_in_the_ball(
    kernels: torch.device, dtype: torch.dtype, norm: str, bounds: tuple[float, float]
) -> None:
    """Many steps of images that are pressed against the ball, as those of an attack are."""
    lower, width = bounds[0], bounds[1] - bounds[0]
    rng, shape = generator(0), (3, 3, 17, 29)
    origin = round_to_8_bits(torch.rand(shape, generator=rng) * width + lower, bounds)
    origin = origin.to(kernels, dtype)
    shadow, grid = origin.clone(), torch.full_like(origin, 7.0)
    size = math.sqrt(origin[0].numel()) if norm == "l2" else 1.0
    radii = [1.6 / 255 * width * size, 4 / 255 * width * size, 0.3 / 255 * width * size]
    settings = {"norm": norm, "alpha": 0.02 * width * size, "epsilon": of_each(radii, kernels)}
    settings |= {"lower": bounds[0], "upper": bounds[1], "grid": grid, "levels": 256}
    for _ in range(5):
        gradient = torch.randn(shape, generator=rng).to(kernels, dtype)
        active = counts([1, 1, 1], kernels)
        assert ops.pgd_step_(shadow, origin, gradient, active, **settings).all()
        level = nearest(grid, bounds, 256)
        assert same_bits(grid, round_to_8_bits(grid, bounds))
        assert 0 <= float(level.min()) <= float(level.max()) <= 255
        away = (level - nearest(origin, bounds, 256)).double().flatten(1)
        away = away.norm(dim=1) if norm == "l2" else away.abs().amax(1)
        most = [radius / width * 255 for radius in radii]
        assert all(float(a) <= m * (1 + 1e-6) for a, m in zip(away, most, strict=True))
    used = [round(float(a) / m, 1) for a, m in zip(away, most, strict=True)]
    assert min(used[:2]) >= 0.6, "the ball is hardly used"
    assert same_bits(grid, shown(shadow, origin, bounds, 256, settings["epsilon"], norm))


@BOTH
def test_levels_by_hand_in_l2(module: Any, kernels: torch.device) -> None:
    """Five levels a quarter apart; pixels are 0.6, 1.7 and -0.9 levels away from their origin."""
    origin = torch.tensor([[0.5, 0.25, 0.5]], device=kernels)
    shadow = origin + torch.tensor([[0.15, 0.425, -0.225]], device=kernels)
    gradient = torch.tensor([[1.0, 1.0, -1.0]], device=kernels)
    found = {}
    for radius in (2.5, 2.4, 2.2, 2.0):  # in levels; the shadow is 2.02 away
        grid = torch.zeros_like(origin)
        settings = {"norm": "l2", "alpha": 1e-6, "epsilon": radius / 4, "lower": 0.0, "upper": 1.0}
        given = (shadow.clone(), origin, gradient, ONE.to(kernels))
        assert module.pgd_step_(*given, **settings, grid=grid, levels=5)
        found[radius] = ((grid - origin) * 4).tolist()
    assert found == {
        2.5: [[1, 2, -1]],  # the nearest: sqrt(6) = 2.45
        2.4: [[0, 2, -1]],  # 0.6 is at most 10/16: sqrt(5) = 2.24
        2.2: [[0, 1, -1]],  # 0.7 is at most 12/16: sqrt(2)
        2.0: [[0, 1, -1]],
    }


def test_shadows_that_are_shown_towards_the_origin(kernels: torch.device) -> None:
    """Every pixel 0.9999 of a level away, in a ball that holds no more: nothing else is left."""
    origin = torch.full((1, 1000), 0.5, dtype=torch.float64, device=kernels)
    gradient, grid = torch.ones_like(origin), torch.zeros_like(origin)
    settings = {"norm": "l2", "alpha": 9.0, "epsilon": 0.9999 * math.sqrt(1000) / 4}
    settings |= {"lower": 0.0, "upper": 1.0, "grid": grid, "levels": 5}
    shadow = origin.clone()
    assert ops.pgd_step_(shadow, origin, gradient, ONE.to(kernels), **settings)
    torch.testing.assert_close(shadow, origin + 0.9999 / 4)
    assert torch.equal(grid, origin)


@settings(max_examples=100)
@given(
    st.integers(0, 2**31),
    st.sampled_from((torch.float32, torch.float64)),
    st.sampled_from(NORMS),
    st.booleans(),
    st.floats(1e-3, 3.0),
    st.floats(1e-3, 3.0),
)
def test_images_stay_within_both_balls(
    seed: int, dtype: torch.dtype, norm: str, previous: bool, alpha: float, epsilon: float
) -> None:
    given = case((2, 3, 4, 5), seed, dtype, (norm, True, previous, False))
    given |= {"alpha": alpha, "epsilon": epsilon, "active": counts([1, 1])}
    ops.pgd_step_(**given)
    images = given["images"].double()
    away = (images - given["origin"].double()).flatten(1)
    away = away.norm(dim=1) if norm == "l2" else away.abs().amax(1)
    assert float(away.max()) <= epsilon * (1 + 1e-6) + 1e-7
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1


# --- autograd


@BOTH
@pytest.mark.parametrize("which", WRITTEN)
def test_autograd_notices_the_writes(module: Any, which: str) -> None:
    given = case((2, 3), 0, torch.float32, ("linf", True, True, True))
    weight = torch.ones(2, 3, requires_grad=True)
    product = (weight * given[which]).sum()  # needs the values as they are now
    module.pgd_step_(**given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@BOTH
def test_tensors_that_require_grad(module: Any) -> None:
    given = case((2, 3, 5, 7), 0, torch.float32, ("l2", True, True, True))
    expected = copied(given)
    reference.pgd_step_(**expected)
    leaves = given | {k: v.clone().requires_grad_() for k, v in tensors_of(given).items()}
    moved = module.pgd_step_(**leaves)
    assert_close(leaves["images"].detach(), expected["images"], exact=False)
    assert not moved.requires_grad
    assert leaves["images"].is_leaf


# --- wrong arguments: what is replaced, the error, its message

X, A = torch.zeros(2, 3, 4), torch.ones(2, dtype=torch.int32)
EACH = torch.ones(2, dtype=torch.float64)
WRONG = {
    "images type": ({"images": 1.0}, TypeError, "images must be a torch.Tensor, got float"),
    "images dtype": ({"images": X.int()}, TypeError, "images must be float16, bfloat16, float32"),
    "images expanded": (
        {"images": X[:1].expand(2, 3, 4)},
        ValueError,
        "images must not be an expanded tensor: it is written in place",
    ),
    "origin shape": (
        {"origin": X[:, :2]},
        ValueError,
        r"origin must have shape \(2, 3, 4\) to match images, got \(2, 2, 4\)",
    ),
    "gradient dtype": ({"gradient": X.double()}, TypeError, "gradient must be float32, got float6"),
    "gradient device": ({"gradient": X.to("meta")}, ValueError, "gradient must be on the device"),
    "active dtype": ({"active": A.long()}, TypeError, "active must be int32, got int64"),
    "norm": ({"norm": "l1"}, ValueError, "norm must be 'linf' or 'l2', got 'l1'"),
    "alpha 0": ({"alpha": 0}, ValueError, "alpha must be a finite number above 0, got 0"),
    "alpha infinite": ({"alpha": INF}, ValueError, "alpha must be a finite number above 0"),
    "alpha type": ({"alpha": "1"}, TypeError, "alpha must be a number, got '1'"),
    "alpha dtype": ({"alpha": EACH.float()}, TypeError, "alpha must be float64, got float32"),
    "alpha shape": (
        {"alpha": EACH[:1]},
        ValueError,
        r"alpha must have shape \(2,\) to match images, got \(1,\)",
    ),
    "alpha device": ({"alpha": EACH.to("meta")}, ValueError, "alpha must be on the device of"),
    "alpha of one image": (
        {"alpha": of_each([1.0, NAN])},
        ValueError,
        "alpha must be a finite number above 0, got nan",
    ),
    "epsilon 0": ({"epsilon": 0.0}, ValueError, "epsilon must be a number above 0, got 0.0"),
    "epsilon of one image": (
        {"epsilon": of_each([INF, -1.0])},
        ValueError,
        "epsilon must be a number above 0, got -1.0",
    ),
    "epsilon dtype": ({"epsilon": A}, TypeError, "epsilon must be float64, got int32"),
    "lower NaN": ({"lower": NAN}, ValueError, "lower must be a number, got nan"),
    "bounds swapped": ({"lower": 1, "upper": 0}, ValueError, "lower must be below upper, got 1"),
    "momentum type": ({"momentum": 0.5}, TypeError, "momentum must be a torch.Tensor, got float"),
    "momentum dtype": ({"momentum": X.double()}, TypeError, "momentum must be float32, got float6"),
    "momentum shape": ({"momentum": X[:1]}, ValueError, r"momentum must have shape \(2, 3, 4\)"),
    "momentum expanded": (
        {"momentum": X[:1].expand(2, 3, 4)},
        ValueError,
        "momentum must not be an expanded tensor",
    ),
    "decay negative": (
        {"momentum": X, "decay": -1},
        ValueError,
        "decay must be a finite number of",
    ),
    "decay infinite": ({"momentum": X, "decay": INF}, ValueError, "decay must be a finite number"),
    "decay alone": ({"decay": 0.5}, ValueError, "momentum must be given with decay, got None and"),
    "previous alone": (
        {"previous": X.clone()},
        ValueError,
        "previous and share must be given together, got previous=Tensor and share=NoneType",
    ),
    "share alone": ({"share": 0.75}, ValueError, "previous and share must be given together"),
    "previous dtype": (
        {"previous": X.half(), "share": 1},
        TypeError,
        "previous must be float32, got float16",
    ),
    "share above 1": (
        {"previous": X, "share": 1.5},
        ValueError,
        "share must be at most 1, got 1.5",
    ),
    "share below 0": (
        {"previous": X, "share": of_each([0.5, -0.5])},
        ValueError,
        "share must be a finite number of at least 0, got -0.5",
    ),
    "grid alone": ({"grid": X.clone()}, ValueError, "grid and levels must be given together"),
    "one level": (
        {"grid": X, "levels": 1, "lower": 0, "upper": 1},
        ValueError,
        "levels must be at",
    ),
    "levels without bounds": (
        {"grid": X, "levels": 256},
        ValueError,
        "lower and upper must be finite with levels, got -inf and inf",
    ),
}


@BOTH
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(module: Any, name: str) -> None:
    changed, error, message = WRONG[name]
    images = X.clone()
    given = {"images": images, "origin": X + 1, "gradient": X + 1, "active": A, **FREE, **changed}
    with pytest.raises(error, match=f"^{message}"):
        module.pgd_step_(**given)
    assert torch.equal(images, X)


@BOTH
@pytest.mark.parametrize("name", ["momentum", "previous", "grid"])
@pytest.mark.parametrize("other", ["images", "origin", "gradient", "momentum", "previous"])
def test_what_is_written_has_memory_of_its_own(module: Any, name: str, other: str) -> None:
    given = case((2, 3, 4), 0, torch.float32, ("linf", True, True, True))
    if name == other or (name, other) == ("momentum", "previous"):
        name, other = "previous", "momentum"
    given[name] = given[other]
    message = f"^{name} must not share memory with {other}"
    with pytest.raises(ValueError, match=message):
        module.pgd_step_(**given)


PAST_THE_WRAPPER = {
    "images dtype": ({"images": X.int()}, "origin must have the dtype of images"),
    "origin shape": ({"origin": X[:, :2]}, r"origin must have the shape .* got \(2, 2, 4\)"),
    "active dtype": ({"active": A.long()}, r"active must be int32 of shape \(2\)"),
    "norm": ({"norm": "l1"}, "norm must be one of linf, l2, got l1"),
    "alpha dtype": ({"alpha": EACH.float()}, r"alpha must be contiguous float64 of shape \(2\)"),
    "alpha shape": ({"alpha": EACH[:1]}, r"alpha must be contiguous .* got \(1\)"),
    "epsilon gaps": (
        {"epsilon": EACH.repeat(2)[::2]},
        r"epsilon must be contiguous float64 of shape \(2\), got \(2\)",
    ),
    "momentum dtype": ({"momentum": X.half()}, "momentum must be float32"),
    "momentum shape": ({"momentum": X[:1]}, r"momentum must have the shape .* got \(1, 3, 4\)"),
    "momentum expanded": ({"momentum": X[:1].expand(2, 3, 4)}, "momentum must not be an expanded"),
    "previous alone": ({"previous": X}, "previous and share must be given together"),
    "previous dtype": ({"previous": X.half(), "share": EACH}, "previous must have the dtype"),
    "previous expanded": (
        {"previous": X[:1].expand(2, 3, 4), "share": EACH},
        "previous must not be an expanded tensor",
    ),
    "share dtype": ({"previous": X, "share": EACH.int()}, "share must be contiguous float64"),
    "grid dtype": ({"grid": X.half()}, "grid must have the dtype of images"),
    "one level": ({"grid": X, "levels": 1}, "levels must be from 2 to 131072 with a grid, got 1"),
    "no bounds": ({"grid": X, "levels": 9, "upper": INF}, "lower and upper must be finite with a"),
}


@pytest.mark.parametrize("name", PAST_THE_WRAPPER)
def test_wrong_arguments_past_the_wrapper(device: torch.device, name: str) -> None:
    changed, message = PAST_THE_WRAPPER[name]
    given = {"images": X, "origin": X, "gradient": X, "active": A, "norm": "linf", "alpha": EACH}
    given |= {"epsilon": EACH, "lower": 0.0, "upper": 1.0, "momentum": None, "decay": 0.5}
    given |= {"previous": None, "share": None, "grid": None, "levels": 256} | changed
    arguments = [v.to(device) if isinstance(v, Tensor) else v for v in given.values()]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dagcore.pgd_step_(*arguments)

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, example, given, settings
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

pytestmark = pytest.mark.cuda_on_host

GAMMA = 0.5 / 255
FREE = {"gamma": GAMMA, "lower": None, "upper": None, "epsilon": None}
WRITABLE = tuple(layout for layout in LAYOUTS if layout != "expanded")
CLIPS = (
    {"lower": None, "upper": None, "epsilon": None},
    {"lower": 0.0, "upper": 1.0, "epsilon": None},
    {"lower": 0.0, "upper": None, "epsilon": 0.01},
    {"lower": None, "upper": 0.9, "epsilon": 0.003},
    {"lower": 0.1, "upper": 0.9, "epsilon": 0.01},
)


def case(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Images that have moved up to 0.02 away from their origin, and a gradient; on the CPU."""
    rng = generator(seed)
    origin = torch.rand(shape, generator=rng)
    images = (origin + 0.02 * (2 * torch.rand(shape, generator=rng) - 1)).clamp(0, 1)
    gradient = torch.randn(shape, generator=rng) * 3
    return images.to(dtype), origin.to(dtype), gradient.to(dtype)


def counts(values: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_steps_alike(
    images: Tensor, origin: Tensor, gradient: Tensor, active: Tensor, **settings
):
    """One step by ops and one by the reference, on images of the same layout: the same bits."""
    expected = images.clone()  # keeps the strides of dense tensors, and the values of all
    before = [bits(origin), bits(gradient)]
    expected_norms = reference.linf_step_(expected, origin, gradient, active, **settings)
    norms = ops.linf_step_(images, origin, gradient, active, **settings)
    assert same_bits(images, expected)
    assert same_bits(norms, expected_norms)
    assert norms.dtype == (torch.float64 if images.dtype == torch.float64 else torch.float32)
    assert norms.device == images.device
    assert torch.equal(bits(origin), before[0]), "origin was written to"
    assert torch.equal(bits(gradient), before[1]), "gradient was written to"
    return norms


# --- native against the reference


@pytest.mark.cuda_on_host("every-order")
def test_more_images_than_a_grid_has_rows(device: torch.device) -> None:
    """CUDA's grids have at most 65,535 blocks in every direction but the first."""
    images, origin, gradient = (t.to(device) for t in case((65_537, 3), 0, torch.float32))
    active = counts([n % 3 for n in range(len(images))], device)
    assert_steps_alike(images, origin, gradient, active, gamma=GAMMA, **CLIPS[0])


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    others = itertools.product(LAYOUTS, LAYOUTS)
    for k, (origin_layout, gradient_layout) in enumerate(others):
        shape = ((3, 3, 33, 41), (3, 1, 1, 1), (3, 2, 7, 151), (3, 4, 3, 5, 2))[k % 4]
        images, origin, gradient = (t.to(device) for t in case(shape, k, dtype))
        assert_steps_alike(
            lay_out(images, layout),
            lay_out(origin, origin_layout),
            lay_out(gradient, gradient_layout),
            counts([3, 0, 7], device),
            gamma=GAMMA,
            **CLIPS[k % len(CLIPS)],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_simd_level(kernels: torch.device, dtype: torch.dtype) -> None:
    """Both paths over the pixels, those side by side and those apart, with every kind of clip."""
    for (k, layout), clip in itertools.product(enumerate(WRITABLE), CLIPS):
        tensors = [lay_out(t.to(kernels), layout) for t in case((3, 2, 7, 151), k, dtype)]
        assert_steps_alike(*tensors, counts([3, 0, 7], kernels), gamma=GAMMA, **clip)


@pytest.mark.parametrize("where", UNPACKED)
@pytest.mark.parametrize("which", ["images", "origin", "gradient", "grid", "all"])
def test_pixels_that_cannot_be_read_several_at_once(
    kernels: torch.device, which: str, where: str
) -> None:
    """Tensors that do not go through the vectors or packs of a kernel, one of them or all."""
    shape = (3, 2, 5, 13) if where == "rows" else (3, 2, 5, 16)
    for k, dtype in enumerate(DTYPES):
        tensors = [t.to(kernels) for t in case(shape, k, dtype)]
        tensors.append(torch.zeros_like(tensors[0]))
        names = ("images", "origin", "gradient", "grid")
        images, origin, gradient, grid = (
            unpacked(tensor, where) if which in (name, "all") else tensor
            for name, tensor in zip(names, tensors, strict=True)
        )
        expected, shown, rule = images.clone(), grid.clone(), CLIPS[4] | {"gamma": GAMMA}
        active = counts([3, 0, 7], kernels)
        reference.linf_step_(expected, origin, gradient, active, **rule, grid=shown, levels=256)
        ops.linf_step_(images, origin, gradient, active, **rule, grid=grid, levels=256)
        assert same_bits(images, expected)
        assert same_bits(grid, shown)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_sizes(kernels: torch.device, dtype: torch.dtype) -> None:
    """Around a vector's width and around the pixels of a task."""
    sizes = ((4,), (2, 3), (1, 129), (2, 16383), (1, 16384), (2, 16385), (1, 3, 129, 151))
    for (k, shape), clip in itertools.product(enumerate((*sizes, (2, 3, 1, 1))), CLIPS[::2]):
        images, origin, gradient = (t.to(kernels) for t in case(shape, k, dtype))
        active = counts([1] * shape[0], kernels)
        norms = assert_steps_alike(images, origin, gradient, active, gamma=GAMMA, **clip)
        largest = gradient.double().abs().flatten(1).amax(1) if len(shape) > 1 else gradient.abs()
        assert torch.equal(norms.double(), largest.double())


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_finds_the_largest_anywhere(
    module: object, kernels: torch.device, dtype: torch.dtype
) -> None:
    places = (0, 5, 16383, 16384, 40000, 49152)
    for where, sign, layout in itertools.product(places, (1, -1), ("contiguous", "gaps")):
        gradient = torch.full((2, 49153), 0.25, dtype=dtype, device=kernels)
        gradient[1, where] = sign * 2
        images = torch.zeros_like(gradient)
        norms = module.linf_step_(
            images, images.clone(), lay_out(gradient, layout), counts([1, 1], kernels), **FREE
        )
        assert norms.tolist() == [0.25, 2]


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_images_are_not_touched(
    device: torch.device, dtype: torch.dtype, layout: str
) -> None:
    images, origin, gradient = (t.to(device) for t in case((5, 3, 9, 17), 0, dtype))
    images[0, 0, 0, :3] = torch.tensor([NAN, INF, 7.0])  # out of bounds: a clip would show
    images[2, 0, 0, :2] = torch.tensor([-0.0, -INF])
    gradient[2, 1, 1, 1] = NAN
    images = lay_out(images, layout)
    before = bits(images)
    norms = ops.linf_step_(
        images,
        origin,
        gradient,
        counts([0, 4, -1, 1, -(2**31)], device),
        gamma=GAMMA,
        lower=0.2,
        upper=0.8,
        epsilon=1e-3,
    )
    after = bits(images)
    for n, is_frozen in enumerate([True, False, True, False, True]):
        assert torch.equal(after[n], before[n]) == is_frozen
        assert (float(norms[n]) == 0) == is_frozen


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_useless_gradients_leave_the_image(
    module: object, device: torch.device, dtype: torch.dtype
) -> None:
    images, origin, gradient = (t.to(device) for t in case((7, 3, 9, 17), 1, dtype))
    images[:, 0, 0, 0] = 5  # out of bounds: must stay too
    gradient[0] = 0
    gradient[1] = -0.0
    gradient[2, 1, 3, 4] = NAN
    gradient[3, 1, 3, 4] = INF
    gradient[4, 2, 8, 16] = -INF
    gradient[5, 0, 0, 0], gradient[5, 2, 8, 16] = INF, NAN
    before = bits(images)
    norms = module.linf_step_(
        images, origin, gradient, counts([1] * 7, device), gamma=GAMMA, lower=0, upper=1, epsilon=1
    )
    assert torch.equal(bits(images)[:6], before[:6])
    assert not torch.equal(bits(images)[6], before[6])
    assert norms[:2].tolist() == [0, 0]
    assert norms[3:5].tolist() == [INF, INF]
    assert norms[[2, 5]].isnan().all()
    assert float(norms[6]) == float(gradient[6].double().abs().max())


@BOTH
def test_norm_whose_quotient_overflows(module: object, device: torch.device) -> None:
    # gamma / 1e-45 is beyond float32, gamma / 1e-40 is not.
    gradient = torch.tensor([[1e-45, 0.0], [1e-40, -1e-40], [1.0, -1.0]], device=device)
    images = torch.full((3, 2), 0.5, device=device)
    norms = module.linf_step_(images, images.clone(), gradient, counts([1, 1, 1], device), **FREE)
    assert torch.equal(norms, gradient.abs().amax(1))
    assert images[0].tolist() == [0.5, 0.5]
    torch.testing.assert_close(images[1:], images.new_tensor([[0.5 + GAMMA, 0.5 - GAMMA]] * 2))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_norm(module: object, device: torch.device, dtype: torch.dtype) -> None:
    # gamma / norm is a subnormal number: a step, if not one of full precision.
    largest = torch.finfo(dtype).max
    gradient = torch.tensor([[largest, -largest, largest / 2]], dtype=dtype, device=device)
    images = torch.zeros_like(gradient)
    module.linf_step_(images, images.clone(), gradient, counts([1], device), **FREE)
    wanted = images.new_tensor([[GAMMA, -GAMMA, GAMMA / 2]])
    torch.testing.assert_close(images, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5), (0,), (2, 0)])
def test_empty(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images = torch.zeros(shape, dtype=dtype, device=device)
    active = counts([1] * shape[0], device)
    norms = assert_steps_alike(images, images.clone(), images.clone(), active, **FREE)
    assert norms.tolist() == [0] * shape[0]


@BOTH
@pytest.mark.parametrize(
    ("lower", "upper", "epsilon", "expected"),
    [
        (None, None, None, [[-0.5, 0.0, 0.5, 1.25]]),
        (0.0, None, None, [[0.0, 0.0, 0.5, 1.25]]),
        (None, 1.0, None, [[-0.5, 0.0, 0.5, 1.0]]),
        (0.0, 1.0, None, [[0.0, 0.0, 0.5, 1.0]]),
        (None, None, 0.25, [[-0.25, 0.0, 0.5, 1.0]]),
        (-0.125, 0.75, 0.25, [[-0.125, 0.0, 0.5, 0.75]]),
        (None, None, INF, [[-0.5, 0.0, 0.5, 1.25]]),
        (-INF, INF, None, [[-0.5, 0.0, 0.5, 1.25]]),
    ],
)
def test_clipping_by_hand(
    module: object,
    device: torch.device,
    lower: float | None,
    upper: float | None,
    epsilon: float | None,
    expected: list[list[float]],
) -> None:
    for dtype, repeats in itertools.product(DTYPES, (1, 33)):
        make = {"dtype": dtype, "device": device}
        origin = torch.tensor([[0.0, 0.25, 0.5, 0.75]], **make).repeat(1, repeats)
        gradient = torch.tensor([[-4.0, -2.0, 0.0, 4.0]], **make).repeat(1, repeats)
        images = origin.clone()
        norms = module.linf_step_(
            images,
            origin,
            gradient,
            counts([1], device),
            gamma=0.5,
            lower=lower,
            upper=upper,
            epsilon=epsilon,
        )
        assert norms.tolist() == [4]
        assert images.tolist() == torch.tensor(expected).repeat(1, repeats).tolist()


def test_each_image_has_its_own_norm(device: torch.device) -> None:
    gradient = torch.tensor([[1e-6, -2e-6], [3e6, 1e6]], device=device)
    images = torch.zeros(2, 2, device=device)
    norms = ops.linf_step_(
        images, images.clone(), gradient, counts([1, 1], device), **FREE | {"gamma": 1.0}
    )
    assert torch.equal(norms, gradient.new_tensor([2e-6, 3e6]))
    torch.testing.assert_close(images, images.new_tensor([[0.5, -1], [1, 1 / 3]]))


def test_origin_may_be_the_images_themselves(device: torch.device) -> None:
    images, _, gradient = (t.to(device) for t in case((2, 3, 33, 41), 5, torch.float32))
    expected = images.clone()
    settings = FREE | {"epsilon": 1e-3}
    reference.linf_step_(expected, images.clone(), gradient, counts([1, 1], device), **settings)
    ops.linf_step_(images, images, gradient, counts([1, 1], device), **settings)
    assert same_bits(images, expected)


def test_active_with_gaps(device: torch.device) -> None:
    images, origin, gradient = (t.to(device) for t in case((3, 3, 5, 5), 5, torch.float32))
    active = counts([1, 9, 0, 9, 1, 9], device)[::2]
    norms = assert_steps_alike(images, origin, gradient, active, **FREE)
    assert (norms > 0).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_images(kernels: torch.device, dtype: torch.dtype) -> None:
    """NaN and infinity among the images, with every kind of clip."""
    values = [NAN, INF, -INF, -0.0, 0.0, 1.0, 0.5, 3.0]
    images = torch.tensor(values, dtype=dtype, device=kernels)[None].repeat(2, 11)
    for clip in CLIPS:
        gradient = torch.ones_like(images)
        gradient[:, ::3] = 0
        origin = torch.full_like(images, 0.5)
        moved = images.clone()
        assert_steps_alike(moved, origin, gradient, counts([1, 1], kernels), gamma=GAMMA, **clip)


@pytest.mark.parametrize("epsilon", [None, 0.01])
@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_origin_that_is_not_finite(
    kernels: torch.device, layout: str, epsilon: float | None
) -> None:
    """Without a ball the origin does not matter; with one, both backends make the same of it."""
    origin = torch.tensor([NAN, INF, -INF, 0.5], device=kernels)[None].repeat(2, 11)
    images = lay_out(torch.full_like(origin, 0.5), layout)
    gradient = torch.ones_like(origin)
    settings = FREE | {"epsilon": epsilon}
    assert_steps_alike(images, origin, gradient, counts([1, 1], kernels), **settings)


def test_thread_count_changes_no_bit(one_and_two_threads: tuple[int, int]) -> None:
    for dtype, layout in itertools.product(DTYPES, ("contiguous", "gaps")):
        images, origin, gradient = case((2, 3, 129, 151), 2, dtype)
        results = []
        for threads in one_and_two_threads:
            torch.set_num_threads(threads)
            moved = lay_out(images, layout).clone()
            moved = lay_out(moved, layout)
            norms = ops.linf_step_(
                moved,
                origin,
                gradient,
                counts([1, 1]),
                gamma=GAMMA,
                lower=0.0,
                upper=1.0,
                epsilon=0.01,
            )
            results.append((moved, norms))
        assert same_bits(results[0][0], results[1][0])
        assert same_bits(results[0][1], results[1][1])


# --- 16-bit rounding


def all_patterns(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every 16-bit pattern, (1, 65536)."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return patterns.view(dtype)[None].to(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_image_survives_a_step_of_nothing(
    device: torch.device, dtype: torch.dtype
) -> None:
    images = all_patterns(dtype, device)
    finite = images.isfinite()
    gradient = torch.zeros_like(images)
    gradient[0, int(finite[0].nonzero()[0])] = 1  # one pixel that makes the norm 1
    before = images.clone()
    ops.linf_step_(images, torch.zeros_like(images), gradient, counts([1], device), **FREE)
    still = (gradient == 0) & ~before.isnan()
    assert torch.equal(bits(images[still]), bits(before[still]))
    assert torch.equal(images.isnan(), before.isnan())


@pytest.mark.cuda_on_host(False)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_image_is_rounded_like_the_reference(
    kernels: torch.device, dtype: torch.dtype, sign: int
) -> None:
    # Powers of two land on ties of some binade each, 16 on the one between 65504 and infinity.
    steps = [2.0**k for k in range(-26, 5)] + [3e-8, GAMMA, 0.7, 1000.0, 3e38]
    for gamma in steps:
        images = all_patterns(dtype, kernels)
        gradient = torch.full_like(images, sign)
        zeros = torch.zeros_like(images)
        assert_steps_alike(images, zeros, gradient, counts([1], kernels), **FREE | {"gamma": gamma})


@pytest.mark.cuda_on_host(False)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_gradient_is_read_like_the_reference(
    kernels: torch.device, dtype: torch.dtype
) -> None:
    patterns = all_patterns(dtype, kernels)
    finite = patterns[patterns.isfinite()]
    # As an image of its own, each pattern is a norm; together they share the largest.
    for gradient in (patterns.T.contiguous(), finite[None]):
        images = torch.full_like(gradient, 0.25)
        active = torch.ones(len(gradient), dtype=torch.int32, device=kernels)
        assert_steps_alike(images, images.clone(), gradient, active, **FREE | {"gamma": 0.5})


# --- sentences of the algorithm

finite_floats = st.floats(-1e6, 1e6, width=32)
vectors = st.lists(finite_floats, min_size=1, max_size=20)


@settings(max_examples=100)
@given(vectors, st.floats(1e-6, 1.0))
def test_norm_of_the_step_is_gamma(values: list[float], gamma: float) -> None:
    gradient = torch.tensor([values], dtype=torch.float64)
    assume(float(gradient.abs().max()) > 1e-30)
    images = torch.full_like(gradient, 0.5)
    norms = ops.linf_step_(images, images.clone(), gradient, counts([1]), **FREE | {"gamma": gamma})
    step = images - 0.5
    assert float(norms) == float(gradient.abs().max())
    assert float(step.abs().max()) == pytest.approx(gamma, rel=1e-9, abs=1e-15)
    # The step is the gradient, only shorter or longer.
    torch.testing.assert_close(step, gamma * gradient / norms, rtol=1e-9, atol=1e-15)


@example([-1.0], 1.0, 2.0**-149, 1.0, 1.0, torch.float16, 0)  # rounds to 0
@settings(max_examples=100)
@given(
    vectors,
    st.floats(1e-4, 2.0),
    st.floats(-1.0, 0.25, width=32),
    st.floats(0.5, 2.0, width=32),
    st.floats(2.0**-10, 2.0, width=32),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_result_is_inside_bounds_and_ball(
    values: list[float],
    gamma: float,
    lower: float,
    upper: float,
    epsilon: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    gradient = torch.tensor([values]).to(dtype)
    assume(bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 1e-30)
    assume(gradient.dtype != torch.float16 or float(gradient.abs().max()) > 1e-4)
    origin = (lower + (upper - lower) * torch.rand(gradient.shape, generator=generator(seed))).to(
        dtype
    )
    images = origin.clone()
    ops.linf_step_(
        images,
        origin,
        gradient,
        counts([1]),
        gamma=gamma,
        lower=lower,
        upper=upper,
        epsilon=epsilon,
    )
    # 16-bit results are rounded once after the clip.
    slack = torch.finfo(dtype).eps * 2
    subnormal = torch.finfo(dtype).eps * torch.finfo(dtype).tiny
    assert float(images.min()) >= lower - slack * abs(lower) - subnormal
    assert float(images.max()) <= upper + slack * abs(upper) + subnormal
    assert float((images.double() - origin.double()).abs().max()) <= epsilon + slack * 4


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_an_image_in_a_batch_is_the_image_alone(seed: int, dtype: torch.dtype) -> None:
    images, origin, gradient = case((3, 3, 4, 5), seed, dtype)
    together = images.clone()
    settings = {"gamma": GAMMA, "lower": 0.0, "upper": 1.0, "epsilon": 0.01}
    norms = ops.linf_step_(together, origin, gradient, counts([1, 1, 1]), **settings)
    for n in range(3):
        alone = images[n : n + 1].clone()
        norm = ops.linf_step_(
            alone, origin[n : n + 1], gradient[n : n + 1], counts([1]), **settings
        )
        assert same_bits(alone[0], together[n])
        assert same_bits(norm[0], norms[n])


# --- autograd


@BOTH
def test_autograd_notices_the_write(module: object) -> None:
    images, origin, gradient = case((2, 3), 0, torch.float32)
    weight = torch.ones(2, 3, requires_grad=True)
    product = (weight * images).sum()  # needs the images as they are now
    module.linf_step_(images, origin, gradient, counts([1, 1]), **FREE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@BOTH
def test_tensors_that_require_grad(module: object) -> None:
    images, origin, gradient = case((2, 3, 5, 7), 0, torch.float32)
    expected = images.clone()
    reference.linf_step_(expected, origin, gradient, counts([1, 1]), **FREE)
    leaves = [t.clone().requires_grad_() for t in (images, origin, gradient)]
    norms = module.linf_step_(*leaves, counts([1, 1]), **FREE)
    assert same_bits(leaves[0], expected)
    assert not norms.requires_grad
    assert leaves[0].is_leaf


# --- wrong arguments: what is replaced, the error, its message

X, A = torch.zeros(2, 3, 4), torch.ones(2, dtype=torch.int32)
WRONG = {
    "images type": ({"images": 1.0}, TypeError, "images must be a torch.Tensor, got float"),
    "images dtype": (
        {"images": X.int()},
        TypeError,
        "images must be float16, bfloat16, float32 or float64, got int32",
    ),
    "images scalar": ({"images": torch.tensor(1.0)}, ValueError, "images must have a batch dim"),
    "images expanded": (
        {"images": X[:1].expand(2, 3, 4)},
        ValueError,
        "images must not be an expanded tensor: it is written in place",
    ),
    "origin type": ({"origin": None}, TypeError, "origin must be a torch.Tensor, got NoneType"),
    "origin dtype": ({"origin": X.half()}, TypeError, "origin must be float32, got float16"),
    "origin shape": (
        {"origin": X[:, :2]},
        ValueError,
        r"origin must have shape \(2, 3, 4\) to match images, got \(2, 2, 4\)",
    ),
    "origin device": (
        {"origin": X.to("meta")},
        ValueError,
        r"origin must be on the device of images \(cpu\), got meta",
    ),
    "gradient type": ({"gradient": None}, TypeError, "gradient must be a torch.Tensor"),
    "gradient dtype": (
        {"gradient": X.double()},
        TypeError,
        "gradient must be float32, got float64",
    ),
    "gradient shape": ({"gradient": X[:1]}, ValueError, r"gradient must have shape.*\(1, 3, 4\)"),
    "gradient device": ({"gradient": X.to("meta")}, ValueError, "gradient must be on the device"),
    "active type": ({"active": [1, 1]}, TypeError, "active must be a torch.Tensor, got list"),
    "active dtype": ({"active": A.long()}, TypeError, "active must be int32, got int64"),
    "active shape": (
        {"active": A[:1]},
        ValueError,
        r"active must have shape \(2,\) to match images, got \(1,\)",
    ),
    "active device": ({"active": A.to("meta")}, ValueError, "active must be on the device"),
    "gamma 0": ({"gamma": 0}, ValueError, "gamma must be a finite number above 0, got 0"),
    "gamma negative": ({"gamma": -1.0}, ValueError, "gamma must be a finite number above 0"),
    "gamma NaN": ({"gamma": NAN}, ValueError, "gamma must be a finite number above 0, got nan"),
    "gamma infinite": ({"gamma": INF}, ValueError, "gamma must be a finite number above 0"),
    "gamma type": ({"gamma": "0.5"}, TypeError, "gamma must be a number, got '0.5'"),
    "gamma bool": ({"gamma": True}, TypeError, "gamma must be a number, got True"),
    "lower type": ({"lower": "0"}, TypeError, "lower must be a number"),
    "lower NaN": ({"lower": NAN}, ValueError, "lower must be a number, got nan"),
    "upper NaN": ({"upper": NAN}, ValueError, "upper must be a number, got nan"),
    "bounds swapped": (
        {"lower": 1.0, "upper": 0.0},
        ValueError,
        "lower must be below upper, got 1.0 and 0.0",
    ),
    "bounds equal": ({"lower": 1.0, "upper": 1.0}, ValueError, "lower must be below upper"),
    "epsilon 0": ({"epsilon": 0.0}, ValueError, "epsilon must be a number above 0, got 0.0"),
    "epsilon NaN": ({"epsilon": NAN}, ValueError, "epsilon must be a number above 0, got nan"),
    "epsilon type": ({"epsilon": A}, TypeError, "epsilon must be a number"),
}


@BOTH
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(module: object, name: str) -> None:
    changed, error, message = WRONG[name]
    images = X.clone()
    given = {"images": images, "origin": X, "gradient": X + 1, "active": A, **FREE, **changed}
    with pytest.raises(error, match=f"^{message}"):
        module.linf_step_(**given)
    assert torch.equal(images, X)


@pytest.mark.parametrize("name", ["lower", "upper", "epsilon", "gamma"])
def test_numbers_beyond_float32(name: str) -> None:
    """Bounds past the largest float are no bounds; such a gamma makes no usable step."""
    images, origin, gradient = case((2, 3), 0, torch.float32)
    settings = FREE | {name: -1e39 if name == "lower" else 1e39}
    assert_steps_alike(images, origin, gradient, counts([1, 1]), **settings)


PAST_THE_WRAPPER = {
    "images dtype": ((X.int(), X.int(), X.int(), A), "images must be float16"),
    "images scalar": ((X[0, 0, 0], X[0, 0, 0], X[0, 0, 0], A), "images must have a batch dim"),
    "images expanded": ((X[:1].expand(2, 3, 4), X, X, A), "images must not be an expanded tensor"),
    "origin dtype": ((X, X.half(), X, A), "origin must have the dtype of images"),
    "origin shape": ((X, X[:, :2], X, A), r"origin must have the shape .* got \(2, 2, 4\)"),
    "gradient dtype": ((X, X, X.long(), A), "gradient must have the dtype of images"),
    "gradient dims": ((X, X, X[..., 0], A), r"gradient must have the shape .* got \(2, 3\)"),
    "active dtype": ((X, X, X, A.long()), r"active must be int32 of shape \(2\)"),
    "active shape": ((X, X, X, A[:1]), r"active must be int32 of shape \(2\), got \(1\)"),
    "active scalar": ((X, X, X, A[0]), r"active must be int32 of shape \(2\), got \(\)"),
}


@pytest.mark.parametrize("name", PAST_THE_WRAPPER)
def test_wrong_arguments_past_the_wrapper(device: torch.device, name: str) -> None:
    tensors, message = PAST_THE_WRAPPER[name]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dagcore.linf_step_(*(t.to(device) for t in tensors), 0.1, -INF, INF, INF, None, 0)


@pytest.mark.parametrize("which", range(4))
def test_mixed_devices_past_the_wrapper(which: int) -> None:
    tensors = [X.clone(), X, X, A]
    tensors[which] = tensors[which].to("meta")
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.dagcore.linf_step_(*tensors, 0.1, -INF, INF, INF, None, 0)


def test_mixed_devices_with_cuda(cuda: torch.device) -> None:
    with pytest.raises(ValueError, match=r"active must be on the device of images \(cuda:0\)"):
        ops.linf_step_(X.to(cuda), X.to(cuda), X.to(cuda), A, **FREE)

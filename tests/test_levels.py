"""Attacks whose images lie on levels, as those of an 8-bit file, and that win by a margin."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DTYPES, INF, LAYOUTS, NAN, bits, generator, lay_out, same_bits
from torch import Tensor, nn

from dagcore import (
    DAG,
    Part,
    Sample,
    Status,
    joint_attack,
    ops,
    reference,
    universal_perturbation,
    victims,
)
from dagcore.engine.scores import aligned
from dagcore.levels import nearest, radius, shown, value
from dagcore.ops import fallback
from dagcore.perturbation import round_to_8_bits, round_to_levels

BOUNDS = ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0))
CLASSES = 5
EPSILONS = (0.03, 0.01, 1.6 / 255, 8 / 255, 0.001)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Network(nn.Module):
    """The class whose colour is the nearest, pixel by pixel: each class wins somewhere.

    `width` is how far apart the bounds of the images are.
    """

    def __init__(self, seed: int = 0, width: float = 1.0) -> None:
        super().__init__()
        self.width = width
        colours = torch.rand(CLASSES, 3, generator=generator(seed)) * 0.6 + 0.2
        self.weight = nn.Parameter(2 * colours[:, :, None, None])
        self.bias = nn.Parameter(-(colours**2).sum(1))

    def forward(self, images: Tensor) -> Tensor:
        shown = images / self.width + (0.5 if self.width == 2 else 0.0)
        return 30 * nn.functional.conv2d(shown, self.weight, self.bias)


def photographs(count: int = 2, size: int = 14, seed: int = 0) -> Tensor:
    """8-bit images, (N, 3, H, W) uint8."""
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


def seen(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


# --- levels


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_level_and_its_value_are_each_others(
    bounds: tuple[float, float], dtype: torch.dtype
) -> None:
    for levels in (2, 3, 17, 256, 65536):
        every = torch.arange(levels, dtype=dtype)
        values = value(every, bounds, levels)
        assert torch.equal(nearest(values, bounds, levels), every)
        assert values[0] == bounds[0]
        assert values[-1] == bounds[1]


def test_levels_are_the_values_that_a_file_is_read_as() -> None:
    file = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(value(file.float(), (0.0, 1.0), 256), file.float() / 255)
    assert torch.equal(value(file.float(), (0.0, 255.0), 256), file.float())
    assert torch.equal(round_to_8_bits(file.float() / 255 + 1e-3), file.float() / 255)
    assert torch.equal(
        round_to_levels(torch.tensor([-1.0, 0.3, 2.0]), 3), torch.tensor([0, 0.5, 1])
    )


def test_a_ball_is_rounded_inward() -> None:
    reach = {e: radius(e, (0.0, 1.0), 256) for e in EPSILONS}
    assert list(reach.values()) == [7, 2, 1, 8, 0]
    for k in range(1, 256):  # however the number was computed
        for epsilon in (k / 255, float(torch.tensor(k / 255)), k * (1 / 255)):
            assert radius(epsilon, (0.0, 1.0), 256) == k
            assert radius(2 * epsilon, (-1.0, 1.0), 256) == k
    assert radius(float("inf"), (0.0, 1.0), 256) == float("inf")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_shown_within_a_ball_of_each_image(bounds: tuple[float, float], norm: str) -> None:
    """The nearest levels where the ball has room for them, and elsewhere most of the ball."""
    width = bounds[1] - bounds[0]
    origin = value(photographs(4).double(), bounds, 256)
    away = torch.randn(origin.shape, generator=generator(0), dtype=torch.float64) * 3 * width / 255
    values = (origin + away).clamp(*bounds)

    def size(change: Tensor) -> Tensor:
        flat = change.flatten(1)
        return flat.norm(dim=1) if norm == "l2" else flat.abs().amax(1)

    balls = size(values - origin) * torch.tensor([2.0, 1.0, 0.99, INF], dtype=torch.float64)
    values = torch.where(
        balls[:, None, None, None] < INF, origin + (values - origin) * 0.99, values
    )
    found = shown(values, origin, bounds, 256, balls, norm)
    level = nearest(found, bounds, 256)
    assert torch.equal(value(level, bounds, 256), found)
    assert torch.equal(level[[0, 3]], nearest(values, bounds, 256)[[0, 3]])
    moved = size(found - origin)
    assert bool((moved <= balls * (1 + 1e-6)).all())
    assert bool((moved[1:3] > 0.8 * balls[1:3]).all())
    for n, ball in enumerate(balls.tolist()):
        alone = values[n : n + 1], origin[n : n + 1]
        assert torch.equal(shown(*alone, bounds, 256, ball, norm)[0], found[n])
        assert torch.equal(reference.on_levels(*alone, 256, *bounds, ball, norm)[0], found[n])


# --- the step


def shadows(shape: tuple[int, ...], bounds: tuple[float, float], seed: int, dtype: torch.dtype):
    """Shadows around an origin on the levels, the images they look like, a gradient."""
    lower, upper = bounds
    rng, width = generator(seed), upper - lower
    drawn = torch.rand(shape, generator=rng, dtype=torch.float64) * width + lower
    origin = round_to_8_bits(drawn.float(), bounds).to(dtype)
    away = 0.02 * width * (2 * torch.rand(shape, generator=rng) - 1)
    shadow = (origin + away).clamp(lower, upper).to(dtype)
    gradient = torch.randn(shape, generator=rng).to(dtype)
    return shadow, origin, gradient, torch.full(shape, 7.0, dtype=dtype)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_equals_reference(
    kernels: torch.device, dtype: torch.dtype, bounds: tuple[float, float]
) -> None:
    width = bounds[1] - bounds[0]
    layouts = itertools.cycle(layout for layout in LAYOUTS if layout != "expanded")
    shapes = ((3, 3, 33, 41), (3, 2, 7, 151), (3, 1, 1, 1))
    for (k, shape), epsilon in itertools.product(enumerate(shapes), (None, 0.0101 * width)):
        tensors = shadows(shape, bounds, k, dtype)
        tensors = [lay_out(t.to(kernels), next(layouts)) for t in tensors]
        active = torch.tensor([2, 0, 1], dtype=torch.int32, device=kernels)
        settings = {"gamma": width * 0.6 / 255, "lower": bounds[0], "upper": bounds[1]}
        settings |= {"epsilon": epsilon, "levels": 256}
        shadow, origin, gradient, grid = tensors
        right, right_grid = shadow.clone(), grid.clone()
        norms = ops.linf_step_(shadow, origin, gradient, active, grid=grid, **settings)
        right_norms = reference.linf_step_(
            right, origin, gradient, active, grid=right_grid, **settings
        )
        assert same_bits(norms, right_norms)
        assert same_bits(shadow, right)
        assert same_bits(grid, right_grid)
        assert bool((grid[1] == 7).all()), "an image that is not active was written to"
        plain = tensors[0].clone()
        fallback_grid = torch.zeros_like(grid)
        fallback.linf_step_(
            plain,
            origin,
            gradient,
            active,
            settings["gamma"],
            *bounds,
            float("inf") if epsilon is None else epsilon,
            fallback_grid,
            256,
        )
        moved = active > 0
        if dtype in (torch.float32, torch.float64):
            assert torch.equal(fallback_grid[moved], round_to_8_bits(fallback_grid[moved], bounds))


def test_step_by_hand(kernels: torch.device) -> None:
    """Three levels: 0, 1/2 and 1. Halfway between two the even one is shown."""
    shadow = torch.tensor([[0.0, 0.2, 0.5, 0.5, 1.0, 0.9]], device=kernels)
    origin = torch.tensor([[0.0, 0.0, 0.5, 0.5, 1.0, 1.0]], device=kernels)
    gradient = torch.tensor([[1.0, 0.25, 1.0, -1.0, 1.0, -0.9]], device=kernels)
    active = torch.ones(1, dtype=torch.int32, device=kernels)
    grid = torch.zeros_like(shadow)
    settings = {"gamma": 0.25, "lower": 0.0, "upper": 1.0, "grid": grid, "levels": 3}
    ops.linf_step_(shadow.clone(), origin, gradient, active, epsilon=None, **settings)
    assert grid.tolist() == [[0.0, 0.5, 1.0, 0.0, 1.0, 0.5]]
    ops.linf_step_(shadow.clone(), origin, gradient, active, epsilon=0.49, **settings)
    assert grid.tolist() == origin.tolist()  # no other level lies in the ball


@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_shown_where_the_origin_is_no_level(module: Any, kernels: torch.device) -> None:
    """Beyond the bounds the ball counts from there; around NaN there is none."""
    shadow = torch.tensor([[0.1, 0.1, 0.1, 0.8]], device=kernels)
    origin = torch.tensor([[3.0, 3.0, NAN, NAN]], device=kernels)
    gradient, grid = torch.full_like(shadow, 0.01), torch.zeros_like(shadow)
    active = torch.ones(1, dtype=torch.int32, device=kernels)
    settings = {"gamma": 0.01, "lower": 0.0, "upper": 1.0, "grid": grid, "levels": 2}
    module.linf_step_(shadow.clone(), origin, gradient, active, epsilon=5, **settings)
    assert grid.tolist() == [[0, 0, 0, 1]]
    for epsilon in (2.5, 3 * (1 - 3e-8) / (1 + 1e-6)):  # float32 would round it up to three levels
        module.linf_step_(shadow.clone(), origin, gradient, active, epsilon=epsilon, **settings)
        assert grid.tolist() == [[1, 1, 0, 1]]
        grid.zero_()


WRONG_STEPS = {
    "a grid alone": ({"levels": None}, "grid and levels must be given together"),
    "levels alone": ({"grid": None}, "grid and levels must be given together"),
    "one level": ({"levels": 1}, "levels must be at least 2, got 1"),
    "too many levels": ({"levels": 2**17 + 1}, "levels must be at most 131072"),
    "no bound": ({"lower": None}, "lower and upper must be finite with levels"),
    "another shape": ({"grid": torch.zeros(2, 5)}, r"grid must have shape \(2, 4\)"),
    "an expanded grid": ({"grid": torch.zeros(4).expand(2, 4)}, "grid must not be an expanded"),
    "the images": ({"grid": "images"}, "grid must not share memory with images"),
}


@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("name", WRONG_STEPS)
def test_wrong_step(module: Any, name: str) -> None:
    changed, message = WRONG_STEPS[name]
    images = torch.zeros(2, 4)
    given = {"lower": 0.0, "upper": 1.0, "epsilon": None, "grid": torch.zeros(2, 4), "levels": 256}
    given |= {k: images if v == "images" else v for k, v in changed.items() if k != "grid"} | {
        k: images if isinstance(v, str) else v for k, v in changed.items() if k == "grid"
    }
    active = torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^{message}"):
        module.linf_step_(images, images.clone(), images + 1, active, gamma=0.1, **given)


# --- attacks


def attack_of(bounds: tuple[float, float], **settings: Any) -> DAG:
    width = bounds[1] - bounds[0]
    if "epsilon" in settings:
        settings["epsilon"] *= width
    settings = {"max_iter": 120, **settings}
    return DAG(gamma=2.5 / 255 * width, bounds=bounds, levels=256, **settings)


def as_images(file: Tensor, bounds: tuple[float, float]) -> Tensor:
    return value(file.float(), bounds, 256)


def file_of(images: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The file that the images are kept in."""
    lower, upper = bounds
    return ((images - lower) / (upper - lower) * 255).round().byte()


@pytest.mark.parametrize("goal", ["leave", "reach"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_what_is_kept_is_what_was_attacked(bounds: tuple[float, float], goal: str) -> None:
    model, file = Network(width=bounds[1] - bounds[0]), photographs()
    images = as_images(file, bounds)
    labels = seen(model, images)
    adversarial = (labels + 1) % 5
    attack = attack_of(bounds, goal=goal)
    result = attack(model, images, labels, adversarial)
    kept = file_of(result.adversarial, bounds)
    assert torch.equal(as_images(kept, bounds), result.adversarial)
    last = [int(result.active[m, n]) for n, m in enumerate(result.iterations.tolist())]
    assert attack.count_active(model, as_images(kept, bounds), labels, adversarial).tolist() == last
    assert bool(result.converged.all())
    assert last == [0, 0]
    same = dataclasses.replace(attack, backend="reference")(model, images, labels, adversarial)
    assert same_bits(same.adversarial, result.adversarial)
    assert torch.equal(same.active, result.active)
    assert same.status == result.status
    free = dataclasses.replace(attack, levels=None)(model, images, labels, adversarial)
    assert not torch.equal(free.adversarial, round_to_8_bits(free.adversarial, bounds))


def test_files_lie_within_epsilon() -> None:
    model, file = Network(), photographs()
    images, bounds = as_images(file, (0.0, 1.0)), (0.0, 1.0)
    labels = seen(model, images)
    for epsilon in EPSILONS[:-1]:
        result = attack_of(bounds, epsilon=epsilon)(model, images, labels)
        change = (file_of(result.adversarial, bounds).int() - file.int()).abs().max()
        assert int(change) == int(epsilon * 255 + 1e-6)  # the ball is used up


def test_a_ball_without_another_level() -> None:
    model, file = Network(), photographs()
    images = as_images(file, (0.0, 1.0))
    message = r"epsilon=0\.001 is less than the spacing of 256 levels"
    with pytest.warns(RuntimeWarning, match=message):
        attack = attack_of((0.0, 1.0), epsilon=0.001)
    with pytest.warns(RuntimeWarning, match=message):
        reference_attack = dataclasses.replace(attack, backend="reference")
    for one in (attack, reference_attack):
        result = one(model, images, seen(model, images))
        assert torch.equal(result.adversarial, images)
        assert result.status == (Status.STALLED, Status.STALLED)
        assert result.iterations.tolist() == [0, 0]


def test_start_between_the_levels() -> None:
    model, file = Network(), photographs()
    images = as_images(file, (0.0, 1.0))
    start = (images + 0.7 / 255).clamp(0, 1)
    attack = attack_of((0.0, 1.0), epsilon=4 / 255, max_iter=0)
    for backend in ("native", "reference"):
        one = dataclasses.replace(attack, backend=backend)
        result = one(model, images, seen(model, images), start=start)
        assert torch.equal(result.adversarial, round_to_8_bits(start))


def test_streams_and_batches_are_alike() -> None:
    model = Network()
    files = [photographs(1, size, size) for size in (9, 12, 9, 10)]
    images = [as_images(file, (0.0, 1.0)) for file in files]
    attack = attack_of((0.0, 1.0), margin=0.25)
    samples = [
        Sample(one[0], seen(model, one)[0], "runner-up", key=k) for k, one in enumerate(images)
    ]
    results = {r.key: r for r in attack.stream(model, samples, slots=2)}
    for k, one in enumerate(images):
        alone = attack(model, one, seen(model, one), "runner-up")
        assert same_bits(results[k].adversarial, alone.adversarial)
        assert torch.equal(results[k].active, alone.active)


def test_joint_attack_on_levels() -> None:
    models, file = [Network(0), Network(1)], photographs(3)
    images = as_images(file, (0.0, 1.0))
    parts = [Part(model, seen(model, images)) for model in models]
    attack = attack_of((0.0, 1.0))
    result = joint_attack(attack, parts, images, generator(0))
    assert torch.equal(
        as_images(file_of(result.adversarial, (0.0, 1.0)), (0.0, 1.0)), result.adversarial
    )
    for k, part in enumerate(parts):
        left = attack.count_active(
            part.model, result.adversarial, part.labels, result.adversarial_labels[k]
        )
        assert torch.equal(left, result.active[result.iterations.long(), k, torch.arange(3)])


def test_universal_perturbation_of_whole_levels() -> None:
    model, file = Network(), photographs(3)
    images = as_images(file, (0.0, 1.0))
    samples = [Sample(one, label) for one, label in zip(images, seen(model, images), strict=True)]
    attack = attack_of((0.0, 1.0), epsilon=3.5 / 255, max_iter=25)
    result = universal_perturbation(attack, model, samples, 2, generator(0))
    levels = result.perturbation * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert int(levels.abs().max().round()) == 3
    evaluated: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        evaluated.append(x.detach().clone())
        return model(x)

    universal_perturbation(attack, watched, samples, 2, generator(0))
    assert all(torch.equal(round_to_8_bits(x), x) for x in evaluated)


def test_every_image_that_is_evaluated_lies_on_the_levels() -> None:
    model, file = Network(), photographs()
    images, evaluated = as_images(file, (0.0, 1.0)), []

    def watched(x: Tensor) -> Tensor:
        evaluated.append(x.detach().clone())
        return model(x)

    attack_of((0.0, 1.0))(watched, images, seen(model, images))
    assert len(evaluated) > 5
    assert all(torch.equal(round_to_8_bits(x), x) for x in evaluated)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_images_between_the_levels(bounds: tuple[float, float]) -> None:
    width = bounds[1] - bounds[0]
    model, images = Network(width=width), as_images(photographs(), bounds)
    images[1, 2, 3, 4] += 0.25 * width / 255 * (-1 if images[1, 2, 3, 4] > bounds[0] else 1)
    labels = seen(model, images)
    message = r"images must lie on 256 levels .* which is 0.25 of a level away: round them first"
    with pytest.raises(ValueError, match=message + r".*round_to_8_bits\(images, \("):
        attack_of(bounds)(model, images, labels)
    with pytest.raises(ValueError, match=r"^sample 'x': " + message):
        list(attack_of(bounds).stream(model, [Sample(images[1], labels[1], key="x")]))
    with pytest.raises(ValueError, match=message):
        joint_attack(attack_of(bounds), [Part(model, labels)], images)
    with pytest.raises(ValueError, match=r"^samples\[0\]: " + message):
        universal_perturbation(attack_of(bounds), model, [Sample(images[1], labels[1])])
    rounded = round_to_8_bits(images, bounds)
    assert bool(attack_of(bounds)(model, rounded, labels).iterations.min() > 0)


def test_images_off_their_levels_by_rounding_alone() -> None:
    model, file = Network(), photographs()
    images = as_images(file, (0.0, 1.0))
    labels = seen(model, images)
    nearly = file.float() * (1 / 255)
    assert not torch.equal(nearly, images)
    results = [attack_of((0.0, 1.0))(model, one, labels, "runner-up") for one in (images, nearly)]
    assert same_bits(results[0].adversarial, results[1].adversarial)
    assert same_bits(results[0].perturbation, results[1].perturbation)


def test_images_with_gradients_are_taken() -> None:
    images = as_images(photographs(), (0.0, 1.0)).requires_grad_()
    result = attack_of((0.0, 1.0), max_iter=2)(Network(), images, seen(Network(), images))
    assert not result.adversarial.requires_grad


def test_images_that_are_negated_in_memory_are_taken() -> None:
    images = as_images(photographs(), (0.0, 1.0))
    attack, negated = attack_of((0.0, 1.0), max_iter=2), torch._neg_view(-images)
    labels = seen(Network(), images)
    aims = (labels + 1) % CLASSES
    found, expected = (attack(Network(), x, labels, aims).adversarial for x in (negated, images))
    assert same_bits(found, expected)


def test_images_off_their_bounds_by_rounding_alone() -> None:
    """As antialiased resizing leaves them."""
    model = Network()
    images = torch.rand(2, 3, 9, 9, generator=generator(0))
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 1 + 3e-7, -2e-8
    labels = seen(model, images)
    before = bits(images)
    for attack in (DAG(max_iter=3), DAG(max_iter=3, backend="reference")):
        result = attack(model, images, labels)
        assert float(result.adversarial.max()) <= 1
        assert float(result.adversarial.min()) >= 0
        assert torch.equal(bits(images), before)
    images[0, 0, 0, 0] = 1 + 2e-6
    message = r"images must lie within bounds \(0.0, 1.0\), got values in \[.*, 1.00000203\]"
    with pytest.raises(ValueError, match=message):
        DAG()(model, images, labels)


def test_levels_that_a_dtype_cannot_tell_apart() -> None:
    images = as_images(photographs(), (0.0, 1.0)).bfloat16()
    with pytest.raises(ValueError, match=r"levels must be at least four times .* bfloat16 images"):
        DAG(levels=256, gamma=0.1)(Network().bfloat16(), images, torch.zeros(2, 14, 14).long())
    half = as_images(photographs(), (0.0, 1.0)).half()
    result = attack_of((0.0, 1.0))(Network().half(), half, torch.zeros(2, 14, 14).long())
    exact = as_images(file_of(result.adversarial.float(), (0.0, 1.0)), (0.0, 1.0))
    assert torch.equal(exact.half(), result.adversarial)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 1}, "levels must be at least 2, got 1"),
        ({"levels": 2**16 + 1}, "levels must be at most 65536"),
        ({"levels": 256, "bounds": None}, "bounds must be given with levels=256, got None"),
        ({"margin": -0.5}, "margin must be a finite number of at least 0, got -0.5"),
        ({"margin": float("inf")}, "margin must be a finite number of at least 0, got inf"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        DAG(**settings)


# --- a network that writes into its input


@pytest.mark.parametrize("how", ["no_grad", "data", "with autograd"])
def test_a_network_that_writes_into_its_images(how: str) -> None:
    """It changes neither the images, nor the iterate, nor what it sees."""
    plain = Network()

    def writing(x: Tensor) -> Tensor:
        if how == "with autograd":
            return plain(x.mul_(2).sub_(1))
        if how == "data":
            x.data.mul_(2).sub_(1)
        else:
            with torch.no_grad():
                x.mul_(2).sub_(1)
        return plain(x)

    images = as_images(photographs(), (0.0, 1.0))
    before = images.clone()
    labels = seen(plain, images * 2 - 1)
    attack = attack_of((0.0, 1.0), epsilon=4 / 255)
    result = attack(writing, images, labels, generator=generator(0))
    right = attack(lambda x: plain(x * 2 - 1), images, labels, generator=generator(0))
    assert torch.equal(images, before)
    if how == "with autograd":
        assert same_bits(result.adversarial, right.adversarial)
    assert float(result.perturbation.abs().max()) <= 4 / 255 + 1e-7
    assert float(result.adversarial.min()) >= 0
    aims = result.adversarial_labels
    left = attack.count_active(writing, result.adversarial, labels, aims)
    assert left.tolist() == [
        int(result.active[m, n]) for n, m in enumerate(result.iterations.tolist())
    ]
    assert torch.equal(images, before)
    assert torch.equal(attack.count_active(writing, images, labels, aims), result.active[0])
    assert torch.equal(images, before)


# --- half precision


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_that_float16_cannot_hold(backend: str) -> None:
    """Summed over all targets they pass its largest number, 65,504."""
    weight = torch.tensor([[120.0, 60.0, -120.0], [0.0, 120.0, 60.0]])

    def model(x: Tensor) -> Tensor:  # of the mean colour: every target pulls at every pixel
        mean = x.mean((2, 3), keepdim=True).expand_as(x)
        return torch.einsum("kc,nchw->nkhw", weight.to(x.dtype), mean)

    images = round_to_8_bits(torch.rand(1, 3, 64, 64, generator=generator(0)))
    labels = seen(model, images)
    attack = DAG(gamma=2 / 255, max_iter=3, backend=backend)
    exact = attack(model, images, labels, 1 - labels)
    result = attack(model, images.half(), labels, 1 - labels)
    leaf = images.half().requires_grad_()
    (plain,) = torch.autograd.grad(model(leaf).diff(dim=1).sum(), leaf)
    assert not bool(plain.isfinite().all())
    assert result.status == exact.status == (Status.BUDGET,)
    torch.testing.assert_close(result.adversarial.float(), exact.adversarial, rtol=0, atol=2e-3)


def test_detectors_and_examples_are_not_written_to() -> None:
    def writing(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x.mul_(2).sub_(1)
        logits = nn.functional.avg_pool2d(x, 4).flatten(2)
        return torch.tensor([[2.0, 2.0, 9.0, 9.0]]).expand(len(x), logits.shape[2], 4), logits

    images = as_images(photographs(2, 16), (0.0, 1.0))
    before = images.clone()
    detector = victims.dense_detector(writing, threshold=0.3)
    found = detector.detect(images)
    assert torch.equal(images, before)
    targets = detector.dense_targets(images)
    assert torch.equal(images, before)
    with detector.encoded(images):
        again = detector.detect(images)
    assert torch.equal(images, before)
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(found, again, strict=True))
    assert targets.labels.shape == (2, 16)

    class Writing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x.mul_(2).sub_(1)
            return super().forward(x)

    net = Writing(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    right = nn.Sequential(*net)(images * 2 - 1)
    prepared = victims.prepare(net, example=images)
    assert torch.equal(images, before)
    torch.testing.assert_close(prepared(images.clone()), right)


def test_a_part_of_a_network_called_original() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.original = Network()

        def forward(self, x: Tensor) -> Tensor:
            return self.original(x)

    images = as_images(photographs(), (0.0, 1.0))
    result = attack_of((0.0, 1.0))(Named(), images, seen(Network(), images), "runner-up")
    assert bool(result.converged.all())


def test_scores_that_align_corners_are_copied_as_plain_tensors(tmp_path: Path) -> None:
    scores = aligned(torch.rand(1, 2, 3, 3))
    torch.save(scores, tmp_path / "scores.pt")
    for copied in (torch.load(tmp_path / "scores.pt"), copy.deepcopy(scores)):
        assert type(copied) is Tensor
        assert torch.equal(copied, scores)


# --- margins


@pytest.mark.parametrize("mode", ["leave", "reach", "runner-up"])
@pytest.mark.parametrize("scale", [1, 2], ids=["as it is", "enlarged"])
def test_targets_count_until_they_are_won_by_the_margin(mode: str, scale: int) -> None:
    coarse = torch.rand(2, 3, 3, 3, generator=generator(0))
    images = nn.functional.interpolate(coarse, (14, 14), mode="bilinear", align_corners=True)
    model, images = Network(), round_to_8_bits(images)
    labels = ops.argmax_bilinear(model(images), (14 * scale, 14 * scale))
    goal = "reach" if mode == "reach" else "leave"
    adversarial = "runner-up" if mode == "runner-up" else (labels + 1) % CLASSES
    updates = []
    for margin in (0.0, 0.5, 2.0):
        attack = attack_of((0.0, 1.0), goal=goal, margin=margin, max_iter=400 // scale**2)
        result = attack(model, images, labels, adversarial)
        assert bool(result.converged.all()) or scale > 1  # there targets are in each other's way
        updates.append(int(result.iterations.sum()))
        large = (14 * scale, 14 * scale)
        scores = nn.functional.interpolate(model(result.adversarial), large, mode="bilinear")
        own = (labels if goal == "leave" else adversarial)[:, None]
        others = scores.scatter(1, own, float("-inf")).amax(1)
        lead = (others - scores.gather(1, own)[:, 0]) * (1 if goal == "leave" else -1)
        short = (lead < margin).flatten(1).sum(1)
        last = [int(result.active[m, n]) for n, m in enumerate(result.iterations.tolist())]
        assert float((short - torch.tensor(last)).abs().max()) <= scale - 1  # but for rounding
    assert updates[0] < updates[2] or scale > 1

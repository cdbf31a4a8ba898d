"""ALMAProx against a plain loop of its own, in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dagcore
from dagcore import PGD, ALMAProx, Part, Sample, Status
from dagcore.attacks.alma import BEYOND, penalty_slope, score_ratio

STEPS = 24


def network(seed: int = 3, classes: int = 5, stride: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=stride), nn.Tanh(), nn.Conv2d(8, classes, 1)
    ).double()
    net[2].bias.data -= net(torch.full((1, 3, 9, 9), 0.5).double()).detach()[0, :, 2, 2]
    return net  # with equal scores at grey


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    """Images that are nearly grey, so that targets can be fooled by small perturbations."""
    net = network()
    images = torch.rand((3, 3, 9, 11), generator=torch.Generator().manual_seed(5)).double()
    images = 0.5 + 0.1 * (images - 0.5)
    with torch.no_grad():
        labels = net(images).argmax(1)
    labels[:, 0] = 255
    return net, images, labels


# --- the plain loop


def penalty(y: Tensor, rho: Tensor, mu: Tensor) -> Tensor:
    above = mu * y + mu * rho * y**2 + rho**2 * y**3 / 6
    below = mu * y / (1 - rho.clamp(min=1) * y.clamp(max=0))
    return torch.where(y >= 0, above, below)


def slope(y: Tensor, rho: Tensor, mu: Tensor) -> Tensor:
    leaf = y.detach().clone().requires_grad_()
    return torch.autograd.grad(penalty(leaf, rho, mu).sum(), leaf)[0]


def ratio(scores: Tensor, aims: Tensor, targeted: bool) -> Tensor:
    """Of targets (C, M), with classes (M,)."""
    own = scores.gather(0, aims[None])[0]
    rival = scores.scatter(0, aims[None], -math.inf).amax(0)
    order = scores.sort(0, descending=True).values
    if targeted:
        return (rival - own + BEYOND) / (order[0] - (order[2] + order[3]) / 2 + 1e-8)
    return (own - rival + BEYOND) / (order[0] - order[2] + 1e-8)


def proximal(d: Tensor, h: Tensor, excess: float, low: Tensor, high: Tensor) -> Tensor:
    """The p in a box of the smallest excess * ||p||_inf + sum h (p - d)^2 / 2: golden section."""

    def at(t: float) -> tuple[float, Tensor]:
        p = d.clamp(low, high).clamp(-t, t)
        return excess * t + float((h * (p - d) ** 2).sum()) / 2, p

    left, right = 0.0, float(d.clamp(low, high).abs().max())
    for _ in range(70):
        a, b = left + 0.382 * (right - left), left + 0.618 * (right - left)
        left, right = (a, right) if at(a)[0] >= at(b)[0] else (left, b)
    return at((left + right) / 2)[1]


def plain(net, image, labels, aims=None, *, steps=STEPS, share=0.9):
    """One image: the best, the last iterate, and the active targets of each."""
    counted = (labels != 255).flatten()
    goal = (labels if aims is None else aims).flatten()[counted]
    count = len(goal)
    allowed = count - math.ceil(share * count - 1e-9)
    mu, rho = torch.ones(count).double(), torch.full((count,), 0.01).double()
    checked, fooled, scale = None, torch.zeros(count, dtype=torch.bool), 1.0
    delta, squares = torch.zeros_like(image), torch.zeros_like(image)
    best, smallest, fewest, found_at, left = image, math.inf, math.inf, None, []
    radius, growth = 0.0005, 2000 ** (2 / steps)  # from half a step to the whole range
    for i in range(steps + 1):
        leaf = (image + delta).requires_grad_()
        scores = net(leaf[None])
        if scores.shape[2:] != labels.shape:
            scores = F.interpolate(scores, labels.shape, mode="bilinear")
        z = scores[0].flatten(1)[:, counted]
        hit = (z.argmax(0) == goal) ^ (aims is not None)
        fooled |= ~hit
        found = smallest < math.inf
        left.append(int(hit.sum()))
        success, size = left[-1] <= allowed, float(delta.abs().max())
        if success and size < smallest:
            best, smallest = leaf.detach(), size
        elif smallest == math.inf and left[-1] < fewest:
            best, fewest = leaf.detach(), left[-1]
        if i == steps:
            return best, leaf.detach(), left
        if success and found_at is None and i < steps // 2:
            found_at = i
        rate = 0.002 + 0.048 * (1 + math.cos(math.pi * i / steps)) / 2
        larger = radius * (growth if smallest == math.inf else 1 + rate)
        radius = min(radius, smallest) * (1 - rate) if success else min(larger, smallest)
        scale = min(max(scale / (1.02 if success else 0.98), 0.1), 1.0)
        y = scale * ratio(z, goal, aims is not None)
        given_up = int(allowed * i / (steps - 1))
        kept = y <= y.sort(descending=True).values[given_up]
        if i == 0:
            checked = y.detach()
        elif (i + 1) % 10 == 0:
            if found:
                rho = torch.where(fooled | (y * kept <= 0.95 * checked), rho, 2 * rho)
            checked, fooled = y.detach(), torch.zeros_like(fooled)
        if i:
            mu = (0.8 * mu + 0.2 * slope(y, rho, mu) * kept).clamp(1e-12, 1)
        (g,) = torch.autograd.grad((penalty(y, rho, mu) * kept).sum(), leaf)
        since = steps // 2 if found_at is None else found_at
        tangent = 0.3 / 0.7 * (steps - since)
        length = 0.001 * tangent / (max(i - since, 0) + tangent)
        squares = 0.8 * squares + 0.2 * g**2
        h = (squares / (1 - 0.8 ** (i + 1))).sqrt().clamp(min=1e-8)
        low, high = (-image).clamp(min=-radius), (1 - image).clamp(max=radius)
        delta = proximal(delta - length * g / h, h, length, low, high)
    raise AssertionError


def check(result, n: int, expected) -> None:
    best, last, left = expected
    assert result.active[:, n].tolist() == left
    torch.testing.assert_close(result.last[n], last, rtol=0, atol=1e-7)
    torch.testing.assert_close(result.adversarial[n], best, rtol=0, atol=1e-7)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_result_is_that_of_a_plain_loop(case, targeted, stride):
    _, images, labels = case
    net = network(stride=stride)
    with torch.no_grad():
        seen = F.interpolate(net(images), (9, 11), mode="bilinear").argmax(1)
    labels = torch.where(labels == 255, 255, seen)
    aims = torch.where(labels == 255, 255, (labels + 1) % 5) if targeted else None
    result = ALMAProx(steps=STEPS, share=0.9)(net, images, labels, aims)
    for n in range(len(images)):
        check(result, n, plain(net, images[n], labels[n], None if aims is None else aims[n]))
    assert bool((result.perturbation.abs().flatten(1).amax(1) > 1e-3).all())  # or it says little


def test_penalties_have_the_slope_that_autograd_finds():
    y = torch.linspace(-3, 3, 61).double()
    for rho, mu in ((0.01, 1.0), (0.5, 0.3), (40.0, 1e-4)):
        rho, mu = torch.full_like(y, rho), torch.full_like(y, mu)
        torch.testing.assert_close(penalty_slope(y, rho, mu), slope(y, rho, mu), rtol=1e-12, atol=0)
    # It is continuous at 0, where it is mu.
    near = torch.tensor([-1e-12, 0.0, 1e-12]).double()
    found = penalty_slope(near, torch.full_like(near, 5.0), torch.full_like(near, 0.7))
    torch.testing.assert_close(found, torch.full_like(near, 0.7))


@pytest.mark.parametrize("targeted", [False, True])
def test_gradients_of_the_ratios_are_those_of_autograd(targeted):
    scores = torch.randn((2, 6, 4, 5), generator=torch.Generator().manual_seed(1)).double()
    aims = torch.randint(6, (2, 4, 5), generator=torch.Generator().manual_seed(2))
    leaf = scores.clone().requires_grad_()
    flat = leaf.movedim(1, 0).flatten(1)
    expected = ratio(flat, aims.flatten(), targeted)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    found = score_ratio(scores.clone(), aims, targeted=targeted)
    torch.testing.assert_close(found.value.flatten(), expected.detach())
    seed = torch.zeros_like(scores)
    for classes, value in found.terms:
        seed.scatter_add_(1, classes[:, None], value[:, None])
    torch.testing.assert_close(seed, gradient, rtol=1e-9, atol=1e-9)
    assert torch.equal(found.winner, scores.argmax(1))


def test_of_equal_scores_the_lowest_class_wins():
    scores = torch.tensor([[2.0, 1.0, 2.0, 0.0]]).double()
    assert score_ratio(scores.clone(), torch.tensor([2]), targeted=False).winner.tolist() == [0]
    broken = score_ratio(scores.fill_(math.nan), torch.tensor([2]), targeted=False)
    assert broken.broken.tolist() == [True]
    assert broken.value.tolist() == broken.weight.tolist() == [0]


# --- what is found


def test_what_is_found_is_smaller_than_by_a_search_with_pgd(case):
    net, images, labels = case
    result = ALMAProx(steps=80, share=0.6)(net, images, labels)
    assert set(result.status) == {Status.CONVERGED}
    assert bool((result.left <= result.targets * 0.4).all())
    with torch.no_grad():
        hits = (net(result.adversarial).argmax(1) == labels).flatten(1).sum(1)
    assert torch.equal(hits, result.left.long())
    assert result.iterations.tolist() == [80] * 3
    sizes = result.perturbation.abs().flatten(1).amax(1)
    for n, size in enumerate(sizes.tolist()):
        one = images[n : n + 1], labels[n : n + 1]
        small, large = 0.0, 4 * size
        while large - small > 0.01 * size:  # the radius of the smallest ball in which PGD succeeds
            radius = (small + large) / 2
            pgd = PGD(epsilon=radius, alpha=radius / 8, steps=40, tolerance=0.4, loss="margin")
            found = pgd(net, *one).status == [Status.CONVERGED]
            small, large = (small, radius) if found else (radius, large)
        assert size < large
    # Half of that is not enough for as many targets.
    with torch.no_grad():
        less = net(images + result.perturbation / 2).argmax(1)
    assert bool(((less == labels).flatten(1).sum(1) > result.left).all())


def test_a_smaller_share_takes_a_smaller_perturbation(case):
    net, images, labels = case
    sizes = [
        ALMAProx(steps=120, share=share)(net, images, labels).perturbation.abs().amax((1, 2, 3))
        for share in (0.3, 0.5, 0.8)
    ]
    assert bool((sizes[0] < sizes[1]).all())
    assert bool((sizes[1] < sizes[2]).all())


def test_results_are_those_of_each_image_alone(case):
    net, images, labels = case
    attack = ALMAProx(steps=40, share=0.9)
    batch = attack(net, images, labels)
    for order, slots in (([0, 1, 2], 2), ([2, 0, 1], 1), ([1, 2, 0, 1], 3)):
        samples = [Sample(images[n], labels[n], key=(k, n)) for k, n in enumerate(order)]
        results = list(attack.stream(net, samples, slots))
        assert len(results) == len(order)
        for result in results:
            n = result.key[1]
            torch.testing.assert_close(
                result.adversarial[0], batch.adversarial[n], rtol=0, atol=1e-9
            )
            assert torch.equal(result.active[:, 0], batch.active[:, n])
            assert result.status[0] is batch.status[n]


def test_units_do_not_matter(case):
    net, images, labels = case

    def of_bytes(x: Tensor) -> Tensor:
        return net(x / 255)

    small = ALMAProx(steps=30)(net, images, labels)
    large = ALMAProx(steps=30, alpha=0.255, bounds=(0.0, 255.0))(of_bytes, 255 * images, labels)
    torch.testing.assert_close(large.adversarial / 255, small.adversarial, rtol=0, atol=1e-8)


def test_where_nothing_is_found_the_iterate_with_the_fewest_targets_is_kept(case):
    net, images, labels = case
    result = ALMAProx(steps=6, share=1.0, alpha=0.004)(net, images, labels)
    assert set(result.status) == {Status.BUDGET}
    assert torch.equal(result.left, result.active.min(0).values)
    assert bool((result.left > 0).all())
    with torch.no_grad():
        hits = (net(result.adversarial).argmax(1) == labels).flatten(1).sum(1)
    assert torch.equal(hits, result.left.long())
    assert bool((result.perturbation != 0).flatten(1).any(1).all())


def test_an_image_that_is_fooled_already_is_left_alone(case):
    net, images, labels = case
    labels[0], labels[1] = 255, (labels[1] + 1) % 5
    result = ALMAProx(steps=60, share=0.5)(net, images, labels)
    assert result.iterations.tolist() == [0, 0, 60]
    assert set(result.status) == {Status.CONVERGED}
    assert torch.equal(result.adversarial[:2], images[:2])
    assert result.targets.tolist()[0] == 0


def test_ignored_targets_do_not_matter(case):
    net, images, labels = case
    attack = ALMAProx(steps=20, share=0.9)
    result = attack(net, images, labels)
    other = dataclasses.replace(attack, ignore_index=77)
    again = other(net, images, torch.where(labels == 255, 77, labels).to(torch.uint8))
    assert torch.equal(again.adversarial, result.adversarial)
    assert result.targets.tolist() == [88] * 3


def test_the_share_is_exact():
    for share, targets, allowed in ((0.9, 10, 1), (0.99, 100, 1), (0.99, 99, 0), (1.0, 50, 0)):
        attack = ALMAProx(share=share)
        assert attack.schedule().allowed(torch.tensor([targets])).tolist() == [allowed]


def test_a_start_may_be_given(case):
    net, images, labels = case
    start = (images + 0.05).clamp(0, 1)
    result = ALMAProx(steps=1, share=0.5)(net, images, labels, start=start)
    with torch.no_grad():
        hits = (net(start).argmax(1) == labels).flatten(1).sum(1)
    assert result.active[0].tolist() == hits.tolist()


def test_from_where_another_attack_ended_it_makes_that_smaller(case):
    """The ball is as large as the start, however small a step is."""
    net, images, labels = case
    first = PGD(epsilon=0.05, alpha=0.01, steps=40, tolerance=0.4, loss="margin")(
        net, images, labels
    )
    assert first.converged.all()
    attack = ALMAProx(steps=40, share=0.6, alpha=0.001)
    result = attack(net, images, labels, start=first.adversarial)
    assert result.converged.all()
    assert torch.equal(result.active[0], first.left)
    before, after = (r.perturbation.abs().flatten(1).amax(1) for r in (first, result))
    assert bool((after < 0.75 * before).all())


def test_a_zero_gradient_stalls_and_is_no_nan(case):
    _, images, _ = case
    flat = nn.Conv2d(3, 4, 1).double()
    flat.weight.data.zero_()
    flat.bias.data = torch.tensor([1.0, 0, 0, 0]).double()
    labels = torch.zeros((3, 9, 11), dtype=torch.int64)
    result = ALMAProx()(flat, images, labels)
    assert set(result.status) == {Status.STALLED}
    assert torch.equal(result.adversarial, images)
    assert result.left.tolist() == [99, 99, 99]


def test_scores_of_half_precision(case):
    net, images, labels = case
    half = net.float().to(torch.bfloat16)

    def model(x: Tensor) -> Tensor:
        return half(x.to(torch.bfloat16))

    images = images.float()
    labels = model(images).argmax(1)
    result = ALMAProx(steps=60, share=0.5)(model, images, labels)
    assert set(result.status) == {Status.CONVERGED}
    assert bool(result.adversarial.isfinite().all())


def test_a_network_of_one_target_an_image():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    images = 0.5 + 0.1 * torch.rand((4, 3, 2, 2)).double()
    labels = net(images).argmax(1)
    result = ALMAProx(steps=100, alpha=0.01)(net, images, labels)
    assert bool((net(result.adversarial).argmax(1) != labels).all())
    assert result.left.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ALMAProx(share=0.0), "share must be a finite number above 0, got 0.0"),
        (lambda: ALMAProx(share=1.5), "share must be a number above 0, at most 1, got 1.5"),
        (lambda: ALMAProx(steps=0), "steps must be at least 1, got 0"),
        (lambda: ALMAProx(alpha=0.0), "alpha must be a finite number above 0, got 0.0"),
        (lambda: ALMAProx(decay=2.0), "decay must be a number above 0, at most 1, got 2.0"),
        (lambda: ALMAProx(mu=-1.0), "mu must be a finite number above 0, got -1.0"),
        (lambda: ALMAProx(rho=0.0), "rho must be a finite number above 0, got 0.0"),
        (lambda: ALMAProx(ignore_index=0.5), "ignore_index must be an integer, got 0.5"),
        (lambda: ALMAProx(bounds=(1.0, 0.0)), r"bounds must be \(lower, upper\)"),
    ],
)
def test_settings_out_of_range_are_named(make, told):
    with pytest.raises((TypeError, ValueError), match=told):
        make()


def test_arguments_that_do_not_go_together_are_named(case):
    net, images, labels = case
    attack = ALMAProx(steps=5)
    with pytest.raises(ValueError, match="must be 'permutation', 'random' or 'untargeted'"):
        attack(net, images, labels, "runner-up")
    with pytest.raises(ValueError, match="scores must have at least 3 classes"):
        attack(network(classes=2), images, labels.clamp(max=1))
    with pytest.raises(ValueError, match="scores must have at least 4 classes"):
        attack(network(classes=3), images, labels % 3, "random")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\) .* got 9"):
        attack(net, images, torch.full_like(labels, 9))
    with pytest.raises(ValueError, match=r"alpha \* decay must be .* spacing of bfloat16"):
        attack(net, images.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"attack must .* got ALMAProx"):
        dagcore.joint_attack(attack, [Part(net, labels)], images)
    with pytest.raises(ValueError, match=r"attack must .* got ALMAProx"):
        dagcore.universal_perturbation(attack, net, [Sample(images[0], labels[0])])

"""PGD, SegPGD and CosPGD against plain loops of their own, in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dagcore
from dagcore import APGD, PGD, CosPGD, Part, Sample, SegPGD, Status, losses

EPSILON, ALPHA, STEPS = 0.05, 0.012, 9


def network(seed: int = 3, classes: int = 4, stride: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=stride), nn.Tanh(), nn.Conv2d(8, classes, 1)
    ).double()


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    net = network()
    images = torch.rand((3, 3, 9, 11), generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        labels = net(images).argmax(1)
    labels[:, 0] = 255
    return net, images, labels


def entropies(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores, labels, ignore_index=255, reduction="none")


def is_right(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(1) == labels).double()


def segpgd(scores: Tensor, labels: Tensor, t: int, targeted: bool) -> Tensor:
    blend, c = t / (2 * STEPS), is_right(scores, labels)
    c = 1 - c if targeted else c
    return ((1 - blend) * c + blend * (1 - c)) * entropies(scores, labels)


def cospgd(scores: Tensor, labels: Tensor, t: int, targeted: bool) -> Tensor:
    label = F.one_hot(labels % 255, scores.shape[1]).movedim(-1, 1).double()
    alike = F.cosine_similarity(scores.detach().softmax(1), label)
    return (1 - alike if targeted else alike) * entropies(scores, labels)


def plain(net, image, labels, loss, *, norm="linf", momentum=0.0, steps=STEPS, x=None, aims=None):
    """One image: the last iterate, the one with the fewest targets left, losses, targets left."""
    origin, x, m = image, image if x is None else x, torch.zeros_like(image)
    left, told, fewest, best = [], [], math.inf, None
    goal, sign = (labels, 1) if aims is None else (aims, -1)
    for t in range(steps + 1):
        leaf = x.clone().requires_grad_()
        scores = net(leaf[None])
        if scores.shape[2:] != goal.shape:
            scores = F.interpolate(scores, goal.shape, mode="bilinear")
        value = sign * loss(scores, goal[None], t, aims is not None).sum()
        (g,) = torch.autograd.grad(value, leaf)
        hit = scores.argmax(1)[0] == goal
        left.append(int((hit if aims is None else ~hit & (goal != 255)).sum()))
        told.append(float(value.detach()))
        if left[-1] < fewest:
            fewest, best = left[-1], x
        if t == steps:
            return x, best, told, left
        m = momentum * m + g / g.abs().sum() if momentum else g
        if norm == "linf":
            r = (x + ALPHA * m.sign() - origin).clamp(-EPSILON, EPSILON)
        else:
            r = x + 10 * ALPHA * m / m.norm() - origin
            r = r * min(1.0, 10 * EPSILON / float(r.norm()))
        x = (origin + r).clamp(0, 1)
    raise AssertionError


def check(result, n: int, expected) -> None:
    last, best, told, left = expected
    torch.testing.assert_close(result.last[n], last, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.adversarial[n], best, rtol=0, atol=1e-9)
    assert result.active[:, n].tolist() == left
    assert result.loss[:, n].tolist() == pytest.approx(told, rel=1e-10)


ATTACKS = {
    "pgd": (PGD, lambda z, y, t, targeted: entropies(z, y), {}),
    "momentum": (PGD, lambda z, y, t, targeted: entropies(z, y), {"momentum": 0.9}),
    "segpgd": (SegPGD, segpgd, {}),
    "cospgd": (CosPGD, cospgd, {}),
}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_result_is_that_of_a_plain_loop(case, name, norm, targeted):
    net, images, labels = case
    kind, loss, settings = ATTACKS[name]
    scale = 1 if norm == "linf" else 10
    attack = kind(
        steps=STEPS,
        epsilon=scale * EPSILON,
        alpha=scale * ALPHA,
        norm=norm,
        random_start=False,
        tolerance=None,
        **settings,
    )
    aims = torch.where(labels == 255, 255, (labels + 1) % 4) if targeted else None
    result = attack(net, images, labels, aims)
    assert set(result.status) == {Status.BUDGET}
    for n in range(len(images)):
        own = None if aims is None else aims[n]
        expected = plain(net, images[n], labels[n], loss, norm=norm, aims=own, **settings)
        check(result, n, expected)


def test_low_resolution_scores_are_read_through_the_interpolation(case):
    _, images, labels = case
    net = network(stride=2)
    attack = CosPGD(steps=STEPS, epsilon=EPSILON, alpha=ALPHA, random_start=False, tolerance=None)
    result = attack(net, images, labels)
    for n in range(len(images)):
        check(result, n, plain(net, images[n], labels[n], cospgd))


@pytest.mark.parametrize("each_target", [True, False])
def test_a_users_own_loss_gives_what_the_fused_one_gives(case, each_target):
    net, images, labels = case

    def own(scores: Tensor, labels: Tensor) -> Tensor:
        values = entropies(scores, labels)
        return values if each_target else values.sum((1, 2))

    settings = {"steps": STEPS, "random_start": False}
    for model in (net, network(stride=2)):
        fused = PGD(**settings)(model, images, labels)
        users = PGD(loss=own, **settings)(model, images, labels)
        torch.testing.assert_close(users.adversarial, fused.adversarial, rtol=0, atol=1e-9)
        assert torch.equal(users.active, fused.active)
        torch.testing.assert_close(users.loss, fused.loss)


def test_loss_and_driver_are_independent(case):
    net, images, labels = case
    for loss in ("jensen-shannon", losses.tsallis, "margin", "dlr", "masked-spherical"):
        for attack in (PGD(loss=loss, steps=4), APGD(loss=loss, steps=6)):
            result = attack(net, images, labels)
            assert result.adversarial_labels == "untargeted"
            assert bool((result.active.min(0).values < (labels != 255).flatten(1).sum(1)).all())
    result = APGD(loss="dag", steps=6)(net, images, labels)
    assert result.adversarial_labels.shape == labels.shape  # a permutation was drawn
    assert bool((result.adversarial_labels != labels)[labels != 255].all())


def test_an_image_without_a_target_left_is_done(case):
    net, images, labels = case
    attack = PGD(epsilon=9.0, alpha=0.3, steps=50, random_start=False, bounds=None)
    result = attack(net, images, labels)
    done = [n for n in range(3) if result.status[n] is Status.CONVERGED]
    assert done  # or this says nothing
    for n in done:
        m = int(result.iterations[n])
        assert m < 50
        assert result.active[m, n] == 0
        assert bool((result.active[m + 1 :, n] == -1).all())
        assert bool(result.loss[m + 1 :, n].isnan().all())
        assert not bool(result.loss[: m + 1, n].isnan().any())
        assert torch.equal(result.adversarial[n], result.last[n])
    whole = dataclasses.replace(attack, tolerance=None)(net, images, labels)
    assert whole.iterations.tolist() == [50] * 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_are_each_images_own_and_fill_the_ball(norm):
    attack = PGD(norm=norm, epsilon=0.2, bounds=None, restarts=2)
    image = torch.full((3, 40, 50), 0.5)
    points = [attack.random_point(image, seed, run) - image for seed in (1, 2) for run in (0, 1)]
    for k, point in enumerate(points):
        for other in points[:k]:
            assert float((point - other).abs().max()) > 1e-3
        if norm == "linf":
            assert 0.199 < float(point.abs().max()) <= 0.2
            assert abs(float(point.std()) - 0.2 / math.sqrt(3)) < 2e-3  # uniform
        else:  # nearly all of a ball of 6,000 dimensions is near its surface
            assert 0.199 < float(point.norm()) <= 0.2
            assert abs(float(point.mean())) < 1e-4
    assert torch.equal(points[0], attack.random_point(image, 1, 0) - image)


@pytest.mark.parametrize("attack", [CosPGD(steps=5, restarts=4), APGD(steps=8, restarts=3)])
def test_restarts_keep_the_worst_run_of_each_image(case, attack):
    net, images, labels = case
    attack = dataclasses.replace(attack, epsilon=0.02)
    seeds = torch.Generator().manual_seed(11)
    result = attack(net, images, labels, generator=seeds)
    single = dataclasses.replace(attack, restarts=1)
    seeds = torch.Generator().manual_seed(11)
    for n in range(len(images)):
        seed = int(torch.randint(2**63 - 1, (), generator=seeds))
        runs = []
        for run in range(attack.restarts):
            start = attack.random_point(images[n], seed, run)
            runs.append(single(net, images[n : n + 1], labels[n : n + 1], start=start[None]))
        left = [int(run.active.min()) for run in runs]
        worst = runs[left.index(min(left))]
        assert torch.equal(result.active[:, n], worst.active[:, 0])
        torch.testing.assert_close(result.adversarial[n], worst.adversarial[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(result.last[n], worst.last[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=6, restarts=2, momentum=0.5),
        SegPGD(steps=6),
        APGD(steps=12, norm="l2", epsilon=0.6),
        APGD(steps=12, radii="shrinking", loss="masked-cross-entropy"),
    ],
)
def test_a_stream_gives_what_each_image_gives_in_a_batch(case, attack, slots):
    net, images, labels = case
    batch = attack(net, images, labels, generator=torch.Generator().manual_seed(2))
    samples = [Sample(images[k], labels[k], key=k) for k in range(3)]
    told: dict[int, list[int]] = {k: [] for k in range(3)}

    def note(keys, counts):
        for key, count in zip(keys, counts.tolist(), strict=True):
            told[key].append(count)

    results = attack.stream(
        net, samples, slots, generator=torch.Generator().manual_seed(2), callback=note
    )
    for result in results:
        n = result.key
        torch.testing.assert_close(result.adversarial[0], batch.adversarial[n], rtol=0, atol=1e-9)
        assert torch.equal(result.active[:, 0], batch.active[:, n])
        own = [count for count in batch.active[:, n].tolist() if count >= 0]
        assert any(told[n][k : k + len(own)] == own for k in range(len(told[n])))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [PGD, APGD])
def test_on_levels_every_image_is_one_of_the_grid_within_the_ball(case, kind, norm):
    net, images, labels = case
    images = (images * 255).round() / 255
    epsilon = 5.5 / 255 if norm == "linf" else 40 / 255
    attack = kind(epsilon=epsilon, norm=norm, steps=6, levels=256, restarts=2)
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    result = attack(net, images, labels)
    for shown in (*seen, result.adversarial, result.last):
        level = shown * 255
        torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-9)
    away = result.perturbation.flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)
    assert bool((away > 0).all())
    limit = 5 / 255 if norm == "linf" else epsilon
    assert float(away.max()) <= limit + 1e-6
    expected = [int(c[c >= 0].min()) for c in result.active.T]
    with torch.no_grad():
        left = (net(result.adversarial).argmax(1) == labels).flatten(1).sum(1)
    assert left.tolist() == expected


@pytest.mark.parametrize("attack", [PGD(steps=5), SegPGD(steps=5), APGD(steps=8, loss="dag")])
def test_joint_attacks_fool_several_networks(case, attack):
    net, images, labels = case
    other = network(seed=8, classes=6, stride=2)
    parts = [Part(net, labels), Part(other, other(images).argmax(1).detach())]
    result = dagcore.joint_attack(attack, parts, images, torch.Generator().manual_seed(1))
    assert result.active.shape == result.loss.shape == (attack.schedule().max_iter + 1, 2, 3)
    best = result.active.sum(1).min(0).values  # of both networks together
    for part, k in zip(parts, range(2), strict=True):
        scores = part.model(result.adversarial)
        hits = (scores.argmax(1) == part.labels).flatten(1).sum(1)
        best -= hits
        assert hits.shape == result.active[0, k].shape
    assert torch.equal(result.left, result.active.sum(1).min(0).values)
    assert bool((result.left <= result.active[0].sum(0)).all())
    assert best.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"parts\[0\]: goal must be None for"):
        dagcore.joint_attack(attack, [Part(net, labels, goal="reach")], images)


def test_joint_is_the_attack_itself_for_one_network(case):
    net, images, labels = case
    attack = CosPGD(steps=5)
    alone = attack(net, images, labels, generator=torch.Generator().manual_seed(1))
    seeds = torch.Generator().manual_seed(1)
    joint = dagcore.joint_attack(attack, [Part(net, labels)], images, seeds)
    assert torch.equal(joint.adversarial, alone.adversarial)
    assert torch.equal(joint.loss[:, 0], alone.loss)


@pytest.mark.parametrize("levels", [None, 256])
def test_a_universal_perturbation_leaves_fewer_targets_of_every_image(case, levels):
    net, images, labels = case
    images = (images * 255).round() / 255
    samples = [Sample(images[k], labels[k]) for k in range(3)]
    attack = PGD(steps=12, epsilon=0.1, levels=levels)
    result = dagcore.universal_perturbation(attack, net, samples, batch_size=2)
    assert result.perturbation.shape == (1, 3, 9, 11)
    assert 0.05 < float(result.perturbation.abs().max()) <= 0.1 + 1e-9
    attacked = (images + result.perturbation).clamp(0, 1)
    with torch.no_grad():
        before, after = ((net(x).argmax(1) == labels).sum() for x in (images, attacked))
    assert after < before
    with pytest.raises(ValueError, match="batch_size must be at least the number of samples, 3"):
        dagcore.universal_perturbation(APGD(steps=5), net, samples, batch_size=2)
    whole = dagcore.universal_perturbation(APGD(steps=9, epsilon=0.1), net, samples)
    assert whole.loss[-1, 0] > whole.loss[0, 0]


def test_a_zero_gradient_stalls_and_is_no_nan(case):
    _, images, labels = case
    flat = nn.Conv2d(3, 4, 1).double()
    flat.weight.data.zero_()
    flat.bias.data = torch.tensor([1.0, 0, 0, 0]).double()
    labels = torch.zeros_like(labels)
    for attack in (PGD(norm="l2", epsilon=1.0), PGD(momentum=0.9), APGD(), CosPGD()):
        result = attack(flat, images, labels)
        assert set(result.status) == {Status.STALLED}
        assert bool(result.adversarial.isfinite().all())
        assert result.active[0].tolist() == [99, 99, 99]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: PGD(loss="hinge"), "loss must be 'cross-entropy', .* got 'hinge'"),
        (lambda: PGD(loss=3), "loss must be a name, .* got int"),
        (lambda: PGD(norm="l1"), "norm must be 'linf' or 'l2', got 'l1'"),
        (lambda: PGD(epsilon=0.0), "epsilon must be a finite number above 0, got 0.0"),
        (lambda: PGD(alpha=-1.0), "alpha must be a finite number above 0, got -1.0"),
        (lambda: PGD(steps=-1), "steps must be at least 0, got -1"),
        (lambda: PGD(momentum=-0.1), "momentum must be a finite number of at least 0, got -0.1"),
        (lambda: PGD(restarts=0), "restarts must be at least 1, got 0"),
        (lambda: PGD(restarts=2, random_start=False), "random_start must be True with restarts=2"),
        (lambda: PGD(tolerance=1.0), r"tolerance must be a fraction in \[0, 1\), got 1.0"),
        (lambda: PGD(levels=256, bounds=None), "bounds must be given with levels=256, got None"),
        (lambda: SegPGD(loss="dlr"), "unexpected keyword argument 'loss'"),
        (lambda: APGD(steps=0), "steps must be at least 1, got 0"),
        (lambda: APGD(radii="growing"), "radii must be 'shrinking', got 'growing'"),
        (lambda: APGD(radii=[(2, 0.5), (1, 0.4)]), "radii must have .* shares that add up to 1"),
        (lambda: APGD(radii=[(2, 1.0)]), "radii must have 1 as their last factor"),
        (lambda: APGD(radii=[2, 1]), r"radii\[0\] must be \(factor, share\), got 2"),
        (lambda: APGD(radii="shrinking", steps=2), "steps must give each of the 3 phases"),
    ],
)
def test_settings_out_of_range_are_named(make, told):
    with pytest.raises((TypeError, ValueError), match=told):
        make()


def test_arguments_that_do_not_go_together_are_named(case):
    net, images, labels = case
    with pytest.raises(ValueError, match="must be 'permutation', 'random' or 'untargeted'"):
        PGD()(net, images, labels, "runner-up")
    with pytest.raises(ValueError, match="or 'runner-up', got 'untargeted'"):
        PGD(loss="dag")(net, images, labels, "untargeted")
    with pytest.raises(ValueError, match="scores must have at least 3 classes for 'dlr', got 2"):
        PGD(loss="dlr")(network(classes=2), images, labels.clamp(max=1))
    weights = losses.Loss("cross-entropy", class_weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"class_weights must have shape \(4,\)"):
        PGD(loss=weights)(net, images, labels)
    with pytest.raises(ValueError, match=r"loss must return one value for each image or target"):
        PGD(loss=lambda scores, labels: scores.mean())(net, images, labels)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\) .* got 9"):
        PGD()(net, images, torch.full_like(labels, 9))
    far = images.clone()
    far[0, :, :5] = (far[0, :, :5] + 0.3) % 1
    with pytest.raises(ValueError, match=r"start must lie within epsilon=0\.5 of images in the L2"):
        PGD(norm="l2", epsilon=0.5)(net, images, labels, start=far)
    with pytest.raises(ValueError, match="alpha must be at least the spacing of float16 images"):
        PGD(alpha=1e-4)(net, images.half(), labels)

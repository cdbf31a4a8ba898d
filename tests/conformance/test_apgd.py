"""APGD against a plain loop of its own, written from the paper's Algorithm 1, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dagcore import APGD
from dagcore.attacks.base import open_slots
from dagcore.engine.networks import Targets

EPSILON = 0.06
CLOSE = 1e-7  # of steps far below this, the sign of a gradient of 0 may decide


def network() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()
    )
    return nn.Sequential(net, nn.Conv2d(8, 4, 1)).double()


def project(v: Tensor, origin: Tensor, epsilon: float, norm: str) -> Tensor:
    r = v - origin
    if norm == "linf":
        r = r.clamp(-epsilon, epsilon)
    elif float(r.norm()) > epsilon:
        r = r * (epsilon / r.norm())
    return (origin + r).clamp(0, 1)


def plain_phase(net, x, origin, labels, steps, epsilon, norm):
    """One image in one ball: every iterate, step size and checkpoint, and the most successful."""

    def look(x: Tensor) -> tuple[float, Tensor, int]:
        leaf = x.clone().requires_grad_()
        scores = net(leaf[None])
        loss = F.cross_entropy(scores, labels[None], reduction="sum")
        (g,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), g, int((scores.argmax(1) == labels).sum())

    alpha = 2 * epsilon
    window = max(int(0.22 * steps), 1)
    loss, g, hits = look(x)
    best_x, best_g, best_loss = x, g, loss
    fewest, returned = hits, x
    losses, iterates, alphas, checkpoints = [loss], [x], [alpha], []
    before = x
    checked_best, halved, since = loss, True, 0
    for t in range(steps):
        along = g.sign() if norm == "linf" else g / g.norm()
        z = project(x + alpha * along, origin, epsilon, norm)
        a = 0.75 if t else 1.0
        moved = project(x + a * (z - x) + (1 - a) * (x - before), origin, epsilon, norm)
        before, x = x, moved
        loss, g, hits = look(x)
        losses.append(loss)
        iterates.append(x)
        if hits < fewest:
            fewest, returned = hits, x
        if loss > best_loss:
            best_x, best_g, best_loss = x, g, loss
        since += 1
        if since == window:
            rises = sum(losses[k] > losses[k - 1] for k in range(-window, 0))
            halve = rises <= 0.75 * window or (not halved and best_loss <= checked_best)
            if halve:
                alpha, x, g = alpha / 2, best_x, best_g
            checkpoints.append(t + 1)
            checked_best, halved, since = best_loss, halve, 0
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        alphas.append(alpha)
    return iterates, alphas, checkpoints, losses, returned


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    net = network()
    images = torch.rand((3, 3, 9, 11), generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        labels = net(images).argmax(1)
    return net, images, labels


def trajectory(attack: APGD, net, images, labels):
    """Iterates and step sizes of an attack in slots, evaluation by evaluation."""
    targets = Targets(labels, attack.assign(None, None))
    slots = open_slots(attack, [attack.network(net)], images, [targets])
    iterates, alphas, outcomes = [], [], {}
    while len(outcomes) < len(images):
        iterates.append(slots.state["x"].clone())
        slots.iterate()
        alphas.append(slots.state["alpha"].clone())
        outcomes |= {one.tag: one for one in slots.collect()}
    return iterates, alphas, outcomes


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 7, 300])
def test_the_trajectory_is_that_of_a_plain_loop(case, steps, norm):
    net, images, labels = case
    epsilon = EPSILON if norm == "linf" else 0.8
    attack = APGD(steps=steps, epsilon=epsilon, norm=norm, random_start=False, tolerance=None)
    iterates, alphas, outcomes = trajectory(attack, net, images, labels)
    assert len(iterates) == steps + 1
    for n in range(len(images)):
        plain = plain_phase(net, images[n], images[n], labels[n], steps, epsilon, norm)
        for t in range(steps + 1):
            torch.testing.assert_close(iterates[t][n], plain[0][t], rtol=0, atol=CLOSE)
        told = [float(a[n]) for a in alphas[:-1]]
        assert told == pytest.approx(plain[1][:-1], rel=1e-12)
        assert outcomes[n].loss is not None
        assert outcomes[n].loss[:, 0].tolist() == pytest.approx(plain[3], rel=1e-12)
        torch.testing.assert_close(outcomes[n].image, plain[4], rtol=0, atol=CLOSE)
        if steps == 300:  # it has to have gone back and forth for this to say something
            assert len(set(told)) > 4
            assert plain[2][:4] == [66, 123, 171, 210]


def test_shrinking_radii_begin_from_the_best_of_the_last_phase(case):
    net, images, labels = case
    attack = APGD(steps=30, epsilon=EPSILON, radii="shrinking", random_start=False, tolerance=None)
    assert attack.phases == ((9, 2 * EPSILON), (9, 1.5 * EPSILON), (12, EPSILON))
    result = attack(net, images, labels)
    assert result.iterations.tolist() == [32] * 3  # a change of radius is one
    for n in range(len(images)):
        x, losses = images[n], []
        for steps, epsilon in attack.phases:
            x = project(x, images[n], epsilon, "linf")
            *_, own, x = plain_phase(net, x, images[n], labels[n], steps, epsilon, "linf")
            losses += own
        torch.testing.assert_close(result.adversarial[n], x, rtol=0, atol=CLOSE)
        assert result.loss[:, n].tolist() == pytest.approx(losses, rel=1e-12)
        assert float(result.perturbation[n].abs().max()) <= EPSILON + 1e-12


def test_steps_are_judged_by_the_loss_that_is_tracked(case):
    net, images, labels = case
    settings = {"steps": 30, "epsilon": EPSILON, "random_start": False, "tolerance": None}
    own = APGD(**settings, loss="cosine")(net, images, labels)
    tracked = APGD(**settings, loss="cosine", track="cross-entropy")(net, images, labels)
    assert not torch.equal(own.last, tracked.last)
    with torch.no_grad():
        entropy = F.cross_entropy(net(tracked.last), labels, reduction="none").sum((1, 2))
    torch.testing.assert_close(tracked.loss[-1], entropy)
    same = APGD(**settings, loss="cosine", track="cosine")(net, images, labels)
    assert torch.equal(own.last, same.last)


def test_the_shares_of_the_paper_are_90_90_and_120_of_300_steps():
    phases = APGD(steps=300, epsilon=1.0, radii="shrinking").phases
    assert phases == ((90, 2.0), (90, 1.5), (120, 1.0))
    assert math.isclose(sum(steps for steps, _ in phases), 300)

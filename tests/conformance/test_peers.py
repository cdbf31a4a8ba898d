"""Public peers, where they are installed: what is the same, and which of their faults are not here.

    pip install --no-deps adv-lib torchattacks cospgd

A fault is told of the versions that it was seen in; with another version its test is skipped.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dagcore import DAG, PGD, ALMAProx, CosPGD, SegPGD, Status, losses
from dagcore.attacks.alma import penalty_slope

GAMMA = 0.5 / 255


@pytest.fixture
def adv_lib(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its attacks; the plotting client that they import is not needed."""
    client = types.ModuleType("visdom")
    client.Visdom = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "visdom", client)
    reason = "adv-lib is not installed: pip install --no-deps adv-lib"
    dag = pytest.importorskip("adv_lib.attacks.segmentation.dense_adversary", reason=reason)
    alma = pytest.importorskip("adv_lib.attacks.segmentation.alma_prox", reason=reason)
    # Looked up by name: the package has a function of the module's name.
    alma = sys.modules[f"{dag.__package__}.alma_prox"]
    return types.SimpleNamespace(dag=dag.dag, alma_prox=alma.alma_prox, P=alma.P)


def seen_in(package: str, *versions: str) -> None:
    """Skip unless the package is one that a fault was seen in."""
    version = importlib.metadata.version(package)
    if version not in versions:
        pytest.skip(f"{package} is {version}; the fault is told of {', '.join(versions)}")


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1)).double()
    net[2].bias.data -= net(torch.full((1, 3, 9, 9), 0.5).double()).detach()[0, :, 2, 2]
    return net.requires_grad_(False)  # with equal scores at grey


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    """Images that are nearly grey, labelled as the network sees them."""
    net = network()
    images = torch.rand((3, 3, 9, 11), generator=torch.Generator().manual_seed(5)).double()
    images = 0.5 + 0.1 * (images - 0.5)
    return net, images, net(images).argmax(1)


class Watched(nn.Module):
    """A network that keeps the images that it was given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        return self.net(images)


def hits(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return (net(images).argmax(1) == labels).flatten(1).sum(1)


# --- adv-lib's dag


def test_dag_makes_the_same_updates(case, adv_lib):
    """By the runner-up rule, with a step that suits the images, one image after the other."""
    net, images, labels = case
    result = DAG(gamma=GAMMA, max_iter=150, tolerance=0.5)(net, images, labels, "runner-up")
    assert result.converged.all()
    for n in range(len(images)):
        watched = Watched(net)
        found = adv_lib.dag(
            watched, images[n : n + 1], labels[n : n + 1], adv_threshold=0.5, max_iter=151, γ=GAMMA
        )
        assert len(watched.seen) == int(result.iterations[n]) + 1 > 5
        torch.testing.assert_close(found[0], result.adversarial[n], rtol=0, atol=1e-12)


def test_dag_takes_steps_for_images_of_bytes(case, adv_lib):
    seen_in("adv-lib", "0.2.8")
    net, images, labels = case
    assert inspect.signature(adv_lib.dag).parameters["γ"].default == 0.5  # noqa: RUF001
    watched = Watched(net)
    adv_lib.dag(watched, images, labels, max_iter=2)
    first = (watched.seen[1] - images).abs().flatten(1).amax(1)
    assert bool((first > 0.4).all())  # half of the whole range of the images, but for the clip
    result = DAG(max_iter=1)(net, images, labels, "runner-up")
    largest = result.perturbation.abs().flatten(1).amax(1)
    torch.testing.assert_close(largest, torch.full_like(largest, 0.5 / 255))


def test_dag_gives_back_the_clean_image_where_it_is_not_done(case, adv_lib):
    seen_in("adv-lib", "0.2.8")
    net, images, labels = case
    found = adv_lib.dag(net, images, labels, max_iter=6, γ=GAMMA)
    assert torch.equal(found, images)
    result = DAG(gamma=GAMMA, max_iter=5, tolerance=0.01)(net, images, labels, "runner-up")
    assert set(result.status) == {Status.BUDGET}
    assert bool((hits(net, result.adversarial, labels) < hits(net, images, labels)).all())


# --- adv-lib's alma_prox


def test_the_derivative_of_alma_proxs_penalty_is_wrong_above_0(adv_lib):
    seen_in("adv-lib", "0.2.8")
    y = torch.linspace(-2, 2, 41).double()
    rho, mu = torch.full_like(y, 0.6), torch.full_like(y, 0.3)

    def told(y: Tensor) -> Tensor:  # what its forward pass computes, by autograd
        above = mu * y + mu * rho * y**2 + rho**2 * y**3 / 6
        below = mu * y / (1 - rho.clamp(min=1) * y.clamp(max=0))
        return torch.where(y >= 0, above, below)

    leaf = y.clone().requires_grad_()
    torch.testing.assert_close(adv_lib.P.apply(leaf, rho, mu), told(leaf))
    (true,) = torch.autograd.grad(told(leaf).sum(), leaf)
    (theirs,) = torch.autograd.grad(adv_lib.P.apply(leaf, rho, mu).sum(), leaf)
    above = y >= 0
    torch.testing.assert_close(theirs[~above], true[~above])
    # mu y where mu belongs: nothing draws a target over the border.
    torch.testing.assert_close((true - theirs)[above], (mu - mu * y)[above], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(penalty_slope(y, rho, mu), true)


def test_alma_prox_fails_for_a_batch_with_an_image_of_few_targets(case, adv_lib):
    seen_in("adv-lib", "0.2.8")
    net, images, labels = case
    few = torch.zeros_like(labels, dtype=torch.bool)
    few[0, :, :2] = few[1:] = True
    labels = torch.where(few, labels, 255)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="index -1"):
        adv_lib.alma_prox(net, images, labels, masks=few, adv_threshold=0.95, num_steps=20)
    result = ALMAProx(share=0.95, steps=20)(net, images, labels)
    assert result.targets.tolist() == [18, 99, 99]
    assert bool(result.adversarial.isfinite().all())


def test_alma_prox_is_content_with_a_tie_where_it_is_targeted(adv_lib):
    """The distance by which a target is to be won has the wrong sign there.

    A constraint of 0 stands for a target that falls short by as much.
    """
    seen_in("adv-lib", "0.2.8")
    ratio = sys.modules[adv_lib.alma_prox.__module__].difference_of_logits_ratio
    scores = torch.tensor([[1.0, 1.0 - 1e-4, 0.0, -1.0]]).double()
    goal = torch.tensor([1])  # which has not won yet
    multiplier = -1  # as its loop has it
    assert float(multiplier * ratio(scores, goal, targeted=True, ε=1e-4)) == pytest.approx(
        0, abs=1e-7
    )
    assert int(scores.argmax(1)) != int(goal)


# --- torchattacks


def test_pgd_of_torchattacks_makes_the_same_iterates():
    torchattacks = pytest.importorskip(
        "torchattacks", reason="torchattacks is not installed: pip install --no-deps torchattacks"
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 5)).eval()
    images = torch.rand((6, 3, 4, 4))
    labels = net(images).argmax(1)
    for steps in (1, 4, 12):
        peer = torchattacks.PGD(net, eps=8 / 255, alpha=2 / 255, steps=steps, random_start=False)
        attack = PGD(
            epsilon=8 / 255, alpha=2 / 255, steps=steps, random_start=False, tolerance=None
        )
        result = attack(net, images, labels)
        torch.testing.assert_close(result.last, peer(images, labels), rtol=0, atol=1e-6)
        assert float((result.last - images).abs().max()) > 1 / 255


# --- cospgd


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kind", [CosPGD, SegPGD])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_released_loops_make_the_same_iterates(case, kind, norm, targeted):
    """The steps and weights of the package, with the loop of its page around them."""
    peer = pytest.importorskip(
        "cospgd", reason="cospgd is not installed: pip install --no-deps cospgd"
    )
    released = sys.modules[f"{peer.__name__}.attack_implementations"].Attack
    net, images, labels = case
    goal = (labels + 1) % 4 if targeted else labels
    epsilon, alpha, steps = (0.03, 0.01, 8) if norm == "linf" else (0.6, 0.1, 8)
    step = released.step_inf if norm == "linf" else released.step_l2
    x = images
    for t in range(steps):
        leaf = x.clone().requires_grad_()
        scores = net(leaf)
        loss = F.cross_entropy(scores, goal, reduction="none")
        if kind is SegPGD:
            loss = released.segpgd_scale(scores, goal, loss, t, steps, targeted)
        else:
            loss = released.cospgd_scale(scores, goal, loss, 4, targeted).sum()
        (g,) = torch.autograd.grad(loss, leaf)
        x = step(x, torch.tensor(epsilon).double(), g, images, alpha, targeted)
    attack = kind(
        norm=norm, epsilon=epsilon, alpha=alpha, steps=steps, random_start=False, tolerance=None
    )
    result = attack(net, images, labels, goal if targeted else None)
    torch.testing.assert_close(result.last, x, rtol=0, atol=1e-7)


# --- published formulas


def test_jensen_shannon_as_it_is_written_is_nan_where_the_fused_one_is_finite():
    """p log(p / m) in float32, of a target that is lost by 120: p is 0 there, and 0 log 0 NaN."""
    scores = torch.tensor([[0.0, 120.0, 1.0]])
    labels = torch.tensor([0])
    leaf = scores.clone().requires_grad_()
    p, y = leaf.softmax(1), F.one_hot(labels, 3).float()
    m = (p + y) / 2
    written = (p * torch.log(p / m) + y * torch.log(y / m)).sum() / 2
    assert bool(written.isnan())
    assert bool(torch.autograd.grad(written, leaf)[0].isnan().any())
    leaf = scores.clone().requires_grad_()
    loss = losses.jensen_shannon(leaf, labels)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert bool(torch.autograd.grad(loss, leaf)[0].isfinite().all())

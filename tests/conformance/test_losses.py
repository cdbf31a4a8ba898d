"""`dagcore.losses` as functions, against formulas written here, in float64 by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dagcore import losses

WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])


def of(p: Tensor, labels: Tensor) -> Tensor:
    return p.gather(1, labels[:, None])[:, 0]


def entropy(z: Tensor, labels: Tensor) -> Tensor:
    return -of(z.log_softmax(1), labels)


def right(z: Tensor, labels: Tensor) -> Tensor:
    return (z.argmax(1) == labels).double()


def rival(z: Tensor, labels: Tensor) -> Tensor:
    return z.scatter(1, labels[:, None], -math.inf).amax(1)


def jensen_shannon(z: Tensor, labels: Tensor) -> Tensor:
    """Of the softmax and the one-hot label, from its definition."""
    p, label = z.softmax(1), F.one_hot(labels, z.shape[1]).movedim(-1, 1).double()
    mean = (p + label) / 2
    apart = p * (p / mean).log() + label * (label.clamp(min=1e-30) / mean).log()
    return apart.sum(1) / 2


def dlr(z: Tensor, labels: Tensor) -> Tensor:
    order = z.sort(1, descending=True).values
    return -(of(z, labels) - rival(z, labels)) / (order[:, 0] - order[:, 2] + 1e-12)


FORMULAS = {
    "cross_entropy": entropy,
    "masked_cross_entropy": lambda z, y: right(z, y) * entropy(z, y),
    "blended_cross_entropy": lambda z, y: 0.5 * entropy(z, y),
    "cosine": lambda z, y: (
        F.cosine_similarity(z.softmax(1), F.one_hot(y, z.shape[1]).movedim(-1, 1).double()).detach()
        * entropy(z, y)
    ),
    "jensen_shannon": jensen_shannon,
    "tsallis": lambda z, y: (1 - of(z.softmax(1), y) ** 0.5) / 0.5,
    "margin": lambda z, y: (rival(z, y) - of(z, y)).clamp(max=0),
    "dlr": dlr,
    "masked_spherical": lambda z, y: -right(z, y) * of(z, y) / z.norm(dim=1),
}


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    scores = 3 * torch.randn((3, 5, 4, 6), generator=source, dtype=torch.float64)
    labels = torch.randint(5, (3, 4, 6), generator=source)
    labels[0] = scores[0].argmax(0)  # some are right
    labels[:, 1, 2:] = 255
    return scores.to(dtype), labels


def by_hand(name: str, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's sum, and the gradient of the mean over all targets."""
    leaf = scores.double().clone().requires_grad_()
    counted = labels != 255
    values = FORMULAS[name](leaf, torch.where(counted, labels, 0)) * counted
    (gradient,) = torch.autograd.grad(values.sum() / counted.sum(), leaf)
    return values.detach().flatten(1).sum(1), gradient


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_those_of_the_formulas(name: str, dtype: torch.dtype) -> None:
    scores, labels = case(dtype)
    sums, gradient = by_hand(name, scores, labels)
    loss = getattr(losses, name)
    close = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-13}
    leaf = scores.clone().requires_grad_()
    mean = loss(leaf, labels)
    assert mean.dtype == dtype
    torch.testing.assert_close(mean.double(), sums.sum() / (labels != 255).sum(), rtol=1e-6, atol=0)
    mean.backward()
    torch.testing.assert_close(leaf.grad.double(), gradient, **close)
    each = loss(scores, labels, reduction="none")
    torch.testing.assert_close(each.double(), sums, rtol=1e-6, atol=0)
    whole = loss(scores, labels, reduction="sum").double()
    torch.testing.assert_close(whole, sums.sum(), rtol=1e-6, atol=0)


def test_gradients_of_the_incoming_gradient_are_each_images_own() -> None:
    scores, labels = case()
    weights = torch.tensor([2.0, 0.0, -1.0]).double()
    leaf = scores.clone().requires_grad_()
    (losses.cross_entropy(leaf, labels, reduction="none") * weights).sum().backward()
    _, gradient = by_hand("cross_entropy", scores, labels)
    expected = gradient * (labels != 255).sum() * weights.view(3, 1, 1, 1)
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-12)


def test_low_resolution_scores_are_read_through_the_interpolation() -> None:
    scores, _ = case()
    labels = torch.randint(5, (3, 13, 17), generator=torch.Generator().manual_seed(2))
    for align_corners in (False, True):
        leaf = scores.clone().requires_grad_()
        losses.jensen_shannon(leaf, labels, align_corners=align_corners).backward()
        other = scores.clone().requires_grad_()
        large = F.interpolate(other, (13, 17), mode="bilinear", align_corners=align_corners)
        jensen_shannon(large, labels).mean().backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-12)


def test_class_weights_weigh_targets_by_their_label() -> None:
    scores, labels = case()
    loss = losses.Loss("cross-entropy", class_weights=WEIGHTS)
    counted = labels != 255
    kept = torch.where(counted, labels, 0)
    expected = (entropy(scores, kept) * WEIGHTS.double()[kept] * counted).flatten(1).sum(1)
    torch.testing.assert_close(loss(scores, labels, reduction="none"), expected, rtol=1e-12, atol=0)


def test_a_network_learns_by_a_fused_loss_as_by_torchs() -> None:
    source = torch.Generator().manual_seed(4)
    images = torch.rand((4, 3, 8, 8), generator=source)
    labels = torch.randint(5, (4, 8, 8), generator=source)
    labels[:, :2] = 255

    def trained(loss) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            loss(net(images), labels).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    ours = trained(losses.cross_entropy)
    theirs = trained(lambda z, y: F.cross_entropy(z, y, ignore_index=255))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_second_derivative_is_refused() -> None:
    scores, labels = case()
    leaf = scores.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.cosine(leaf, labels), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        gradient.square().sum().backward()


def test_a_loss_compiles_without_a_break() -> None:
    scores, labels = case(torch.float32)
    compiled = torch.compile(losses.jensen_shannon.__call__, fullgraph=True, backend="aot_eager")
    leaf, other = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    compiled(leaf, labels).backward()
    losses.jensen_shannon(other, labels).backward()
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: losses.Loss("hinge"), "name must be 'cross-entropy', .* or 'dlr', got 'hinge'"),
        (lambda: losses.Loss("tsallis", q=2.0), "q must be at most 1, got 2.0"),
        (lambda: losses.Loss("cosine", blend=2.0), "blend must be between 0 and 1, got 2.0"),
        (
            lambda: losses.Loss("cosine", class_weights=torch.ones(2, 2)),
            r"class_weights must have shape \(C,\), got \(2, 2\)",
        ),
        (
            lambda: losses.cosine(*case(), reduction="all"),
            "reduction must be 'mean', 'sum' or 'none', got 'all'",
        ),
        (
            lambda: losses.Loss("dlr", class_weights=WEIGHTS[:3])(*case()),
            r"class_weights must have shape \(5,\)",
        ),
    ],
)
def test_what_is_wrong_is_named(make, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()

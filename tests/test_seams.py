"""An attack of one's own on the engine: an objective, a step and a schedule, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import generator
from torch import Tensor, nn
from torch.nn import functional as F

from dagcore import Sample
from dagcore.attacks import Attack
from dagcore.attacks.schedules import UntilFooled
from dagcore.engine.loop import Seed


class CrossEntropy:
    """Every target's cross-entropy goes up; a target is active while its label wins."""

    tells_loss = False
    default = "none"

    def assign(self, wanted, labels, num_classes, generator):
        return "none"

    def count(self, num_classes, labels, adversarial):
        return (labels != 255).flatten(1).sum(1)

    def begin(self, labels):
        return {}

    def seed(self, scores, labels, adversarial, *, align_corners, state):
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            large = F.interpolate(leaf, labels.shape[1:], mode="bilinear")
            loss = F.cross_entropy(large, labels.long(), ignore_index=255, reduction="sum")
            (seed,) = torch.autograd.grad(loss, leaf)
        hits = (large.argmax(1) == labels) & (labels != 255)
        return Seed(seed, hits.flatten(1).sum(1, dtype=torch.int32))

    def refuse(self, num_classes, labels, adversarial):
        raise ValueError("labels")


class MomentumStep:
    """The sign of a running mean of gradients: one tensor of state for each image."""

    def begin(self, images, start):
        return {"momentum": torch.zeros_like(images)}

    def move(self, state, seen, going):
        if seen.gradient is None:
            return going
        gradient = seen.gradient
        rows = going.view(-1, 1, 1, 1)
        norm = gradient.abs().mean((1, 2, 3), keepdim=True)
        state["momentum"].copy_(torch.where(rows, 0.9 * state["momentum"] + gradient / norm, 0))
        moved = state["x"] + 2 / 255 * state["momentum"].sign()
        state["x"].copy_(torch.where(rows, moved.clamp(0, 1), state["x"]))
        return going & (norm.flatten() > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentumAscent(Attack):
    max_iter: int = 30

    def objective(self):
        return CrossEntropy()

    def step(self):
        return MomentumStep()

    def schedule(self):
        return UntilFooled(self.max_iter, tolerance=0.5)


def network() -> nn.Module:
    net = nn.Conv2d(3, 4, 2, stride=2)
    net.weight.data = torch.randn(net.weight.shape, generator=generator(1))
    net.bias.data.zero_()
    return net


def some_images(count: int = 5) -> Tensor:
    images = torch.rand((count, 3, 8, 12), generator=generator(2))
    # Less and less contrast: the images take more and more updates.
    return 0.5 + (images - 0.5) * torch.linspace(0.1, 1.2, count).view(-1, 1, 1, 1).clamp(max=1)


def by_hand(net: nn.Module, image: Tensor, labels: Tensor) -> tuple[Tensor, list[int]]:
    """The attack on one image, as a plain loop."""
    x, momentum, counts = image.clone(), torch.zeros_like(image), []
    for m in range(31):
        leaf = x.clone().requires_grad_()
        scores = F.interpolate(net(leaf[None]), labels.shape, mode="bilinear")
        counts.append(int((scores.argmax(1)[0] == labels).sum()))
        if counts[-1] <= 0.5 * labels.numel() or m == 30:
            return x, counts
        F.cross_entropy(scores, labels[None], reduction="sum").backward()
        momentum = 0.9 * momentum + leaf.grad / leaf.grad.abs().mean()
        x = (x + 2 / 255 * momentum.sign()).clamp(0, 1)
    raise AssertionError


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    net, images = network(), some_images()
    with torch.no_grad():
        labels = F.interpolate(net(images), (8, 12), mode="bilinear").argmax(1)
    return net, images, labels


def test_a_batch_closes_up_as_its_images_stop(case):
    net, images, labels = case
    seen = []
    result = MomentumAscent()(net, images, labels, callback=lambda m, a: seen.append(a.tolist()))
    assert len(set(result.iterations.tolist())) > 2  # at different times
    for n in range(len(images)):
        x, counts = by_hand(net, images[n], labels[n])
        assert result.active[: len(counts), n].tolist() == counts
        assert bool((result.active[len(counts) :, n] == -1).all())
        torch.testing.assert_close(result.adversarial[n], x, rtol=0, atol=1e-5)
    assert seen[0] == result.active[0].tolist()
    assert result.adversarial_labels == "none"


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_stream_gives_slots_to_the_next_image_with_fresh_state(case, slots):
    net, images, labels = case
    together = MomentumAscent()(net, images, labels)
    samples = [Sample(images[k], labels[k], key=k) for k in range(len(images))]
    results = {r.key: r for r in MomentumAscent().stream(net, samples, slots=slots)}
    assert sorted(results) == list(range(len(images)))
    for k, result in results.items():
        assert result.iterations.tolist() == [int(together.iterations[k])]
        torch.testing.assert_close(
            result.adversarial[0], together.adversarial[k], rtol=0, atol=1e-5
        )
        assert result.targets.tolist() == [96]

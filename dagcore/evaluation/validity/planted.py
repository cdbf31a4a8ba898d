"""Plant adversarial examples, to test whether an attack finds them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...attacks import BallAttack
from ...seeds import generator_of
from .case import DRAWS, Case, pooled

PLANTED = 2  # examples planted for each image
BETWEEN = 0.9  # where the second class begins, on the way from random points to the planted one


class Readout:
    """A network with two classes, whose second class begins close to a planted point of the ball.

    It reads the victim's pooled scores along the line from the mean of random points to the planted
    point. `along` is 0 at that mean and 1 at the planted point. The second class begins at `begin`,
    between the random point that is farthest along and the planted point.

    Args:
        case: case with the victim whose scores are read.
        labels: labels of the image, (1, h, w).
        random: pooled scores at random points, (K, D).
        planted: pooled scores at the planted point, (D,).
    """

    def __init__(self, case: Case, labels: Tensor, random: Tensor, planted: Tensor) -> None:
        self.case, self.labels = case, labels
        self.mean = random.mean(0)
        away = planted - self.mean
        self.direction = away / away.square().sum()
        self.farthest = float(self.along(random).max())
        self.begin = self.farthest + BETWEEN * (1 - self.farthest)

    @property
    def sound(self) -> bool:
        """Whether the planted point lies beyond the random points."""
        return self.farthest < 0.99  # False for NaN

    def along(self, features: Tensor) -> Tensor:
        """Return the positions (N,) of features (N, D) along the line."""
        return ((features - self.mean) * self.direction).sum(1)

    def __call__(self, images: Tensor) -> Tensor:
        """Return scores (N, 2) for images (N, 3, H, W)."""
        scores = self.case.scores_of(images, self.labels.expand(len(images), -1, -1))
        height = (self.along(pooled(scores)) - self.begin) / (1 - self.farthest)
        return torch.stack([torch.zeros_like(height), height], 1)


def find_planted(case: Case) -> tuple[int, int, int]:
    """Return how many examples were planted, found by the attack, and found by random points.

    These random points are not the ones from which the readout was made.
    """
    attack = on_two_classes(case.attack)
    planted = found = by_noise = 0
    for b, (batch, noise) in enumerate(zip(case.batches, case.noise, strict=True)):
        for n, image in enumerate(batch.images):
            known, others = noise.features[: DRAWS // 2, n], noise.features[DRAWS // 2 :, n]
            for draw in range(PLANTED):
                rng = generator_of(case.seed, b, n, draw)
                labels = batch.labels[n : n + 1]
                point = far_point(image, case.attack, rng)[None]
                with torch.no_grad():
                    there = pooled(case.scores_of(point, labels))[0]
                readout = Readout(case, labels, known, there)
                if not readout.sound:
                    continue
                planted += 1
                by_noise += bool((readout.along(others) > readout.begin).any())
                result = attack(readout, image[None], labels.new_zeros(1), generator=rng)
                found += int(result.left[0]) == 0
    return planted, found, by_noise


def far_point(image: Tensor, attack: BallAttack, rng: torch.Generator) -> Tensor:
    """Return a random point (3, H, W) on the ball's surface: a corner for L-infinity."""
    noise = torch.randn(image.shape, generator=rng, dtype=torch.float64)
    noise = noise.sign() if attack.norm == "linf" else noise / torch.linalg.vector_norm(noise)
    return (image + (attack.epsilon * noise).to(image)).clamp(0, 1)


def on_two_classes(attack: BallAttack) -> BallAttack:
    """Return the attack with the cross-entropy as loss, unless its loss is fixed.

    Other losses need more classes. The test is about the gradient, and how the steps follow it.
    """
    free = {field.name for field in dataclasses.fields(attack) if field.init}
    losses: dict[str, str | None] = {"loss": "cross-entropy", "track": None}
    changes: dict[str, object] = {name: losses[name] for name in losses if name in free}
    return dataclasses.replace(attack, **changes)  # type: ignore[arg-type]

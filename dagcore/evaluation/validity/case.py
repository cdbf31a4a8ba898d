"""The case to check, a network with images and an attack, and results that checks share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...attacks import PGD, BallAttack
from ...engine import ScoreModel
from ...losses import cross_entropy
from ...ops import argmax_bilinear
from ...seeds import generator_of, seed_of

DRAWS = 10  # random points in the ball of each image
MAP = 32  # maximum side of a score map that serves as features; larger ones are pooled


class Batch(NamedTuple):
    """Images of one size, with their labels."""

    images: Tensor  # (N, 3, H, W)
    labels: Tensor  # (N, h, w) int64


class Noise(NamedTuple):
    """Results of the network at random points in the balls around the images of a batch."""

    correct: Tensor
    """Number of correct pixels, (DRAWS, N)."""
    features: Tensor
    """Pooled scores, (DRAWS, N, D)."""


@dataclasses.dataclass(eq=False)
class Case:
    """A case to check. Accuracies are in percent of all pixels that count."""

    victim: Any
    batches: list[Batch]
    attack: BallAttack
    surrogate: Any
    seed: int

    def __post_init__(self) -> None:
        self.scores_of = ScoreModel(self.victim)
        self.counted = sum(int(self.counts(batch).sum()) for batch in self.batches)

    @property
    def steps(self) -> int:
        """Number of steps of the attack."""
        return int(self.attack.steps)  # type: ignore[attr-defined]  # PGD's and APGD's

    def counts(self, batch: Batch) -> Tensor:
        """Return a mask of the pixels that count, (N, h, w)."""
        return batch.labels != self.attack.ignore_index

    def seen(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the predicted class of each pixel, (N, h, w)."""
        height, width = batch.labels.shape[1:]
        return argmax_bilinear(scores, (height, width), align_corners=self.scores_of.align_corners)

    def correct(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the number of correct pixels of each image, (N,)."""
        hits = (self.seen(scores, batch) == batch.labels) & self.counts(batch)
        return hits.flatten(1).sum(1)

    def accuracy(self, correct: Sequence[Tensor]) -> float:
        """Return the accuracy, given the number of correct pixels (N,) of each batch."""
        return 100 * sum(int(one.sum()) for one in correct) / self.counted

    def look(self, images: Tensor, batch: Batch) -> Tensor:
        """Return the scores of images that replace those of a batch, without a graph."""
        with torch.no_grad():
            return self.scores_of(images, batch.labels)

    def loss(self, leaf: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy, summed over the pixels, and the scores."""
        scores = self.scores_of(leaf, batch.labels)
        loss = cross_entropy(
            scores,
            batch.labels,
            ignore_index=self.attack.ignore_index,
            align_corners=self.scores_of.align_corners,
            reduction="sum",
        )
        return loss, scores

    def gradient(self, images: Tensor, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """Return the gradient of the cross-entropy, or None if there is none, and the scores."""
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            loss, scores = self.loss(leaf, batch)
            if not loss.requires_grad:
                return None, scores.detach()
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return gradient, scores.detach()

    @functools.cached_property
    def _clean(self) -> list[tuple[Tensor | None, Tensor]]:
        return [self.gradient(batch.images, batch) for batch in self.batches]

    @property
    def differentiable(self) -> bool:
        """Whether the loss has a gradient at every image."""
        return all(gradient is not None for gradient, _ in self._clean)

    @property
    def clean_scores(self) -> list[tuple[Batch, Tensor]]:
        """Each batch with the scores of its images."""
        return list(zip(self.batches, (scores for _, scores in self._clean), strict=True))

    @property
    def clean_gradients(self) -> list[tuple[Batch, Tensor]]:
        """Each batch with the gradients at its images. Batches without gradients are left out."""
        known = zip(self.batches, self._clean, strict=True)
        return [(batch, gradient) for batch, (gradient, _) in known if gradient is not None]

    @functools.cached_property
    def clean(self) -> float:
        """Accuracy on the clean images."""
        return self.accuracy([self.correct(scores, batch) for batch, scores in self.clean_scores])

    def points(self, batch: Batch, draw: int) -> Tensor:
        """Return a random point in the ball around each image of a batch."""
        ball = PGD(epsilon=self.attack.epsilon, norm=self.attack.norm)
        made = [
            ball.random_point(image, seed_of((self.seed, k)), draw)
            for k, image in enumerate(batch.images)
        ]
        return torch.stack([point for point in made if point is not None])

    @functools.cached_property
    def noise(self) -> list[Noise]:
        """Results at random points, for each batch."""
        found = []
        for batch in self.batches:
            scores = [self.look(self.points(batch, draw), batch) for draw in range(DRAWS)]
            correct = torch.stack([self.correct(one, batch) for one in scores])
            found.append(Noise(correct, torch.stack([pooled(one) for one in scores])))
        return found

    def attacked(self, network: Any = None, **changes: Any) -> tuple[list[Tensor], float]:
        """Attack each batch, and return the adversarial images and the accuracy.

        Args:
            network: network to attack; None attacks the victim.
            changes: changed settings of the attack.
        """
        attack = dataclasses.replace(self.attack, **changes)
        network = self.victim if network is None else network
        results = [
            attack(network, *batch, generator=generator_of(self.seed)) for batch in self.batches
        ]
        left = self.accuracy([result.left for result in results])
        return [result.adversarial for result in results], left

    @functools.cached_property
    def own(self) -> float:
        """Accuracy under the attack, without changes to it."""
        return self.attacked()[1]

    def stride(self, factor: float) -> dict[str, float]:
        """Return the setting that makes the attack's steps `factor` times as long."""
        return {"alpha": factor * self.attack.alpha} if isinstance(self.attack, PGD) else {}


def pooled(scores: Tensor) -> Tensor:
    """Pool a score map (N, C, h, w) to at most `MAP` x `MAP` cells. Return (N, D) float32."""
    height, width = (min(side, MAP) for side in scores.shape[2:])
    return functional.adaptive_avg_pool2d(scores.float(), (height, width)).flatten(1)

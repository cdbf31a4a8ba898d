"""Networks and detectors behind transforms of their images, which attacks take like any other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..engine import read_scores
from ..engine.scores import aligns_corners
from ..errors import ArgumentError, ArgumentTypeError
from ..optional import optional_import
from ..victims.detection import Detector
from .draws import fingerprints, mixed
from .transforms import Move, Transform

OVERLAP = 0.5  # IoU above which the worse of two detections of a class is removed, across views


class Defence:
    """Base class of `Defended` and `DefendedDetector`.

    Attributes:
        victim: the defended network or detector, or another defence, which images pass afterwards.
        views: transforms whose scores are averaged; one, except for test-time augmentation.
        draws: number of draws of each random transform, over which scores are averaged.
        seed: seed of the random draws.
    """

    victim: Any
    views: tuple[Transform, ...]
    draws: int
    seed: int

    @property
    def undefended(self) -> Any:
        """The network or detector behind all defences, which an oblivious attacker attacks."""
        inner = self.victim
        return inner.undefended if isinstance(inner, Defence) else inner

    @property
    def layers(self) -> list[Defence]:
        """This defence and those inside it, in the order in which images pass them."""
        inner = self.victim
        return [self, *(inner.layers if isinstance(inner, Defence) else [])]

    @property
    def random(self) -> bool:
        """Whether any transform, here or inside, is random."""
        return any(view.random for one in self.layers for view in one.views)

    @property
    def gradient(self) -> str:
        """How gradients pass each defence, in the order in which images pass them."""
        return "; ".join(one.described() for one in self.layers)

    def described(self) -> str:
        """Return what this defence alone does, and how gradients pass it."""
        what = " and ".join(map(str, self.views))
        how = " and ".join(dict.fromkeys(view.gradient for view in self.views))
        if any(view.random for view in self.views):
            how += f", expected over {self.draws} draw{'s' * (self.draws > 1)} (EOT)"
        return f"{what}: {how}"

    def adaptive(self, draws: int = 8, seed: int = 1) -> Any:
        """Return the defence as seen by an attacker who knows it, but not its random draws.

        Scores and gradients are means over `draws` draws from the attacker's own seed (Athalye et
        al., Synthesizing Robust Adversarial Examples, ICML 2018). The first random transform draws
        `draws` times, and later ones draw once for each of these. Attack the result, and measure
        the defence itself.

        Raises:
            ValueError: if `draws` is below 1, or `seed` is the defence's own.
        """
        checks.integer("draws", draws, at_least=1)
        checks.integer("seed", seed, at_least=0)
        own: Any = copy.copy(self)
        if isinstance(self, nn.Module):
            own._modules = dict(self._modules)
        if any(view.random for view in self.views):
            if seed == self.seed:
                raise ArgumentError(f"seed must not be the defence's own, got {seed}")
            own.draws, own.seed, draws = draws, seed, 1
        if isinstance(self.victim, Defence):
            own.victim = self.victim.adaptive(draws, seed)
        return own

    def seen(self, images: Tensor) -> Iterator[tuple[Transform, Tensor, Tensor, Tensor]]:
        """Yield each view, the images repeated for its draws, their keys, and them transformed."""
        prints: Tensor | None = None
        for number, view in enumerate(self.views):
            count = self.draws if view.random else 1
            if prints is None and view.random:
                prints = fingerprints(images)
            if prints is None:
                keys = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            else:
                own = torch.arange(count, device=images.device) + (number << 32)
                seeded = mixed(prints + mixed(torch.full_like(prints, self.seed)))
                keys = mixed(seeded[:, None] + mixed(own)).flatten()
            repeated = images.repeat_interleave(count, 0) if count > 1 else images
            yield view, repeated, keys, self.moved(view, repeated, keys)

    def moved(self, view: Transform, images: Tensor, keys: Tensor) -> Tensor:
        """Return the images as the victim sees them."""
        return view(images, keys)


class Defended(Defence, nn.Module):
    """A segmentation network behind transforms, as the functions of `dagcore.defences` make it."""

    def __init__(
        self,
        victim: Callable[[Tensor], Any],
        views: Sequence[Transform],
        *,
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        self.victim, self.views, self.draws, self.seed = victim, tuple(views), draws, seed
        self.training = bool(getattr(victim, "training", False))
        for name in ("classes", "palette", "cells", "size"):
            setattr(self, name, getattr(victim, name, None))

    @property
    def align_corners(self) -> bool:
        """Whether scores of lower resolution than the labels are enlarged with align_corners."""
        return aligns_corners(self.victim)

    def moved(self, view: Transform, images: Tensor, keys: Tensor) -> Tensor:
        """Return the images as the victim sees them."""
        if isinstance(view, Move):
            return view(images, keys, self.align_corners)
        return view(images, keys)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, C, *T) of images (N, 3, H, W) in [0, 1].

        They are the mean over the draws and, with several views, the logarithm of the views' mean
        probability.
        """
        found = []
        for view, given, keys, moved in self.seen(images):
            scores = read_scores(self.victim(moved), moved)
            if isinstance(view, Move):
                scores = view.back(scores, given, keys, self.align_corners)
            found.append(mean_of_draws(scores, len(images)))
        return together(found)


class DefendedDetector(Defence, Detector):
    """A detector behind transforms, as the functions of `dagcore.defences` make it."""

    def __init__(
        self, victim: Detector, views: Sequence[Transform], *, draws: int = 1, seed: int = 0
    ) -> None:
        Detector.__init__(self, victim, victim.classes)
        self.views, self.draws, self.seed = tuple(views), draws, seed
        self.background, self.has_own_targets = victim.background, victim.has_own_targets
        if self.has_own_targets and any(isinstance(view, Move) for view in views):
            raise ArgumentTypeError(
                "model must be a detector that reads its scores at boxes, since the defence moves "
                f"the images, got {type(victim).__name__}, which has its own targets"
            )

    @property
    def victim(self) -> Any:
        """The defended detector."""
        return self.network

    @victim.setter
    def victim(self, victim: Detector) -> None:
        self.network = victim

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Return scores (N, C, P) at boxes (N, P, 4), averaged over the draws; see `Detector`."""
        found = []
        for view, given, keys, moved in self.seen(images):
            own = boxes
            if own is not None:
                own = own.repeat_interleave(len(given) // max(1, len(images)), 0)
                own = view.boxes(own, given, keys) if isinstance(view, Move) else own
            scores = self.victim(moved, own)
            found.append(mean_of_draws(scores, len(images)))
        return together(found)

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Return the detections in the transformed images, pooled over all views and draws."""
        found: list[list[dict[str, Tensor]]] = [[] for _ in images]
        for view, given, keys, moved in self.seen(images):
            each = self.victim.detect(moved)
            count = len(given) // max(1, len(images))
            for k, one in enumerate(each):
                found[k // count].append(self._restored(view, one, given, keys, k))
        return [one[0] if len(one) == 1 else merged(one) for one in found]

    def candidates(
        self, images: Tensor, nms_threshold: float, max_proposals: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the candidates of the first view and draw; see `Detector`."""
        view, given, keys, moved = next(self.seen(images))
        count = len(given) // max(1, len(images))
        found = self.victim.candidates(moved[::count], nms_threshold, max_proposals)
        restored = [
            self._restored(view, {"boxes": boxes, "scores": scores}, given, keys, k * count)
            for k, (boxes, scores) in enumerate(found)
        ]
        return [(one["boxes"], one["scores"]) for one in restored]

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the defended detector's probabilities of scores."""
        found: Tensor = self.victim.probabilities(scores)
        return found

    def check_boxes(self, boxes: Tensor | None, images: Tensor) -> None:
        """Raise unless the defended detector takes these boxes."""
        self.victim.check_boxes(boxes, images)

    def _restored(
        self, view: Transform, found: dict[str, Tensor], images: Tensor, keys: Tensor, k: int
    ) -> dict[str, Tensor]:
        """Map what was found in moved image k back to the original, without what is outside it."""
        if not isinstance(view, Move):
            return found
        one = slice(k, k + 1)
        boxes = view.boxes(found["boxes"][None], images[one], keys[one], back=True)[0]
        size = (images.shape[2], images.shape[3])
        clip = optional_import("torchvision.ops", "vision").clip_boxes_to_image
        boxes = clip(boxes, size)
        inside = (boxes[:, :2] < boxes[:, 2:]).all(1)
        return {key: value[inside] for key, value in {**found, "boxes": boxes}.items()}


def mean_of_draws(scores: Tensor, count: int) -> Tensor:
    """Average scores (N * draws, ...), whose draws of an image are adjacent, to (N, ...)."""
    if len(scores) == count:
        return scores
    return scores.view(count, len(scores) // count, *scores.shape[1:]).mean(1)


def together(views: Sequence[Tensor]) -> Tensor:
    """Return the scores (N, C, ...) of one view, or the log mean probability of several."""
    if len(views) == 1:
        return views[0]
    logs = torch.stack([scores.log_softmax(1) for scores in views])
    return logs.logsumexp(0) - math.log(len(views))


def merged(found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge the detections of several views by class-wise suppression, the best first."""
    whole = {key: torch.cat([one[key] for one in found]) for key in ("boxes", "labels", "scores")}
    nms = optional_import("torchvision.ops", "vision").batched_nms
    kept = nms(whole["boxes"], whole["scores"], whole["labels"], OVERLAP)
    return {key: value[kept] for key, value in whole.items()}

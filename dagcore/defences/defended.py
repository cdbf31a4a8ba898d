"""Networks and detectors behind a transform of their images, to be attacked like any other."""

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

OVERLAP = 0.5  # IoU from which one of two detections of a class, from several views, goes


class Defence:
    """What `Defended` and `DefendedDetector` share.

    Attributes:
        victim: what is defended: a network, a detector, or another defence, which comes after.
        views: transforms whose scores are averaged; one, unless it is test-time augmentation.
        draws: of random transforms, over which scores are averaged.
        seed: of what is drawn.
    """

    victim: Any
    views: tuple[Transform, ...]
    draws: int
    seed: int

    @property
    def undefended(self) -> Any:
        """The network or detector behind all defences: what an oblivious attacker attacks."""
        inner = self.victim
        return inner.undefended if isinstance(inner, Defence) else inner

    @property
    def layers(self) -> list[Defence]:
        """This defence and those inside, in the order in which images pass them."""
        inner = self.victim
        return [self, *(inner.layers if isinstance(inner, Defence) else [])]

    @property
    def random(self) -> bool:
        """Whether any of its transforms draws."""
        return any(view.random for one in self.layers for view in one.views)

    @property
    def gradient(self) -> str:
        """How a gradient passes, each defence's in the order in which images pass them."""
        return "; ".join(one.described() for one in self.layers)

    def described(self) -> str:
        """This defence alone: what it does, and how a gradient passes it."""
        what = " and ".join(map(str, self.views))
        how = " and ".join(dict.fromkeys(view.gradient for view in self.views))
        if any(view.random for view in self.views):
            how += f", expected over {self.draws} draw{'s' * (self.draws > 1)} (EOT)"
        return f"{what}: {how}"

    def adaptive(self, draws: int = 8, seed: int = 1) -> Any:
        """The same defences as an attacker knows them who does not know what will be drawn.

        Scores and gradients are means over `draws` draws from a seed of the attacker's own (Athalye
        et al., Synthesizing Robust Adversarial Examples, ICML 2018): of the first random transform;
        those that come after draw once for each of these. Attack this, and measure the defence
        itself.

        Raises:
            ValueError: draws below 1, or the seed of the defence itself.
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
        """For each view: itself, the images, drawn for as often as it draws, keys, and moved."""
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
        """Images as the victim sees them."""
        return view(images, keys)


class Defended(Defence, nn.Module):
    """A network behind transforms; made by the functions of `dagcore.defences`."""

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
        """How scores at a lower resolution than the labels are to be enlarged."""
        return aligns_corners(self.victim)

    def moved(self, view: Transform, images: Tensor, keys: Tensor) -> Tensor:
        """Images as the victim sees them."""
        if isinstance(view, Move):
            return view(images, keys, self.align_corners)
        return view(images, keys)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, C, *T) of images (N, 3, H, W) in [0, 1].

        The mean over the draws; over several views the logarithm of their mean probability.
        """
        found = []
        for view, given, keys, moved in self.seen(images):
            scores = read_scores(self.victim(moved), moved)
            if isinstance(view, Move):
                scores = view.back(scores, given, keys, self.align_corners)
            found.append(mean_of_draws(scores, len(images)))
        return together(found)


class DefendedDetector(Defence, Detector):
    """A detector behind transforms; made by the functions of `dagcore.defences`."""

    def __init__(
        self, victim: Detector, views: Sequence[Transform], *, draws: int = 1, seed: int = 0
    ) -> None:
        Detector.__init__(self, victim, victim.classes)
        self.views, self.draws, self.seed = tuple(views), draws, seed
        self.background, self.has_own_targets = victim.background, victim.has_own_targets
        if self.has_own_targets and any(isinstance(view, Move) for view in views):
            raise ArgumentTypeError(
                "model must be a detector whose scores are read at boxes where a defence moves "
                f"the images, got {type(victim).__name__}, which has targets of its own"
            )

    @property
    def victim(self) -> Any:
        """The detector that is defended."""
        return self.network

    @victim.setter
    def victim(self, victim: Detector) -> None:
        self.network = victim

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Scores (N, C, P) at boxes, the mean over draws; see `Detector`."""
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
        """What the detector finds in transformed images, of all views and draws together."""
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
        """Those of the first view and draw."""
        view, given, keys, moved = next(self.seen(images))
        count = len(given) // max(1, len(images))
        found = self.victim.candidates(moved[::count], nms_threshold, max_proposals)
        return [
            (self._restored(view, {"boxes": boxes}, given, keys, k * count)["boxes"], scores)
            for k, (boxes, scores) in enumerate(found)
        ]

    def probabilities(self, scores: Tensor) -> Tensor:
        """As the detector's own."""
        found: Tensor = self.victim.probabilities(scores)
        return found

    def check_boxes(self, boxes: Tensor | None, images: Tensor) -> None:
        """As the detector's own."""
        self.victim.check_boxes(boxes, images)

    def _restored(
        self, view: Transform, found: dict[str, Tensor], images: Tensor, keys: Tensor, k: int
    ) -> dict[str, Tensor]:
        """Detections in moved image k, in the image as it was."""
        if not isinstance(view, Move):
            return found
        one = slice(k, k + 1)
        boxes = view.boxes(found["boxes"][None], images[one], keys[one], back=True)[0]
        size = (images.shape[2], images.shape[3])
        clip = optional_import("torchvision.ops", "vision").clip_boxes_to_image
        return {**found, "boxes": clip(boxes, size)}


def mean_of_draws(scores: Tensor, count: int) -> Tensor:
    """Scores (N * draws, ...), the draws of an image in a row, as their mean (N, ...)."""
    if len(scores) == count:
        return scores
    return scores.view(count, -1, *scores.shape[1:]).mean(1)


def together(views: Sequence[Tensor]) -> Tensor:
    """Scores (N, C, ...) of one view, or the logarithm of the mean probability over several."""
    if len(views) == 1:
        return views[0]
    logs = torch.stack([scores.log_softmax(1) for scores in views])
    return logs.logsumexp(0) - math.log(len(views))


def merged(found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Detections of several views: of those of a class that overlap, the best, the best first."""
    whole = {key: torch.cat([one[key] for one in found]) for key in ("boxes", "labels", "scores")}
    nms = optional_import("torchvision.ops", "vision").batched_nms
    kept = nms(whole["boxes"], whole["scores"], whole["labels"], OVERLAP)
    return {key: value[kept] for key, value in whole.items()}

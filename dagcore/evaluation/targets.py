"""Targets of the attack on an image, from the user's options, the network and the truth."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..engine import frozen, read_scores
from ..engine.scores import aligns_corners, check_layout, warn_of_probabilities
from ..errors import ArgumentError, ArgumentTypeError
from ..losses import UNTARGETED
from ..ops import argmax_bilinear
from ..victims import Detector
from ..victims.detection.targets import ADVERSARIAL_KINDS
from .adversary import Adversary, find_class, is_pattern
from .options import AttackOptions
from .predict import Prediction
from .truth import Truth, size_of

CONFIDENT = 0.5  # minimum score of the detections that replace a missing truth


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTarget:
    """Targets of an attack on one image; see `dagcore.Sample`."""

    labels: Tensor
    adversarial: Tensor | str
    prediction: Prediction
    """Prediction of the network on the clean image."""
    seen: Tensor
    """Predicted class of each target of the clean image: int64, shaped like `labels`; -1: none."""
    record: dict[str, Any]
    """Entries for the image's record."""
    boxes: Tensor | None = None
    truth: Mapping[str, Tensor] | None = None
    """Ground truth of a detector's image: its own detections if no truth was given."""
    known: tuple[Tensor, Tensor] | None = None
    """The image as an autograd leaf, with its scores; see `dagcore.Sample`."""

    @property
    def correct(self) -> Tensor:
        """Whether the network predicts the label at each target: bool, shaped like `labels`."""
        return self.seen == self.labels.long()

    @property
    def aims(self) -> Tensor | str:
        """Adversarial labels of a batch with this image only."""
        return self.adversarial if isinstance(self.adversarial, str) else self.adversarial[None]

    @property
    def num_classes(self) -> int:
        """Number of classes C of the scores."""
        return int(self.record["num_classes"])


class UnfitImageError(ArgumentError):
    """Error for an image that the network cannot take, or whose truth does not match it."""


class TargetRules(abc.ABC):
    """Rules for the targets of a network's images. `rules_for` creates them.

    The network runs once on each image. Its scores give the prediction on the clean image, the
    attack's first evaluation and, if no labels are given, the labels.

    Args:
        options: options of the attack.
        model: network that is attacked: a `Victim`, a `Detector`, or the result of `prepare`.
    """

    num_classes: int

    def __init__(self, options: AttackOptions, model: Any) -> None:
        self.options, self.model = options, model

    def target(
        self,
        name: str,
        image: Tensor,  # (3, H, W)
        truth: Truth,
        generator: torch.Generator,
        *,
        with_graph: bool = False,
    ) -> ImageTarget:
        """Run the network on an image, and return the targets of an attack on it.

        Args:
            name: name of the image in messages.
            image: image (3, H, W) on the network's device.
            truth: ground truth; see `Truth`.
            generator: source of the random choices.
            with_graph: whether to keep the graph of the scores, so that they can serve as the
                attack's first evaluation.

        Raises:
            UnfitImageError: if the network cannot take the image, or the truth does not match it.
            ArgumentError: if the network cannot be attacked, or the options do not fit it.
        """
        leaf = image[None].detach().requires_grad_(with_graph)
        with frozen(self.model), torch.inference_mode(False), torch.set_grad_enabled(with_graph):
            return self._target(name, leaf, truth, generator)

    @abc.abstractmethod
    def check(self, name: str, image: Tensor, truth: Truth) -> None:
        """Raise if it is clear that an image (3, H, W) with its truth cannot be attacked.

        A segmentation network only runs on image sizes that it has not run on before. The errors
        are those of `target`.
        """

    @abc.abstractmethod
    def _target(
        self, name: str, leaf: Tensor, truth: Truth, generator: torch.Generator
    ) -> ImageTarget: ...

    @contextlib.contextmanager
    def _running(self, name: str, leaf: Tensor) -> Any:
        """Turn errors of the network that the image may have caused into `UnfitImageError`."""
        try:
            yield
        except ArgumentError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            machine = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", ()))
            if isinstance(error, machine) or "DefaultCPUAllocator" in str(error):
                raise
            reason = str(error).partition("\n")[0]
            hint = " (--size WIDTHxHEIGHT resizes images for a network that takes one size)"
            sized = self.options.size or getattr(self.model, "size", None)
            resizes = isinstance(self.model, Detector) and not hasattr(self.model, "size")
            raise UnfitImageError(
                f"model {self.options.model!r} cannot take {name} "
                f"({leaf.shape[3]} x {leaf.shape[2]} pixels): {reason}"
                + hint
                * (not sized and not resizes)
            ) from error


def rules_for(options: AttackOptions, model: Any) -> TargetRules:
    """Return the target rules for a network."""
    return BoxRules(options, model) if isinstance(model, Detector) else MapRules(options, model)


class MapRules(TargetRules):
    """Target rules for a segmentation network, whose targets are pixels or cells."""

    adversary: Adversary | None = None

    def __init__(self, options: AttackOptions, model: Any) -> None:
        super().__init__(options, model)
        self.maps: dict[tuple[int, int], tuple[int, int]] = {}  # image size -> score size

    def check(self, name: str, image: Tensor, truth: Truth) -> None:
        """Raise unless the label map matches the image, and a pattern can be painted."""
        if size_of(image) not in self.maps:
            with frozen(self.model), torch.no_grad():
                self._scores(name, image[None])
        assert self.adversary is not None
        self.adversary.check(*self._size(name, size_of(image), truth))

    def _scores(self, name: str, leaf: Tensor) -> Tensor:
        """Return the network's scores. The first call parses the options that name classes."""
        model = self.model
        with self._running(name, leaf):
            scores = read_scores(model(leaf.clone()), leaf)
        seen = scores.detach()
        if not bool(seen.isfinite().all()):
            raise UnfitImageError(
                f"model {self.options.model!r} must return finite scores, but does not for {name}"
            )
        if seen.dim() != 4:
            raise ArgumentError(
                f"model {self.options.model!r} must return scores of shape (N, C, h, w), "
                f"got {tuple(seen.shape)}"
            )
        if self.adversary is None:
            check_layout(seen, size_of(leaf[0]))
            warn_of_probabilities(seen)
            self.num_classes = seen.shape[1]
            self.adversary = Adversary.parse(
                self.options.aims,
                self.options.foreground,
                self.options.background,
                self.num_classes,
                getattr(model, "classes", None),
            )
        self.maps[size_of(leaf[0])] = size_of(seen[0])
        return scores

    def _target(
        self, name: str, leaf: Tensor, truth: Truth, generator: torch.Generator
    ) -> ImageTarget:
        scores = self._scores(name, leaf)
        assert self.adversary is not None
        size = self._size(name, size_of(leaf[0]), truth)
        self.adversary.check(*size)
        align_corners, seen = (
            aligns_corners(self.model, scores),
            scores.detach().as_subclass(Tensor),
        )
        prediction = argmax_bilinear(seen, size, align_corners=align_corners)[0]
        if truth is None:
            labels = prediction.int()
        else:
            assert isinstance(truth, Tensor)
            labels = files.void_as_ignored(truth, self.num_classes).to(leaf.device)
        adversarial, chosen = self.adversary.choose(labels, self.num_classes, generator)
        record: dict[str, Any] = {
            "num_classes": self.num_classes,
            "label_map": list(labels.shape),
            "labelled": truth is not None,
            **chosen,
        }
        if truth is not None:
            record["correct_if_shifted"] = {
                f"{shift:+d}": int(
                    ((prediction == labels + shift) & (labels != files.IGNORE)).sum()
                )
                for shift in (-1, 1)
            }
        known = (leaf, scores) if scores.requires_grad else None
        return ImageTarget(labels, adversarial, prediction.cpu(), prediction, record, known=known)

    def _size(self, name: str, image: tuple[int, int], truth: Truth) -> tuple[int, int]:
        """Return (rows, columns) of an image's targets. Raise if the truth has another size."""
        scores = self.maps[image]
        fits = scores[0] <= image[0] and scores[1] <= image[1]  # scores are never reduced
        sizes = {scores: "the model's score map"}
        if fits:
            sizes = {image: "the image"} | sizes
        if truth is None:
            return list(sizes)[-1 if getattr(self.model, "cells", False) else 0]
        assert isinstance(truth, Tensor)
        given = size_of(truth[None])
        if given not in sizes:
            allowed = [f"{w} x {h} pixels (the size of {of})" for (h, w), of in sizes.items()]
            raise UnfitImageError(
                f"label map of {name} must have {' or '.join(allowed)}, got {given[1]} x {given[0]}"
            )
        counted = files.void_as_ignored(truth, self.num_classes)
        counted = counted[counted != files.IGNORE]
        if counted.numel() and (largest := int(counted.max())) >= self.num_classes:
            hint = " (are they numbered from 1?)" if largest == self.num_classes else ""
            raise UnfitImageError(
                f"label map of {name} must hold classes below {self.num_classes} "
                f"(255 is ignored), got {largest}{hint}"
            )
        return given


class BoxRules(TargetRules):
    """Target rules for a detector, whose targets are proposals, anchors or queries near objects."""

    def __init__(self, options: AttackOptions, model: Detector) -> None:
        super().__init__(options, model)
        if is_pattern(options.aims):
            raise ArgumentError(f"--adversarial {options.aims} requires a segmentation network")
        for option, value in (
            ("--foreground", options.foreground),
            ("--background", options.background),
        ):
            if value is not None:
                raise ArgumentError(f"{option} requires a pattern")
        self.target_class: int | None = None

    def check(self, name: str, image: Tensor, truth: Truth) -> None:
        """Raise unless the detector can take the true boxes."""
        if truth is not None:
            self._true(name, truth, image[None])

    def _true(self, name: str, truth: Truth, images: Tensor) -> None:
        try:
            self.model.check_truth(0, truth, images, self.num_classes)
        except (ArgumentTypeError, ArgumentError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _target(
        self, name: str, leaf: Tensor, truth: Truth, generator: torch.Generator
    ) -> ImageTarget:
        kind, model = self.options.aims, self.model
        with contextlib.ExitStack() as stack:
            with self._running(name, leaf):
                stack.enter_context(model.encoded(leaf.clone()))
                with torch.no_grad():
                    (found,) = model.detect(leaf.clone())
            labelled = truth is not None
            if truth is None:
                truth = model.confident(found, CONFIDENT, leaf)
            assert isinstance(truth, Mapping)
            objects = len(truth["boxes"]) - int(truth.get("iscrowd", torch.zeros(0)).sum())
            try:
                with self._running(name, leaf):
                    targets = model.dense_targets(
                        leaf.detach().clone(),
                        [truth],
                        adversarial=kind if kind in ADVERSARIAL_KINDS else "vanish",
                        generator=generator,
                        ignore_index=files.IGNORE,
                    )
            except (ArgumentTypeError, ArgumentError) as error:
                raise type(error)(f"{name}: {error}") from error
            boxes = None if model.has_own_targets else targets.boxes
            known, seen = None, torch.full_like(targets.labels[0], -1, dtype=torch.int64)
            if bool(targets.counts[0]):
                with self._running(name, leaf):
                    scores = model(leaf.clone(), boxes)
                if not bool(scores.detach().isfinite().all()):
                    raise UnfitImageError(
                        f"model {self.options.model!r} must return finite scores, but does not "
                        f"for {name}"
                    )
                seen = scores[0].detach().argmax(0)
                known = (leaf, scores) if leaf.requires_grad else None
        self.num_classes = targets.num_classes
        words = ("runner-up", UNTARGETED)
        if self.target_class is None and kind not in (*ADVERSARIAL_KINDS, *words):
            try:
                self.target_class = find_class(kind, self.num_classes, model.classes)
            except ArgumentError as error:
                raise ArgumentError(
                    f"--adversarial must be {', '.join(ADVERSARIAL_KINDS)}, runner-up, untargeted "
                    f"or a class for a detector: {error}"
                ) from error
        labels = targets.labels[0]
        adversarial: Tensor | str = targets.adversarial_labels[0]
        record: dict[str, Any] = {
            "num_classes": self.num_classes,
            "proposals": int(targets.proposals[0]),
            "labelled": labelled,
            "objects": objects,
        }
        if self.target_class is not None:
            adversarial = torch.where(labels == files.IGNORE, files.IGNORE, self.target_class)
            record["class"] = self.target_class
        elif kind in words:
            adversarial = kind
        return ImageTarget(
            labels,
            adversarial,
            {key: value.cpu() for key, value in found.items()},
            seen,
            record,
            None if boxes is None else boxes[0],
            truth,
            known,
        )

"""Detectors to attack: scores at boxes, anchors or queries that are fixed on the clean image.

A detector recognises many things at once: each proposal (or anchor, or object query) is one
target of the attack. They must be dense. The attacked image makes the region network propose other
boxes, and only where many overlapping boxes were led astray do the new ones fall among them.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...engine import frozen
from ...engine.scores import described
from ...errors import ArgumentError
from ...optional import optional_import
from .targets import ADVERSARIAL_KINDS, Targets, check_inside, draw_adversarial_labels, match, stack


class Detector(nn.Module, abc.ABC):
    """A detector that takes images in [0, 1], its resizing and normalisation inside.

    Made by `detector`, `dense_detector` or `load`. To attack it:

        targets = victim.dense_targets(images, ground_truth)
        result = dagcore.DAG(max_iter=150)(
            victim, images, targets.labels, targets.adversarial_labels, boxes=targets.boxes)
        detections = victim.detect(result.adversarial)

    Attributes:
        network: the detector itself.
        classes: names of the classes, None where unknown.
        background: index of the background class in the scores.
        has_own_targets: whether the targets are the same for every image, so that scores need no
            boxes.
        preparation: what `dagcore.victims.prepare` did, None for a detector that it did not make.
        original: the detector that it was made of, as long as someone else holds it; not pickled.
    """

    network: Any
    background = 0
    has_own_targets = False
    preparation: Any = None
    original: weakref.ref[nn.Module] | None = None

    def __init__(self, network: nn.Module, classes: Sequence[str] | None = None) -> None:
        super().__init__()
        self.network = network
        self.classes = None if classes is None else tuple(classes)
        self.training = network.training

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "original": None}

    @abc.abstractmethod
    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Scores (N, C, P) before softmax, of images (N, 3, H, W) at P targets each.

        The targets are `boxes` (N, P, 4), unless the detector has targets of its own.
        """

    @abc.abstractmethod
    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """What the whole detector finds in images (N, 3, H, W), new proposals and all.

        Returns:
            For each image "boxes" (D, 4) in pixels, "labels" (D,) and "scores" (D,), the best
            first.
        """

    @abc.abstractmethod
    def candidates(
        self, images: Tensor, nms_threshold: float, max_proposals: int
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image the boxes (P, 4) that can be targets, in its pixels, and scores (P, C)."""

    @contextlib.contextmanager
    def encoded(self, images: Tensor) -> Iterator[None]:
        """Compute the features of images once, for all that is asked of them inside the block.

        Gradients of scores reach `images` as they do outside. torchvision's detectors and those
        that are built like them; others are run as often as they are asked. For one thread.
        """
        network = self.network
        if not (hasattr(network, "transform") and hasattr(network, "backbone")):
            yield
            return
        transformed = network.transform(list(images))
        known = copy.copy(network)
        known._modules = {
            **network._modules,
            "transform": Known(transformed, network.transform),
            "backbone": Known(network.backbone(transformed[0].tensors)),
        }
        self.network = known
        try:
            yield
        finally:
            self.network = network

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probabilities (P, C) of scores (P, C)."""
        return scores.softmax(-1)

    def check_boxes(self, boxes: Tensor | None, images: Tensor) -> None:
        """Raise unless an attack's boxes fit images (N, 3, H, W): (N, P, 4), or None."""
        if boxes is not None and (boxes.dim() != 3 or boxes.shape[::2] != (len(images), 4)):
            raise ArgumentError(
                f"boxes must have shape ({len(images)}, P, 4), got {tuple(boxes.shape)}"
            )

    def dense_targets(
        self,
        images: Tensor,
        ground_truth: Sequence[Any] | None = None,
        *,
        nms_threshold: float = 0.9,
        min_iou: float = 0.1,
        min_score: float = 0.1,
        max_proposals: int = 3000,
        adversarial: str = "permutation",
        generator: torch.Generator | None = None,
        confidence: float = 0.5,
        ignore_index: int = 255,
    ) -> Targets:
        """The targets of an attack, as in the paper: densely distributed proposals.

        A proposal is a target if its IoU with a true box is above `min_iou` and its probability of
        that box's class above `min_score`; where several true boxes qualify it takes the label
        of the one that it overlaps most.

        Args:
            images: (N, 3, H, W) floating point in [0, 1].
            ground_truth: for each image its true "boxes" (K, 4) in pixels and "labels" (K,): a
                mapping as torchvision's detectors are trained on, or a `dagcore.data.Example`.
                Boxes that "iscrowd" (K,) marks are regions to ignore, and give no targets.
                If None, what the detector itself finds with a score of `confidence` or more.
            nms_threshold: of the region network while it proposes (the paper: 0.9, where its
                detectors have 0.7). One-stage detectors take all anchors.
            min_iou: see above.
            min_score: see above.
            max_proposals: of an image at the most, before the filter; the best ones. Two-stage
                detectors only.
            adversarial: "permutation" (each image's object classes permuted at random, none to
                itself), "random" (each target an object class of its own) or "vanish" (the
                background). The first two never aim at the background.
            generator: source of randomness; torch's global one if None.
            confidence: see `ground_truth`.
            ignore_index: label of what is no target; give the attack's.

        Returns:
            The targets; `counts` is 0 for images without any, which the attack leaves alone.

        Raises:
            TypeError, ValueError: the argument, what was required and what came: a box that is
                degenerate or reaches outside its image, a label out of range, ...
        """
        checks.tensor("images", images, checks.FLOAT_DTYPES)
        if images.dim() != 4 or images.shape[1] != 3:
            raise ArgumentError(f"images must have shape (N, 3, H, W), got {tuple(images.shape)}")
        shares = {"min_iou": min_iou, "min_score": min_score, "confidence": confidence}
        for name, value in {"nms_threshold": nms_threshold, **shares}.items():
            checks.number(name, value)
            if not 0 <= value <= 1:
                raise ArgumentError(f"{name} must lie in [0, 1], got {value}")
        checks.integer("max_proposals", max_proposals, at_least=1)
        checks.integer("ignore_index", ignore_index)
        checks.choice("adversarial", adversarial, ADVERSARIAL_KINDS)
        if ground_truth is not None and len(ground_truth) != len(images):
            raise ArgumentError(
                f"ground_truth must have an entry for each of {len(images)} images, "
                f"got {len(ground_truth)}"
            )
        with frozen(self), torch.no_grad():
            given = images.clone()  # the detector's to write into
            found = self.candidates(given, nms_threshold, max_proposals) if len(images) else []
            self.check_candidates(found, images)
            if ground_truth is None:
                detections = self.detect(images.clone()) if len(images) else []
                ground_truth = [self.confident(one, confidence, images) for one in detections]
        num_classes = found[0][1].shape[1] if found else 0
        if 0 <= ignore_index < num_classes:
            raise ArgumentError(
                f"ignore_index must be no class, of which there are {num_classes}, "
                f"got {ignore_index}"
            )
        rows = []
        for n, ((boxes, scores), truth) in enumerate(zip(found, ground_truth, strict=True)):
            true_boxes, true_labels = self.check_truth(n, truth, images, num_classes)
            labels = match(
                boxes.to(true_boxes.dtype),
                self.probabilities(scores),
                true_boxes,
                true_labels,
                min_iou=min_iou,
                min_score=min_score,
                none=ignore_index,
            )
            if not self.has_own_targets:
                boxes, labels = boxes[labels != ignore_index], labels[labels != ignore_index]
            rows.append((boxes, labels))
        boxes, labels = stack(rows, images, ignore_index, pad=not self.has_own_targets)
        return Targets(
            boxes=boxes,
            labels=labels,
            adversarial_labels=draw_adversarial_labels(
                labels,
                adversarial,
                self.objects(num_classes).to(labels.device),
                background=self.background,
                ignore_index=ignore_index,
                generator=generator,
            ),
            proposals=torch.tensor([len(b) for b, _ in found], device=images.device),
            num_classes=num_classes,
            counts=(labels != ignore_index).sum(1),
            boxes_needed=not self.has_own_targets,
        )

    def confident(
        self, found: Mapping[str, Tensor], least: float, images: Tensor
    ) -> dict[str, Tensor]:
        """The objects that were found in an image with at least a score, cut at its border."""
        for key in ("boxes", "labels", "scores"):
            if not isinstance(found, Mapping) or key not in found:
                raise ArgumentError(
                    f"{type(self).__name__}.detect must return 'boxes', 'labels' and 'scores' of "
                    f"each image, got {described(found)}"
                )
        kept = (found["scores"] >= least) & (found["labels"] != self.background)
        size = (images.shape[-2], images.shape[-1])
        boxes = optional_import("torchvision.ops", "vision").clip_boxes_to_image(
            found["boxes"][kept], size
        )
        full = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return {"boxes": boxes[full], "labels": found["labels"][kept][full]}

    def object_classes(self) -> dict[str, int] | None:
        """The class of each kind of object, by name; None where the names are unknown."""
        if self.classes is None:
            return None
        return {
            name: k for k, name in enumerate(self.classes) if k != self.background and name != "N/A"
        }

    def check_truth(
        self, n: int, truth: Any, images: Tensor, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Boxes and labels of image n's objects; raise where anything is wrong with its truth."""
        name = f"ground_truth[{n}]"
        values: list[Any] = []
        for key in ("boxes", "labels", "iscrowd"):
            known = truth.get(key) if isinstance(truth, Mapping) else getattr(truth, key, None)
            if known is None and key != "iscrowd":
                raise ArgumentError(
                    f"{name} must have 'boxes' and 'labels', got {type(truth).__name__} "
                    f"without {key!r}"
                )
            values.append(known)
        boxes, labels, crowd = values
        checks.tensor(f"{name} boxes", boxes, checks.FLOAT_DTYPES)
        checks.tensor(f"{name} labels", labels, checks.LABEL_DTYPES)
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ArgumentError(f"{name} boxes must have shape (K, 4), got {tuple(boxes.shape)}")
        checks.shape(f"{name} labels", labels, (len(boxes),), "its boxes")
        boxes, labels = boxes.to(images.device, images.dtype), labels.to(images.device).long()
        check_inside(f"{name} boxes", boxes, images)
        wrong = (labels < 0) | (labels >= num_classes) | (labels == self.background)
        if bool(wrong.any()):
            raise ArgumentError(
                f"{name} labels must be classes below {num_classes} other than the background "
                f"({self.background}), got {int(labels[wrong][0])}"
            )
        if crowd is None:
            return boxes, labels
        checks.tensor(f"{name} iscrowd", crowd, (torch.bool, *checks.LABEL_DTYPES))
        checks.shape(f"{name} iscrowd", crowd, (len(boxes),), "its boxes")
        single = ~crowd.to(images.device).bool()
        return boxes[single], labels[single]

    def check_candidates(self, found: Sequence[tuple[Tensor, Tensor]], images: Tensor) -> None:
        """Raise unless there are boxes (P, 4) and scores (P, C) for each image."""
        name = f"{type(self).__name__}.candidates"
        if len(found) != len(images):
            raise ArgumentError(
                f"{name} must return boxes and scores for each of {len(images)} images, "
                f"got {len(found)} entries"
            )
        for boxes, scores in found:
            if boxes.dim() != 2 or boxes.shape[1] != 4:
                raise ArgumentError(
                    f"{name} must return boxes of shape (P, 4), got {tuple(boxes.shape)}"
                )
            if scores.dim() != 2 or len(scores) != len(boxes):
                raise ArgumentError(
                    f"{name} must return scores of shape ({len(boxes)}, C) for {len(boxes)} boxes, "
                    f"got {tuple(scores.shape)}"
                )

    def objects(self, num_classes: int) -> Tensor:
        """The classes of objects: not the background, nor those that a data set left unused."""
        names = self.classes or ()
        unused = {k for k, name in enumerate(names) if name == "N/A"} | {self.background}
        return torch.tensor([c for c in range(num_classes) if c not in unused], dtype=torch.int64)


def rescale(
    boxes: Tensor, sizes: Sequence[tuple[int, int]], to: Sequence[tuple[int, int]]
) -> Tensor:
    """Boxes (N, P, 4) in images of sizes (H, W), as boxes in the same images of other sizes."""
    factors = boxes.new_tensor(
        [
            [b[1] / a[1], b[0] / a[0], b[1] / a[1], b[0] / a[0]]
            for a, b in zip(sizes, to, strict=True)
        ]
    )
    return boxes * factors[:, None]


class OfTorchvision(Detector):
    """What torchvision's detectors share: a transform, a backbone, and the form of detections."""

    @staticmethod
    @abc.abstractmethod
    def kinds(detection: Any) -> tuple[type, ...]:
        """The classes of torchvision.models.detection that are understood."""

    @classmethod
    def understands(cls, network: nn.Module) -> bool:
        """Whether a network is of one of the `kinds`, or built on one."""
        # Where this was never imported, the network is none of its.
        detection = sys.modules.get("torchvision.models.detection")
        return detection is not None and isinstance(network, cls.kinds(detection))

    def features(self, images: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Images as the transform resizes them, and their feature maps by name."""
        transformed, _ = self.network.transform(list(images))
        features = self.network.backbone(transformed.tensors)
        return transformed, {"0": features} if isinstance(features, Tensor) else dict(features)

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """What the whole detector finds."""
        found: list[dict[str, Tensor]] = self.network(list(images))
        return [{key: one[key] for key in ("boxes", "labels", "scores")} for one in found]

    def restored(self, boxes: Tensor, size: tuple[int, int], images: Tensor) -> Tensor:
        """Boxes (P, 4) in an image resized to `size`, as boxes in pixels of the images.

        Those that rounding moved past the border are moved back.
        """
        raw = (images.shape[-2], images.shape[-1])
        clip = optional_import("torchvision.ops", "vision").clip_boxes_to_image
        clipped: Tensor = clip(rescale(boxes[None], [size], [raw])[0], raw)
        return clipped


class Known(nn.Module):
    """A module whose output is known already."""

    def __init__(self, output: Any, module: Any = None) -> None:
        super().__init__()
        self.output = output
        if module is not None:
            self.postprocess = module.postprocess

    def forward(self, *_: Any) -> Any:
        """The output, whatever comes in."""
        return self.output

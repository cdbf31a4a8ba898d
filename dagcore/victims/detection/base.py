"""Detectors to attack: scores at boxes, anchors or queries that are fixed on the clean image.

A detector recognises many things at once: each proposal (or anchor, or object query) is one target
of the attack. The targets must be dense, because the region network proposes other boxes on the
attacked image. Those are fooled too only if many overlapping boxes were attacked.
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
    """A detector that takes images in [0, 1], and resizes and normalises them itself.

    `detector`, `dense_detector` and `load` make it. To attack it:

        targets = victim.dense_targets(images, ground_truth)
        result = dagcore.DAG(max_iter=150)(
            victim, images, targets.labels, targets.adversarial_labels, boxes=targets.boxes)
        detections = victim.detect(result.adversarial)

    Attributes:
        network: the wrapped detector.
        classes: names of the classes; None if unknown.
        background: index of the background class in the scores.
        has_own_targets: whether the targets are the same for every image, so that scores need no
            boxes.
        preparation: what `dagcore.victims.prepare` did; None if it did not make this detector.
        original: weak reference to the detector that this one was prepared from; not pickled.
        follower: helper by which `dagcore.victims.refresh` copies the original's weights.
    """

    network: Any
    background = 0
    has_own_targets = False
    preparation: Any = None
    original: weakref.ref[nn.Module] | None = None
    follower: Any = None

    def __init__(self, network: nn.Module, classes: Sequence[str] | None = None) -> None:
        super().__init__()
        self.network = network
        self.classes = None if classes is None else tuple(classes)
        self.training = network.training

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "original": None}

    @abc.abstractmethod
    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Return scores (N, C, P) before softmax of images (N, 3, H, W), at P targets each.

        The targets are `boxes` (N, P, 4), unless the detector has its own targets.
        """

    @abc.abstractmethod
    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Run the whole detector, with new proposals, on images (N, 3, H, W).

        Returns:
            A dictionary for each image: "boxes" (D, 4) in pixels, "labels" (D,) and "scores" (D,),
            the best first.
        """

    @abc.abstractmethod
    def candidates(
        self, images: Tensor, nms_threshold: float, max_proposals: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return for each image the boxes (P, 4) that can be targets, in pixels, and scores (P, C).

        Detectors with a region network use `nms_threshold` and `max_proposals` for it.
        """

    @contextlib.contextmanager
    def encoded(self, images: Tensor) -> Iterator[None]:
        """Compute the features of `images` once, for all calls inside the block.

        Gradients of scores reach `images` as they do outside. This works for torchvision's
        detectors and those built like them. Others run in full at every call. Use it in one thread.
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
        """Return the probabilities (P, C) of scores (P, C)."""
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
        """Choose the targets of an attack as in the paper: densely distributed proposals.

        A proposal becomes a target if its IoU with a true box is above `min_iou` and its
        probability of that box's class is above `min_score`. If several true boxes qualify, it gets
        the label of the one that it overlaps most.

        Args:
            images: (N, 3, H, W) floating point in [0, 1].
            ground_truth: for each image its true "boxes" (K, 4) in pixels and "labels" (K,): a
                mapping as torchvision's detectors are trained on, or a `dagcore.data.Example`.
                Boxes that "iscrowd" (K,) marks are regions to ignore, and give no targets.
                If None, the detector's own detections with a score of at least `confidence`.
            nms_threshold: NMS threshold of the region network (0.9 in the paper, whose detectors
                have 0.7 otherwise). One-stage detectors use all anchors.
            min_iou: see above.
            min_score: see above.
            max_proposals: maximum number of proposals of an image, the best ones, before they are
                filtered. Two-stage detectors only.
            adversarial: "permutation" (a random permutation of each image's object classes, none to
                itself), "random" (another object class for each target) or "vanish" (the
                background). The first two never aim at the background.
            generator: source of randomness; torch's global one if None.
            confidence: see `ground_truth`.
            ignore_index: label of proposals that are no target, as in the attack.

        Returns:
            The targets. `counts` is 0 for images without targets, which the attack leaves alone.

        Raises:
            TypeError, ValueError: if an argument is invalid, for example if a box is degenerate or
                reaches outside its image, or a label is out of range. The message names the
                argument, what was required and what was given.
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
            given = images.clone()  # the detector may write into it
            found = self.candidates(given, nms_threshold, max_proposals) if len(images) else []
            self.check_candidates(found, images)
            if ground_truth is None:
                detections = self.detect(images.clone()) if len(images) else []
                ground_truth = [self.confident(one, confidence, images) for one in detections]
        num_classes = found[0][1].shape[1] if found else 0
        if 0 <= ignore_index < num_classes:
            raise ArgumentError(
                f"ignore_index must not be one of the {num_classes} classes, got {ignore_index}"
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
        """Return the objects found with a score of at least `least`, clipped to the image."""
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
        """Return the index of each object class by name; None if the names are unknown."""
        if self.classes is None:
            return None
        return {
            name: k for k, name in enumerate(self.classes) if k != self.background and name != "N/A"
        }

    def check_truth(
        self, n: int, truth: Any, images: Tensor, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Return boxes and labels of image n's objects; raise if its ground truth is invalid."""
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
        """Return the object classes: all but the background and those the data set does not use."""
        names = self.classes or ()
        unused = {k for k, name in enumerate(names) if name == "N/A"} | {self.background}
        return torch.tensor([c for c in range(num_classes) if c not in unused], dtype=torch.int64)


def rescale(
    boxes: Tensor, sizes: Sequence[tuple[int, int]], to: Sequence[tuple[int, int]]
) -> Tensor:
    """Scale boxes (N, P, 4) in images of sizes (H, W) to other sizes of the same images."""
    factors = boxes.new_tensor(
        [
            [b[1] / a[1], b[0] / a[0], b[1] / a[1], b[0] / a[0]]
            for a, b in zip(sizes, to, strict=True)
        ]
    )
    return boxes * factors[:, None]


class OfTorchvision(Detector):
    """Base class for torchvision's detectors, with their transform, backbone and detections."""

    @staticmethod
    @abc.abstractmethod
    def kinds(detection: Any) -> tuple[type, ...]:
        """Return the supported classes of torchvision.models.detection."""

    @classmethod
    def understands(cls, network: nn.Module) -> bool:
        """Return whether a network is an instance of one of the `kinds`."""
        # If it was never imported, the network cannot be one of them.
        detection = sys.modules.get("torchvision.models.detection")
        return detection is not None and isinstance(network, cls.kinds(detection))

    def features(self, images: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Return the images as the transform resizes them, and their feature maps by name."""
        transformed, _ = self.network.transform(list(images))
        features = self.network.backbone(transformed.tensors)
        return transformed, {"0": features} if isinstance(features, Tensor) else dict(features)

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Run the whole detector; see `Detector.detect`."""
        found: list[dict[str, Tensor]] = self.network(list(images))
        return [{key: one[key] for key in ("boxes", "labels", "scores")} for one in found]

    def restored(self, boxes: Tensor, size: tuple[int, int], images: Tensor) -> Tensor:
        """Map boxes (P, 4) in an image resized to `size` to pixels of the original images.

        Boxes that rounding moved past the border are clipped to the image.
        """
        raw = (images.shape[-2], images.shape[-1])
        clip = optional_import("torchvision.ops", "vision").clip_boxes_to_image
        clipped: Tensor = clip(rescale(boxes[None], [size], [raw])[0], raw)
        return clipped


class Known(nn.Module):
    """A module with a fixed output."""

    def __init__(self, output: Any, module: Any = None) -> None:
        super().__init__()
        self.output = output
        if module is not None:
            self.postprocess = module.postprocess

    def forward(self, *_: Any) -> Any:
        """Return the fixed output, whatever the input."""
        return self.output

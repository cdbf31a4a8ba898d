"""Detectors to attack: scores at boxes, anchors or queries that are fixed on the clean image.

A detector recognises many things at once: each proposal (or anchor, or object query) is one
target of the attack. They must be dense. The attacked image makes the region network propose other
boxes, and only where many overlapping boxes were led astray do the new ones fall among them.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..engine import frozen
from ..engine.stream import Sample
from ..errors import ArgumentError, ArgumentTypeError
from ..labels import derangement
from ..optional import optional_import
from . import fold

KINDS = ("permutation", "random", "vanish")
PADDED_TO = 128  # numbers of boxes are multiples of it, so that images share slots of a stream


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """What an attack on N images aims at, P targets each (padding included)."""

    boxes: Tensor
    """(N, P, 4) left, top, right, bottom in pixels of the images; NaN where padded."""
    labels: Tensor
    """(N, P) int64, the class of the true object; the ignore label where there is none."""
    adversarial_labels: Tensor
    """(N, P) int64; the ignore label likewise."""
    at: Tensor | None
    """What the attack hands on to the detector: the boxes, or None where it has targets itself."""
    proposals: Tensor
    """(N,) int64, boxes that were looked at."""
    num_classes: int
    """C, the background included."""
    counts: Tensor
    """(N,) int64, targets with a label: 0 for an image without objects, which is left alone."""

    def samples(self, images: Tensor, keys: Sequence[Any] | None = None) -> Iterator[Sample]:
        """The images (N, 3, H, W), one by one, for `DAG.stream`; keys are their numbers if None."""
        for n in range(len(images)):
            yield Sample(
                image=images[n],
                labels=self.labels[n],
                adversarial_labels=self.adversarial_labels[n],
                boxes=None if self.at is None else self.at[n],
                key=n if keys is None else keys[n],
            )


class Detector(nn.Module, abc.ABC):
    """A detector that takes images in [0, 1], its resizing and normalisation inside.

    Made by `detector` or `load`. To attack it:

        targets = victim.dense_targets(images, ground_truth)
        result = dagcore.DAG(max_iter=150)(
            victim, images, targets.labels, targets.adversarial_labels, at=targets.at)
        detections = victim.detect(result.adversarial)

    Attributes:
        network: the detector itself.
        classes: names of the classes, None where unknown.
        background: index of the background class in the scores.
    """

    network: Any
    background = 0

    def __init__(self, network: nn.Module, classes: Sequence[str] | None = None) -> None:
        super().__init__()
        self.network = network
        self.classes = None if classes is None else tuple(classes)
        self.training = network.training

    @abc.abstractmethod
    def forward(self, images: Tensor, at: Tensor | None = None) -> Tensor:
        """Scores (N, C, P) before softmax, of images (N, 3, H, W) at P targets each."""

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

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probabilities (P, C) of scores (P, C)."""
        return scores.softmax(-1)

    def check_at(self, at: Tensor | None, images: Tensor) -> None:
        """Raise unless an attack's `at` fits this detector."""
        if at is not None:
            raise ArgumentError(
                f"at must be None, as a {type(self.network).__name__} has targets of its own, "
                f"got a tensor of shape {tuple(at.shape)}"
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
        for name, value in (
            ("nms_threshold", nms_threshold),
            ("min_iou", min_iou),
            ("min_score", min_score),
            ("confidence", confidence),
        ):
            checks.number(name, value)
            if not 0 <= value <= 1:
                raise ArgumentError(f"{name} must lie in [0, 1], got {value}")
        checks.integer("max_proposals", max_proposals, at_least=1)
        checks.integer("ignore_index", ignore_index)
        checks.choice("adversarial", adversarial, KINDS)
        if ground_truth is not None and len(ground_truth) != len(images):
            raise ArgumentError(
                f"ground_truth must have an entry for each of {len(images)} images, "
                f"got {len(ground_truth)}"
            )
        with frozen(self), torch.no_grad():
            found = self.candidates(images, nms_threshold, max_proposals) if len(images) else []
            if ground_truth is None:
                detections = self.detect(images) if len(images) else []
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
        boxes, labels = _stack(rows, images, ignore_index, pad=not self.has_own_targets)
        return Targets(
            boxes=boxes,
            labels=labels,
            adversarial_labels=self._adversarial(
                labels, num_classes, adversarial, ignore_index, generator
            ),
            at=None if self.has_own_targets else boxes,
            proposals=torch.tensor([len(b) for b, _ in found], device=images.device),
            num_classes=num_classes,
            counts=(labels != ignore_index).sum(1),
        )

    has_own_targets = False
    """Whether the targets are the same for every image, and `at` is not needed."""

    def confident(
        self, found: Mapping[str, Tensor], least: float, images: Tensor
    ) -> dict[str, Tensor]:
        """The objects that were found in an image with at least a score, cut at its border."""
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
        """Boxes and labels of image n's ground truth; raise where anything is wrong with them."""
        name = f"ground_truth[{n}]"
        values = []
        for key in ("boxes", "labels"):
            known = truth.get(key) if isinstance(truth, Mapping) else getattr(truth, key, None)
            if known is None:
                raise ArgumentError(
                    f"{name} must have 'boxes' and 'labels', got {type(truth).__name__} "
                    f"without {key!r}"
                )
            values.append(known)
        boxes, labels = values
        checks.tensor(f"{name} boxes", boxes, checks.FLOAT_DTYPES)
        checks.tensor(f"{name} labels", labels, checks.LABEL_DTYPES)
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ArgumentError(f"{name} boxes must have shape (K, 4), got {tuple(boxes.shape)}")
        checks.shape(f"{name} labels", labels, (len(boxes),), "its boxes")
        boxes, labels = boxes.to(images.device, images.dtype), labels.to(images.device).long()
        check_boxes(f"{name} boxes", boxes, images)
        wrong = (labels < 0) | (labels >= num_classes) | (labels == self.background)
        if bool(wrong.any()):
            raise ArgumentError(
                f"{name} labels must be classes below {num_classes} other than the background "
                f"({self.background}), got {int(labels[wrong][0])}"
            )
        return boxes, labels

    def _adversarial(
        self,
        labels: Tensor,  # (N, P)
        num_classes: int,
        kind: str,
        ignore_index: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        counted = labels != ignore_index
        if kind == "vanish":
            return torch.where(counted, self.background, ignore_index)
        classes = self._objects(num_classes).to(labels.device)
        if len(classes) < 2:
            if bool(counted.any()):
                raise ArgumentError(
                    f"adversarial={kind!r} needs at least 2 object classes, there are "
                    f"{len(classes)}: use 'vanish'"
                )
            return labels.clone()
        # Ranks among the object classes; a label that is none of them gets the rank after its own.
        ranks = torch.bucketize(torch.where(counted, labels, 0), classes).clamp_(
            0, len(classes) - 1
        )
        if kind == "permutation":
            tables = [derangement(len(classes), generator) for _ in range(len(labels))]
            drawn = torch.stack(tables).to(labels.device).gather(1, ranks) if tables else ranks
        else:
            device = "cpu" if generator is None else generator.device
            shift = torch.randint(
                1, len(classes), labels.shape, generator=generator, device=device
            ).to(labels.device)
            drawn = (ranks + shift) % len(classes)
        return torch.where(counted, classes[drawn], ignore_index)

    def _objects(self, num_classes: int) -> Tensor:
        """The classes of objects: not the background, nor those that a data set left unused."""
        names = self.classes or ()
        unused = {k for k, name in enumerate(names) if name == "N/A"} | {self.background}
        return torch.tensor([c for c in range(num_classes) if c not in unused], dtype=torch.int64)


def match(
    boxes: Tensor,  # (P, 4)
    probabilities: Tensor,  # (P, C)
    true_boxes: Tensor,  # (K, 4)
    true_labels: Tensor,  # (K,)
    *,
    min_iou: float,
    min_score: float,
    none: int,
) -> Tensor:
    """The label of each box, `none` where it is no target: (P,) int64."""
    if not len(true_boxes) or not len(boxes):
        return torch.full((len(boxes),), none, dtype=torch.int64, device=boxes.device)
    overlap = optional_import("torchvision.ops", "vision").box_iou(boxes, true_boxes)
    fits = (overlap > min_iou) & (probabilities[:, true_labels] > min_score)
    best = torch.where(fits, overlap, -1).argmax(1)
    return torch.where(fits.any(1), true_labels[best], none)


def check_boxes(name: str, boxes: Tensor, images: Tensor) -> None:
    """Raise unless boxes (*, 4) lie inside images (N, 3, H, W) and have an area. Reads values."""
    height, width = images.shape[-2:]
    left, top, right, bottom = boxes.unbind(-1)
    faults = {
        "be finite": ~boxes.isfinite().all(-1),
        "have left < right and top < bottom": (left >= right) | (top >= bottom),
        f"lie inside the image ({width} x {height} pixels)": (
            (left < 0) | (top < 0) | (right > width) | (bottom > height)
        ),
    }
    for required, wrong in faults.items():
        if bool(wrong.any()):
            where = tuple(int(i) for i in wrong.nonzero()[0])
            raise ArgumentError(
                f"{name} must {required}, got {boxes[where].tolist()} at {list(where)}"
            )


def _stack(
    rows: list[tuple[Tensor, Tensor]], images: Tensor, ignore_index: int, *, pad: bool
) -> tuple[Tensor, Tensor]:
    """Boxes (N, P, 4) and labels (N, P) of all images."""
    most = max((len(labels) for _, labels in rows), default=0)
    size = -(-most // PADDED_TO) * PADDED_TO if pad else most
    boxes = images.new_full((len(images), size, 4), torch.nan)
    labels = torch.full((len(images), size), ignore_index, dtype=torch.int64, device=images.device)
    for n, (own_boxes, own_labels) in enumerate(rows):
        boxes[n, : len(own_boxes)], labels[n, : len(own_labels)] = own_boxes, own_labels
    return boxes, labels


def detector(network: nn.Module, classes: Sequence[str] | None = None, **options: Any) -> Detector:
    """The victim around a detector.

    Args:
        network: torchvision's Faster R-CNN, Mask R-CNN and Keypoint R-CNN, and the zoo's R-FCN
            (two stages: the targets are proposals); its RetinaNet, FCOS, SSD and SSDlite (one
            stage: the targets are the anchors or points); or transformers'
            ...ForObjectDetection of the DETR kind (the targets are the object queries).
            It shares its parameters with the victim.
        classes: names of the classes; the network's own `classes` or config if None.
        options: see `TwoStage`, `OneStage` and `Queries`.

    Raises:
        TypeError: a network that is not understood.
    """
    for understands, kind in _kinds():
        if understands(network):
            if classes is None:
                classes = getattr(network, "classes", None)
            victim: Detector = kind(network, classes, **options)
            return victim
    raise ArgumentTypeError(
        "network must be a detector of torchvision (two-stage or one-stage) or transformers' DETR, "
        f"got {type(network).__module__}.{type(network).__qualname__}"
    )


def prepare_detector(
    victim: Detector, *, fold_batch_norm: bool = True, channels_last: bool = True
) -> Detector:
    """A faster copy of a detector, to be attacked in its place; see `prepare`.

    Scores, gradients and detections stay within float32 rounding of the detector's own, which is
    never changed.

    Args:
        victim: as `detector` makes it.
        fold_batch_norm: fold each batch norm into the convolution before it where a run of the
            whole detector on an image of noise shows that this changes nothing.
        channels_last: lay out the weights of convolutions with the channels last in memory.
    """
    copied = copy.deepcopy(victim).eval().requires_grad_(False)
    if fold_batch_norm:
        fold.thaw(copied)
        first = next(copied.network.parameters())
        noise = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        fold.fold(_Whole(copied), noise.to(first))
    return copied.to(memory_format=torch.channels_last) if channels_last else copied


class _Whole(nn.Module):
    """A detector from images to detections."""

    def __init__(self, victim: Detector) -> None:
        super().__init__()
        self.victim = victim

    def forward(self, images: Tensor) -> Any:
        return self.victim.detect(images)


def is_detector(network: nn.Module) -> bool:
    """Whether `detector` understands a network."""
    return any(understands(network) for understands, _ in _kinds())


def _kinds() -> list[tuple[Callable[[nn.Module], bool], Any]]:
    from . import one_stage, queries, two_stage

    return [
        (queries.understands, queries.Queries),
        (two_stage.understands, two_stage.TwoStage),
        (one_stage.understands, one_stage.OneStage),
    ]


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

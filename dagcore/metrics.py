"""Measures of networks: mean IoU, average precision at IoU 0.5, and kinds of detection errors.

Each measure collects a data set through `update`, and returns the result from `compute`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import checks
from .errors import ArgumentError, ArgumentTypeError
from .optional import optional_import

VOID = 255
PROTOCOLS = ("voc2007", "voc2010", "coco")


@dataclasses.dataclass(frozen=True)
class Score:
    """A score per class and their mean, in percent.

    Attributes:
        per_class: (C,), NaN for classes without a score.
        mean: mean over the classes that have a score; NaN if none has.
    """

    per_class: tuple[float, ...]
    mean: float


def _score(per_class: Iterable[float]) -> Score:
    values = tuple(100 * value for value in per_class)
    known = [value for value in values if not math.isnan(value)]
    return Score(values, sum(known) / len(known) if known else math.nan)


class MeanIoU:
    """Intersection over union of each class, and their mean: the measure of VOC's segmentation.

    As in VOC's development kit, one confusion matrix counts the pixels of the whole data set except
    void pixels, and the background is a class like any other. A class that occurs neither in the
    truth nor in a prediction has no score and does not count in the mean. (The kit divides 0 by 0
    in that case. In VOC's own sets, every class occurs.)

    Args:
        num_classes: number of classes C, including the background.
        void: value of the pixels in masks that do not count.
    """

    def __init__(self, num_classes: int, *, void: int = VOID) -> None:
        checks.integer("num_classes", num_classes, at_least=2)
        checks.integer("void", void)
        self.num_classes, self.void = num_classes, void
        self._confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predictions: Tensor, masks: Tensor) -> None:
        """Count predicted classes against true classes, integers of the same shape."""
        for name, value in (("predictions", predictions), ("masks", masks)):
            checks.tensor(name, value, checks.LABEL_DTYPES)
        checks.shape("predictions", predictions, tuple(masks.shape), "masks")
        checks.label_range("masks", masks, self.num_classes, self.void)
        predictions, masks = predictions.long().cpu(), masks.long().cpu()
        if bool(((predictions < 0) | (predictions >= self.num_classes)).any()):
            raise ArgumentError(
                f"predictions must lie in [0, {self.num_classes}), got {int(predictions.min())} "
                f"to {int(predictions.max())}"
            )
        counted = masks != self.void
        pairs = masks[counted] * self.num_classes + predictions[counted]
        self._confusion += pairs.bincount(minlength=self.num_classes**2).view_as(self._confusion)

    def compute(self) -> Score:
        """Return the score of everything counted so far."""
        return iou(self._confusion.diag(), self._confusion.sum(0), self._confusion.sum(1))


def iou(hits: Tensor, predicted: Tensor, true: Tensor) -> Score:
    """Return the score from the correct, the predicted and the true pixels of each class (C,)."""
    hits, predicted, true = hits.double(), predicted.double(), true.double()
    return _score((hits / (predicted + true - hits)).tolist())


def mean_iou(
    predictions: Iterable[Tensor], masks: Iterable[Tensor], num_classes: int, *, void: int = VOID
) -> Score:
    """Return the `MeanIoU` of predicted maps against masks, (H, W) each, of any sizes."""
    measure = MeanIoU(num_classes, void=void)
    end: Any = object()
    for k, pair in enumerate(itertools.zip_longest(predictions, masks, fillvalue=end)):
        if end in pair:
            short = ("predictions", "masks")[pair.index(end)]
            raise ArgumentError(
                f"predictions and masks must have the same length, got {k} {short} and more of the "
                "others"
            )
        measure.update(*pair)
    return measure.compute()


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """The worst case of several attacks on a data set, with one attack chosen for each image.

    Attributes:
        score: score of the data set.
        choice: (N,) int64, index of the attack chosen for each image.
        rounds: number of passes over all images.
    """

    score: Score
    choice: Tensor
    rounds: int


def worst_iou(
    hits: Tensor,  # (A, N, C)
    predicted: Tensor,  # (A, N, C)
    true: Tensor,  # (N, C)
    *,
    begin: int | None = None,
    least_gain: float = 1e-6,
    generator: torch.Generator | None = None,
) -> WorstCase:
    """Search the worst case of the mean IoU of N images under A attacks, as SEA does.

    The mean IoU is a score of the whole data set, so the worst attack on an image depends on the
    attacks chosen for the others. This is SEA's greedy search (Croce, Singh, Hein, ECCV 2024). All
    images begin with one attack. Then each image in turn takes the attack that gives the lowest
    mean IoU of the data set. The search ends when a round over all images gains almost nothing.
    Then no change of a single image gains more, but other choices of attacks may be worse still.
    Counts are exact integers, and only divisions round.

    Args:
        hits: correctly predicted pixels of each image and class, integers.
        predicted: predicted pixels of each image and class, integers.
        true: true pixels of each image and class, integers. Void pixels count in none of the three.
        begin: attack that all images begin with. None takes the one with the lowest mean IoU, so
            that the worst case is at most the mean IoU under each attack.
        least_gain: gain in a round that leads to another round, as a fraction of 1.
        generator: draws the order of the images in each round. None keeps their order.

    Raises:
        TypeError, ValueError: if an argument is invalid. The message names it, what was required
            and what was given.
    """
    for name, value, dims in (("hits", hits, 3), ("predicted", predicted, 3), ("true", true, 2)):
        checks.tensor(name, value, checks.LABEL_DTYPES)
        if value.dim() != dims:
            raise ArgumentError(f"{name} must have {dims} dimensions, got {tuple(value.shape)}")
    checks.shape("predicted", predicted, tuple(hits.shape), "hits")
    checks.shape("true", true, tuple(hits.shape[1:]), "hits")
    wrong = (hits < 0) | (hits > predicted) | (hits > true)
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise ArgumentError(
            "hits must be at least 0 and at most predicted and true, got "
            f"{int(hits[place])} hits, {int(predicted[place])} predicted and "
            f"{int(true[place[1:]])} true at {place}"
        )
    attacks, images, _ = hits.shape
    if attacks == 0:
        raise ArgumentError("hits must be of at least one attack, got none")
    if begin is not None:
        checks.integer("begin", begin, at_least=0, at_most=attacks - 1)
    checks.number("least_gain", least_gain, at_least=0)
    checks.generator(generator)
    # Intersection and union of each class, whose quotient is its IoU.
    h = hits.long().cpu().numpy()
    u = (predicted.long() + true.long() - hits.long()).cpu().numpy()
    whole = _mean_ious(h.sum(1), u.sum(1))
    start = int(whole.argmin()) if begin is None else begin
    choice = np.full(images, start)
    hit, union, now, rounds = h[start].sum(0), u[start].sum(0), whole[start], 0
    while True:
        before, rounds = now, rounds + 1
        order = range(images) if generator is None else torch.randperm(images, generator=generator)
        for n in map(int, order):
            own = choice[n]
            all_hits, all_unions = hit - h[own, n] + h[:, n], union - u[own, n] + u[:, n]
            means = _mean_ious(all_hits, all_unions)
            worst = means.argmin()
            if means[worst] < means[own]:
                choice[n], now = worst, means[worst]
                hit, union = all_hits[worst], all_unions[worst]
        if not before - now > least_gain:
            break
    score = _score((torch.from_numpy(hit).double() / torch.from_numpy(union)).tolist())
    return WorstCase(score, torch.from_numpy(choice), rounds)


def _mean_ious(hits: np.ndarray, unions: np.ndarray) -> np.ndarray:
    """Return the mean IoUs (A,) over the classes (A, C) that occur; NaN if none does."""
    occur = unions > 0
    ratios = hits / np.maximum(unions, 1)  # a class that does not occur has no hits
    with np.errstate(invalid="ignore"):
        means: np.ndarray = ratios.sum(1) / occur.sum(1)
    return means


class AveragePrecision:
    """Average precision of each class at an IoU of at least 0.5, and their mean (mAP).

    - "voc2007": the mean of the best precision at or above recalls of 0, 0.1, ..., 1.
    - "voc2010": the area under that curve, over all recalls (VOC 2010 and later).
    - "coco": the mean at recalls of 0, 0.01, ..., 1, by pycocotools through torchmetrics, of the
      100 detections with the highest scores in each image.

    VOC sorts detections by their scores, and keeps the given order of equal scores. Each detection
    belongs to the true box of its class that it overlaps most, and is correct if it is the first
    one there. A detection that belongs to a difficult box is ignored. COCO lets a detection take
    another box that is still free, and treats difficult boxes as crowds.

    In every protocol, a crowd is a region to ignore. All detections that are not correct and have
    at least half of their own area in a crowd of their class are ignored.

    A class that only has difficult boxes and crowds, or no true box at all, has no score and does
    not count in the mean.

    Args:
        num_classes: number of classes C, including the background (0), which has no score.
        protocol: "voc2007", "voc2010" or "coco".
    """

    def __init__(self, num_classes: int, *, protocol: str = "voc2007") -> None:
        checks.integer("num_classes", num_classes, at_least=2)
        checks.choice("protocol", protocol, PROTOCOLS)
        self.num_classes, self.protocol = num_classes, protocol
        self._coco = _coco() if protocol == "coco" else None
        self._truths = [0] * num_classes
        # For each class: scores of the detections, and whether they are correct.
        self._found: list[list[tuple[float, bool]]] = [[] for _ in range(num_classes)]

    def update(
        self,
        prediction: Mapping[str, Tensor],
        boxes: Tensor,
        labels: Tensor,
        difficult: Tensor | None = None,
        iscrowd: Tensor | None = None,
    ) -> None:
        """Count the detections in one image.

        Args:
            prediction: detections as returned by torchvision's detectors: "boxes" (D, 4) floating
                point, left, top, right, bottom in pixels; "labels" (D,) integers from 1 to C - 1;
                "scores" (D,).
            boxes: true boxes (K, 4) likewise.
            labels: classes of the true boxes, (K,) uint8, int32 or int64, from 1 to C - 1.
            difficult: (K,) bool; None if no box is difficult.
            iscrowd: (K,) bool; None if no box is a crowd.

        Raises:
            TypeError, ValueError: a wrong argument; the message names it, what was required and
                what came.
        """
        seen = _Detections(prediction, boxes, labels, difficult, iscrowd, self.num_classes)
        for label in seen.labels[~seen.ignored].tolist():
            self._truths[label] += 1
        if self._coco is not None:
            truth = {"boxes": seen.boxes, "labels": seen.labels, "iscrowd": seen.ignored.long()}
            self._coco.update(
                [{"boxes": seen.found, "labels": seen.classes, "scores": seen.scores}], [truth]
            )
            return
        for d, right in seen.judged():
            self._found[int(seen.classes[d])].append((float(seen.scores[d]), right))

    def compute(self) -> Score:
        """Return the score of everything counted so far."""
        known = {c: self._area(c) for c, count in enumerate(self._truths) if count}
        if self._coco is not None and known:
            result = self._coco.compute()
            classes, values = result["classes"].reshape(-1), result["map_per_class"].reshape(-1)
            known = dict(zip(classes.tolist(), values.tolist(), strict=True))
        return _score(known[c] if count else math.nan for c, count in enumerate(self._truths))

    def _area(self, label: int) -> float:
        """Return the average precision of a class by VOC's protocols."""
        truths, found = self._truths[label], sorted(self._found[label], key=lambda f: -f[0])
        # Precision where the k-th true box is found, then the best at that recall or above.
        ranks = [rank for rank, (_, right) in enumerate(found, start=1) if right]
        precision = [hits / rank for hits, rank in enumerate(ranks, start=1)]
        precision += [0.0] * (truths - len(ranks))
        for k in reversed(range(truths - 1)):
            precision[k] = max(precision[k], precision[k + 1])
        if self.protocol == "voc2010":
            return sum(precision) / truths
        # Recall k / truths is at least t / 10, in integers.
        first = (max(-(-t * truths // 10), 1) for t in range(11))
        return sum(precision[k - 1] for k in first) / 11


KINDS = ("correct", "classification", "localisation", "both", "duplicate", "background")


@dataclasses.dataclass(frozen=True)
class ErrorCounts:
    """Numbers of detections in a data set by kind of error, and of missed and all objects.

    Attributes:
        correct: detections that are correct.
        classification: detections at the place of an object of another class.
        localisation: detections near an object of their class, but not at its place.
        both: detections near an object of another class.
        duplicate: further detections at the place of an object that was found.
        background: detections that are near no object.
        missed: objects without a correct detection, a classification or a localisation error.
        objects: all objects except difficult ones and crowds.
    """

    correct: int
    classification: int
    localisation: int
    both: int
    duplicate: int
    background: int
    missed: int
    objects: int

    @property
    def detections(self) -> int:
        """Number of detections that count."""
        return sum(getattr(self, kind) for kind in KINDS)

    @property
    def shares(self) -> dict[str, float]:
        """Percentages: "missed" of the objects, the others of the detections; NaN if none count."""
        parts = {kind: (getattr(self, kind), self.detections) for kind in KINDS}
        parts["missed"] = (self.missed, self.objects)
        return {kind: 100 * n / of if of else math.nan for kind, (n, of) in parts.items()}


class DetectionErrors:
    """Detections counted by kind of error, such as wrong place or wrong class, as in TIDE.

    A detection that is not correct has the first of these errors that applies to its IoU with the
    true boxes (Bolya et al., ECCV 2020):

        duplicate: at least 0.5 with a box of its class that was found already.
        classification: at least 0.5 with a box of another class.
        localisation: at least 0.1 with a box of its class.
        both: at least 0.1 with a box of another class.
        background: less than 0.1 with every box.

    TIDE's own code looks for localisation errors first. So a detection that fits an object of
    another class and touches one of its own class is a localisation error there, and a
    classification error here.

    `AveragePrecision` with VOC's protocols defines which detections are correct and which are
    ignored, except that detections below `min_score` are left out first.

    Args:
        num_classes: number of classes C, including the background (0).
        min_score: minimum score of detections that count. Average precision weighs detections by
            their rank, so the many detections with low scores hardly change it. In counts, they
            would hide all others.
    """

    def __init__(self, num_classes: int, *, min_score: float = 0.5) -> None:
        checks.integer("num_classes", num_classes, at_least=2)
        checks.number("min_score", min_score)
        self.num_classes, self.min_score = num_classes, min_score
        self._counts = dict.fromkeys((*KINDS, "missed", "objects"), 0)

    def update(
        self,
        prediction: Mapping[str, Tensor],
        boxes: Tensor,
        labels: Tensor,
        difficult: Tensor | None = None,
        iscrowd: Tensor | None = None,
    ) -> None:
        """Count the detections in one image; see `AveragePrecision.update`."""
        seen = _Detections(
            prediction, boxes, labels, difficult, iscrowd, self.num_classes, self.min_score
        )
        met = seen.ignored.clone()  # objects that are not missed
        for d, right in seen.judged():
            kind, box = ("correct", seen.best[d]) if right else seen.error(d)
            self._counts[kind] += 1
            if kind in ("correct", "classification", "localisation"):
                met[box] = True
        self._counts["missed"] += int((~met).sum())
        self._counts["objects"] += int((~seen.ignored).sum())

    def compute(self) -> ErrorCounts:
        """Return the counts of everything counted so far."""
        return ErrorCounts(**self._counts)


class _Detections:
    """The detections and the true boxes of one image, checked and on the CPU.

    Attributes:
        own: (D, K + 1), IoU with the true boxes of the same class; 0 for crowds and at the end.
        others: (D, K + 1), the same for the true boxes of other classes.
        best: (D,), index of the box with the largest `own`.
    """

    def __init__(
        self,
        prediction: Mapping[str, Tensor],
        boxes: Tensor,
        labels: Tensor,
        difficult: Tensor | None,
        iscrowd: Tensor | None,
        num_classes: int,
        min_score: float = -math.inf,
    ) -> None:
        if not isinstance(prediction, Mapping):
            raise ArgumentTypeError(
                "prediction must be a mapping with 'boxes', 'labels' and 'scores', the detections "
                f"in one image, got {type(prediction).__name__}"
            )
        for key in ("boxes", "labels", "scores"):
            if key not in prediction:
                raise ArgumentError(f"prediction must have {key!r}, got {list(prediction)}")
        found, classes, scores = (prediction[key] for key in ("boxes", "labels", "scores"))
        _check_boxes("prediction['boxes']", found, "prediction['labels']", classes, num_classes)
        _check_boxes("boxes", boxes, "labels", labels, num_classes)
        none = torch.zeros(len(labels), dtype=torch.bool)
        difficult = none if difficult is None else difficult
        iscrowd = none if iscrowd is None else iscrowd
        checks.tensor("prediction['scores']", scores, checks.FLOAT_DTYPES)
        checks.shape("prediction['scores']", scores, (len(found),), "prediction['boxes']")
        for name, flags in (("difficult", difficult), ("iscrowd", iscrowd)):
            checks.tensor(name, flags, (torch.bool,))
            checks.shape(name, flags, (len(boxes),), "boxes")
        if bool(scores.isnan().any()):
            raise ArgumentError("prediction['scores'] must be numbers, got NaN")
        kept = scores >= min_score
        self.found, self.classes, self.scores = (
            values[kept].detach().cpu() for values in (found.double(), classes.long(), scores)
        )
        self.boxes, self.labels, self.difficult, iscrowd = (
            values.detach().cpu() for values in (boxes.double(), labels.long(), difficult, iscrowd)
        )
        self.ignored = self.difficult | iscrowd
        same = self.classes[:, None] == self.labels
        overlap = optional_import("torchvision.ops", "data").box_iou(self.found, self.boxes)
        overlap = overlap * ~iscrowd
        self.own, self.others = (functional.pad(overlap * of, (0, 1)) for of in (same, ~same))
        self.best = self.own.argmax(1).tolist()
        inside = _share_inside(self.found, self.boxes) >= 0.5
        self.in_crowd = (inside & same & iscrowd).any(1)

    def judged(self) -> Iterator[tuple[int, bool]]:
        """Yield the detections that count, best score first, and whether they are correct."""
        taken = set()
        for d in self.scores.argsort(descending=True, stable=True).tolist():
            box = self.best[d]
            hit = bool(self.own[d, box] >= 0.5)
            if hit and bool(self.difficult[box]):
                continue
            right = hit and box not in taken
            if right:
                taken.add(box)
            elif bool(self.in_crowd[d]):
                continue
            yield d, right

    def error(self, d: int) -> tuple[str, int]:
        """Return the error of a detection that is not correct, and the box that it concerns."""
        box, other = self.best[d], int(self.others[d].argmax())
        own, others = float(self.own[d, box]), float(self.others[d, other])
        if own >= 0.5:
            return "duplicate", box
        if others >= 0.5:
            return "classification", other
        if own >= 0.1:
            return "localisation", box
        return ("both" if others >= 0.1 else "background"), other


def _check_boxes(
    boxes_name: str, boxes: Tensor, labels_name: str, labels: Tensor, num_classes: int
) -> None:
    checks.tensor(boxes_name, boxes, checks.FLOAT_DTYPES)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ArgumentError(f"{boxes_name} must have shape (K, 4), got {tuple(boxes.shape)}")
    checks.tensor(labels_name, labels, checks.LABEL_DTYPES)
    checks.shape(labels_name, labels, (len(boxes),), boxes_name)
    if len(labels) and not 0 < int(labels.min()) <= int(labels.max()) < num_classes:
        raise ArgumentError(f"{labels_name} must lie in [1, {num_classes}), got {labels.tolist()}")


def _share_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """Return the shares (D, K) of the area of boxes (D, 4) that lie in regions (K, 4)."""
    corner = torch.maximum(boxes[:, None, :2], regions[:, :2])
    sides = (torch.minimum(boxes[:, None, 2:], regions[:, 2:]) - corner).clamp(min=0)
    return sides.prod(2) / (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None]


def _coco() -> Any:
    detection = optional_import("torchmetrics.detection", "data")
    optional_import("pycocotools", "data")
    return detection.MeanAveragePrecision(iou_thresholds=[0.5], class_metrics=True)

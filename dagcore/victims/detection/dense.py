"""Any detector that says its boxes and logits: every place, anchor or query is a target."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...engine.scores import described
from ...errors import ArgumentError, ArgumentTypeError
from ...optional import optional_import
from ..segmentation import check_size, resized
from .base import Detector, Known, rescale


class Function(nn.Module):
    """A plain function as a module; of a bound method, the module that it belongs to is held."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        owner = getattr(function, "__self__", None)
        self.owner = owner if isinstance(owner, nn.Module) else None

    def forward(self, images: Tensor) -> Any:
        """What the function returns."""
        return self.function(images)


class Dense(Detector):
    """A detector made by `dense_detector`, which needs no boxes; see there."""

    has_own_targets = True

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str] | None,
        *,
        threshold: float | None,
        background: int | None,
        size: tuple[int, int] | None,
        iou_threshold: float,
        max_detections: int,
    ) -> None:
        super().__init__(network, classes)
        self.independent = background is None
        if background is None:
            checks.number("threshold", threshold, above=0)
            if not threshold < 1:  # type: ignore[operator]
                raise ArgumentError(f"threshold must lie in (0, 1), got {threshold}")
        else:
            checks.integer("background", background, at_least=0)
            checks.number("threshold", 0.0 if threshold is None else threshold)
            if threshold is not None and not 0 <= threshold < 1:
                raise ArgumentError(f"threshold must lie in [0, 1), got {threshold}")
        checks.number("iou_threshold", iou_threshold)
        if not 0 <= iou_threshold <= 1:
            raise ArgumentError(f"iou_threshold must lie in [0, 1], got {iou_threshold}")
        checks.integer("max_detections", max_detections, at_least=1)
        self.threshold = float(threshold or 0.0)
        # Of sigmoids it follows the network's classes; without names a first run counts them.
        self.background = len(classes or ()) if background is None else background
        self.size = None if size is None else check_size(size)
        self.iou_threshold, self.max_detections = iou_threshold, max_detections

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Scores (N, C, A) of images (N, 3, H, W) at all boxes, the background included."""
        return self._with_background(self._run(images)[1])

    def probabilities(self, scores: Tensor) -> Tensor:
        """Of each class: sigmoids, or a softmax."""
        return scores.sigmoid() if self.independent else scores.softmax(-1)

    @contextlib.contextmanager
    def encoded(self, images: Tensor) -> Iterator[None]:
        """Run the function on images once, for all that is asked of it inside the block."""
        network = self.network
        self.network = Known(network(resized(images.clone(), self.size)))
        try:
            yield
        finally:
            self.network = network

    def candidates(
        self, images: Tensor, nms_threshold: float, max_proposals: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Every box, cut at the image's border, and its scores."""
        boxes, logits = self._run(images)
        clip = optional_import("torchvision.ops", "vision").clip_boxes_to_image
        scores = self._with_background(logits).transpose(1, 2)
        size = (images.shape[-2], images.shape[-1])
        return list(zip(clip(boxes, size), scores, strict=True))

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """The boxes whose best class is an object, thinned out class by class."""
        nms = optional_import("torchvision.ops", "vision").batched_nms
        found = []
        for boxes, scores in self.candidates(images, 1.0, 1):
            label = scores.argmax(-1)
            values = self.probabilities(scores).gather(-1, label[:, None])[:, 0]
            kept = label != self.background
            if not self.independent:
                kept = kept & (values > self.threshold)
            boxes, label, values = boxes[kept], label[kept], values[kept]
            best = nms(boxes, values, label, self.iou_threshold)[: self.max_detections]
            found.append({"boxes": boxes[best], "labels": label[best], "scores": values[best]})
        return found

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, A, 4) in pixels of the images, and logits (N, C, A), as the function says."""
        output = self.network(resized(images.clone(), self.size))  # the function's to write into
        pair = isinstance(output, (tuple, list)) and len(output) == 2
        if not pair or not all(isinstance(one, Tensor) for one in output):
            raise ArgumentTypeError(
                "function must return two tensors, boxes (N, A, 4) and logits (N, C, A), "
                f"got {described(output)}"
            )
        boxes, logits = output
        count, places = len(images), boxes.shape[1] if boxes.dim() == 3 else -1
        if boxes.shape != (count, places, 4):
            raise ArgumentError(
                f"function must return boxes of shape ({count}, A, 4) for {count} images, "
                f"got {tuple(boxes.shape)}"
            )
        if logits.dim() != 3 or (len(logits), logits.shape[2]) != (count, places):
            turned = logits.dim() == 3 and logits.shape[:2] == (count, places)
            raise ArgumentError(
                f"function must return logits of shape ({count}, C, {places}) for boxes "
                f"{tuple(boxes.shape)}, got {tuple(logits.shape)}"
                + ": return logits.transpose(1, 2)"
                * turned
            )
        self._check_classes(logits.shape[1])
        if self.size is not None:
            raw = (images.shape[-2], images.shape[-1])
            boxes = rescale(boxes, [self.size] * count, [raw] * count)
        return boxes, logits

    def _check_classes(self, count: int) -> None:
        """Raise unless the function returns logits of as many classes as there are names."""
        if self.classes is not None and count != len(self.classes):
            raise ArgumentError(
                f"classes must have a name for each of {count} classes of the logits, "
                f"got {len(self.classes)}"
            )
        if self.independent:
            self.background = count
        elif not self.background < count:
            raise ArgumentError(
                f"background must be one of {count} classes of the logits, got {self.background}"
            )

    def _with_background(self, logits: Tensor) -> Tensor:
        """Logits (N, C, A), of sigmoids with the background's row last."""
        if not self.independent:
            return logits
        constant = math.log(self.threshold / (1 - self.threshold))
        return torch.cat([logits, torch.full_like(logits[:, :1], constant)], 1)


def dense_detector(
    function: Callable[[Tensor], Any],
    *,
    threshold: float | None = None,
    background: int | None = None,
    classes: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> Dense:
    """The victim around any detector, by a function from images to boxes and logits.

    Every box is a target of the attack. Where the classes have a sigmoid each, the scores get a
    row for the background behind them: the logit of `threshold`. So the best class of a box is an
    object where the detector reports one. A detector that multiplies an objectness and a class
    probability, as YOLO does, returns the logit of the product:

        def function(images):  # (N, 3, H, W) in [0, 1]
            boxes, objectness, classes = network(images)  # (N, A, 4), (N, 1, A), (N, C, A)
            log_p = F.logsigmoid(objectness) + F.logsigmoid(classes)
            return boxes, log_p - torch.log(-torch.expm1(log_p))

    Args:
        function: maps images (N, 3, H, W) in [0, 1] to boxes (N, A, 4), left, top, right, bottom
            in pixels of the images, and logits (N, C, A); the logits differentiably, the boxes
            with their last scaling but before any suppression. An nn.Module, or a method of one,
            is held in eval mode while it is attacked; of another callable dagcore sees no modules.
        threshold: of sigmoids the probability that a detection needs, in (0, 1). With a
            `background` what the softmax of the best class needs, 0 if None.
        background: index of the background among the logits' classes, for a softmax over them;
            None for a sigmoid of each class.
        classes: names of the logits' C classes (with a softmax that of the background too).
        size: (height, width) that images are resized to before `function` sees them, for networks
            that take one size (bilinear, antialiased, without regard to their shape); its boxes
            are in pixels of this size then. None: images as they are.
        iou_threshold: of two detections of a class that overlap more, `detect` leaves one.
        max_detections: of an image at the most, the best ones.

    Returns:
        A `Detector`: to be attacked, streamed, prepared, and given to the commands as
        `--model module:function`, where the function returns it.

    Raises:
        TypeError, ValueError: the argument, what was required and what came; and, once it runs,
            what `function` returned.
    """
    if not callable(function):
        raise ArgumentTypeError(f"function must be callable, got {type(function).__name__}")
    if isinstance(function, Detector):
        raise ArgumentTypeError("function must return boxes and logits, got a Detector")
    if threshold is None and background is None:
        raise ArgumentError(
            "threshold must be given for sigmoids (or background, for a softmax), got None"
        )
    return Dense(
        function if isinstance(function, nn.Module) else Function(function),
        classes,
        threshold=threshold,
        background=background,
        size=size,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
    )

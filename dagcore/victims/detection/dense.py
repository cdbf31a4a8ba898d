"""Any detector that returns boxes and logits: every place, anchor or query is a target."""

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
    """A function as a module; for a bound method of a module, it holds that module as a child."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        owner = getattr(function, "__self__", None)
        self.owner = owner if isinstance(owner, nn.Module) else None

    def forward(self, images: Tensor) -> Any:
        """Return what the function returns."""
        return self.function(images)


class Dense(Detector):
    """A detector made by `dense_detector`; its scores need no boxes."""

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
        # With sigmoids it follows the network's classes. Without names the first run counts them.
        self.background = len(classes or ()) if background is None else background
        self.size = None if size is None else check_size(size)
        self.iou_threshold, self.max_detections = iou_threshold, max_detections

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Return scores (N, C, A) of images (N, 3, H, W) at all boxes, with the background."""
        return self._with_background(self._run(images)[1])

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities (P, C) of scores (P, C): sigmoids, or a softmax."""
        return scores.sigmoid() if self.independent else scores.softmax(-1)

    @contextlib.contextmanager
    def encoded(self, images: Tensor) -> Iterator[None]:
        """Run the function on `images` once, for all calls inside the block."""
        network = self.network
        self.network = Known(network(resized(images.clone(), self.size)))
        try:
            yield
        finally:
            self.network = network

    def candidates(
        self, images: Tensor, nms_threshold: float, max_proposals: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return every box, clipped to the image, and its scores."""
        boxes, logits = self._run(images)
        clip = optional_import("torchvision.ops", "vision").clip_boxes_to_image
        scores = self._with_background(logits).transpose(1, 2)
        size = (images.shape[-2], images.shape[-1])
        return list(zip(clip(boxes, size), scores, strict=True))

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Return the boxes whose best class is an object, after class-wise NMS."""
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
        """Return the function's boxes (N, A, 4), in pixels of the images, and logits (N, C, A)."""
        output = self.network(resized(images.clone(), self.size))  # a copy: it may write into it
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
        """Raise unless the number of classes of the logits fits the names and the background."""
        if self.classes is not None and count != len(self.classes):
            raise ArgumentError(
                f"classes must have a name for each of the {count} classes of the logits, "
                f"got {len(self.classes)}"
            )
        if self.independent:
            self.background = count
        elif not self.background < count:
            raise ArgumentError(
                f"background must be one of the {count} classes of the logits, "
                f"got {self.background}"
            )

    def _with_background(self, logits: Tensor) -> Tensor:
        """Return logits (N, C, A); with sigmoids the background's row is appended."""
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
    """Wrap any detector, given as a function from images to boxes and logits.

    Every box is a target of the attack. If each class has a sigmoid, a row for the background is
    appended to the scores: the logit of `threshold`. The best class of a box is then an object
    exactly where the detector reports one. For a detector that multiplies an objectness and a class
    probability, as YOLO does, return the logit of the product:

        def function(images):  # (N, 3, H, W) in [0, 1]
            boxes, objectness, classes = network(images)  # (N, A, 4), (N, 1, A), (N, C, A)
            log_p = F.logsigmoid(objectness) + F.logsigmoid(classes)
            return boxes, log_p - torch.log(-torch.expm1(log_p))

    Args:
        function: maps images (N, 3, H, W) in [0, 1] to boxes (N, A, 4), as left, top, right, bottom
            in pixels of the images, and logits (N, C, A). The logits must be differentiable. The
            boxes are final but not suppressed. An nn.Module, or a method of one, is in eval mode
            while it is attacked. The modules inside any other callable are unknown to dagcore.
        threshold: with sigmoids, the probability that a detection needs, in (0, 1). With a
            `background`, the softmax probability that the best class needs; 0 if None.
        background: index of the background among the logits' classes, for a softmax over them;
            None for a sigmoid per class.
        classes: names of the logits' C classes (with a softmax that of the background too).
        size: (height, width) to which images are resized before `function` sees them, for networks
            that take one size (bilinear, antialiased, without keeping the aspect ratio). The
            function's boxes are then in pixels of this size. None: images are not resized.
        iou_threshold: IoU above which `detect` keeps only the better of two detections of a class.
        max_detections: maximum number of detections of an image, the best ones.

    Returns:
        A `Detector`. It can be attacked, streamed and prepared. A function that returns it can be
        given to the commands as `--model module:function`.

    Raises:
        TypeError, ValueError: if an argument is invalid, or, once it runs, what `function` returns.
            The message names what is wrong, what was required and what was given.
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

"""DETR: every object query is a target."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...optional import optional_import
from ..segmentation import IMAGENET_MEAN, IMAGENET_STD, per_channel, resized
from .base import Detector


class Queries(Detector):
    """transformers' DetrForObjectDetection, whose scores need no boxes.

    The last class is "no object".

    Args:
        network: maps pixel_values (N, 3, H, W) to logits (N, Q, C) and pred_boxes (N, Q, 4).
        classes: names of the classes; the config's if None.
        shortest: length to which the shorter side is resized, as the network's image processor
            does, unless the longer side would exceed `longest`.
        longest: maximum length of the longer side.
        mean: mean of the normalisation per channel, in units of the [0, 1] range.
        std: standard deviation of the normalisation, likewise.
    """

    mean: Tensor
    std: Tensor
    has_own_targets = True

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str] | None = None,
        *,
        shortest: int = 800,
        longest: int = 1333,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        config = self.config = network.config
        self.background = int(config.num_labels)  # type: ignore[union-attr,arg-type]
        names = classes
        if names is None:
            names = [config.id2label.get(k, "N/A") for k in range(self.background)]  # type: ignore
        super().__init__(network, names)
        self.shortest, self.longest = shortest, longest
        self.register_buffer("mean", per_channel("mean", mean), persistent=False)
        self.register_buffer("std", per_channel("std", std, positive=True), persistent=False)

    @staticmethod
    def understands(network: nn.Module) -> bool:
        """Return whether a network is transformers' DETR, or similar with a "no object" class."""
        kind = type(network)
        return kind.__module__.startswith("transformers.") and kind.__name__ in (
            "DetrForObjectDetection",
            "TableTransformerForObjectDetection",
        )

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Return scores (N, C, Q) of images (N, 3, H, W) at all queries."""
        logits: Tensor = self.network(self._resized(images)).logits
        return logits.transpose(1, 2)

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Return the queries whose best class is an object, with its probability."""
        found = []
        for boxes, scores in self.candidates(images, 1.0, 1):
            probability, label = scores.softmax(-1).max(-1)
            order = probability.argsort(descending=True, stable=True)
            order = order[label[order] != self.background]
            found.append(
                {"boxes": boxes[order], "labels": label[order], "scores": probability[order]}
            )
        return found

    def candidates(
        self, images: Tensor, nms_threshold: float, max_proposals: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return every query's box and scores."""
        ops = optional_import("torchvision.ops", "vision")
        output = self.network(self._resized(images))
        height, width = images.shape[-2:]
        scale = images.new_tensor([width, height, width, height])
        boxes = ops.box_convert(output.pred_boxes, "cxcywh", "xyxy") * scale
        boxes = ops.clip_boxes_to_image(boxes, (height, width))
        return list(zip(boxes, output.logits, strict=True))

    def _resized(self, images: Tensor) -> Tensor:
        """Resize and normalise images for the network, differentiably."""
        height, width = images.shape[-2:]
        short, long = min(height, width), max(height, width)
        side = self.shortest
        if long / short * side > self.longest:
            side = round(self.longest * short / long)
        size = (
            side if height == short else side * height // width,
            side if width == short else side * width // height,
        )
        return (resized(images, size) - self.mean) / self.std

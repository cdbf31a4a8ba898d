"""Two-stage detectors: the classifier's scores at proposals that are fixed on the clean image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...errors import ArgumentError
from .base import OfTorchvision, rescale
from .targets import check_inside

ROWS = 1024  # boxes that pass the head at a time


class TwoStage(OfTorchvision):
    """torchvision's Faster R-CNN family, with and without FPN, and R-FCN.

    Scores are read at boxes (N, P, 4) in pixels of the images. Rows of NaN are padding, and their
    scores are meaningless.

    Args:
        network: a torchvision GeneralizedRCNN.
        classes: names of the classes.
        active_only: whether only active boxes go back through the head. None: only on the CPU, and
            only if the head has layers (R-FCN's is a mean). Elsewhere it waits for the device in
            each iteration.
        distinct: whether boxes that the pooling rounds to the same cells are read once, on the CPU.
            RoI pooling and position-sensitive pooling round boxes, RoI align does not.
        rows: number of boxes that pass the head at a time, which bounds its memory.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str] | None = None,
        *,
        active_only: bool | None = None,
        distinct: bool = True,
        rows: int = ROWS,
    ) -> None:
        super().__init__(network, classes)
        checks.integer("rows", rows, at_least=1)
        self.active_only, self.distinct, self.rows = active_only, distinct, rows

    @staticmethod
    def kinds(detection: Any) -> tuple[type, ...]:
        """Return torchvision's two-stage detectors."""
        return (detection.faster_rcnn.GeneralizedRCNN,)

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Return scores (N, C, P) of images (N, 3, H, W) at boxes (N, P, 4)."""
        if boxes is None:
            raise ArgumentError("boxes must be given for a two-stage detector, got None")
        transformed, features = self.features(images)
        maps = self._pooled_from(features)
        sizes = transformed.image_sizes
        boxes = rescale(boxes, [(images.shape[-2], images.shape[-1])] * len(images), sizes)
        present = ~boxes[..., 0].isnan()
        if images.device.type == "cpu":
            lists = [own[there] for own, there in zip(boxes, present, strict=True)]
        else:
            lists = list(boxes.nan_to_num(0.0))
        scores = self.read(maps, lists, sizes)
        if len(scores) != present.numel():
            index = present.flatten().nonzero()[:, 0]
            scores = scores.new_zeros(present.numel(), scores.shape[1]).index_copy(0, index, scores)
        return scores.view(*present.shape, scores.shape[1]).transpose(1, 2)

    def read(
        self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor], sizes: list[tuple[int, int]]
    ) -> Tensor:
        """Return scores (R, C) at each image's boxes (R_n, 4), in pixels of the resized images."""
        head = Head(self.network.roi_heads, list(maps), sizes, self.rows)
        on_cpu = boxes[0].device.type == "cpu"
        cell = getattr(self.network.roi_heads.box_roi_pool, "cell", None)
        again = None
        if self.distinct and cell is not None and on_cpu:
            boxes, again = without_repeats(boxes, cell)
        active_only = self.active_only
        if active_only is None:
            active_only = on_cpu and any(True for _ in head.box_head.parameters())
        if active_only:
            scores: Tensor = _ActiveRows.apply(head, boxes, *maps.values())
        else:
            scores = head(boxes, list(maps.values()))
        return scores if again is None else scores[again]

    def candidates(
        self, images: Tensor, nms_threshold: float, max_proposals: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the region network's proposals at another NMS threshold, and their scores."""
        rpn = copy.copy(self.network.rpn)  # another thread may be using it
        transformed, features = self.features(images)
        before = {**rpn._pre_nms_top_n}
        before["testing"] = max(before["testing"], 2 * max_proposals)
        after = {**rpn._post_nms_top_n, "testing": max_proposals}
        rpn.nms_thresh, rpn._pre_nms_top_n, rpn._post_nms_top_n = nms_threshold, before, after
        proposals, _ = rpn(transformed, features)
        sizes = transformed.image_sizes
        scores = self.read(self._pooled_from(features), proposals, sizes)
        parts = torch.split(scores, [len(own) for own in proposals])
        return [
            (self.restored(own, size, images), of_own)
            for own, size, of_own in zip(proposals, sizes, parts, strict=True)
        ]

    def check_boxes(self, boxes: Tensor | None, images: Tensor) -> None:
        """Raise unless the boxes (N, P, 4) lie inside the images, or are rows of NaN."""
        super().check_boxes(boxes, images)
        if boxes is None:
            raise ArgumentError(
                "boxes must be given for a two-stage detector, such as dense_targets(...).boxes, "
                "got None"
            )
        padding = boxes.isnan().all(-1)
        whole = boxes.new_tensor([0, 0, images.shape[-1], images.shape[-2]])
        check_inside("boxes", torch.where(padding[..., None], whole, boxes), images)

    def _pooled_from(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the maps that boxes are pooled from: the features, or R-FCN's score maps."""
        score_maps: Callable[[Tensor], Tensor] | None
        score_maps = getattr(self.network.roi_heads.box_roi_pool, "score_maps", None)
        return features if score_maps is None else {"0": score_maps(features["0"])}


def without_repeats(boxes: Sequence[Tensor], cell: float) -> tuple[list[Tensor], Tensor]:
    """Drop boxes of each image that are the same as another one once rounded to cells.

    Args:
        boxes: boxes (R_n, 4) of each image, left, top, right, bottom at 0 or above.
        cell: side of a cell, in pixels.

    Returns:
        One box for each distinct rounded box, per image, and for every given box the index of its
        representative among all of them, (R,).
    """
    kept, again, start = [], [], 0
    for own in boxes:
        # As torchvision's pooling does: a product in the boxes' precision, halves away from zero.
        rounded = ((own * (1 / cell)).double() + 0.5).floor()
        found, inverse = torch.unique(rounded, dim=0, return_inverse=True)
        first = torch.empty(len(found), dtype=torch.int64, device=own.device)
        first[inverse] = torch.arange(len(own), device=own.device)
        kept.append(own[first])
        again.append(inverse + start)
        start += len(found)
    return kept, torch.cat(again)


class Head:
    """The part of a detector that works on each box separately."""

    def __init__(
        self, roi_heads: Any, names: list[str], sizes: list[tuple[int, int]], rows: int
    ) -> None:
        pool = roi_heads.box_roi_pool
        self.pool = getattr(pool, "pool_maps", pool)
        self.box_head, self.predictor = roi_heads.box_head, roi_heads.box_predictor
        self.names, self.sizes, self.rows = names, sizes, rows

    def __call__(self, boxes: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
        """Return scores (R, C) at the boxes (R_n, 4) of each image, `rows` boxes at a time."""
        total = sum(len(own) for own in boxes)
        chunks = [
            self.at_once(self._slice(boxes, first, first + self.rows), maps)
            for first in range(0, max(total, 1), self.rows)
        ]
        return torch.cat(chunks) if len(chunks) > 1 else chunks[0]

    def at_once(self, boxes: list[Tensor], maps: Sequence[Tensor]) -> Tensor:
        """Return the scores (R, C) of all boxes at once."""
        named = dict(zip(self.names, maps, strict=True))
        pooled = self.pool(named, boxes, self.sizes)
        features = self.box_head(pooled)
        linear = getattr(self.predictor, "cls_score", None)
        if linear is not None and type(self.predictor).__name__ == "FastRCNNPredictor":
            scores: Tensor = linear(features.flatten(1))  # its box offsets are not needed
            return scores
        scores, _ = self.predictor(features)
        return scores

    @staticmethod
    def _slice(boxes: Sequence[Tensor], first: int, last: int) -> list[Tensor]:
        """Return boxes first to last, counted over all images, as a list per image."""
        parts, start = [], 0
        for own in boxes:
            parts.append(own[max(first - start, 0) : max(last - start, 0)])
            start += len(own)
        return parts


class _ActiveRows(torch.autograd.Function):
    """Run the head on all boxes, and backward only on those whose seed is not zero.

    The backward pass runs the forward pass of these boxes again, so that nothing is stored for the
    others.
    """

    @staticmethod
    def forward(ctx: Any, head: Head, boxes: Sequence[Tensor], *maps: Tensor) -> Tensor:
        ctx.head, ctx.boxes = head, boxes
        ctx.save_for_backward(*maps)
        return head(boxes, maps)

    @staticmethod
    def backward(ctx: Any, *seeds: Tensor) -> tuple[Tensor | None, ...]:
        maps: tuple[Tensor, ...] = ctx.saved_tensors
        (seed,) = seeds
        active = seed.ne(0).any(1)
        masks = torch.split(active, [len(own) for own in ctx.boxes])
        kept = [own[mask] for own, mask in zip(ctx.boxes, masks, strict=True)]
        seed = seed[active]
        gradients = [torch.zeros_like(values) for values in maps]
        rows = ctx.head.rows
        for first in range(0, len(seed), rows):
            leaves = [values.detach().requires_grad_() for values in maps]
            with torch.enable_grad():
                scores = ctx.head.at_once(ctx.head._slice(kept, first, first + rows), leaves)
            parts = torch.autograd.grad(
                scores, leaves, seed[first : first + rows], allow_unused=True
            )
            for total, part in zip(gradients, parts, strict=True):
                if part is not None:
                    total += part
        return None, None, *gradients

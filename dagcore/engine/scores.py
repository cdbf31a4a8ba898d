"""The scores in what a model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import checks
from ..errors import ArgumentError, ArgumentTypeError


def read_scores(output: Any, images: Tensor) -> Tensor:
    """The scores (N, C, *T) in a model's output: a tensor, {"out": tensor}, or .logits."""
    scores = output
    if isinstance(output, Mapping) and "out" in output:
        scores = output["out"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        scores = output.logits
    if not isinstance(scores, Tensor):
        raise ArgumentTypeError(
            "model must return scores as a tensor, a mapping with 'out' or an object with .logits, "
            f"got {type(output).__name__}"
        )
    if scores.dim() < 2 or len(scores) != len(images):
        raise ArgumentError(
            f"model must return scores of shape ({len(images)}, C, *targets) for "
            f"{len(images)} images, got {tuple(scores.shape)}"
        )
    if scores.shape[1] < 1:
        raise ArgumentError(
            f"model must return scores of at least one class, got {tuple(scores.shape)}"
        )
    return scores


class ScoreModel:
    """A model's scores at the targets of given labels.

    Maps of a lower resolution than the labels are read through bilinear interpolation; a model
    whose own enlargement aligns corners says so by an attribute `align_corners`.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        if not callable(model):
            raise ArgumentTypeError(f"model must be callable, got {type(model).__name__}")
        self.model = model
        self.align_corners = bool(getattr(model, "align_corners", False))

    def __call__(self, images: Tensor, labels: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Scores (N, C, *T) of images (N, *) whose labels are (N, *T), or maps below their size.

        `boxes` (N, *) is what a detector takes beside the images; None for other models.
        """
        given = images.clone()  # the model's to write into
        output = self.model(given) if boxes is None else self.model(given, boxes.clone())
        scores = read_scores(output, images)
        checks.device("scores of model", scores, "labels", labels)
        score_map, label_map = tuple(scores.shape[2:]), tuple(labels.shape[1:])
        enlarged = len(score_map) == len(label_map) == 2 and all(
            0 < low <= high for low, high in zip(score_map, label_map, strict=True)
        )
        if score_map != label_map and not enlarged:
            raise ArgumentError(
                f"labels must have shape {(len(labels), *score_map)} to match the model's scores "
                f"{tuple(scores.shape)}, or be larger maps, got {tuple(labels.shape)}"
            )
        return scores

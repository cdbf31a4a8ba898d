"""Reading the scores from a model's output."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import ArgumentError, ArgumentTypeError

MOST_DESCRIBED = 4  # members of an output shown in a message
FEW = 16  # fewer targets may have all scores in [0, 1] by chance


class AlignedScores(Tensor):
    """Score maps that must be enlarged with aligned corners.

    A network that requires this returns its scores as this type. Every operation keeps the type, so
    that it survives whatever is wrapped around the network. Gradients are plain tensors, as they go
    to the images. Copies by pickle or deepcopy are plain too.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Tensor.__reduce_ex__(self.as_subclass(Tensor), protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if func is not torch.autograd.grad:
            return result
        return tuple(g.as_subclass(Tensor) if isinstance(g, Tensor) else g for g in result)


def aligned(scores: Tensor) -> Tensor:
    """Mark scores as to be enlarged with aligned corners."""
    return scores.as_subclass(AlignedScores)


def read_scores(output: Any, images: Tensor, *, least: int = 2) -> Tensor:
    """Return the scores (N, C, *T) in a model's output, which must have at least `least` classes.

    The output is a tensor, {"out": tensor}, an object with .logits, or a tuple with a single tensor
    that has targets.
    """
    scores = output
    if isinstance(output, Mapping) and "out" in output:
        scores = output["out"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        scores = output.logits
    elif isinstance(output, (tuple, list)):
        maps = [one for one in output if isinstance(one, Tensor) and one.dim() > 2]
        scores = maps[0] if len(maps) == 1 else output[0] if len(output) == 1 else output
    if not isinstance(scores, Tensor):
        raise ArgumentTypeError(
            "model must return scores as a tensor, a mapping with 'out' or an object with .logits, "
            f"got {described(output)} (wrap it: lambda images: model(images)[...]; detectors go "
            "through dagcore.victims.detector or dense_detector)"
        )
    checks.tensor("scores", scores, checks.FLOAT_DTYPES)
    if scores.dim() < 2 or len(scores) != len(images):
        raise ArgumentError(
            f"model must return scores of shape ({len(images)}, C, *targets) for "
            f"{len(images)} images, got {tuple(scores.shape)}"
        )
    if scores.shape[1] < least:
        hint = ": dagcore.victims.binary(model) turns one logit into two" * (scores.shape[1] == 1)
        raise ArgumentError(
            f"model must return scores of at least {least} classes, got {tuple(scores.shape)}{hint}"
        )
    return scores


def described(output: Any) -> str:
    """Describe a model's output for a message: "list of 3: (1, 80, 52, 52), ..."."""
    kind = type(output).__name__
    if isinstance(output, Mapping):
        members = [f"{key!r}: {_shape(value)}" for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        members = [_shape(value) for value in output]
    else:
        return kind if not isinstance(output, Tensor) else f"{kind} {tuple(output.shape)}"
    shown = ", ".join(members[:MOST_DESCRIBED]) + ", ..." * (len(members) > MOST_DESCRIBED)
    return f"{kind} of {len(members)}" + f": {shown}" * bool(members)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def check_layout(scores: Tensor, targets: tuple[int, ...]) -> None:
    """Raise for scores (N, *T, C), with the classes last, for targets (*T)."""
    shape = tuple(scores.shape)
    if shape[2:] != targets and shape[1:-1] == targets:
        order = (0, scores.dim() - 1, *range(1, scores.dim() - 1))
        raise ArgumentError(
            "model must return scores (N, C, *targets), got the classes last, "
            f"{shape}: return scores.permute{order}"
        )


def warn_of_probabilities(scores: Tensor) -> None:
    """Warn if scores (N, C, *T) are probabilities, after a softmax or sigmoid. Reads values."""
    if scores.numel() < FEW * scores.shape[1]:
        return
    seen = scores.detach()
    low, high = map(float, torch.aminmax(seen))
    if not 0 <= low < high <= 1 or bool(((seen == 0) | (seen == 1)).all()):
        return
    off = float((seen.sum(1, dtype=torch.float32) - 1).abs().max())
    kind = "a softmax" if off < 1e-2 else "sigmoids"
    warnings.warn(
        f"the model's scores all lie in [{low:.2g}, {high:.2g}], as after {kind}: attacks need the "
        "scores before that, whose gradients do not vanish",
        RuntimeWarning,
        stacklevel=2,
    )


def aligns_corners(model: object, scores: Tensor | None = None) -> bool:
    """Return whether scores smaller than the labels must be enlarged with aligned corners.

    The scores decide, or an attribute `align_corners` of the model, which may also be the last
    module of an nn.Sequential or inside DataParallel.
    """
    if isinstance(scores, AlignedScores):
        return True
    while not hasattr(model, "align_corners"):
        if isinstance(model, nn.Sequential) and len(model):
            model = model[-1]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return False
    return bool(model.align_corners)


class ScoreModel:
    """A model that returns its scores at the targets of given labels.

    Scores smaller than the labels are interpolated bilinearly later. After a call, `align_corners`
    says how, as decided by the scores or the model (`aligns_corners`).
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        if not callable(model):
            raise ArgumentTypeError(f"model must be callable, got {type(model).__name__}")
        self.model = model
        self.align_corners = aligns_corners(model)
        self.looked = False

    def __call__(self, images: Tensor, labels: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Return scores (N, C, *T), or smaller maps, of images (N, *) whose labels are (N, *T).

        `boxes` (N, *) is the second input of a detector; None for other models.
        """
        given = images.clone()  # the model may write to it
        try:
            output = self.model(given) if boxes is None else self.model(given, boxes.clone())
        except RuntimeError as error:
            if "Inference tensors cannot be saved for backward" not in str(error):
                raise
            raise ArgumentError(
                "model must not be made under torch.inference_mode: its weights then pass no "
                "gradients to the images (attack copy.deepcopy(model), made outside of it)"
            ) from error
        scores = self.read(read_scores(output, images))
        checks.device("scores of model", scores, "labels", labels)
        score_map, label_map = tuple(scores.shape[2:]), tuple(labels.shape[1:])
        check_layout(scores, label_map)
        enlarged = len(score_map) == len(label_map) == 2 and all(
            0 < low <= high for low, high in zip(score_map, label_map, strict=True)
        )
        if score_map != label_map and not enlarged:
            raise ArgumentError(
                f"labels must have shape {(len(labels), *score_map)} to match the model's scores "
                f"{tuple(scores.shape)}, or be larger maps, got {tuple(labels.shape)}"
            )
        if not self.looked:
            self.looked = True
            warn_of_probabilities(scores)
        return scores

    def read(self, scores: Tensor) -> Tensor:
        """Return scores as a plain tensor; set `align_corners`, which says how to enlarge them."""
        if isinstance(scores, AlignedScores):
            self.align_corners = True
            return scores.as_subclass(Tensor)
        return scores

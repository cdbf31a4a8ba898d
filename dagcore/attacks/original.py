"""A look at the network itself, where a faster copy of it was attacked."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine import ScoreModel, frozen
from ..engine.stream import device_of
from ..victims.segmentation import Victim, precision
from .result import Result, Status

if TYPE_CHECKING:
    from .base import Attack


def warn_at_original(
    attack: Attack,
    model: Callable[..., Any],
    result: Result,
    labels: Tensor,  # (N, *T)
    boxes: Tensor | None,  # (N, *)
) -> None:
    """Warn of targets that are active at the network that `prepare` made a copy of, if it is there.

    It is run once, on the images that converged on the copy.
    """
    reference = getattr(model, "original", None)
    original = reference() if isinstance(reference, weakref.ref) else None
    done = [n for n, status in enumerate(result.status) if status is Status.CONVERGED]
    if original is None or not done:
        return
    images = result.adversarial[done]
    if device_of(original) not in (None, images.device):
        return
    aims: Any = result.adversarial_labels
    aims = aims[done] if isinstance(aims, Tensor) else aims
    scores_of = ScoreModel(original)
    scores_of.looked = True  # at the copy's scores
    own = None if isinstance(original, Victim) else precision(original)
    with frozen(original), torch.no_grad():
        scores = scores_of(
            images.to(images.dtype if own is None else own),
            labels[done],
            None if boxes is None else boxes[done],
        )
    active = attack.active_targets(
        scores, labels[done], aims, align_corners=scores_of.align_corners
    ).cpu()
    allowed = attack.schedule().allowed(result.targets[done].cpu())
    wrong = active > allowed
    if bool(wrong.any()):
        warnings.warn(
            f"{int(active[wrong].sum())} targets of {int(wrong.sum())} images, of {len(done)} that "
            "converged on the prepared network, are active at the network itself: go on there with "
            "start=result.adversarial and result.adversarial_labels",
            RuntimeWarning,
            stacklevel=3,
        )

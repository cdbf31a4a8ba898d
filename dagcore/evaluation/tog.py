"""TOG's four goals as dense targets of any detector.

Chow et al., "Adversarial Objectness Gradient Attacks in Real-time Object Detection Systems"
(TPS-ISA 2020), attack a detector with four goals. They take 10 steps of 2/255 in a ball of 8/255
on its training loss. Here, a goal gives labels for a loss over the victim's candidates. So it works
for two-stage detectors, anchors, points and queries alike:

    targets = goal_targets(victim, image, truth, goals=["vanish"])["vanish"]
    attack = dagcore.PGD(epsilon=8 / 255, alpha=2 / 255, steps=10, tolerance=None)
    boxes = None if targets.boxes is None else targets.boxes[None]
    result = attack(
        victim, image[None], targets.labels[None], targets.adversarial[None], boxes=boxes
    )
    victim.detect(result.last)  # like TOG: the last iterate, not the best one

There are two differences from TOG. Only class scores are attacked, but not the losses of region
proposals, box offsets and centre-ness. So objects are harder to fabricate for a detector that
multiplies its scores by a centre-ness. And the truth is given here, while TOG uses the detector's
own detections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import checks
from ..engine import frozen
from ..errors import ArgumentError, ArgumentTypeError
from ..losses import UNTARGETED
from ..victims import Detector
from ..victims.detection.targets import match, stack

GOALS = ("vanish", "mislabel", "fabricate", "untargeted")
RIVALS = ("least-likely", "most-likely")
# As in Detector.dense_targets: which candidates are kept, and which of them are near an object.
NMS_THRESHOLD = 0.9
NEAR = {"min_iou": 0.1, "min_score": 0.1}


@dataclasses.dataclass(frozen=True, eq=False)
class GoalTargets:
    """Targets of an attack with one goal: P targets of an image, including padding."""

    labels: Tensor
    """Labels (P,) int64, with the ignore label where there is no target."""
    adversarial: Tensor | str
    """Adversarial labels (P,) int64, ignored like `labels`; or "untargeted"."""
    boxes: Tensor | None
    """Boxes (P, 4) in pixels, NaN for padding; None if the detector has its own targets."""


def goal_targets(
    detector: Detector,
    image: Tensor,  # (3, H, W)
    truth: Mapping[str, Any],
    *,
    goals: Sequence[str] = GOALS,
    mislabel: str = "least-likely",
    max_proposals: int = 3000,
    ignore_index: int = 255,
) -> dict[str, GoalTargets]:
    """Return the targets of each goal in an image, from one pass of the detector.

    `Detector.dense_targets` defines when a candidate is near an object. The goals are:

        "vanish": moves all candidates from their likeliest object class to the background. If only
            those near objects counted, detections would appear elsewhere.
        "mislabel": moves candidates near objects from the true class to another one.
        "fabricate": moves candidates that are background to their likeliest object class.
        "untargeted": moves candidates near objects away from the true class.

    Inside `detector.encoded(image[None])`, the image's features are computed only once.

    Args:
        detector: victim.
        image: image (3, H, W), floating point in [0, 1].
        truth: "boxes" (K, 4) in pixels, "labels" (K,), and "iscrowd" (K,) if there are crowds,
            which are left out.
        goals: goals out of `GOALS`.
        mislabel: adversarial class of each object: the "least-likely" or the "most-likely" wrong
            class, by the mean probability of the object's candidates in the clean image. The
            default is "least-likely", because it gives a lower mAP and because its successes
            cannot be confusions to which the detector is prone anyway.
        max_proposals: maximum number of candidates; the best ones are kept. Only for two-stage
            detectors.
        ignore_index: label of candidates that are no targets. It must be the attack's.

    Returns:
        The targets of each goal, in the order of `goals`.

    Raises:
        TypeError, ValueError: if an argument is invalid. The message names it, what was required
            and what was given.
    """
    _check(detector, image, goals, mislabel, max_proposals, ignore_index)
    images = image[None]
    with frozen(detector), torch.no_grad():
        found = detector.candidates(images.clone(), NMS_THRESHOLD, max_proposals)
    detector.check_candidates(found, images)
    ((boxes, scores),) = found
    num_classes = scores.shape[1]
    if 0 <= ignore_index < num_classes:
        raise ArgumentError(
            f"ignore_index must not be one of the {num_classes} classes, got {ignore_index}"
        )
    true_boxes, true_labels = detector.check_truth(0, truth, images, num_classes)
    objects = detector.objects(num_classes).to(scores.device)
    if "mislabel" in goals and len(objects) < 2:
        raise ArgumentError("goals must not have 'mislabel' for a detector with one object class")
    probabilities = detector.probabilities(scores)
    owner = match(
        boxes.to(true_boxes.dtype),
        probabilities[:, true_labels],
        true_boxes,
        torch.arange(len(true_labels), device=true_labels.device),
        none=len(true_labels),
        **NEAR,
    )

    def near(classes: Tensor) -> Tensor:
        """Spread a class of each object (K,) to the candidates near it (P,)."""
        return functional.pad(classes, (0, 1), value=ignore_index)[owner]

    likeliest = objects[scores[:, objects].argmax(1)]
    background = torch.full_like(likeliest, detector.background)
    empty = scores.argmax(1) == detector.background
    aims: dict[str, tuple[Tensor, Tensor | str]] = {
        "vanish": (likeliest, background),
        "fabricate": (
            background.where(empty, ignore_index),
            likeliest.where(empty, ignore_index),
        ),
        "untargeted": (near(true_labels), UNTARGETED),
    }
    if "mislabel" in goals:
        others = _rivals(probabilities, owner, true_labels, objects, mislabel)
        aims["mislabel"] = near(true_labels), near(others)
    own = detector.has_own_targets
    return {goal: _fitted(*aims[goal], boxes, images, ignore_index, own=own) for goal in goals}


def _check(
    detector: object,
    image: Any,
    goals: Sequence[str],
    mislabel: str,
    max_proposals: int,
    ignore_index: int,
) -> None:
    """Raise unless the arguments of `goal_targets` are valid."""
    if not isinstance(detector, Detector):
        raise ArgumentTypeError(
            f"detector must be a dagcore.victims.Detector, got {type(detector).__name__}"
        )
    checks.tensor("image", image, checks.FLOAT_DTYPES)
    if image.dim() != 3 or image.shape[0] != 3:
        raise ArgumentError(f"image must have shape (3, H, W), got {tuple(image.shape)}")
    for goal in goals:
        checks.choice("goals", goal, GOALS)
    checks.choice("mislabel", mislabel, RIVALS)
    checks.integer("max_proposals", max_proposals, at_least=1)
    checks.integer("ignore_index", ignore_index)


def _rivals(
    probabilities: Tensor,  # (P, C)
    owner: Tensor,  # (P,), in [0, K]
    true_labels: Tensor,  # (K,)
    objects: Tensor,
    kind: str,
) -> Tensor:
    """Return the least or the most likely wrong object class of each object, (K,)."""
    count = len(true_labels)
    belongs = functional.one_hot(owner, count + 1)[:, :count].to(probabilities.dtype)
    sums = belongs.T @ probabilities
    rank = torch.full_like(sums, torch.inf)
    rank[:, objects] = sums[:, objects] if kind == "least-likely" else -sums[:, objects]
    return rank.scatter(1, true_labels[:, None], torch.inf).argmin(1)


def _fitted(
    labels: Tensor,  # (P,)
    adversarial: Tensor | str,  # (P,)
    boxes: Tensor,  # (P, 4)
    images: Tensor,
    ignore_index: int,
    *,
    own: bool,
) -> GoalTargets:
    """Keep the targets with their boxes, and pad them. Keep all if the detector has its own."""
    if own:
        return GoalTargets(labels, adversarial, None)
    counted = labels != ignore_index
    where, stacked = stack([(boxes[counted], labels[counted])], images, ignore_index, pad=True)
    if isinstance(adversarial, Tensor):
        padding = stacked.shape[1] - int(counted.sum())
        adversarial = functional.pad(adversarial[counted], (0, padding), value=ignore_index)
    return GoalTargets(stacked[0], adversarial, where[0])

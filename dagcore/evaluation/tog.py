"""TOG's four goals, as dense targets of any detector.

Chow et al., "Adversarial Objectness Gradient Attacks in Real-time Object Detection Systems"
(TPS-ISA 2020), lead a detector astray in four ways, by 10 steps of 2/255 in a ball of 8/255 on
its training loss. Here the goals are labels for a loss over the victim's candidates, so that
two-stage detectors, anchors, points and queries are attacked alike:

    targets = goal_targets(victim, image, truth, goals=["vanish"])["vanish"]
    attack = dagcore.PGD(epsilon=8 / 255, alpha=2 / 255, steps=10, tolerance=None)
    boxes = None if targets.boxes is None else targets.boxes[None]
    result = attack(
        victim, image[None], targets.labels[None], targets.adversarial[None], boxes=boxes
    )
    victim.detect(result.last)  # as TOG: the last iterate, not the one with most targets astray

What differs from attacking the training loss: only class scores are attacked. The loss of the
region network, of box offsets and of a centre-ness are not part of it, so a detector that
multiplies its scores by a centre-ness is harder to make see objects. TOG takes the detector's own
detections for the truth; here it is given.
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
# As in Detector.dense_targets: which candidates there are, and which of them are near an object.
NMS_THRESHOLD = 0.9
NEAR = {"min_iou": 0.1, "min_score": 0.1}


@dataclasses.dataclass(frozen=True, eq=False)
class GoalTargets:
    """What an attack with one goal aims at: P targets of an image, padding included."""

    labels: Tensor
    """(P,) int64; the ignore label where there is no target."""
    adversarial: Tensor | str
    """(P,) int64, the ignore label likewise; or "untargeted"."""
    boxes: Tensor | None
    """(P, 4) in pixels, NaN where padded; None for a detector with targets of its own."""


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
    """What each goal aims at in an image, from one pass of the detector over it.

    A candidate is near an object as in `Detector.dense_targets`. Goals:

        "vanish": all candidates, from their likeliest object class to the background. If only
            those near objects counted, detections would appear elsewhere.
        "mislabel": candidates near objects, from the true class to another one.
        "fabricate": candidates that are background, to their likeliest object class.
        "untargeted": candidates near objects, away from the true class.

    Inside `detector.encoded(image[None])` the features are shared with what else is asked there.

    Args:
        detector: the victim.
        image: floating point in [0, 1].
        truth: "boxes" (K, 4) in pixels, "labels" (K,), and "iscrowd" (K,) if there are crowds,
            which are left out.
        goals: which of `GOALS`.
        mislabel: the class that objects are led to, each of its own: the "least-likely" one by
            the mean probability of its candidates in the clean image, or the "most-likely" one
            but the true. The least likely is the default because it leaves the lower mAP, and
            because no success can be a confusion that the detector is prone to anyway.
        max_proposals: candidates at the most, the best ones; two-stage detectors only.
        ignore_index: label of what is no target; give the attack's.

    Returns:
        The targets of each goal, in the order of `goals`.

    Raises:
        TypeError, ValueError: the argument, what was required and what came.
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
            f"ignore_index must be no class, of which there are {num_classes}, got {ignore_index}"
        )
    true_boxes, true_labels = detector.check_truth(0, truth, images, num_classes)
    objects = detector.objects(num_classes).to(scores.device)
    if "mislabel" in goals and len(objects) < 2:
        raise ArgumentError("goals must be without 'mislabel' for a detector of one object class")
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
        """A class of each object (K,), at the candidates that are near it (P,)."""
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
    """Raise unless the arguments of `goal_targets` are what they must be."""
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
    """The other object class that is the least or the most likely at each object: (K,)."""
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
    """The targets alone with their boxes, padded; all of a detector that has its own."""
    if own:
        return GoalTargets(labels, adversarial, None)
    counted = labels != ignore_index
    where, stacked = stack([(boxes[counted], labels[counted])], images, ignore_index, pad=True)
    if isinstance(adversarial, Tensor):
        padding = stacked.shape[1] - int(counted.sum())
        adversarial = functional.pad(adversarial[counted], (0, padding), value=ignore_index)
    return GoalTargets(stacked[0], adversarial, where[0])

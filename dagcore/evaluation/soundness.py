"""Check an evaluation with `validity`, on its own strongest attack and some of its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import files
from ..attacks import CosPGD
from ..losses import UNTARGETED
from . import validity
from .kept import keep_json, read_json
from .robustness import Summary
from .store import FAILED, Record
from .validity import Finding

if TYPE_CHECKING:
    from .evaluator import Evaluation

CHECKED_STEPS = 40  # maximum updates of the checked attack, which the checks run ten times


def findings(
    evaluation: Evaluation, records: Sequence[Record], summary: Summary
) -> list[dict[str, Any]]:
    """Return the findings of the checks on a few images. They are kept in checks.json."""
    done = [r for r in records if r["status"] != FAILED and r["targets"]]
    if evaluation.task != "segmentation" or not evaluation.settings.check or not done:
        return []
    strongest = strongest_of(evaluation, summary)
    path = evaluation.folder.out / "checks.json"
    of = {
        **evaluation.made_with(),
        "images": evaluation.settings.check,
        "surrogate": evaluation.settings.surrogate,
        "epsilon": list(evaluation.settings.epsilon or ()),
        "attack": list(strongest),
    }
    kept = read_json(path, of)
    if kept is None:
        checked = done[: evaluation.settings.check]
        evaluation.tell("note", f"checking the evaluation on {len(checked)} images")
        found = _checked(evaluation, checked, strongest)
        kept = {"findings": [dataclasses.asdict(one) for one in found]}
        keep_json(path, kept, of)
    told: list[dict[str, Any]] = kept["findings"]
    return told


def strongest_of(evaluation: Evaluation, summary: Summary) -> tuple[str, float | None]:
    """Return the untargeted attack with the lowest accuracy in its largest ball, and its radius."""
    inside = [
        one
        for entry in evaluation.entries
        if entry.aims == UNTARGETED
        for one in summary["results"]
        if one["attack"] == entry.name
        if one["epsilon"] == evaluation.protocol.radii(entry, evaluation.settings.epsilon)[-1]
    ]
    if not inside:
        return "CosPGD", 8 / 255
    least = min(inside, key=lambda one: one["aAcc"])
    return least["attack"], least["epsilon"]


def _checked(
    evaluation: Evaluation, records: Sequence[Record], strongest: tuple[str, float | None]
) -> list[Finding]:
    """Check an attack on some images, with at most `CHECKED_STEPS` updates."""
    name, epsilon = strongest
    assert epsilon is not None
    looked = [evaluation.again(record) for record in records]
    entry = next((entry for entry in evaluation.entries if entry.name == name), None)
    attack: Any = CosPGD(epsilon=epsilon, alpha=epsilon / 4, ignore_index=files.IGNORE)
    if entry is not None:
        if entry.class_weights and evaluation.weights is None:
            evaluation.weights = evaluation.balanced()
        attack = entry.build(epsilon, None, evaluation.weights if entry.class_weights else None)
        attack = dataclasses.replace(attack, steps=min(attack.steps, CHECKED_STEPS))
    return validity.check(
        evaluation.victim,
        [image for image, _ in looked],
        [target.labels for _, target in looked],
        epsilon=epsilon,
        norm=attack.norm,
        attack=attack,
        surrogate=evaluation.surrogate,
        seed=evaluation.settings.seed,
    )

"""Summarise the records of a run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..attacks import Status
from ..attacks.schedules import UntilFooled
from ..metrics import AveragePrecision, Score, iou
from .options import KnownAttack
from .store import FAILED, Record

STAGES = ("before", "after")  # of the attack, in the files
FEW = 0.2  # share of the labelled targets: a warning if fewer are correct on the clean images


def tally(seen: Tensor, labels: Tensor) -> dict[str, list[int]]:
    """Count the correct, predicted and true pixels of each class, at labels (h, w) that count."""
    counted = labels != files.IGNORE
    seen, labels = seen[counted].long(), labels[counted].long()
    classes = int(torch.cat([seen, labels]).max()) + 1 if len(labels) else 0
    parts = [torch.bincount(x, minlength=classes) for x in (seen[seen == labels], seen, labels)]
    table = torch.stack(parts, 1)
    return {str(c): table[c].tolist() for c in range(classes) if bool(table[c].any())}


def summarise(
    records: Sequence[Record], classes: Sequence[str] | None, tolerance: float
) -> dict[str, Any]:
    """Return the summary of a run, from the records of all its images.

    The attack's success is measured on images that have targets to fool (see `to_fool`). Targets
    that were wrong on the clean image are no success of the attack.
    """
    attacked = [record for record in records if record["status"] != FAILED]
    with_targets = [record for record in attacked if record["targets"]]
    aimed = [record for record in with_targets if to_fool(record)]
    status = [record["status"] for record in aimed]
    measure = "mIoU" if any("pixels" in record for record in attacked) else "mAP"
    return {
        "images": len(records),
        "attacked": len(attacked),
        "without targets": len(attacked) - len(with_targets),
        "targets correct when clean, %": _share(
            sum(r["correct_before"] / r["targets"] for r in with_targets), with_targets
        ),
        "nothing to fool": len(with_targets) - len(aimed),
        **{name: status.count(name) for name in ("converged", "budget", "stalled")},
        "success after rounding, %": _share(sum(succeeded(r, tolerance) for r in aimed), aimed),
        "active targets left, %": _share(sum(r["left"] / to_fool(r) for r in aimed), aimed),
        **({measure: scores(attacked, classes, measure)} if attacked else {}),
        "perceptibility": _spread([r["perceptibility"] for r in aimed]),
        "perceptibility after rounding": _spread(
            [r["perceptibility_after_rounding"] for r in aimed]
        ),
        "iterations": _spread([r["iterations"] for r in aimed]),
        "images with notes": sum(bool(record["notes"]) for record in attacked),
        "failed": [
            {key: record[key] for key in ("number", "name", "reason")}
            for record in records
            if record["status"] == FAILED
        ],
    }


def to_fool(record: Record) -> int:
    """Return the number of targets that an attack has to fool.

    These are the active targets of the clean image: targets that are correct, or wrong by less than
    the margin. For targeted attacks, they are the targets whose adversarial label does not win by
    the margin.
    """
    return int(record["to_fool"])


def succeeded(record: Record, tolerance: float) -> bool:
    """Whether the tolerance allows the active targets of the 8-bit file, out of those to fool."""
    return _within(record, tolerance, to_fool(record))


def _within(record: Record, tolerance: float, targets: int) -> bool:
    """Whether the tolerance allows the active targets of the 8-bit file, out of `targets`."""
    allowed = UntilFooled(0, tolerance).allowed(torch.tensor([targets]))
    return bool(record["active_after_rounding"] <= allowed)


def warning_of_labels(records: Sequence[Record]) -> str | None:
    """Return a warning if hardly any of the given labels match the network's predictions.

    That is the case if less than `FEW` of all targets are correct on the clean images, or less than
    `FEW` of the images with objects have targets. The message mentions labels one less or one more
    if at least `FEW` of them, and at least twice as many as now, would be correct.
    """
    labelled = [record for record in records if record.get("labelled")]
    targets, correct = (sum(r[name] for r in labelled) for name in ("targets", "correct_before"))
    objects = [record for record in labelled if record.get("objects")]
    without = sum(not record["targets"] for record in objects)
    if objects and len(objects) - without < FEW * len(objects):
        return (
            f"{without} of {len(objects)} images with labelled objects have no target: the network "
            "does not see what the labels say, are its classes those of the labels?"
        )
    if not targets or correct >= FEW * targets:
        return None
    told = (
        f"only {100 * correct / targets:.1f} % of the labelled targets are correct on the clean "
        "images: are the network's classes those of the labels?"
    )
    for shift in ("-1", "+1"):
        count = sum(record.get("correct_if_shifted", {}).get(shift, 0) for record in labelled)
        if count >= max(FEW * targets, 2 * correct):
            how = "less: are they numbered from 1" if shift == "-1" else "more: does 0 stand for 1"
            told += f" {100 * count / targets:.1f} % would be correct if every label were 1 {how}?"
    return told


def warning_of_files(
    records: Sequence[Record], tolerance: float, levels: int | None, prepared: bool = False
) -> str | None:
    """Return a warning if attacks that converged have active targets in the 8-bit files."""
    converged = [r for r in records if r["status"] == Status.CONVERGED and to_fool(r)]
    again = [one for one in converged if not _within(one, tolerance, one["targets"])]
    if not again:
        return None
    worst = max(again, key=lambda record: int(record["active_after_rounding"]))
    hint = ""
    if levels is None:
        hint = ": --levels 256 attacks what the files hold"
    elif prepared:
        hint = ": a prepared copy was attacked, --no-prepare attacks the network itself"
    return (
        f"{len(again)} of {len(converged)} images that converged have active targets in their "
        f"8-bit files, most in {worst['name']}: {worst['active_after_rounding']} of "
        f"{worst['targets']} targets"
        f"{hint}"
    )


def warning_of_epsilon(attack: KnownAttack) -> str | None:
    """Return a warning if 8-bit files may leave the ball: its radius is between two levels."""
    if attack.levels is not None or attack.epsilon is None or attack.norm != "linf":
        return None
    if abs(attack.epsilon * 255 - round(attack.epsilon * 255)) < 1e-4:
        return None
    return (
        f"--epsilon {attack.epsilon:.6g} is not a multiple of 1/255, so rounding to 8 bits may "
        "exceed it: --levels 256 keeps files within epsilon"
    )


def warnings_of(
    records: Sequence[Record], attack: KnownAttack, *, prepared: bool = False
) -> list[str]:
    """Return the warnings about a run."""
    attacked = [record for record in records if record["status"] != FAILED]
    told = (
        warning_of_labels(attacked),
        warning_of_files(attacked, attack.tolerance or 0.0, attack.levels, prepared),
        warning_of_epsilon(attack) if attacked else None,
    )
    return [warning for warning in told if warning is not None]


def scores(
    records: Sequence[Record], classes: Sequence[str] | None, measure: str
) -> dict[str, Any]:
    """Return the score before and after the attack over all images, in percent."""
    found = {}
    for stage in STAGES:
        count = max(record["num_classes"] for record in records)
        known = (
            mean_iou([record["pixels"][stage] for record in records], count)
            if measure == "mIoU"
            else average_precision(records, stage, count)
        )
        found[stage] = {
            "mean": as_number(known.mean),
            "classes": {
                (classes[c] if classes and c < len(classes) else str(c)): value
                for c, value in enumerate(map(as_number, known.per_class))
                if value is not None
            },
        }
    return found


def mean_iou(tallies: Sequence[Mapping[str, Sequence[int]]], num_classes: int) -> Score:
    """Return the mean IoU from the tallies of all images."""
    total = torch.zeros(num_classes, 3, dtype=torch.int64)
    for one in tallies:
        for c, counts in one.items():
            total[int(c)] += torch.tensor(counts)
    return iou(*total.unbind(1))


def average_precision(records: Sequence[Record], stage: str, num_classes: int) -> Score:
    """Return the mean average precision at IoU 0.5, as in VOC2007."""
    # The measure's background is class 0; a detector's may be any class.
    measure = AveragePrecision(num_classes + 1)
    for record in records:
        measure.update(*boxes_of(record["seen"][stage], record["truth"]))
    score = measure.compute()
    return Score(score.per_class[1:], score.mean)


def boxes_of(found: Mapping[str, Any], truth: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a record's detections and true boxes as arguments of a measure; classes from 1."""
    return (
        {name: _tensor(name, found[name]) for name in ("boxes", "labels", "scores")},
        *(_tensor(name, truth[name]) for name in ("boxes", "labels", "difficult", "iscrowd")),
    )


def _tensor(name: str, values: Sequence[Any]) -> Tensor:
    kinds = {"labels": torch.int64, "difficult": torch.bool, "iscrowd": torch.bool}
    made = torch.tensor(values, dtype=kinds.get(name, torch.float64))
    if name == "labels":
        return made + 1
    return made.reshape(-1, 4) if name == "boxes" else made


def as_number(value: float) -> float | None:
    """Return a score for JSON: None instead of NaN."""
    return None if value != value else value


def _share(count: float, of: Sequence[Any]) -> float | None:
    return 100 * count / len(of) if of else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "largest": max(values),
    }

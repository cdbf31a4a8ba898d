"""What the records of a run come to."""

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
FEW = 0.2  # of the labelled targets right on the clean images: users are warned below


def tally(seen: Tensor, labels: Tensor) -> dict[str, list[int]]:
    """Pixels of each class: rightly seen, seen, and true, where the labels (h, w) count."""
    counted = labels != files.IGNORE
    seen, labels = seen[counted].long(), labels[counted].long()
    classes = int(torch.cat([seen, labels]).max()) + 1 if len(labels) else 0
    parts = [torch.bincount(x, minlength=classes) for x in (seen[seen == labels], seen, labels)]
    table = torch.stack(parts, 1)
    return {str(c): table[c].tolist() for c in range(classes) if bool(table[c].any())}


def summarise(
    records: Sequence[Record], classes: Sequence[str] | None, tolerance: float
) -> dict[str, Any]:
    """The summary of a run, from the records of all its images.

    What the attack achieved is told of the images that had something to fool (see `to_fool`): what
    was wrong on the clean image is not the attack's success.
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
        "targets right before, %": _share(
            sum(r["right_before"] / r["targets"] for r in with_targets), with_targets
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
    """Targets that an attack has to fool.

    Those that are active on the clean image: right, or wrong by less than the margin; of targeted
    attacks not at their adversarial label by the margin.
    """
    return int(record["to_fool"])


def succeeded(record: Record, tolerance: float) -> bool:
    """Whether the 8-bit file has no more active targets than are tolerated of those to fool."""
    return _within(record, tolerance, to_fool(record))


def _within(record: Record, tolerance: float, targets: int) -> bool:
    """Whether the 8-bit file has no more active targets than are tolerated of so many."""
    allowed = UntilFooled(0, tolerance).allowed(torch.tensor([targets]))
    return bool(record["active_after_rounding"] <= allowed)


def warning_of_labels(records: Sequence[Record]) -> str | None:
    """What is wrong with labels that were given, if hardly any fit what the network sees.

    That is, where less than `FEW` of all targets are right on the clean images, or less than `FEW`
    of the images with objects have targets. If labels one less or one more are right at least
    there and twice as often, the message says so.
    """
    labelled = [record for record in records if record.get("labelled")]
    targets, right = (sum(r[name] for r in labelled) for name in ("targets", "right_before"))
    objects = [record for record in labelled if record.get("objects")]
    without = sum(not record["targets"] for record in objects)
    if objects and len(objects) - without < FEW * len(objects):
        return (
            f"{without} of {len(objects)} images with labelled objects have no target: the network "
            "does not see what the labels say, are its classes those of the labels?"
        )
    if not targets or right >= FEW * targets:
        return None
    told = (
        f"only {100 * right / targets:.1f} % of the labelled targets are right on the clean "
        "images: are the network's classes those of the labels?"
    )
    for shift in ("-1", "+1"):
        count = sum(record.get("right_if_shifted", {}).get(shift, 0) for record in labelled)
        if count >= max(FEW * targets, 2 * right):
            how = "less: are they numbered from 1" if shift == "-1" else "more: does 0 stand for 1"
            told += f" {100 * count / targets:.1f} % would be right if every label were 1 {how}?"
    return told


def warning_of_files(
    records: Sequence[Record], tolerance: float, levels: int | None, prepared: bool = False
) -> str | None:
    """What users should know where attacks that converged have failed in the 8-bit files."""
    converged = [r for r in records if r["status"] == Status.CONVERGED and to_fool(r)]
    again = [one for one in converged if not _within(one, tolerance, one["targets"])]
    if not again:
        return None
    worst = max(again, key=lambda record: int(record["active_after_rounding"]))
    hint = ""
    if levels is None:
        hint = ": --levels 256 attacks what the files hold"
    elif prepared:
        hint = ": a prepared copy of the network was attacked, --no-prepare attacks itself"
    return (
        f"{len(again)} of {len(converged)} images that converged have active targets in their "
        f"8-bit files, {worst['name']} {worst['active_after_rounding']} of {worst['targets']}"
        f"{hint}"
    )


def warning_of_epsilon(attack: KnownAttack) -> str | None:
    """That 8-bit files may leave the ball, where its radius is no whole number of levels."""
    if attack.levels is not None or attack.epsilon is None or attack.norm != "linf":
        return None
    if abs(attack.epsilon * 255 - round(attack.epsilon * 255)) < 1e-4:
        return None
    return (
        f"--epsilon {attack.epsilon:.6g} is no multiple of 1/255, and rounding to 8 bits may lead "
        "out of it: --levels 256 keeps files within epsilon"
    )


def warnings_of(
    records: Sequence[Record], attack: KnownAttack, *, prepared: bool = False
) -> list[str]:
    """What users should know of all images that were attacked."""
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
    """A score of all images at each stage, in percent: its mean, and that of each class."""
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
    """Mean IoU over the tallies of all images."""
    total = torch.zeros(num_classes, 3, dtype=torch.int64)
    for one in tallies:
        for c, counts in one.items():
            total[int(c)] += torch.tensor(counts)
    return iou(*total.unbind(1))


def average_precision(records: Sequence[Record], stage: str, num_classes: int) -> Score:
    """Mean average precision at IoU 0.5 as in VOC2007."""
    # The measure keeps class 0 for the background, which a detector may have anywhere.
    measure = AveragePrecision(num_classes + 1)
    for record in records:
        measure.update(*boxes_of(record["seen"][stage], record["truth"]))
    score = measure.compute()
    return Score(score.per_class[1:], score.mean)


def boxes_of(found: Mapping[str, Any], truth: Mapping[str, Any]) -> tuple[Any, ...]:
    """What measures of detection count, from what a record has found and true; classes from 1."""
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
    """A score as JSON has it: None for a NaN."""
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

"""What the records of a run come to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..attacks.schedules import UntilFooled
from ..metrics import AveragePrecision, Score, iou
from .store import FAILED, Record

STAGES = ("before", "after")  # of the attack, in the files


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
    """The summary of a run, from the records of all its images."""
    attacked = [record for record in records if record["status"] != FAILED]
    aimed = [record for record in attacked if record["targets"]]
    status = [record["status"] for record in aimed]
    measure = "mIoU" if any("pixels" in record for record in attacked) else "mAP"
    return {
        "images": len(records),
        "attacked": len(attacked),
        "without targets": len(attacked) - len(aimed),
        **{name: status.count(name) for name in ("converged", "budget", "stalled")},
        "success after rounding, %": _share(sum(succeeded(r, tolerance) for r in aimed), aimed),
        "active targets left, %": _share(sum(r["active"][-1] / r["targets"] for r in aimed), aimed),
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


def succeeded(record: Record, tolerance: float) -> bool:
    """Whether the attacked image is still one after rounding to 8 bits."""
    allowed = UntilFooled(0, tolerance).allowed(torch.tensor([record["targets"]]))
    return bool(record["active_after_rounding"] <= allowed)


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
            "mean": _number(known.mean),
            "classes": {
                (classes[c] if classes and c < len(classes) else str(c)): value
                for c, value in enumerate(map(_number, known.per_class))
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
    measure = AveragePrecision(num_classes)
    for record in records:
        found, truth = record["seen"][stage], record["truth"]
        measure.update(
            {name: _tensor(name, found[name]) for name in ("boxes", "labels", "scores")},
            *(_tensor(name, truth[name]) for name in ("boxes", "labels", "difficult", "iscrowd")),
        )
    return measure.compute()


def _tensor(name: str, values: Sequence[Any]) -> Tensor:
    kinds = {"labels": torch.int64, "difficult": torch.bool, "iscrowd": torch.bool}
    made = torch.tensor(values, dtype=kinds.get(name, torch.float64))
    return made.reshape(-1, 4) if name == "boxes" else made


def _number(value: float) -> float | None:
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

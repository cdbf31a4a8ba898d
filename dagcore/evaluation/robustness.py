"""Summarise the records of an evaluation: scores of each attack, and the worst case."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..metrics import AveragePrecision, DetectionErrors, ErrorCounts, Score, iou, worst_iou
from .protocols import Protocol
from .store import FAILED, Record
from .summary import as_number, boxes_of, warning_of_labels

STEPS = (0, 1, 2, 3, 5, 7, 10, 14, 20, 30, 40, 50, 70, 100, 140, 200, 300, 500, 700, 1000)
"""Numbers of updates after which correct pixels are reported."""
STAGES = ("memory", "file")
RISE = 1.0  # points by which accuracy may rise in a larger ball, as attacks start at random points
FEW_STEPS = 4  # updates below which the second half says nothing
UNFINISHED = 5.0  # points of accuracy that may be lost in the second half of the updates

Cell = Mapping[str, Any]
"""Result of an attack on one image, or on all images; see `evaluator.Evaluation`."""
Summary = Mapping[str, Any]
"""The content of summary.json."""
Key = tuple[str, Any, Any, Any]


def told_radius(cell: Cell) -> str:
    """Return the radius and the norm of an attack's ball in words."""
    epsilon, norm = cell["epsilon"], cell["norm"]
    if epsilon is None:
        return "no ball"
    told, levels = f"{epsilon:.4g}", f"{epsilon * 255:.4g}"
    if float(told) != epsilon and abs(float(levels) / 255 - epsilon) < 1e-9:
        told = f"{levels}/255"
    return told if norm == "linf" else f"{told} in {str(norm).upper()}"


def correct_of(cell: Cell, truth: Mapping[str, Any] | None, stage: str | None = None) -> int:
    """Return the number of correct pixels, or of correctly detected objects."""
    judged = cell[next(name for name in STAGES if name in cell) if stage is None else stage]
    if "pixels" in judged:
        return sum(counts[0] for counts in judged["pixels"].values())
    assert truth is not None
    return _errors(judged["seen"], truth).correct


def _errors(found: Mapping[str, Any], truth: Mapping[str, Any]) -> ErrorCounts:
    """Count the detections in one image by kind of error."""
    errors = DetectionErrors(2 + max([0, *truth["labels"], *found["labels"]]))
    errors.update(*boxes_of(found, truth))
    return errors.compute()


def correct_when_clean(record: Record) -> tuple[int, int]:
    """Return the numbers of correct and of all counted pixels (objects) in the clean image."""
    judged, truth = record["clean"], record.get("truth")
    if truth is None:
        counts = judged["pixels"].values()
        return sum(correct for correct, _, _ in counts), sum(true for _, _, true in counts)
    errors = _errors(judged["seen"], truth)
    return errors.correct, errors.objects


def worst_images(records: Iterable[Record], count: int) -> list[Record]:
    """Return the images that keep the smallest share of their correct pixels or objects."""
    found = []
    for record in records:
        if "worst" in record and (correct := correct_when_clean(record)[0]):
            found.append((record["worst"]["correct"] / correct, record["number"], record))
    return [record for *_, record in sorted(found, key=lambda one: one[:2])[:count]]


def summarise(
    records: Sequence[Record], protocol: Protocol, classes: Sequence[str] | None, task: str
) -> dict[str, Any]:
    """Return the summary of an evaluation, from the records of all its images."""
    done = [record for record in records if record["status"] != FAILED]
    summary: dict[str, Any] = {
        "protocol": protocol.record(),
        "task": task,
        "images": len(records),
        "evaluated": len(done),
        "failed": [
            {key: record[key] for key in ("number", "name", "reason")}
            for record in records
            if record["status"] == FAILED
        ],
    }
    if not done:
        return {**summary, "classes": [], "clean": None, "results": [], "worst_case": []}
    count = max(record["num_classes"] for record in done)
    names = _names(count, classes)
    clean = [{**record["clean"], "truth": record.get("truth")} for record in done]
    score = segmentation_scores if task == "segmentation" else detection_scores
    results = []
    for key, stage, cells in _groups(done):
        attack, norm, epsilon, levels = key
        judged = [
            {**cell[stage], "truth": record.get("truth")}
            for record, cell in zip(done, cells, strict=True)
        ]
        results.append(
            {
                **{"attack": attack, "norm": norm, "epsilon": epsilon, "levels": levels},
                "stage": stage,
                **score(judged, names),
                "iterations": _mean(cell["iterations"] for cell in cells),
                "perceptibility": _mean(cell["perceptibility"] for cell in cells),
                "forward": _mean(cell["forward"] for cell in cells),
                "backward": _mean(cell["backward"] for cell in cells),
                "examples_of_smaller_balls": sum("example_of" in cell for cell in cells),
                **_by_step(cells),
            }
        )
    return {
        **summary,
        "classes": names,
        "clean": score(clean, names),
        "results": results,
        "worst_case": worst_cases(done, names) if task == "segmentation" else [],
        "cost": {
            # One of the attacked network, one of the judging network, one for TOG's targets.
            "clean passes per image": 2 if task == "segmentation" else 3,
            "forward": _mean(sum(c["forward"] for c in r["cells"]) for r in done),
            "backward": _mean(sum(c["backward"] for c in r["cells"]) for r in done),
            "judging": _mean(sum(stage in c for c in r["cells"] for stage in STAGES) for r in done),
        },
    }


def _groups(records: Sequence[Record]) -> Iterator[tuple[Key, str, list[Cell]]]:
    """Yield the results of each attack on all images, in the order of the protocol."""
    for k, first in enumerate(records[0]["cells"]):
        cells = [record["cells"][k] for record in records]
        key = (first["attack"], first["norm"], first["epsilon"], first["levels"])
        for stage in STAGES:
            if stage in first:
                yield key, stage, cells


def _by_step(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the share of correct pixels over all images, in percent, by number of updates.

    An image that has stopped keeps its last number.
    """
    known = [
        {int(step): correct for step, correct in cell.get("correct_by_step", {}).items()}
        for cell in cells
    ]
    total = sum(true for cell in cells for _, _, true in _counts(cell))
    if not all(known) or not total:
        return {}
    first = max(min(one) for one in known)
    steps = sorted({step for one in known for step in one if step >= first})
    shares = {}
    for step in steps:
        correct = sum(one[max(k for k in one if k <= step)] for one in known)
        shares[step] = 100 * correct / total
    return {"correct_by_step": shares}


def _counts(cell: Cell) -> list[list[int]]:
    """Return the correct, predicted and true pixels of each class; an empty list for detectors."""
    judged = next(cell[stage] for stage in STAGES if stage in cell)
    return list(judged.get("pixels", {}).values())


def tables(judged: Sequence[Mapping[str, Any]], num_classes: int) -> Tensor:
    """Return the correct, predicted and true pixels of each image and class, (N, C, 3) int64."""
    found = torch.zeros(len(judged), num_classes, 3, dtype=torch.int64)
    for n, one in enumerate(judged):
        for c, counts in one["pixels"].items():
            found[n, int(c)] = torch.tensor(counts)
    return found


def segmentation_scores(
    judged: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
    """Return aAcc, mAcc and mIoU over all pixels, and the mean aAcc over images, in percent."""
    counts = tables(judged, len(names))
    hits, seen, true = counts.sum(0).unbind(1)
    overlap = iou(hits, seen, true)
    accuracy = [
        100 * h / t if t else None for h, t in zip(hits.tolist(), true.tolist(), strict=True)
    ]
    known = [value for value in accuracy if value is not None]
    return {
        "aAcc": _share(int(hits.sum()), int(true.sum())),
        "mIoU": as_number(overlap.mean),
        "mAcc": sum(known) / len(known) if known else None,
        "aAcc of images": _image_mean(counts[:, :, 0].sum(1), counts[:, :, 2].sum(1)),
        "per_class": {
            name: {"IoU": as_number(overlap.per_class[c]), "Acc": accuracy[c]}
            for c, name in enumerate(names)
            if as_number(overlap.per_class[c]) is not None
        },
    }


def _image_mean(hits: Tensor, true: Tensor) -> float | None:
    counted = true > 0
    shares = hits[counted].double() / true[counted]
    return 100 * float(shares.mean()) if len(shares) else None


def detection_scores(judged: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return the mAP of VOC and COCO at IoU 0.5, in percent, and the counts of errors."""
    count = len(names) + 1  # class 0 is the measures' background; a detector's may be any class
    measures: dict[str, Any] = {
        "mAP": AveragePrecision(count),
        "AP50 (COCO)": AveragePrecision(count, protocol="coco"),
    }
    errors = DetectionErrors(count)
    for one in judged:
        for measure in (*measures.values(), errors):
            measure.update(*boxes_of(one["seen"], one["truth"]))
    scores = {name: measure.compute() for name, measure in measures.items()}
    voc: Score = scores["mAP"]
    return {
        **{name: as_number(score.mean) for name, score in scores.items()},
        "errors": dataclasses.asdict(errors.compute()),
        "per_class": {
            name: {"AP": as_number(voc.per_class[c + 1])}
            for c, name in enumerate(names)
            if as_number(voc.per_class[c + 1]) is not None
        },
    }


def worst_cases(records: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the worst case over all attacks in each ball: per image, and for the mean IoU.

    The search for the lowest mean IoU starts from each attack in turn. The lowest result counts.
    """
    balls: dict[tuple[Any, Any, Any, str], dict[str, Tensor]] = {}
    for (attack, norm, epsilon, levels), stage, cells in _groups(records):
        counts = tables([cell[stage] for cell in cells], len(names))
        balls.setdefault((norm, epsilon, levels, stage), {})[attack] = counts
    found = []
    for (norm, epsilon, levels, stage), of_attacks in balls.items():
        attacks = list(of_attacks)
        hits, seen, true = torch.stack(list(of_attacks.values())).unbind(3)  # (A, N, C)
        correct, least = hits.sum(2), hits.sum(2).min(0)
        pixels = true[0].sum(1)
        searches = [worst_iou(hits, seen, true[0], begin=k) for k in range(len(attacks))]
        worst = min(searches, key=lambda search: search.score.mean)
        choice = worst.choice.tolist()
        found.append(
            {
                **{"norm": norm, "epsilon": epsilon, "levels": levels, "stage": stage},
                "attacks": attacks,
                "aAcc": _share(int(least.values.sum()), int(pixels.sum())),
                "aAcc of images": _image_mean(least.values, pixels),
                "mIoU": as_number(worst.score.mean),
                "rounds": worst.rounds,
                "images won, aAcc": _won(attacks, correct.argmin(0).tolist()),
                "images won, mIoU": _won(attacks, choice),
                "per_class": {
                    name: {"IoU": as_number(worst.score.per_class[c])}
                    for c, name in enumerate(names)
                    if as_number(worst.score.per_class[c]) is not None
                },
            }
        )
    return found


def _won(attacks: Sequence[str], choice: Sequence[int]) -> dict[str, int]:
    return {name: choice.count(k) for k, name in enumerate(attacks)}


def warnings_of(records: Sequence[Record], summary: Mapping[str, Any]) -> list[str]:
    """Return the warnings about an evaluation."""
    done = [record for record in records if record["status"] != FAILED]
    warnings = [told] if (told := warning_of_labels(done)) is not None else []
    unlabelled = sum(not record["labelled"] for record in done)
    if unlabelled:
        warnings.append(
            f"{unlabelled} of {len(done)} images have no labels: the network's predictions on the "
            "clean images are used instead, so its clean score is 100 %"
        )
    if summary["task"] == "segmentation":
        views = {
            (one["attack"], one["norm"], one["epsilon"], one["levels"]): one
            for one in reversed(summary["results"])
        }
        first = list(reversed(views.values()))  # in memory if that is measured
        warnings += [*_rising(first), *_unfinished(first)]
    warnings += _of_levels(summary["results"])
    large = {told_radius(one) for one in summary["results"] if (one["epsilon"] or 0.0) >= 1}
    if any(one["norm"] == "linf" and (one["epsilon"] or 0.0) >= 1 for one in summary["results"]):
        warnings.append(
            f"a radius of {', '.join(sorted(large))} allows any image: is /255 missing?"
        )
    return warnings


def _rising(results: Sequence[Cell]) -> Iterator[str]:
    """Warn of attacks that leave a higher accuracy in a larger ball."""
    for smaller in results:
        for larger in results:
            same = all(smaller[key] == larger[key] for key in ("attack", "norm", "levels"))
            if not same or smaller["epsilon"] is None or smaller["epsilon"] >= larger["epsilon"]:
                continue
            if (larger["aAcc"] or 0.0) > (smaller["aAcc"] or 0.0) + RISE:
                yield (
                    f"{larger['attack']} leaves {larger['aAcc']:.1f} % of the pixels correct at "
                    f"{told_radius(larger)} and {smaller['aAcc']:.1f} % at "
                    f"{told_radius(smaller)}: its steps do not suit its radius"
                )


def _unfinished(results: Sequence[Cell]) -> Iterator[str]:
    """Warn of balls whose longest attack still progresses in the second half of its updates."""
    for ball in dict.fromkeys((one["norm"], one["epsilon"], one["levels"]) for one in results):
        inside = [
            one
            for one in results
            if (one["norm"], one["epsilon"], one["levels"]) == ball and one.get("correct_by_step")
        ]
        if not inside:
            continue
        longest = max(inside, key=lambda one: one["iterations"])
        by_step = longest["correct_by_step"]
        first, last = min(by_step), max(by_step)
        if last - first < FEW_STEPS:
            continue
        half = max(step for step in by_step if step <= (first + last) / 2)
        if by_step[half] - by_step[last] > UNFINISHED:
            yield (
                f"{longest['attack']} at {told_radius(longest)} leaves {by_step[half]:.1f} % of "
                f"the pixels correct after {half} updates and {by_step[last]:.1f} % after {last}: "
                "more updates would leave fewer"
            )


def _of_levels(results: Sequence[Cell]) -> Iterator[str]:
    """Warn of balls that are too small for 8-bit files, or that rounding can leave."""
    rounded = [one for one in results if one["stage"] == "file" and one["levels"] is None]
    radii = {told_radius(one): one["epsilon"] for one in rounded if one["norm"] == "linf"}
    small = [told for told, epsilon in radii.items() if epsilon < 0.5 / 255]
    if small:
        yield (
            f"changes of less than half a level of an 8-bit file ({', '.join(small)}) are lost "
            "when images are rounded"
        )
    between = [
        told
        for told, epsilon in radii.items()
        if told not in small and abs(epsilon * 255 - round(epsilon * 255)) > 1e-4
    ]
    between += sorted({told_radius(one) for one in rounded if one["norm"] == "l2"})
    if between:
        yield (
            f"rounding to 8 bits may lead out of balls of radius {', '.join(between)}: --levels "
            "256 keeps files within them"
        )


def _names(count: int, classes: Sequence[str] | None) -> list[str]:
    """Return distinct names of the classes. Classes without a name get their number."""
    given = list(classes or ())
    names = [given[c] if c < len(given) else str(c) for c in range(count)]
    return [f"{name} ({c})" if names.count(name) > 1 else name for c, name in enumerate(names)]


def _share(part: int, of: int) -> float | None:
    return 100 * part / of if of else None


def _mean(values: Any) -> float:
    known = list(values)
    return float(sum(known) / len(known))

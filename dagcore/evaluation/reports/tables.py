"""Turn the summary of an evaluation into tables and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..robustness import correct_when_clean, told_radius
from ..store import Record
from .charts import nested_bar, stacked_bar
from .exports import Summary, entries_of, first_view, with_defaults
from .pages import Table

Row = Mapping[str, Any]
"""Scores of clean images, of an attack in a ball, or of a worst case."""

MEASURES = {"segmentation": ("aAcc", "mIoU"), "detection": ("mAP", "AP50 (COCO)")}
OTHERS = {"segmentation": ("mAcc", "aAcc of images"), "detection": ()}
NORMS = {"linf": "L-infinity", "l2": "L2"}
NOTHING = "-"

ERRORS = {
    "correct": ("correct", 2),
    "localisation": ("wrong place", 0),
    "both": ("wrong place and class", 6),
    "classification": ("wrong class", 1),
    "duplicate": ("duplicate", 4),
    "background": ("no object there", 3),
    "missed": ("object missed", 7),
}
"""Kinds of detection errors in words, with the index of their colour."""

OWN_COLUMNS = ("steps", "max_iter", "alpha", "gamma", "loss", "random_start", "norm")


def number(value: float | None, digits: int = 2) -> str:
    """Format a number for a table."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def told_view(row: Row) -> str:
    """Return in words whether the network sees images in memory or in 8-bit files."""
    if row["levels"] is not None:
        return "attacked in 8 bits"
    return "in memory" if row["stage"] == "memory" else "rounded to 8 bits"


def title_of(summary: Summary) -> str:
    """Return network, data set and protocol in words."""
    return f"{summary['network']} on {summary['data']}: {summary['protocol']['name']}"


def worst_name(summary: Summary) -> str:
    """Return the name of the last row of a ball."""
    return "worst case" if summary["task"] == "segmentation" else "lowest of the attacks"


def worst_rows(summary: Summary) -> list[dict[str, Any]]:
    """Return the worst case of each ball and view. For detectors, it is the lowest scores.

    Rows are sorted by norm and then by radius.
    """
    if summary["task"] == "segmentation":
        return sorted(summary["worst_case"], key=lambda row: _place(row, summary))
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in summary["results"]:
        groups.setdefault(_group(row), []).append(row)
    least = [
        {
            **{key: rows[0][key] for key in ("norm", "epsilon", "levels", "stage")},
            **{measure: _least(row[measure] for row in rows) for measure in MEASURES["detection"]},
        }
        for rows in groups.values()
    ]
    return sorted(least, key=lambda row: _place(row, summary))


def first_worst(summary: Summary) -> list[dict[str, Any]]:
    """Return the worst cases in the protocol's view."""
    return first_view({**summary, "worst_case": worst_rows(summary)}, "worst_case")


def _place(row: Row, summary: Summary) -> tuple[int, float]:
    norms = [one["norm"] for one in summary["results"]]
    return norms.index(row["norm"]), row["epsilon"] or 0.0


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _group(row: Row) -> tuple[Any, ...]:
    """Return the ball and the view of a row."""
    return tuple(row[key] for key in ("norm", "epsilon", "levels", "stage"))


def headline(summary: Summary) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return clean scores and worst cases, each as a label and pairs (measure, value)."""
    measures = MEASURES[summary["task"]]
    rows = [("clean", summary["clean"])]
    name = worst_name(summary)
    rows += [(f"{name}, {told_radius(row)}", row) for row in first_worst(summary)]
    return [(label, [(m, f"{number(row[m], 1)} %") for m in measures]) for label, row in rows]


def results_table(summary: Summary) -> Table:
    """Return a table of the attacks in each ball and view, each followed by the worst case."""
    measures = MEASURES[summary["task"]] + OTHERS[summary["task"]]
    counts = ("iterations", "forward", "backward")
    head = ["radius", "images", "attack", *measures, "updates", "forward", "backward"]

    def row(name: str, one: Row, place: Sequence[str]) -> list[str]:
        scores = [number(one.get(measure)) for measure in measures]
        return [*place, name, *scores, *(number(one.get(key), 1) for key in counts)]

    rows = [row("clean", summary["clean"], ("", ""))]
    strong = [0]
    for worst in worst_rows(summary):
        place = told_radius(worst), told_view(worst)
        members = [one for one in summary["results"] if _group(one) == _group(worst)]
        rows += [row(one["attack"], one, place) for one in members]
        strong.append(len(rows))
        rows.append(row(worst_name(summary), worst, place))
    return Table(head, rows, words=3, strong=strong, grouped=2)


def settings_table(summary: Summary) -> Table:
    """Return a table of the protocol's attacks with all settings, including defaults."""
    head = ["attack", "kind", "loss", "labels", "radii", "steps", "step", "random start", "others"]
    rows = []
    for name, entry in entries_of(summary).items():
        known = with_defaults(entry)
        radii = [
            told_radius(one) for one in first_view(summary, "results") if one["attack"] == name
        ]
        step = known.get("alpha", known.get("gamma"))
        loss = [str(known["loss"])] if "loss" in known else []
        loss += [f"classes {entry['class_weights']}"] if entry["class_weights"] else []
        others = [f"{k}: {v}" for k, v in entry["settings"].items() if k not in OWN_COLUMNS]
        rows.append(
            [
                name,
                entry["attack"],
                ", ".join(loss) or "its own",
                entry["adversarial"],
                ", ".join(dict.fromkeys(radii)),
                str(known.get("steps", known.get("max_iter", NOTHING))),
                "adaptive" if step is None else _told_step(step, known.get("norm", "linf")),
                "yes" if known.get("random_start") else "no",
                ", ".join(others),
            ]
        )
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return Table(head, rows, words=len(head))


def _told_step(step: float, norm: str) -> str:
    return told_radius({"epsilon": step, "norm": "linf"}) if norm == "linf" else f"{step:g}"


def won_table(summary: Summary) -> Table:
    """Return a table of the numbers of images for which each attack is the worst in each ball."""
    worst = first_worst(summary)
    head = ["attack"]
    head += [f"{measure}, {told_radius(one)}" for one in worst for measure in ("aAcc", "mIoU")]
    names = list(dict.fromkeys(name for one in worst for name in one["attacks"]))
    rows = []
    for name in names:
        won = [one[f"images won, {m}"].get(name) for one in worst for m in ("aAcc", "mIoU")]
        rows.append([name, *(NOTHING if count is None else str(count) for count in won)])
    return Table(head, rows)


def class_table(summary: Summary) -> Table:
    """Return a table of the classes: their worst-case IoU, or their AP under each attack.

    Attacks on detectors are those in the largest ball of the protocol's norm.
    """
    task, clean = summary["task"], summary["clean"]["per_class"]
    if task == "segmentation":
        worst = first_worst(summary)
        rows = [one for one in worst if one["norm"] == worst[0]["norm"]]
        columns, key = {told_radius(one): one["per_class"] for one in rows}, "IoU"
    else:
        rows = largest_ball(summary)
        columns, key = {one["attack"]: one["per_class"] for one in rows}, "AP"
    absent: Row = {key: None}
    names = [c for c in summary["classes"] if any(c in one for one in (clean, *columns.values()))]
    values = [[one.get(name, absent)[key] for one in (clean, *columns.values())] for name in names]
    cells = [[name, *map(number, of_class)] for name, of_class in zip(names, values, strict=True)]
    shown = values if task == "segmentation" else [[one[0], _least(one[1:])] for one in values]
    return Table(["class", "clean", *columns], cells, bars=[nested_bar(one) for one in shown])


def largest_ball(summary: Summary) -> list[dict[str, Any]]:
    """Return the results in the largest ball of the protocol's norm, in the protocol's view."""
    found = first_view(summary, "results")
    found = [one for one in found if one["norm"] == found[0]["norm"]]
    largest = max(one["epsilon"] or 0.0 for one in found)
    return [one for one in found if (one["epsilon"] or 0.0) == largest]


def errors_table(summary: Summary) -> Table:
    """Return a table of detections by kind and missed objects, clean and under each attack."""
    found: list[tuple[str, Row]] = [("clean", summary["clean"])]
    found += [(f"{o['attack']}, {told_radius(o)}", o) for o in first_view(summary, "results")]
    kinds = [kind for kind in ERRORS if any(kind in row["errors"] for _, row in found)]
    counts = [[int(row["errors"].get(kind, 0)) for kind in kinds] for _, row in found]
    most = max(map(sum, counts)) or 1
    styles = [ERRORS[kind][1] for kind in kinds]
    cells = [[name, *map(str, of)] for (name, _), of in zip(found, counts, strict=True)]
    bars = [stacked_bar(list(zip(of, styles, strict=True)), most) for of in counts]
    return Table(["attack", *(ERRORS[kind][0] for kind in kinds)], cells, bars=bars)


def cost_table(summary: Summary) -> Table:
    """Return a table of the passes through the network per image, over all attacks and balls."""
    cost = summary["cost"]
    rows = [
        ["clean images", number(cost["clean passes per image"], 1)],
        ["attacks, forward", number(cost["forward"], 1)],
        ["attacks, backward", number(cost["backward"], 1)],
        ["judging of examples", number(cost["judging"], 1)],
    ]
    return Table(["passes", "for each image"], rows)


def checks_table(summary: Summary) -> Table:
    """Return a table of the findings of the checks."""
    head = ["verdict", "check", "what was seen"]
    rows = [[one["verdict"], one["name"], one["text"]] for one in summary.get("checks") or ()]
    flagged = [k for k, row in enumerate(rows) if row[0] == "flagged"]
    return Table(head, rows, words=3, strong=flagged)


def checks_line(summary: Summary) -> str:
    """Return the numbers of passed, flagged and skipped checks in one line."""
    verdicts = [one["verdict"] for one in summary.get("checks") or ()]
    known = {v: verdicts.count(v) for v in ("passed", "flagged", "skipped") if v in verdicts}
    told = ", ".join(f"{count} {verdict}" for verdict, count in known.items())
    return f"Checks of the evaluation: {told or 'not run'}."


def images_line(summary: Summary) -> str:
    """Return in words which images were evaluated, and the norms of the balls."""
    told = f"{summary['evaluated']} of {summary['images']} images of {summary['data']}"
    balls = dict.fromkeys(o["norm"] for o in summary["results"] if o["epsilon"] is not None)
    radii = " and ".join(NORMS.get(norm, norm) for norm in balls)
    told += f", seed {summary['seed']}."
    return f"{told} Radii are of balls in {radii}." if radii else told


def reused_line(summary: Summary) -> str:
    """Return in words how many examples come from smaller balls; "" if there are none."""
    count = sum(one["examples_of_smaller_balls"] for one in first_view(summary, "results"))
    if not count:
        return ""
    return (
        f"{count} examples are those of a smaller ball: an image without a correct pixel or object "
        "is not attacked again in a larger one by the same attack."
    )


def images_table(records: Sequence[Record]) -> Table:
    """Return a table of the worst examples of images."""
    head, rows = ["image", "worst attack", "correct when clean, %", "correct under it, %"], []
    for one in records:
        clean, of = correct_when_clean(one)
        told = [number(100 * correct / of) for correct in (clean, one["worst"]["correct"])]
        rows.append([one["name"], one["worst"]["attack"], *told])
    return Table(head, rows, words=2)


def failed_table(summary: Summary) -> Table:
    """Return a table of the images that were passed over, with the reasons."""
    rows = [[str(one["number"]), one["name"], one["reason"]] for one in summary["failed"]]
    return Table(["number", "image", "reason"], rows, words=3)


def versions_line(summary: Summary) -> str:
    """Return the versions and the weights that the results were made with."""
    told = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return f"{told}; digest of the weights {summary['digest of the weights'][:16]}."

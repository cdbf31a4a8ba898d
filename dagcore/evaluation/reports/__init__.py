"""Write the report of an evaluation, and compare two evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ArgumentError
from ..robustness import told_radius
from ..store import Record
from . import exports, pages, tables
from .exports import Summary
from .page import as_html
from .pages import Table

IMAGES = "names and sizes of the images"  # key of a hash in a summary


def write(
    out: Path,
    summary: Summary,
    records: Mapping[int, Record],
    figures: Sequence[Mapping[str, str]] | None = None,
) -> None:
    """Write report.html and report.md into a folder of results, and files for other projects.

    model_info.json and semsegbench.json are written if they apply; see `exports`. The same folder
    gives the same bytes.

    Args:
        out: folder of results, which holds the pictures of the report.
        summary: summary of the evaluation.
        records: records of its images, by number.
        figures: figures of images, each with a "name", a "path" in the folder and a "note". None
            takes those of the summary. If there are none, the worst examples themselves are shown.
    """
    figures = summary.get("figures") if figures is None else figures
    pages.write_text(out / "report.html", as_html(out, summary, records, figures or ()))
    pages.write_text(out / "report.md", as_markdown(summary))
    if summary["clean"] is not None:
        for name, content in (
            ("model_info.json", exports.model_info(summary)),
            ("semsegbench.json", exports.semsegbench(summary)),
        ):
            if content:
                pages.write_text(out / name, json.dumps(content, indent=2) + "\n")


def as_markdown(summary: Summary) -> str:
    """Return a short report in Markdown, for a README or an issue."""
    shown = pages.markdown
    protocol = summary["protocol"]
    parts = [f"# Robustness of {shown(tables.title_of(summary))}"]
    if protocol["title"]:
        parts.append(f"{shown(protocol['title'])}.")
    parts.append(shown(tables.images_line(summary)))
    found: list[tuple[str, Table]] = []
    if summary["clean"] is None:
        parts.append("No image could be evaluated.")
    else:
        found = [
            ("Results, in percent", tables.results_table(summary)),
            ("What was run", tables.settings_table(summary)),
            *(
                [("Images for which each attack is the worst", tables.won_table(summary))]
                if summary["task"] == "segmentation"
                else [("Detections and missed objects", tables.errors_table(summary))]
            ),
            ("Cost", tables.cost_table(summary)),
        ]
    found += [
        ("Checks of the evaluation", tables.checks_table(summary)),
        ("Images passed over", tables.failed_table(summary)),
    ]
    parts += [
        f"## {heading}\n\n{table.markdown()}".rstrip() for heading, table in found if table.rows
    ]
    parts.append(tables.checks_line(summary))
    parts += [f"Warning: {shown(warning)}." for warning in summary["warnings"]]
    parts.append(shown(tables.versions_line(summary)))
    return "\n\n".join(parts) + "\n"


def compare(a: Path, b: Path) -> str:
    """Return a Markdown table of two evaluations: the rows that both have, and their differences.

    Raises:
        ValueError: if a folder is not a finished evaluation, or the evaluations differ in task.
    """
    first, second = (_finished(folder) for folder in (a, b))
    if first["task"] != second["task"]:
        raise ArgumentError(
            f"--compare must have two evaluations of one task, got {first['task']} in {a} and "
            f"{second['task']} in {b}"
        )
    lines = [
        f"{name}: {pages.markdown(f'{tables.title_of(one)} ({folder})')}\n"
        for name, one, folder in (("A", first, a), ("B", second, b))
    ]
    lines += [f"**Not to be compared: {why}.**\n" for why in _differing(first, second)]
    return "\n".join([*lines, _side_by_side(first, second)])


def _finished(folder: Path) -> dict[str, Any]:
    """Read the summary of a finished evaluation."""
    path = folder / "summary.json"
    wanted = "--compare must have two folders of finished evaluations"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = f"{path} does not exist" if isinstance(error, FileNotFoundError) else error
        raise ArgumentError(f"{wanted}, got {folder}: {why}") from error
    needed = ("protocol", "task", "clean", "results", "worst_case")
    if not isinstance(summary, dict) or any(name not in summary for name in needed):
        raise ArgumentError(f"{wanted}, got {folder}, which holds another command's results")
    if summary["clean"] is None:
        raise ArgumentError(f"{wanted}, got {folder}, where no image could be evaluated")
    return summary


def _differing(first: Summary, second: Summary) -> Iterator[str]:
    """Yield the reasons why two evaluations are not comparable."""
    names = [one["protocol"]["name"] for one in (first, second)]
    if names[0] != names[1]:
        yield pages.markdown(f"the protocols differ, {names[0]} and {names[1]}")
    elif first["protocol"] != second["protocol"]:
        yield pages.markdown(f"the protocols named {names[0]} differ in their settings")
    if first.get(IMAGES, first["data"]) != second.get(IMAGES, second["data"]):
        yield pages.markdown(f"the data sets differ, {first['data']} and {second['data']}")
    if first["evaluated"] != second["evaluated"]:
        yield f"the numbers of images differ, {first['evaluated']} and {second['evaluated']}"


def _side_by_side(first: Summary, second: Summary) -> str:
    """Return the rows that both have, and the numbers of rows that only one of them has."""
    measures = tables.MEASURES[first["task"]]
    head = ["radius", "images", "attack"]
    head += [f"{measure}{which}" for measure in measures for which in (", A", ", B", ", B - A")]
    ours, theirs = _rows(first), _rows(second)
    rows: list[list[str]] = []
    strong = []
    for key, one in ours.items():
        if key in theirs:
            *_, name = key
            place = [told_radius(one), tables.told_view(one)] if "norm" in one else ["", ""]
            values = [[row[measure] for row in (one, theirs[key])] for measure in measures]
            if "norm" not in one or name == tables.worst_name(first):
                strong.append(len(rows))
            rows.append([*place, name, *(cell for pair in values for cell in _compared(*pair))])
    alone = [len(ours) - len(rows), len(theirs) - len(rows)]
    told = f"\nOnly in A: {alone[0]} rows. Only in B: {alone[1]} rows.\n" if any(alone) else ""
    return Table(head, rows, words=3, strong=strong).markdown() + told


def _compared(a: float | None, b: float | None) -> list[str]:
    """Return two scores and their difference as text."""
    less = tables.NOTHING if a is None or b is None else f"{b - a:+.2f}"
    return [tables.number(a), tables.number(b), less]


def _rows(summary: Summary) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """Return the scores by ball, view and attack."""
    worst = tables.worst_name(summary)
    found = [("clean", summary["clean"])]
    found += [(one["attack"], one) for one in summary["results"]]
    found += [(worst, one) for one in tables.worst_rows(summary)]
    place = ("norm", "epsilon", "levels", "stage")
    return {(*(one.get(key) for key in place), name): one for name, one in found}

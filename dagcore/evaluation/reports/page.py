"""The report of an evaluation as one HTML page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..robustness import told_radius, worst_images
from ..store import Record
from . import charts, pages, tables
from .charts import Line, line_chart
from .exports import Summary, entries_of, first_view

WORST_IMAGES = 4
STEP_TICKS = (0, 1, 3, 10, 30, 100, 300, 1000)

STYLE = """
nav { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .9rem; }
.cards { display: grid; gap: .8rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.2rem), 1fr)); }
.cards div { background: var(--soft); border-radius: .5rem; padding: .6rem .9rem; }
.cards p { margin: 0; display: flex; flex-wrap: wrap; justify-content: space-between;
  align-items: baseline; column-gap: .5rem; }
.cards b { font-size: 1.4rem; font-weight: 600; white-space: nowrap; }
.pictures { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.pictures img { width: 100%; image-rendering: pixelated; }
.flagged { border-left: .3rem solid #d0342c; padding-left: .7rem; }
#checks ul { list-style: none; padding: 0; } #checks li { margin: .5rem 0; }
#run td:last-child, #passed-over td:last-child { white-space: normal; min-width: 12rem; }
"""

Section = tuple[str, str, str]
"""Anchor, heading and HTML of a section."""


def as_html(
    out: Path,
    summary: Summary,
    records: Mapping[int, Record],
    figures: Sequence[Mapping[str, str]],
) -> str:
    """Return the report as one HTML page."""
    title = f"Robustness of {tables.title_of(summary)}"
    found = [_run(summary)]
    if summary["clean"] is not None:
        found += [*_scores(summary), *_curves(summary), *_details(summary)]
    found.append(_checks(summary))
    found += [*_images(out, summary, records, figures), _versions(summary)]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in found)
    parts = [f"<h1>{html.escape(title)}</h1>", _cards(summary), f"<nav>{links}</nav>"]
    for anchor, heading, body in found:
        parts.append(f'<section id="{anchor}"><h2>{heading}</h2>\n{body}</section>')
    return pages.page(title, "\n".join(parts), charts.STYLE + STYLE)


def _p(text: str, kind: str = "") -> str:
    """Return a paragraph, or "" for an empty text."""
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{html.escape(text)}</p>" if text else ""


def _cards(summary: Summary) -> str:
    """Return the headline numbers, the verdicts of the checks and the warnings."""
    if summary["clean"] is None:
        return _p("No image could be evaluated.", "flagged")
    cards = []
    for label, scores in tables.headline(summary):
        told = "".join(f"<p>{measure} <b>{value}</b></p>" for measure, value in scores)
        cards.append(f"<div>{_p(label)}{told}</div>")
    flagged = any(one["verdict"] == "flagged" for one in summary.get("checks") or ())
    notes = [_p(tables.checks_line(summary), "flagged" if flagged else "")]
    notes += [_p(f"Warning: {warning}.", "flagged") for warning in summary["warnings"]]
    return f'<div class="cards">{"".join(cards)}</div>{"".join(notes)}'


def _run(summary: Summary) -> Section:
    protocol = summary["protocol"]
    parts = [_p(protocol["title"] and f"{protocol['name']}: {protocol['title']}.")]
    parts.append(_p(tables.images_line(summary)))
    if summary["clean"] is not None:
        parts += [tables.settings_table(summary).html(), _p(tables.reused_line(summary), "note")]
    return "run", "What was run", "".join(parts)


def _scores(summary: Summary) -> Iterator[Section]:
    told = "Scores in percent, over all images. Updates and passes are means of the images."
    yield "results", "Results", _p(told, "note") + tables.results_table(summary).html()


def _curves(summary: Summary) -> Iterator[Section]:
    results = first_view(summary, "results")
    names = list(dict.fromkeys(one["attack"] for one in results))
    key = [(name, k) for k, name in enumerate(names)]
    where = f"Images {tables.told_view(results[0])}."
    radii = "".join(_over_radii(summary, names))
    if radii:
        key_of_all = charts.legend([*key, (tables.worst_name(summary), None)])
        body = f'{_p(where, "note")}{key_of_all}<div class="charts">{radii}</div>'
        yield "radii", "Scores over the radius", body
    steps = "".join(_over_steps(results, names))
    if steps:
        told = f"{where} Pixels that are correct in the best iterate so far, in percent of all."
        if any("radii" in one["settings"] for one in entries_of(summary).values()):
            told += " Where radii shrink, the first iterates lie in larger balls."
        body = f'{_p(told, "note")}{charts.legend(key)}<div class="charts">{steps}</div>'
        yield "steps", "Right pixels over the updates", body


def _over_radii(summary: Summary, names: Sequence[str]) -> Iterator[str]:
    """Yield a chart over the radius for each norm and measure. Clean images have radius 0."""
    rows = first_view(summary, "results")
    worst = tables.first_worst(summary)
    for norm in dict.fromkeys(one["norm"] for one in rows if one["epsilon"] is not None):
        radii = sorted({one["epsilon"] for one in rows if one["norm"] == norm})
        ticks = [(0.0, "clean")]
        ticks += [(r, told_radius({"epsilon": r, "norm": "linf"})) for r in radii]
        for measure in tables.MEASURES[summary["task"]]:
            clean = {"epsilon": 0.0, measure: summary["clean"][measure]}
            own = [clean, *(one for one in worst if one["norm"] == norm)]
            lines = [Line(tables.worst_name(summary), _points(own, measure))]
            for k, name in enumerate(names):
                own = [one for one in rows if (one["attack"], one["norm"]) == (name, norm)]
                if own:
                    lines.append(Line(name, _points([clean, *own], measure), k))
            axis = f"radius in {tables.NORMS.get(norm, norm)}"
            yield line_chart(f"{measure}, %", lines, ticks, axis)


def _points(rows: Sequence[Mapping[str, Any]], measure: str) -> list[tuple[float, float]]:
    return sorted((one["epsilon"], one[measure]) for one in rows if one[measure] is not None)


def _over_steps(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """Yield a chart over the updates for each ball, on a logarithmic scale."""
    known = [one for one in results if one.get("correct_by_step")]
    for ball in dict.fromkeys((one["norm"], one["epsilon"]) for one in known):
        own = [one for one in known if (one["norm"], one["epsilon"]) == ball]
        lines = []
        for one in own:
            by_step = sorted(
                (int(k), v) for k, v in one["correct_by_step"].items() if v is not None
            )
            points = [(math.log1p(step), value) for step, value in by_step]
            lines.append(Line(one["attack"], points, names.index(one["attack"])))
        last = max((x for line in lines for x, _ in line.points), default=1.0)
        ticks = [(math.log1p(k), str(k)) for k in STEP_TICKS if math.log1p(k) < last]
        ticks.append((last, str(round(math.expm1(last)))))
        yield line_chart(told_radius(own[0]), lines, ticks, "updates")


def _details(summary: Summary) -> Iterator[Section]:
    """Yield the sections on classes, on winning attacks or kinds of errors, and on cost."""
    segmentation = summary["task"] == "segmentation"
    classes = tables.class_table(summary)
    if segmentation:
        told = "IoU at worst case, in percent. Bars: pale if clean, full for the last column."
    else:
        ball = told_radius(tables.largest_ball(summary)[0])
        told = f"Average precision in percent, {ball}. Bars: pale if clean, full for the lowest."
    yield "classes", "Classes", _p(told, "note") + classes.html()
    if segmentation:
        told = "Number of images on which each attack is chosen as the worst, for each score."
        yield "won", "Which attack wins", _p(told, "note") + tables.won_table(summary).html()
    else:
        errors = tables.errors_table(summary)
        kinds = {words: style for words, style in tables.ERRORS.values() if words in errors.head}
        key = charts.legend(list(kinds.items()))
        told = "Detections by what is wrong with them, and objects that were missed."
        yield "errors", "Errors of place and of class", _p(told, "note") + key + errors.html()
    yield "cost", "Cost", tables.cost_table(summary).html()


def _checks(summary: Summary) -> Section:
    items = []
    for one in summary.get("checks") or ():
        kind = ' class="flagged"' if one["verdict"] == "flagged" else ""
        name, told = html.escape(one["name"]), html.escape(one["text"])
        items.append(f"<li{kind}><b>{name}: {one['verdict']}.</b> {told}</li>")
    listed = f"<ul>{''.join(items)}</ul>" if items else ""
    return "checks", "Checks of the evaluation", _p(tables.checks_line(summary)) + listed


def _images(
    out: Path,
    summary: Summary,
    records: Mapping[int, Record],
    figures: Sequence[Mapping[str, str]],
) -> Iterator[Section]:
    worst = worst_images(records.values(), len(figures) or WORST_IMAGES)
    if worst:
        parts = [tables.images_table(worst).html()]
        if figures:
            found = [(out / f["path"], f"{f['name']}: {f['note']}".rstrip(": ")) for f in figures]
        else:
            found = [(out / "images" / f"{one['name']}.png", one["name"]) for one in worst]
        shown = [pages.picture(path, caption) for path, caption in found if path.is_file()]
        kind = "" if figures else ' class="pictures"'
        parts.append(f"<div{kind}>{''.join(shown)}</div>")
        yield "images", "Worst images", "".join(parts)
    if summary["failed"]:
        yield "passed-over", "Images passed over", tables.failed_table(summary).html()


def _versions(summary: Summary) -> Section:
    return "versions", "Versions", _p(tables.versions_line(summary))

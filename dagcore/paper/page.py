"""Run all experiments, and write one self-contained page with their results."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from ..evaluation.progress import Progress
from ..evaluation.reports import pages
from ..info import versions
from .defence import defence
from .diagnoses import convergence, denseness, perceptibility
from .fancy import fancy
from .reading import findings, text, weaker
from .reports import Report
from .tables import TABLES, Scores, Table, measure
from .why import why
from .work import Setup

PAPER: dict[str, Callable[..., Report]] = {
    "denseness": denseness,
    "convergence": convergence,
    "perceptibility": perceptibility,
    "fancy": fancy,
}
# The questions that the paper ends with: they take networks trained against attacks.
FURTHER: dict[str, Callable[..., Report]] = {"defence": defence, "why": why}
EXPERIMENTS = PAPER | FURTHER


def everything(
    setup: Setup,
    counter: Progress,
    *,
    tables: Sequence[Table] = TABLES,
    experiments: Sequence[Callable[[Setup, Progress], Report]] = tuple(PAPER.values()),
) -> list[str]:
    """Run all experiments, write their reports and index.html, and return the tables' findings."""
    scores = []
    for table in tables:
        scores.append(measure(setup, table, counter))
        scores[-1].report().write(setup)
    reports = []
    for experiment in experiments:
        reports.append(experiment(setup, counter))
        reports[-1].write(setup)
    pages.write_text(setup.out / "index.html", page(setup, scores, reports))
    return text(findings(scores))


def page(setup: Setup, scores: Sequence[Scores], reports: Sequence[Report]) -> str:
    """Return the page as HTML, without scripts or links to other files."""
    parts = [
        "<h1>Dense Adversary Generation: the paper's experiments</h1>",
        f"<p>{_data(setup)}, {setup.images} images per cell, seed {setup.seed}. Scores are mean "
        "IoU for segmentation, mean average precision at IoU 0.5 (VOC2007) for detection, in "
        "percent; small, the paper's own on PASCAL VOC. Marked: networks under a perturbation that "
        "was made for them.</p>",
    ]
    parts += [section(setup, known.report()) for known in scores]
    lines = text(findings(scores))
    if lines:
        worse = weaker(known.rows for known in scores)
        if worse:
            lines.append("Where joint ensembles are weaker than sums: " + " ".join(worse))
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        parts += ["<h2>Reading the tables</h2>", f"<ul>{items}</ul>"]
    parts += [section(setup, report) for report in reports]
    used = ", ".join(f"{key} {value}" for key, value in versions().items() if value)
    parts.append(f'<p class="note">{html.escape(used)}</p>')
    body = "\n".join(parts)
    return pages.page("dagcore: the paper's experiments", body)


def _data(setup: Setup) -> str:
    data = "Test scenes of family 07" if setup.data == "scenes" else setup.data
    weights = "the zoo's weights" if setup.weights is None else f"weights from {setup.weights}"
    return html.escape(f"{data}, {weights}")


def section(setup: Setup, report: Report) -> str:
    """Return a section of the page: a report's table, its findings and its pictures, embedded."""
    said = [f"<p>{html.escape(line)}</p>" for line in report.reading]
    pictures = [pages.picture(setup.out / path, caption) for path, caption in report.pictures]
    return "\n".join([f"<h2>{html.escape(report.title)}</h2>", report.html(), *said, *pictures])

"""All experiments, and one page with their results: no script, no network, its pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence

from ..evaluation.progress import Progress
from ..info import versions
from .diagnoses import convergence, denseness, perceptibility
from .fancy import fancy
from .reading import findings, text, weaker
from .reports import Report, write_text
from .tables import TABLES, Scores, Table, measure
from .work import Setup

EXPERIMENTS: dict[str, Callable[..., Report]] = {
    "denseness": denseness,
    "convergence": convergence,
    "perceptibility": perceptibility,
    "fancy": fancy,
}

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --mark: #e0930033; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
td.own { background: var(--mark); font-weight: 600; }
td small { opacity: .65; }
img { max-width: 100%; height: auto; background: white; }
figure { margin: 1.2rem 0; } figcaption, .note { font-size: .85rem; opacity: .8; }
"""


def everything(
    setup: Setup,
    counter: Progress,
    *,
    tables: Sequence[Table] = TABLES,
    experiments: Sequence[Callable[[Setup, Progress], Report]] = tuple(EXPERIMENTS.values()),
) -> list[str]:
    """Run all experiments, write their reports and index.html; returns what the tables say."""
    scores = []
    for table in tables:
        scores.append(measure(setup, table, counter))
        scores[-1].report().write(setup)
    reports = []
    for experiment in experiments:
        reports.append(experiment(setup, counter))
        reports[-1].write(setup)
    write_text(setup.out / "index.html", page(setup, scores, reports))
    return text(findings(scores))


def page(setup: Setup, scores: Sequence[Scores], reports: Sequence[Report]) -> str:
    """The page as HTML."""
    parts = [
        "<h1>Dense Adversary Generation: the paper's experiments</h1>",
        f"<p>{_data(setup)}, {setup.images} images a cell, seed {setup.seed}. Scores are mean IoU "
        "for segmentation, mean average precision at IoU 0.5 (VOC2007) for detection, in percent; "
        "small, the paper's own on PASCAL VOC. Marked: networks under a perturbation that was made "
        "for them.</p>",
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
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dagcore: the paper's experiments</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _data(setup: Setup) -> str:
    data = "Test scenes of family 07" if setup.data == "scenes" else setup.data
    weights = "the zoo's weights" if setup.weights is None else f"weights from {setup.weights}"
    return html.escape(f"{data}, {weights}")


def section(setup: Setup, report: Report) -> str:
    """A report's table, and its pictures inside the page."""
    parts = [f"<h2>{html.escape(report.title)}</h2>", report.html()]
    for path, caption in report.pictures:
        content = base64.b64encode((setup.out / path).read_bytes()).decode()
        told = html.escape(caption)
        parts.append(
            f'<figure><img alt="{told}" src="data:image/png;base64,{content}">'
            f"<figcaption>{told}</figcaption></figure>"
        )
    return "\n".join(parts)

"""One page with all results: no script, no network, its pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_write
from ..info import versions
from .diagnoses import Diagnosis, Row, cell
from .reading import Rows, findings, text, weaker
from .tables import Scores, named
from .work import Setup

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


def page(
    setup: Setup,
    scores: Mapping[str, Scores],
    diagnoses: Sequence[Diagnosis],
    fancy: Sequence[Row],
) -> str:
    """The page as HTML."""
    parts = [
        "<h1>Dense Adversary Generation: the paper's experiments</h1>",
        f"<p>{_data(setup)}, {setup.images} images a cell, seed {setup.seed}. Scores are mean IoU "
        "for segmentation, mean average precision at IoU 0.5 (VOC2007) for detection, in percent; "
        "small, the paper's own on PASCAL VOC. Marked: networks under a perturbation that was made "
        "for them.</p>",
    ]
    for name, known in scores.items():
        parts += [f"<h2>{name.capitalize()}</h2>", score_table(known)]
    measured: dict[str, Rows] = {name: known.rows for name, known in scores.items()}
    lines = text(findings(measured))
    if lines:
        worse = weaker(measured)
        if worse:
            lines.append("Where joint ensembles are weaker than sums: " + " ".join(worse))
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        parts += ["<h2>Reading the tables</h2>", f"<ul>{items}</ul>"]
    for diagnosis in diagnoses:
        parts += [
            f"<h2>{diagnosis.name.capitalize()}</h2>",
            rows_table(diagnosis.rows),
            picture(
                setup.out / f"{diagnosis.name}.png", f"{diagnosis.name}, as in the table above"
            ),
        ]
    if fancy:
        parts += ["<h2>Fancy examples</h2>", rows_table(fancy, without=("picture",))]
        for row in fancy:
            told = (
                f"{row['example']}: {row['network']}, {row['as wanted, %']:.1f} % as wanted after "
                f"{row['updates']} updates"
            )
            parts.append(picture(setup.out / "fancy" / row["picture"], told))
    used = ", ".join(f"{key} {value}" for key, value in versions().items() if value)
    parts.append(f'<p class="note">{html.escape(used)}</p>')
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dagcore: the paper's experiments</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def write(path: Path, content: str) -> None:
    """Write a page, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _data(setup: Setup) -> str:
    data = "Test scenes of family 07" if setup.data == "scenes" else setup.data
    weights = "the zoo's weights" if setup.weights is None else f"weights from {setup.weights}"
    return html.escape(f"{data}, {weights}")


def score_table(known: Scores) -> str:
    """A table of scores, the paper's own small behind each."""
    networks = known.table.networks
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("perturbation", *networks))
    lines = []
    for row, own in known.rows.items():
        published = known.table.published.get(row, [None] * len(networks))
        cells = ""
        for network, paper in zip(networks, published, strict=True):
            mark = ' class="own"' if network in known.members(row) else ""
            beside = "" if paper is None else f" <small>{paper:.1f}</small>"
            cells += f"<td{mark}>{own[network]:.1f}{beside}</td>"
        lines.append(f"<tr><td>{html.escape(named(row))}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def rows_table(rows: Sequence[Row], without: Sequence[str] = ()) -> str:
    """Rows of one shape as a table, without lists."""
    names = [n for n, value in rows[0].items() if not isinstance(value, list) and n not in without]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = "".join(f"<tr>{''.join(_cell(name, row[name]) for name in names)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>'


def _cell(name: str, value: Any) -> str:
    return f"<td>{html.escape(cell(name, value))}</td>"


def picture(path: Path, caption: str) -> str:
    """A picture inside the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    told = html.escape(caption)
    return (
        f'<figure><img alt="{told}" src="data:image/png;base64,{content}">'
        f"<figcaption>{told}</figcaption></figure>"
    )

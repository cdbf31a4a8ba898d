"""Results of an experiment: as JSON, as a table in Markdown or HTML, and as figures."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..evaluation.reports.pages import write_text
from ..files import atomic_write
from ..info import versions
from .work import Setup

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a table."""

    text: str
    beside: str = ""
    """The paper's number."""
    marked: bool = False
    """Whether the entry is highlighted."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Results of an experiment.

    Attributes:
        name: name of its files.
        title: heading.
        networks: networks that the results depend on.
        rows: the numbers, JSON-serialisable.
        head: columns of the table.
        entries: entries of the table, row by row.
        draw: function that draws the figure NAME.png; None if there is no figure.
        pictures: paths within the folder, and captions.
        reading: findings, in sentences.
    """

    name: str
    title: str
    networks: Sequence[str]
    rows: Sequence[Row]
    head: Sequence[str]
    entries: Sequence[Sequence[Entry]]
    draw: Callable[[Figure], None] | None = None
    pictures: Sequence[tuple[str, str]] = ()
    reading: Sequence[str] = ()

    @classmethod
    def of_rows(cls, name: str, rows: Sequence[Row], hidden: str = "", **others: Any) -> Report:
        """Make a report of rows per network; the table omits lists and the column `hidden`."""
        head = [
            column
            for column, value in rows[0].items()
            if column != hidden and not isinstance(value, list)
        ]
        return cls(
            name=name,
            networks=list(dict.fromkeys(row["network"] for row in rows)),
            rows=rows,
            head=head,
            entries=[[Entry(shown(column, row[column])) for column in head] for row in rows],
            **{"title": name.capitalize(), **others},
        )

    def markdown(self) -> str:
        """Return the table in Markdown, with the paper's numbers in brackets."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)]]
        for entries in self.entries:
            lines.append([f"{e.text} ({e.beside})" if e.beside else e.text for e in entries])
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return table + "".join(f"\n{line}\n" for line in self.reading)

    def html(self) -> str:
        """Return the table in HTML, with the paper's numbers in small print."""
        lines = ["".join(f"<th>{html.escape(name)}</th>" for name in self.head)]
        for entries in self.entries:
            line = ""
            for one in entries:
                mark = ' class="own"' if one.marked else ""
                beside = f" <small>{html.escape(one.beside)}</small>" if one.beside else ""
                line += f"<td{mark}>{html.escape(one.text)}{beside}</td>"
            lines.append(line)
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        return f'<div class="scroll"><table>{rows}</table></div>'

    def write(self, setup: Setup) -> list[Path]:
        """Write NAME.json, NAME.md and the figure; return the paths of all files and pictures."""
        settings = {"images": setup.images, **setup.made_with(self.networks)}
        known = {"rows": self.rows, "settings": settings, "versions": versions()}
        paths = [setup.out / f"{self.name}.{ending}" for ending in ("json", "md")]
        write_text(paths[0], json.dumps(known, indent=2) + "\n")
        write_text(paths[1], self.markdown())
        if self.draw is not None:
            figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
            self.draw(figure)
            with atomic_write(setup.out / f"{self.name}.png") as temporary:
                figure.savefig(temporary, format="png")
        return [*paths, *(setup.out / path for path, _ in self.pictures)]


def shown(column: str, value: Any) -> str:
    """Format a value for a table."""
    if not isinstance(value, float):
        return str(value)
    if column in ("perceptibility", "lowest", "median", "highest"):
        return f"{value:.2e}"
    return f"{value:.2f}" if column in ("NMS threshold", "seconds per image") else f"{value:.1f}"

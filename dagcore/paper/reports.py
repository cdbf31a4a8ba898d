"""What an experiment found: its numbers as JSON, as a table in Markdown or HTML, and drawn."""

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
    """The paper's own number."""
    marked: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """What an experiment found.

    Attributes:
        name: of its files.
        title: its heading.
        networks: what it depends on, beside the data.
        rows: the numbers, ready for JSON.
        head: the columns of the table.
        entries: the table row by row.
        draw: draws its figure, NAME.png, if it has one.
        pictures: paths within the folder, and captions.
    """

    name: str
    title: str
    networks: Sequence[str]
    rows: Sequence[Row]
    head: Sequence[str]
    entries: Sequence[Sequence[Entry]]
    draw: Callable[[Figure], None] | None = None
    pictures: Sequence[tuple[str, str]] = ()

    @classmethod
    def of_rows(cls, name: str, rows: Sequence[Row], hidden: str = "", **others: Any) -> Report:
        """A report of numbers per network; its table leaves out lists and the column `hidden`."""
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
        """The table, the paper's own numbers in brackets."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)]]
        for entries in self.entries:
            lines.append([f"{e.text} ({e.beside})" if e.beside else e.text for e in entries])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def html(self) -> str:
        """The table, the paper's own numbers small."""
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
        """Write NAME.json, NAME.md and the figure; returns them and the other pictures."""
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
    """A value for a table."""
    if not isinstance(value, float):
        return str(value)
    if column in ("perceptibility", "lowest", "median", "highest"):
        return f"{value:.2e}"
    return f"{value:.2f}" if column in ("NMS threshold", "seconds an image") else f"{value:.1f}"

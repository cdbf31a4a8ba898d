"""Pages of results in single HTML files, and tables in HTML or Markdown.

A page adapts to light and dark mode, has its pictures inside, and needs no script or network.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from ...files import atomic_write

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --mark: #e0930033; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: clamp(1.2rem, 5vw, 1.6rem); } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h1, p, li, figcaption { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
.words { text-align: left; white-space: nowrap; }
.group th { padding-top: 1rem; }
.strong td { font-weight: 600; background: var(--soft); }
@media (max-width: 40rem) { th, td { padding: .3rem; } }
td.own { background: var(--mark); font-weight: 600; }
td small { opacity: .65; }
img { max-width: 100%; height: auto; background: white; }
figure { margin: 1.2rem 0; } figcaption, .note { font-size: .85rem; opacity: .8; }
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table in HTML or Markdown.

    Attributes:
        head: names of the columns.
        rows: texts of the cells, row by row.
        words: number of columns, from the left, that hold words. The others hold numbers.
        strong: indices of the highlighted rows.
        grouped: number of columns, from the left, that HTML shows in a separate line above the
            rows that share them.
        bars: HTML of a column after the words, one cell per row. Markdown leaves it out.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    strong: Collection[int] = ()
    grouped: int = 0
    bars: Sequence[str] | None = None

    def html(self) -> str:
        """Return the table in HTML. It scrolls sideways if it is too wide."""
        bars = [""] * len(self.rows) if self.bars is None else self.bars
        lines = [f"<tr>{self._cells('th', self.head, '&nbsp;' if self.bars else '')}</tr>"]
        group: Sequence[str] = [""] * self.grouped
        for k, (row, bar) in enumerate(zip(self.rows, bars, strict=True)):
            if row[: self.grouped] != group:
                group = row[: self.grouped]
                told = html.escape(", ".join(group))
                width = len(row) - self.grouped
                lines.append(f'<tr class="group"><th colspan="{width}">{told}</th></tr>')
            mark = ' class="strong"' if k in self.strong else ""
            lines.append(f"<tr{mark}>{self._cells('td', row, bar)}</tr>")
        return f'<div class="scroll"><table>{"".join(lines)}</table></div>'

    def _cells(self, tag: str, row: Sequence[str], bar: str) -> str:
        cells = [html.escape(cell) for cell in row]
        words = [f'<{tag} class="words">{c}</{tag}>' for c in cells[self.grouped : self.words]]
        middle = [f"<{tag}>{bar}</{tag}>"] if bar else []
        numbers = [f"<{tag}>{c}</{tag}>" for c in cells[self.words :]]
        return "".join([*words, *middle, *numbers])

    def markdown(self) -> str:
        """Return the table in Markdown, with highlighted rows in bold."""
        numbers = len(self.head) - self.words
        lines = [list(map(markdown, self.head)), ["---"] * self.words + ["---:"] * numbers]
        for k, row in enumerate(self.rows):
            cells = map(markdown, row)
            lines.append([f"**{c}**" if k in self.strong and c else c for c in cells])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(text: str) -> str:
    """Escape a text for Markdown, in one line."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def picture(path: Path, caption: str) -> str:
    """Return a PNG as HTML inside the page, with a caption."""
    content = base64.b64encode(path.read_bytes()).decode()
    told = html.escape(caption)
    return (
        f'<figure><img alt="{told}" src="data:image/png;base64,{content}">'
        f"<figcaption>{told}</figcaption></figure>"
    )


def page(title: str, body: str, style: str = "") -> str:
    """Return a page from the HTML of its body."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def write_text(path: Path, content: str) -> None:
    """Write a text atomically. File names that are not UTF-8 are escaped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")

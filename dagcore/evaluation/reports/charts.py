"""Small charts in SVG and HTML. They adopt the colours of their page."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 34, 12, 10, 42  # margins
LETTER = 8  # maximum width of a letter
COLOURS = 8
DASHES = ("", "7 4", "2 3")

STYLE = """
:root { --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b8558a; --c4: #c98a00; --c5: #3a9ad9;
  --c6: #7a5195; --c7: #707070; }
@media (prefers-color-scheme: dark) { :root { --c0: #4aa8e8; --c1: #ff8a4c; --c2: #2fc79a;
  --c3: #e79bc4; --c4: #ffc04d; --c5: #8fd0f7; --c6: #b48fd6; --c7: #a8a8a8; } }
.charts { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.charts figure { margin: .6rem 0; max-width: 30rem; } svg { width: 100%; height: auto; }
svg text { font-size: 13px; fill: currentColor; } svg .axis { stroke: var(--line); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.band { fill: none; stroke: currentColor; stroke-width: 9; opacity: .22; stroke-linejoin: round;
  stroke-linecap: round; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin: .6rem 0; }
.legend i { display: inline-block; width: 1.8em; margin-right: .5em; vertical-align: .25em; }
.track { display: block; position: relative; width: 16rem; height: .8rem;
  background: var(--soft); }
.track i { position: absolute; top: 0; bottom: 0; left: 0; background: var(--c0); }
.stack { display: flex; width: 16rem; height: .8rem; }
@media (max-width: 40rem) { .track, .stack { width: 6rem; } }
"""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: name of the line.
        points: points (x, y), with y in percent.
        style: index of the colour and the dashes. None draws a broad band behind the other lines.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int | None = None


def line_chart(
    title: str, lines: Sequence[Line], ticks: Sequence[tuple[float, str]], axis: str
) -> str:
    """Return a line chart from 0 to 100 percent. The ticks of the x axis are (x, label)."""
    low, high = min(x for x, _ in ticks), max(x for x, _ in ticks)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - low) / (high - low or 1)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / 100

    parts = []
    for percent in range(0, 101, 20):
        y = down(percent)
        parts.append(
            f'<path class="axis" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>'
        )
    for at, label in _apart([(across(x), label) for x, label in ticks]):
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{html.escape(label)}</text>"
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{html.escape(axis)}</text>"
    )
    for line in sorted(lines, key=lambda line: line.style is not None):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line.points)
        look = 'class="band"' if line.style is None else f'class="curve" {_stroke(line.style)}'
        parts.append(f'<polyline {look} points="{path}"/>')
        if line.style is None:
            continue
        for x, y in line.points:
            told = html.escape(f"{line.name}: {y:.2f} %")
            parts.append(
                f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" '
                f'fill="{_colour(line.style)}"><title>{told}</title></circle>'
            )
    told = html.escape(title)
    return (
        f'<figure><figcaption>{told}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{told}">{"".join(parts)}</svg></figure>'
    )


def _apart(labels: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return labels and their places, without those that overlap the last or an earlier one."""
    spans = []
    for at, label in labels:
        half = LETTER * (len(label) + 1) / 2
        spans.append((min(max(at, half), WIDTH - half), half, label))
    *inner, last = spans
    kept = inner[:1]
    for one in inner[1:]:
        if all(abs(one[0] - other[0]) >= one[1] + other[1] for other in (kept[-1], last)):
            kept.append(one)
    return [(at, label) for at, _, label in (*kept, last)]


def _colour(style: int) -> str:
    return f"var(--c{style % COLOURS})"


def _dashes(style: int) -> str:
    return DASHES[style // COLOURS % len(DASHES)]


def _stroke(style: int) -> str:
    dashes = _dashes(style)
    return f'style="stroke:{_colour(style)}{dashes and f";stroke-dasharray:{dashes}"}"'


def legend(names: Sequence[tuple[str, int | None]]) -> str:
    """Return a legend for names with the styles of their lines."""
    items = []
    for name, style in names:
        look = "height:9px;background:currentColor;opacity:.22;vertical-align:0"
        if style is not None:
            border = ("solid", "dashed", "dotted")[DASHES.index(_dashes(style))]
            look = f"border-top:3px {border} {_colour(style)}"
        items.append(f'<span><i style="{look}"></i>{html.escape(name)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def nested_bar(values: Sequence[float | None]) -> str:
    """Return bars in percent over one another, from pale for the first to full for the last."""
    bars = [(value, (k + 1) / len(values)) for k, value in enumerate(values) if value is not None]
    longest_first = sorted(bars, key=lambda bar: -bar[0])
    return (
        '<span class="track">'
        + "".join(f'<i style="width:{v:.2f}%;opacity:{o:.2f}"></i>' for v, o in longest_first)
        + "</span>"
    )


def stacked_bar(counts: Sequence[tuple[int, int]], of: int) -> str:
    """Return counts as a stacked bar, each with the style of its colour. `of` fills the width."""
    parts = [
        f'<i style="width:{100 * count / of:.2f}%;background:{_colour(style)}"></i>'
        for count, style in counts
        if count
    ]
    return f'<span class="stack">{"".join(parts)}</span>'

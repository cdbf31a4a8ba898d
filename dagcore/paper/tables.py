"""The paper's three tables: networks attacked by their own and by others' perturbations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.progress import Progress
from ..files import atomic_write
from ..info import versions
from . import published
from .cells import Cell, measure_cells
from .work import Attack, Setup, make_perturbations

SOURCES = {
    "r1": "FR-ZF-07",
    "r2": "FR-ZF-0712",
    "r3": "FR-VGG-07",
    "r4": "FR-VGG-0712",
    "r5": "FCN-Alex",
    "r6": "FCN-Alex*",
    "r7": "FCN-VGG",
    "r8": "FCN-VGG*",
}
PERMUTED = " (permuted)"
JOINT = "joint "
UNIVERSAL = "universal "


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper: its columns, and its own numbers row by row."""

    name: str
    networks: tuple[str, ...]
    published: Mapping[str, Sequence[float]]
    further: tuple[str, ...] = ()
    """Rows that the paper does not have."""

    @property
    def rows(self) -> list[str]:
        """All rows: the paper's, then the others."""
        return [*self.published, *self.further]


TABLES = {
    "segmentation": Table(
        "segmentation",
        ("FCN-Alex", "FCN-Alex*", "FCN-VGG", "FCN-VGG*", "DL-VGG", "DL-RN101"),
        published.SEGMENTATION,
        ("joint r5 + r7", "joint r6 + r8", "universal r7"),
    ),
    "detection": Table(
        "detection",
        ("FR-ZF-07", "FR-ZF-0712", "FR-VGG-07", "FR-VGG-0712", "R-FCN-RN50", "R-FCN-RN101"),
        published.DETECTION,
        ("joint r1 + r3", "joint r2 + r4"),
    ),
    "cross-task": Table(
        "cross-task",
        ("FR-ZF-07", "FR-VGG-07", "FCN-Alex", "FCN-VGG", "R-FCN-RN101"),
        published.CROSS_TASK,
        (
            "joint r1 + r3 + r5",
            "joint r1 + r3 + r7",
            "joint r1 + r5 + r7",
            "joint r3 + r5 + r7",
            "joint r1 + r3 + r5 + r7",
            "universal r7",
        ),
    ),
}


def members(row: str) -> list[str]:
    """The perturbations that a row adds up: "r5 + r7 (permuted)" -> ["r5", "r7"].

    A joint row has one perturbation, made for the networks of all of them at once; a universal one
    has one for all images.
    """
    plain = row.removesuffix(PERMUTED).removeprefix(JOINT).removeprefix(UNIVERSAL)
    return [] if row == "none" else plain.split(" + ")


def attacks(row: str) -> list[Attack]:
    """The attacks whose perturbations a row adds up."""
    networks = [SOURCES[r] for r in members(row)]
    if row.startswith(UNIVERSAL):
        return [Attack.of(*networks, max_iter=1500, universal=256, epsilon=20 / 255)]
    return [Attack.of(*networks)] if row.startswith(JOINT) else [Attack.of(n) for n in networks]


def sources(tables: Sequence[Table]) -> list[Attack]:
    """The attacks that some tables need, each once."""
    return list({one: None for table in tables for row in table.rows for one in attacks(row)})


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """A table as it was measured."""

    table: Table
    rows: dict[str, dict[str, float]]
    """For each row the score of each network, in percent."""

    def members(self, row: str) -> list[str]:
        """The networks that a row's perturbation was made for, and not permuted since."""
        return [] if row.endswith(PERMUTED) else [SOURCES[r] for r in members(row)]

    def record(self, setup: Setup) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "table": self.table.name,
            "rows": [{"perturbation": row, "scores": own} for row, own in self.rows.items()],
            "settings": {"images": setup.images, **setup.made_with(self.table.networks)},
            "versions": versions(),
        }

    def markdown(self) -> str:
        """The table, the paper's own numbers in brackets."""
        networks = self.table.networks
        lines = [
            "| perturbation | " + " | ".join(networks) + " |",
            "|---|" + "---:|" * len(networks),
        ]
        for row, own in self.rows.items():
            paper = self.table.published.get(row)
            cells = [f"{own[name]:.1f}" for name in networks]
            if paper is not None:
                cells = [f"{c} ({p:.1f})" for c, p in zip(cells, paper, strict=True)]
            lines.append(f"| {named(row)} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def write(self, setup: Setup) -> list[Path]:
        """TABLE.json and TABLE.md, each whole or not at all."""
        setup.out.mkdir(parents=True, exist_ok=True)
        paths = [setup.out / f"table-{self.table.name}.{ending}" for ending in ("json", "md")]
        with atomic_write(paths[0]) as temporary:
            temporary.write_text(json.dumps(self.record(setup), indent=2) + "\n")
        with atomic_write(paths[1]) as temporary:
            temporary.write_text(self.markdown())
        return paths


def named(row: str) -> str:
    """A row with the network that a single perturbation is of."""
    source = row.removeprefix(UNIVERSAL)
    return f"{row}, {SOURCES[source]}" if source in SOURCES else row


def measure(setup: Setup, name: str, counter: Progress) -> Scores:
    """Make what a table needs and is not there yet, and measure every cell."""
    table = TABLES[name]
    make_perturbations(setup, sources([table]), counter)
    cells = {(row, network): cell(row, network) for row in table.rows for network in table.networks}
    scores = measure_cells(setup, list(cells.values()), counter, f"{name} table")
    return Scores(
        table,
        {row: {n: scores[cells[row, n]] for n in table.networks} for row in table.rows},
    )


def cell(row: str, network: str) -> Cell:
    """What a row's score of a network is measured on."""
    return Cell(network, tuple(attacks(row)), row.endswith(PERMUTED))

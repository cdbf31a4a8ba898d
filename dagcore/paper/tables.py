"""The paper's three tables: networks under their own and other networks' perturbations."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.progress import Progress
from . import published
from .cells import Cell, measure_cells
from .reports import Entry, Report
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


# Rows with each network's own perturbations, made by attacks that the paper does not have.
OWN: dict[str, dict[str, Any]] = {
    "own, margin 2": {"margin": 2.0},
    "own, in 8 bits": {"levels": 256},
    "own, margin 2, in 8 bits": {"levels": 256, "margin": 2.0},
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper."""

    name: str
    networks: tuple[str, ...]
    """The columns."""
    published: Mapping[str, Sequence[float]]
    """The paper's numbers, row by row."""
    further: tuple[str, ...] = ()
    """Rows that the paper does not have."""

    @property
    def rows(self) -> list[str]:
        """All rows: the paper's, then the further ones."""
        return [*self.published, *self.further]


TABLES = (
    Table(
        "segmentation",
        ("FCN-Alex", "FCN-Alex*", "FCN-VGG", "FCN-VGG*", "DL-VGG", "DL-RN101"),
        published.SEGMENTATION,
        ("joint r5 + r7", "joint r6 + r8", "universal r7", *OWN),
    ),
    Table(
        "detection",
        ("FR-ZF-07", "FR-ZF-0712", "FR-VGG-07", "FR-VGG-0712", "R-FCN-RN50", "R-FCN-RN101"),
        published.DETECTION,
        ("joint r1 + r3", "joint r2 + r4", *OWN),
    ),
    Table(
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
            *OWN,
        ),
    ),
)


def parse(row: str) -> tuple[str, list[str]]:
    """Return the kind of perturbation that a row adds, and the networks that it was made for.

    The kinds are "none"; "own", each network's own by an attack of `OWN`; "single", that of one
    network; "sum", the sum of those of several networks; "permuted", such a sum with rows and
    columns permuted; "joint", one made for several networks at once; and "universal", one for all
    images.
    """
    if row == "none":
        return row, []
    if row in OWN:
        return "own", []
    names, kind = row, "sum" if "+" in row else "single"
    if row.endswith(" (permuted)"):
        names, kind = row.removesuffix(" (permuted)"), "permuted"
    elif row.startswith(("joint ", "universal ")):
        kind, names = row.split(" ", 1)
    return kind, [SOURCES[name] for name in names.split(" + ")]


def attacks(setup: Setup, row: str, network: str) -> list[Attack]:
    """Return the attacks whose perturbations a row adds to the images of a network."""
    kind, networks = parse(row)
    if kind == "own":
        return [setup.attack(network, **OWN[row])]
    if kind == "universal":
        return [setup.attack(*networks, max_iter=1500, universal=256, epsilon=20 / 255)]
    if kind == "joint":
        return [setup.attack(*networks)]
    return [setup.attack(network) for network in networks]


def sources(setup: Setup, table: Table) -> list[Attack]:
    """Return the attacks that a table needs, without repeats."""
    cells = itertools.product(table.rows, table.networks)
    return list(dict.fromkeys(one for cell in cells for one in attacks(setup, *cell)))


def cell(setup: Setup, row: str, network: str) -> Cell:
    """Return the cell of a row and a network."""
    return Cell(network, tuple(attacks(setup, row, network)), parse(row)[0] == "permuted")


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The measured scores of a table."""

    table: Table
    rows: dict[str, dict[str, float]]
    """Score of each network in each row, in percent."""

    def report(self) -> Report:
        """Return the table with the paper's numbers, marking networks that a row was made for."""
        networks, entries = self.table.networks, []
        for row, own in self.rows.items():
            kind, attacked = parse(row)
            named = f"{row}, {attacked[0]}" if kind in ("single", "universal") else row
            paper = [f"{p:.1f}" for p in self.table.published.get(row, ())]
            line = [Entry(named)]
            for network, beside in zip(networks, paper or [""] * len(networks), strict=True):
                marked = kind == "own" or (kind != "permuted" and network in attacked)
                line.append(Entry(f"{own[network]:.1f}", beside, marked))
            entries.append(line)
        return Report(
            name=f"table-{self.table.name}",
            title=self.table.name.capitalize(),
            networks=networks,
            rows=[{"perturbation": row, "scores": own} for row, own in self.rows.items()],
            head=("perturbation", *networks),
            entries=entries,
        )


def measure(setup: Setup, table: Table, counter: Progress) -> Scores:
    """Make the perturbations that a table still lacks, and measure every cell."""
    make_perturbations(setup, sources(setup, table), counter)
    cells = {row: {n: cell(setup, row, n) for n in table.networks} for row in table.rows}
    every = [one for own in cells.values() for one in own.values()]
    scores = measure_cells(setup, every, counter, f"{table.name} table")
    return Scores(
        table,
        {row: {n: scores[one] for n, one in own.items()} for row, own in cells.items()},
    )

"""The paper's three tables: networks attacked by their own and by others' perturbations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import whole
from ..info import versions
from ..perturbation import combine, permute
from ..report import Counter
from ..zoo import find
from . import published
from .work import (
    Attack,
    Setup,
    generator_of,
    make_perturbations,
    read,
    run,
    score,
    settings_of,
)

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


def added(setup: Setup, row: str) -> Iterator[tuple[str | None, Tensor]]:
    """For each image its key (None: for any), and what a row adds to it, (3, H, W)."""
    for k in range(setup.images):
        records = [read(setup, attack, k) for attack in attacks(row)]
        total = combine(*(record.perturbation for record in records))
        if row.endswith(PERMUTED):
            total = permute(total[None], generator_of(setup, k, 1))[0]
        yield records[0].key, total


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
        with whole(paths[0]) as temporary:
            temporary.write_text(json.dumps(self.record(setup), indent=2) + "\n")
        with whole(paths[1]) as temporary:
            temporary.write_text(self.markdown())
        return paths


def named(row: str) -> str:
    """A row with the network that a single perturbation is of."""
    source = row.removeprefix(UNIVERSAL)
    return f"{row}, {SOURCES[source]}" if source in SOURCES else row


def measure(setup: Setup, name: str, counter: Counter) -> Scores:
    """Make what a table needs and is not there yet, and measure every cell."""
    table = TABLES[name]
    make_perturbations(setup, sources([table]), counter)
    cells = [(network, row) for network in table.networks for row in table.rows]
    missing = [cell for cell in cells if known_cell(setup, *cell) is None]
    counter.add(f"{name} table", len(cells), done=len(cells) - len(missing))
    for _ in run(setup, measure_cell, missing):
        counter.advance(f"{name} table")
    scores: dict[str, dict[str, float]] = {row: {} for row in table.rows}
    for network, row in cells:
        score_there = known_cell(setup, network, row)
        assert score_there is not None
        scores[row][network] = score_there
    return Scores(table, scores)


def made_of(setup: Setup, network: str, row: str) -> dict[str, Any]:
    """What a cell's score follows from."""
    return {
        **setup.made_with([network]),
        "images": setup.images,
        "perturbations": [settings_of(setup, attack) for attack in attacks(row)],
    }


def known_cell(setup: Setup, network: str, row: str) -> float | None:
    """A score that is kept, if it still follows from what there is."""
    path = cell_path(setup, network, row)
    if not path.is_file():
        return None
    known = json.loads(path.read_text())
    return float(known["score"]) if known.get("of") == made_of(setup, network, row) else None


def cell_path(setup: Setup, network: str, row: str) -> Path:
    """The file that keeps the score of a network under a row's perturbation."""
    name = row.replace(" + ", "+").replace(PERMUTED, "-permuted")
    return setup.out / "scores" / str(setup.images) / find(network).slug / f"{name}.json"


def measure_cell(setup: Setup, network: str, row: str) -> None:
    """Measure a network under a row's perturbation, and keep the score."""
    known = score(setup, network, None if row == "none" else added(setup, row))
    path = cell_path(setup, network, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        kept = {"score": known.mean, "per_class": known.per_class}
        temporary.write_text(json.dumps({**kept, "of": made_of(setup, network, row)}) + "\n")

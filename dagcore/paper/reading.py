"""Findings from the tables, computed in the same way from their numbers and from the paper's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from statistics import fmean

from .tables import Scores, Table, parse

Rows = Mapping[str, Mapping[str, float]]

# Distances of a network from those that a perturbation was made for: the slides' levels.
ITSELF, TRAINING_SET, ARCHITECTURE, TASK = ALL = range(4)
ELSEWHERE = (ARCHITECTURE, TASK)

# Name, kind of row, distances, and a description of the cells that are averaged.
FINDINGS = (
    ("White box", "single", [ITSELF], "each network under its own perturbation"),
    ("Across training sets", "single", [TRAINING_SET], "the architecture trained on the other set"),
    ("Across architectures", "single", [ARCHITECTURE], "other networks of the same task"),
    ("Across tasks", "single", [TASK], "detectors' perturbations on segmentation, and the reverse"),
    ("Ensembles, members", "sum", [ITSELF], "sums, on the networks that they are of"),
    ("Ensembles, others", "sum", ELSEWHERE, "sums, on networks of other architectures"),
    ("Joint ensembles, members", "joint", [ITSELF], "one perturbation for several, on these"),
    ("Joint ensembles, others", "joint", ELSEWHERE, "on networks of other architectures"),
    ("Universal, its network", "universal", [ITSELF], "one for all images, made on others"),
    ("Universal, others", "universal", ELSEWHERE, "on networks of other architectures"),
    ("Permuted", "permuted", ALL, "sums with rows and columns permuted"),
)
LEVELS = [what for what, kind, *_ in FINDINGS if kind == "single"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A finding from the tables: the share of the clean score that is left, in percent."""

    what: str
    """Name of the finding."""
    cells: str
    """Description of the cells that are averaged."""
    measured: float
    paper: float | None
    """The share in the paper's tables; None if they do not have these cells."""
    count: int
    """Number of cells."""

    def __str__(self) -> str:
        paper = "" if self.paper is None else f"; in the paper {self.paper:.0f} %"
        return (
            f"{self.what} ({self.cells}): {self.measured:.0f} % of the clean score is left, mean "
            f"of {self.count} cell{'s' * (self.count > 1)}{paper}."
        )


def family(network: str) -> str:
    """Return the family of a network, whose members differ in their training sets only."""
    return network.removesuffix("*").removesuffix("-0712").removesuffix("-07")


def is_detector(network: str) -> bool:
    """Return whether a network of the tables is a detector."""
    return network.startswith(("FR-", "R-FCN"))


def distance(network: str, attacked: Sequence[str]) -> int:
    """Return the distance of a network from the nearest one that a perturbation was made for."""
    if network in attacked:
        return ITSELF
    if family(network) in map(family, attacked):
        return TRAINING_SET
    return ARCHITECTURE if is_detector(network) in map(is_detector, attacked) else TASK


def published_rows(table: Table) -> Rows:
    """Return the paper's numbers of a table in the form of the measured ones."""
    return {
        row: dict(zip(table.networks, scores, strict=True))
        for row, scores in table.published.items()
    }


def shares(tables: Iterable[Rows], kind: str, distances: Collection[int]) -> Iterator[float]:
    """Yield score / clean score, in percent, for the cells of one kind of row at some distances."""
    seen = set()
    for rows in tables:
        for row, scores in rows.items():
            own, attacked = parse(row)
            for network, score in scores.items():
                wanted = own == kind and distance(network, attacked) in distances
                clean = rows["none"][network]
                cell = (row, network, score, clean)  # a cell that two tables share counts once
                if wanted and clean > 0 and cell not in seen:
                    seen.add(cell)
                    yield 100 * score / clean


def findings(measured: Iterable[Scores]) -> list[Finding]:
    """Return the share of the clean score left by each kind of perturbation, and the paper's."""
    measured = list(measured)
    paper = [published_rows(scores.table) for scores in measured]
    found = []
    for what, kind, distances, cells in FINDINGS:
        here = list(shares([scores.rows for scores in measured], kind, distances))
        there = list(shares(paper, kind, distances))
        if here:
            known = fmean(there) if there else None
            found.append(Finding(what, cells, fmean(here), known, len(here)))
    return found


def weaker(tables: Iterable[Rows]) -> list[str]:
    """Describe where a joint ensemble leaves a higher score than the sum of its members' own."""
    lines = []
    for rows in tables:
        for row, joint in rows.items():
            kind, networks = parse(row)
            summed = rows.get(row.removeprefix("joint "))
            if kind != "joint" or summed is None:
                continue
            both = joint, summed
            compared = {network: tuple(own[network] for own in both) for network in networks}
            others = [network for network in joint if network not in networks]
            if others:
                means = tuple(fmean(own[n] for n in others) for own in both)
                compared["the other networks in the mean"] = means
            lines += [
                f"{row} leaves {one:.1f} on {where}, the sum {other:.1f}."
                for where, (one, other) in compared.items()
                if one > other
            ]
    return lines


def text(found: Iterable[Finding]) -> list[str]:
    """Return the findings as sentences."""
    found = list(found)
    lines = [str(one) for one in found]
    levels = [one for one in found if one.what in LEVELS]
    for source, words in (("measured", "here"), ("paper", "in the paper")):
        values = [getattr(one, source) for one in levels]
        rising = all(round(a) < round(b) for a, b in itertools.pairwise(values))
        verdict = (
            "each step away from the attacked network leaves more"
            if rising
            else "the steps away from the attacked network do not rise in order"
        )
        told = [f"{one.what.lower()} {v:.0f} %" for one, v in zip(levels, values, strict=True)]
        if len(levels) > 1:
            lines.append(
                f"The slides' levels of difficulty, {words}: {', '.join(told)}: {verdict}."
            )
    return lines

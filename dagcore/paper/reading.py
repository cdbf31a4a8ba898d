"""What the tables say, computed from their numbers and from the paper's alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from statistics import fmean

from .tables import JOINT, PERMUTED, SOURCES, UNIVERSAL, Scores, Table, members

Rows = Mapping[str, Mapping[str, float]]

# How far a network is from those that a perturbation was made for: the slides' levels.
ITSELF, TRAINING_SET, ARCHITECTURE, TASK = ALL = range(4)
ELSEWHERE = (ARCHITECTURE, TASK)

# Name, what it is the mean of, which rows, and at which distances.
FINDINGS = (
    ("White box", "each network under its own perturbation", "single", [ITSELF]),
    (
        "Across training sets",
        "perturbations of the same architecture trained on the other set",
        "single",
        [TRAINING_SET],
    ),
    (
        "Across architectures",
        "perturbations of other networks of the same task",
        "single",
        [ARCHITECTURE],
    ),
    ("Across tasks", "detectors' perturbations on segmentation, and the reverse", "single", [TASK]),
    ("Ensembles, members", "sums, on the networks that they are of", "sum", [ITSELF]),
    (
        "Ensembles, others",
        "sums, on networks of which no member shares the architecture",
        "sum",
        ELSEWHERE,
    ),
    (
        "Joint ensembles, members",
        "one perturbation for several networks, on these",
        "joint",
        [ITSELF],
    ),
    (
        "Joint ensembles, others",
        "on networks of which no member shares the architecture",
        "joint",
        ELSEWHERE,
    ),
    (
        "Universal, its network",
        "one perturbation for all images, made on others",
        "universal",
        [ITSELF],
    ),
    ("Universal, others", "on networks of another architecture", "universal", ELSEWHERE),
    ("Permuted", "sums with rows and columns permuted", "permuted", ALL),
)
LEVELS = [what for what, _, kind, _ in FINDINGS if kind == "single"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to read off the tables: the share of the clean score that is left, in percent."""

    what: str
    cells: str
    """Which cells it is the mean of."""
    measured: float
    paper: float | None
    """None for what the paper does not have."""
    count: int

    def __str__(self) -> str:
        paper = "" if self.paper is None else f"; in the paper {self.paper:.0f} %"
        return (
            f"{self.what} ({self.cells}): {self.measured:.0f} % of the clean score is left, mean "
            f"of {self.count} cells{paper}."
        )


def kind_of(row: str) -> str:
    """Which kind of perturbation a row adds."""
    if row == "none":
        return "none"
    if row.endswith(PERMUTED):
        return "permuted"
    for prefix in (JOINT, UNIVERSAL):
        if row.startswith(prefix):
            return prefix.strip()
    return "single" if row in SOURCES else "sum"


def family(network: str) -> str:
    """Networks of one family differ in their training sets only."""
    return network.removesuffix("*").removesuffix("-0712").removesuffix("-07")


def is_detector(network: str) -> bool:
    """Whether a network of the tables detects."""
    return network.startswith(("FR-", "R-FCN"))


def distance(row: str, network: str) -> int:
    """How far a network is from the nearest of those that a row's perturbation was made for."""
    attacked = [SOURCES[r] for r in members(row)]
    if network in attacked:
        return ITSELF
    if family(network) in map(family, attacked):
        return TRAINING_SET
    return ARCHITECTURE if is_detector(network) in map(is_detector, attacked) else TASK


def published_rows(table: Table) -> Rows:
    """The paper's table, as the measured ones are."""
    return {
        row: dict(zip(table.networks, scores, strict=True))
        for row, scores in table.published.items()
    }


def shares(tables: Iterable[Rows], kind: str, distances: Collection[int]) -> Iterator[float]:
    """score / clean score in percent, of the cells of a kind of row at some distances."""
    seen = set()
    for rows in tables:
        for row, scores in rows.items():
            for network, score in scores.items():
                wanted = kind_of(row) == kind and distance(row, network) in distances
                clean = rows["none"][network]
                cell = (row, network, score, clean)  # one that two tables share counts once
                if wanted and clean > 0 and cell not in seen:
                    seen.add(cell)
                    yield 100 * score / clean


def findings(measured: Iterable[Scores]) -> list[Finding]:
    """The share of the clean score that each kind of perturbation leaves, here and in the paper."""
    measured = list(measured)
    paper = [published_rows(scores.table) for scores in measured]
    found = []
    for what, cells, kind, distances in FINDINGS:
        here = list(shares([scores.rows for scores in measured], kind, distances))
        there = list(shares(paper, kind, distances))
        if here:
            known = fmean(there) if there else None
            found.append(Finding(what, cells, fmean(here), known, len(here)))
    return found


def weaker(tables: Iterable[Rows]) -> list[str]:
    """Where a joint ensemble leaves more than the sum of its members' own perturbations."""
    lines = []
    for rows in tables:
        for row in [row for row in rows if row.startswith(JOINT) and row[len(JOINT) :] in rows]:
            both = rows[row], rows[row.removeprefix(JOINT)]
            networks = [SOURCES[r] for r in members(row)]
            compared = {network: tuple(own[network] for own in both) for network in networks}
            others = [network for network in both[0] if network not in networks]
            if others:
                means = tuple(fmean(own[n] for n in others) for own in both)
                compared["the other networks in the mean"] = means
            lines += [
                f"{row} leaves {joint:.1f} on {where}, the sum {summed:.1f}."
                for where, (joint, summed) in compared.items()
                if joint > summed
            ]
    return lines


def text(found: Iterable[Finding]) -> list[str]:
    """The findings in sentences."""
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

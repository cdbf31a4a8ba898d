"""What the tables say, computed from their numbers and from the paper's alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from .tables import PERMUTED, SOURCES, TABLES, Table, members

Rows = Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to read off the tables: the share of the clean score that is left, in percent."""

    what: str
    cells: str
    """Which cells it is the mean of."""
    measured: float
    paper: float
    count: int


def family(network: str) -> str:
    """Networks of one family differ in their training sets only."""
    return network.removesuffix("*").removesuffix("-0712").removesuffix("-07")


def is_detector(network: str) -> bool:
    """Whether a network of the tables detects."""
    return network.startswith(("FR-", "R-FCN"))


def published_rows(table: Table) -> Rows:
    """The paper's table, as the measured ones are."""
    return {
        row: dict(zip(table.networks, scores, strict=True))
        for row, scores in table.published.items()
    }


def shares(tables: Mapping[str, Rows], wanted: Callable[[str, str], bool]) -> Iterator[float]:
    """score / clean score in percent, of the cells (row, network) that are wanted."""
    for rows in tables.values():
        for row, scores in rows.items():
            if row not in TABLES_ROWS:
                continue
            for network, score in scores.items():
                clean = rows["none"][network]
                if row != "none" and clean and wanted(row, network):
                    yield 100 * score / clean


TABLES_ROWS = {row for table in TABLES.values() for row in table.published}


def _single(row: str) -> str | None:
    return SOURCES.get(row)


def _sum(row: str) -> list[str]:
    """The members of an ensemble that is not permuted."""
    found = members(row)
    return [SOURCES[r] for r in found] if len(found) > 1 and PERMUTED not in row else []


def _across_sets(row: str, network: str) -> bool:
    source = _single(row)
    return source is not None and source != network and family(source) == family(network)


def _across_networks(row: str, network: str) -> bool:
    source = _single(row)
    return (
        source is not None
        and family(source) != family(network)
        and is_detector(source) == is_detector(network)
    )


def _across_tasks(row: str, network: str) -> bool:
    source = _single(row)
    return source is not None and is_detector(source) != is_detector(network)


def _near(row: str, network: str) -> bool:
    return any(family(member) == family(network) for member in _sum(row))


KINDS: tuple[tuple[str, str, Callable[[str, str], bool]], ...] = (
    ("White box", "each network under its own perturbation", lambda r, n: _single(r) == n),
    (
        "Across training sets",
        "perturbations of the same architecture trained on the other set",
        _across_sets,
    ),
    ("Across architectures", "perturbations of other networks of the same task", _across_networks),
    ("Across tasks", "detectors' perturbations on segmentation, and the reverse", _across_tasks),
    ("Ensembles, members", "sums, on the networks that they are of", lambda r, n: n in _sum(r)),
    (
        "Ensembles, others",
        "sums, on networks of which no member shares the architecture",
        lambda r, n: bool(_sum(r)) and not _near(r, n),
    ),
    ("Permuted", "sums with rows and columns permuted", lambda r, n: r.endswith(PERMUTED)),
)


def findings(tables: Mapping[str, Rows]) -> list[Finding]:
    """The share of the clean score that each kind of perturbation leaves, here and in the paper."""
    paper = {name: published_rows(TABLES[name]) for name in tables}
    found = []
    for what, cells, wanted in KINDS:
        here, there = list(shares(tables, wanted)), list(shares(paper, wanted))
        if here and there:
            found.append(
                Finding(what, cells, sum(here) / len(here), sum(there) / len(there), len(here))
            )
    return found


def text(found: list[Finding]) -> list[str]:
    """The findings in sentences."""
    by = {one.what: one for one in found}
    lines = [
        f"{one.what} ({one.cells}): {one.measured:.0f} % of the clean score is left, mean of "
        f"{one.count} cells; in the paper {one.paper:.0f} %."
        for one in found
    ]
    order = ["White box", "Across training sets", "Across architectures", "Across tasks"]
    known = [by[what] for what in order if what in by]
    for source, words in (("measured", "here"), ("paper", "in the paper")):
        values = [getattr(one, source) for one in known]
        rising = values == sorted(values)
        chain = ", ".join(f"{one.what.lower()} {getattr(one, source):.0f} %" for one in known)
        verdict = (
            "each step away from the attacked network leaves more"
            if rising
            else ("the steps away from the attacked network do not rise in order")
        )
        if len(known) > 1:
            lines.append(f"The slides' levels of difficulty, {words}: {chain}: {verdict}.")
    return lines

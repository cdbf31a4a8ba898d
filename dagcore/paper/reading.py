"""What the tables say, computed from their numbers and from the paper's alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

from .tables import JOINT, PERMUTED, SOURCES, TABLES, UNIVERSAL, Table, members

Rows = Mapping[str, Mapping[str, float]]


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
    seen = set()
    for rows in tables.values():
        for row, scores in rows.items():
            for network, score in scores.items():
                clean = rows["none"][network]
                cell = (row, network, score, clean)  # one that two tables share counts once
                if row != "none" and clean > 0 and cell not in seen and wanted(row, network):
                    seen.add(cell)
                    yield 100 * score / clean


def _single(row: str) -> str | None:
    return SOURCES.get(row)


def _sum(row: str) -> list[str]:
    """The members of a sum that is not permuted."""
    found = _made_for(row)
    plain = PERMUTED not in row and not row.startswith(JOINT)
    return found if len(found) > 1 and plain else []


def _made_for(row: str) -> list[str]:
    return [SOURCES[r] for r in members(row)]


def _joint(row: str) -> list[str]:
    """The networks of a joint ensemble."""
    return _made_for(row) if row.startswith(JOINT) else []


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


def _far(networks: list[str], network: str) -> bool:
    """Whether an ensemble has no network of the same architecture."""
    return bool(networks) and family(network) not in map(family, networks)


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
        lambda r, n: _far(_sum(r), n),
    ),
    (
        "Joint ensembles, members",
        "one perturbation for several networks, on these",
        lambda r, n: n in _joint(r),
    ),
    (
        "Joint ensembles, others",
        "on networks of which no member shares the architecture",
        lambda r, n: _far(_joint(r), n),
    ),
    (
        "Universal, its network",
        "one perturbation for all images, made on others",
        lambda r, n: r.startswith(UNIVERSAL) and n in _made_for(r),
    ),
    (
        "Universal, others",
        "on networks of another architecture",
        lambda r, n: r.startswith(UNIVERSAL) and _far(_made_for(r), n),
    ),
    ("Permuted", "sums with rows and columns permuted", lambda r, n: r.endswith(PERMUTED)),
)


def findings(tables: Mapping[str, Rows]) -> list[Finding]:
    """The share of the clean score that each kind of perturbation leaves, here and in the paper."""
    paper = {name: published_rows(TABLES[name]) for name in tables}
    found = []
    for what, cells, wanted in KINDS:
        here, there = list(shares(tables, wanted)), list(shares(paper, wanted))
        if here:
            known = sum(there) / len(there) if there else None
            found.append(Finding(what, cells, sum(here) / len(here), known, len(here)))
    return found


def weaker(tables: Mapping[str, Rows]) -> list[str]:
    """Where a joint ensemble leaves more than the sum of its members' own perturbations."""
    lines = []
    for rows in tables.values():
        for row, scores in rows.items():
            networks, summed = _joint(row), rows.get(row.removeprefix(JOINT))
            if not networks or summed is None:
                continue
            for network in networks:
                if scores[network] > summed[network]:
                    lines.append(
                        f"{row} leaves {scores[network]:.1f} on {network}, the sum "
                        f"{summed[network]:.1f}."
                    )
            others = [network for network in scores if network not in networks]
            means = [sum(own[n] for n in others) / max(1, len(others)) for own in (scores, summed)]
            if means[0] > means[1]:
                lines.append(
                    f"{row} leaves {means[0]:.1f} on the other networks in the mean, the sum "
                    f"{means[1]:.1f}."
                )
    return lines


def text(found: list[Finding]) -> list[str]:
    """The findings in sentences."""
    by = {one.what: one for one in found}
    lines = [
        f"{one.what} ({one.cells}): {one.measured:.0f} % of the clean score is left, mean of "
        f"{one.count} cells" + ("." if one.paper is None else f"; in the paper {one.paper:.0f} %.")
        for one in found
    ]
    order = ["White box", "Across training sets", "Across architectures", "Across tasks"]
    known = [by[what] for what in order if what in by]
    for source, words in (("measured", "here"), ("paper", "in the paper")):
        values = [getattr(one, source) for one in known]
        shown = [round(value) for value in values]
        rising = all(a < b for a, b in itertools.pairwise(shown))
        chain = ", ".join(f"{one.what.lower()} {getattr(one, source):.0f} %" for one in known)
        verdict = (
            "each step away from the attacked network leaves more"
            if rising
            else ("the steps away from the attacked network do not rise in order")
        )
        if len(known) > 1:
            lines.append(f"The slides' levels of difficulty, {words}: {chain}: {verdict}.")
    return lines

"""Scores of networks under perturbations, each measured once and kept in a file of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..evaluation.kept import keep_json, read_json
from ..evaluation.progress import Progress
from ..perturbation import combine, permute
from ..seeds import generator_of
from ..zoo import find
from .work import Attack, Setup, read, run, score, settings_of


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured: a network, on images to which perturbations are added."""

    network: str
    attacks: tuple[Attack, ...] = ()
    """Whose perturbations are added up; none: the clean images."""
    permuted: bool = False
    """Whether rows and columns of the sum are permuted."""

    def path(self, setup: Setup) -> Path:
        """The file that keeps its score."""
        name = ",".join(attack.folder for attack in self.attacks) or "clean"
        name += "-permuted" if self.permuted else ""
        return setup.out / "scores" / str(setup.images) / find(self.network).slug / f"{name}.json"

    def made_of(self, setup: Setup) -> dict[str, Any]:
        """What its score follows from."""
        return {
            **setup.made_with([self.network]),
            "images": setup.images,
            "perturbations": [settings_of(setup, attack) for attack in self.attacks],
        }


def measure_cells(
    setup: Setup, cells: Sequence[Cell], counter: Progress, what: str
) -> dict[Cell, float]:
    """The scores of some cells in percent, measured where they are not kept yet.

    The perturbations must be there.
    """
    missing = [cell for cell in dict.fromkeys(cells) if known(setup, cell) is None]
    counter.add(what, len(cells), done=len(cells) - len(missing))
    for _ in run(setup, measure_cell, [(cell,) for cell in missing]):
        counter.advance(what)
    found = {cell: known(setup, cell) for cell in cells}
    return {cell: score for cell, score in found.items() if score is not None}


def known(setup: Setup, cell: Cell) -> float | None:
    """A score that is kept, if it still follows from what there is."""
    kept = read_json(cell.path(setup), cell.made_of(setup))
    return None if kept is None else float(kept["score"])


def measure_cell(setup: Setup, cell: Cell) -> None:
    """Measure a cell, and keep its score."""
    in_8_bits = any(attack.levels for attack in cell.attacks)
    parts = added(setup, cell) if cell.attacks else None
    found = score(setup, cell.network, parts, in_8_bits=in_8_bits)
    kept = {"score": found.mean, "per_class": found.per_class}
    keep_json(cell.path(setup), kept, cell.made_of(setup))


def added(setup: Setup, cell: Cell) -> Iterator[tuple[str | None, Tensor]]:
    """For each image its key (None: for any), and what is added to it, (3, H, W)."""
    for k in range(setup.images):
        parts = [read(setup, attack, k) for attack in cell.attacks]
        total = combine(*(part.values for part in parts))
        if cell.permuted:
            total = permute(total[None], generator_of(setup.seed, 1, k))[0]
        yield parts[0].key, total

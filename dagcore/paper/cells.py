"""Scores of networks under perturbations, each measured once and kept in its own file."""

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
    """A measurement: a network on images to which perturbations are added."""

    network: str
    """Name of the network."""
    attacks: tuple[Attack, ...] = ()
    """Attacks whose perturbations are summed; none for clean images."""
    permuted: bool = False
    """Whether rows and columns of the sum are permuted."""

    def path(self, setup: Setup) -> Path:
        """Return the path of the file that keeps the score."""
        name = ",".join(attack.folder for attack in self.attacks) or "clean"
        name += "-permuted" if self.permuted else ""
        return setup.out / "scores" / str(setup.images) / find(self.network).slug / f"{name}.json"

    def made_of(self, setup: Setup) -> dict[str, Any]:
        """Return all that the score depends on."""
        return {
            **setup.made_with([self.network]),
            "images": setup.images,
            "perturbations": [settings_of(setup, attack) for attack in self.attacks],
        }


def measure_cells(
    setup: Setup, cells: Sequence[Cell], counter: Progress, what: str
) -> dict[Cell, float]:
    """Return the scores of cells in percent, measuring those that are not kept yet.

    The perturbations must exist.
    """
    missing = [cell for cell in dict.fromkeys(cells) if known(setup, cell) is None]
    counter.add(what, len(cells), done=len(cells) - len(missing))
    for _ in run(setup, measure_cell, [(cell,) for cell in missing]):
        counter.advance(what)
    found = {cell: known(setup, cell) for cell in cells}
    return {cell: score for cell, score in found.items() if score is not None}


def known(setup: Setup, cell: Cell) -> float | None:
    """Return the kept score of a cell, or None if there is none or it is out of date."""
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
    """Yield for each image its key (None: any image) and the sum (3, H, W) that is added to it."""
    for k in range(setup.images):
        parts = [read(setup, attack, k) for attack in cell.attacks]
        total = combine(*(part.values for part in parts))
        if cell.permuted:
            total = permute(total[None], generator_of(setup.seed, 1, k))[0]
        yield parts[0].key, total

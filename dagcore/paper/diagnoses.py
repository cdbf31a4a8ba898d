"""What the attacks themselves show: how dense targets must be, and how fast they are led astray."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .. import zoo
from ..errors import ArgumentError
from ..evaluation.kept import keep_json, read_json
from ..evaluation.progress import Progress
from ..files import atomic_write
from ..info import versions
from .cells import Cell, measure_cells
from .tables import SOURCES
from .work import Attack, Record, Setup, make_perturbations, read_all, seconds_of, settings_of

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TIMED = 8  # images of which the time is taken
DENSENESS = ("FR-VGG-0712",)  # attacked at every threshold
CONVERGENCE = (*SOURCES.values(), "R-FCN-RN50", "R-FCN-RN101", "FCOS-VGG")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """Rows of numbers, and how they are drawn."""

    name: str
    rows: list[Row]
    draw: Callable[[Figure, list[Row]], None]

    def write(self, setup: Setup) -> dict[str, Path]:
        """NAME.json, NAME.md and NAME.png in the folder, each whole or not at all."""
        paths = {ending: setup.out / f"{self.name}.{ending}" for ending in ("json", "md", "png")}
        setup.out.mkdir(parents=True, exist_ok=True)
        known = {
            "rows": self.rows,
            "images": setup.images,
            **setup.made_with(list(dict.fromkeys(row["network"] for row in self.rows))),
            "versions": versions(),
        }
        with atomic_write(paths["json"]) as temporary:
            temporary.write_text(json.dumps(known, indent=2) + "\n")
        with atomic_write(paths["md"]) as temporary:
            temporary.write_text(markdown(self.rows))
        figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure, self.rows)
        with atomic_write(paths["png"]) as temporary:
            figure.savefig(temporary, format="png")
        return paths


def denseness(setup: Setup, counter: Progress, networks: Sequence[str] | None = None) -> Diagnosis:
    """Detectors attacked with targets from region networks of several NMS thresholds."""
    networks = networks or DENSENESS
    for name in networks:
        if not zoo.find(name).two_stage:
            raise ArgumentError(
                f"denseness needs a two-stage detector, whose region network has an NMS threshold, "
                f"got {name}"
            )
    attacks = {
        (name, threshold): Attack.of(name, nms_threshold=threshold)
        for name in networks
        for threshold in THRESHOLDS
    }
    make_perturbations(setup, list(attacks.values()), counter)
    spent = seconds(setup, list(attacks.values()), min(TIMED, setup.images))
    clean = {name: Cell(name) for name in networks}
    attacked = {(name, t): Cell(name, (attack,)) for (name, t), attack in attacks.items()}
    scores = measure_cells(setup, [*clean.values(), *attacked.values()], counter, "denseness")
    rows = []
    for name in networks:
        for threshold in THRESHOLDS:
            records = read_all(setup, attacks[name, threshold])
            rows.append(
                {
                    "network": name,
                    "NMS threshold": threshold,
                    "proposals": _mean(records, "proposals"),
                    "targets": _mean(records, "targets"),
                    "mAP": scores[clean[name]],
                    "mAP after the attack": scores[attacked[name, threshold]],
                    "updates": _mean(records, "iterations"),
                    "perceptibility": _mean(records, "perceptibility"),
                    "seconds an image": spent[attacks[name, threshold]],
                }
            )
    return Diagnosis("denseness", rows, draw_denseness)


def seconds(setup: Setup, attacks: Sequence[Attack], count: int) -> dict[Attack, float]:
    """Seconds that each attack takes an image, taken once and kept."""
    paths = {one: setup.out / "scores" / "seconds" / f"{one.folder}.json" for one in attacks}
    of = {one: {**settings_of(setup, one), "images": count} for one in attacks}
    if any(read_json(paths[one], of[one]) is None for one in attacks):
        for one, spent in seconds_of(setup, attacks, count).items():
            keep_json(paths[one], {"seconds": spent, "versions": versions()}, of[one])
    found = {one: read_json(paths[one], of[one]) for one in attacks}
    return {one: float(known["seconds"]) for one, known in found.items() if known is not None}


def convergence(
    setup: Setup, counter: Progress, networks: Sequence[str] | None = None
) -> Diagnosis:
    """How many images end within the budget, and how many targets are active on the way."""
    networks = networks or CONVERGENCE
    attacks = {name: Attack.of(name) for name in networks}
    make_perturbations(setup, list(attacks.values()), counter)
    clean = {name: Cell(name) for name in networks}
    attacked = {name: Cell(name, (attacks[name],)) for name in networks}
    scores = measure_cells(setup, [*clean.values(), *attacked.values()], counter, "convergence")
    rows = []
    for name in networks:
        records = [record for record in read_all(setup, attacks[name]) if record.targets]
        rows.append(
            {
                "network": name,
                "images with targets": len(records),
                "not converged, %": 100
                * sum(r.status != "converged" for r in records)
                / max(1, len(records)),
                "updates": _mean(records, "iterations"),
                "perceptibility": _mean(records, "perceptibility"),
                "score": scores[clean[name]],
                "score after the attack": scores[attacked[name]],
                "active": active_shares(records, attacks[name].max_iter),
                "iterations": [record.iterations for record in records],
            }
        )
    return Diagnosis("convergence", rows, draw_convergence)


def perceptibility(
    setup: Setup, counter: Progress, networks: Sequence[str] | None = None
) -> Diagnosis:
    """How visible each network's perturbations are: the slides' p, over the images."""
    networks = networks or CONVERGENCE
    attacks = {name: Attack.of(name) for name in networks}
    make_perturbations(setup, list(attacks.values()), counter)
    rows = []
    for name in networks:
        records = [record for record in read_all(setup, attacks[name]) if record.targets]
        every = np.array([record.perceptibility for record in records] or [0.0])
        largest = [float(record.perturbation.abs().max()) for record in records]
        rows.append(
            {
                "network": name,
                "images with targets": len(records),
                "perceptibility": float(every.mean()),
                "lowest": float(every.min()),
                "median": float(np.median(every)),
                "highest": float(every.max()),
                "largest change of a pixel, of 255": 255 * sum(largest) / max(1, len(largest)),
                "values": every.tolist(),
            }
        )
    return Diagnosis("perceptibility", rows, draw_perceptibility)


def active_shares(records: Sequence[Record], updates: int) -> list[float]:
    """The share of the targets that are active after 0, 1, ... updates, mean over the images."""
    shares = [0.0] * (updates + 1)
    for record in records:
        for m in range(updates + 1):
            left = record.active[min(m, len(record.active) - 1)]
            shares[m] += left / record.targets / len(records)
    return shares


def _mean(records: Sequence[Record], what: str) -> float:
    values: list[float] = [getattr(record, what) for record in records]
    return sum(values) / max(1, len(values))


def draw_denseness(figure: Figure, rows: list[Row]) -> None:
    """mAP after the attack, targets and time, against the threshold."""
    left, right, time = figure.subplots(1, 3)
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        at = [row["NMS threshold"] for row in own]
        left.plot(at, [row["mAP after the attack"] for row in own], "o-", label=name)
        left.axhline(own[0]["mAP"], linestyle=":", color="0.5")
        right.plot(at, [row["targets"] for row in own], "o-", label=name)
        time.plot(at, [row["seconds an image"] for row in own], "o-", label=name)
    for axes in (left, right, time):
        axes.set_xlabel("NMS threshold")
    left.set_ylabel("mAP after the attack, %")
    left.set_ylim(bottom=0)
    left.set_title("dotted: before the attack", fontsize=9)
    right.set_ylabel("targets an image")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    time.set_ylabel("seconds an image")
    time.set_ylim(bottom=0)


def draw_convergence(figure: Figure, rows: list[Row]) -> None:
    """Active targets against updates, and a histogram of the updates."""
    left, right = figure.subplots(1, 2)
    for row, colour in zip(rows, itertools.cycle(colormaps["tab20"].colors)):  # type: ignore
        left.plot([100 * share for share in row["active"]], color=colour)
        right.hist(
            row["iterations"],
            bins=20,
            histtype="step",
            label=row["network"],
            linewidth=1.3,
            color=colour,
        )
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    left.set_xlabel("updates")
    left.set_ylabel("active targets, %")
    right.set_xlabel("updates at the end")
    right.set_ylabel("images")
    right.legend(fontsize=7)


def draw_perceptibility(figure: Figure, rows: list[Row]) -> None:
    """A box for each network, over the images."""
    axes = figure.subplots()
    axes.boxplot([row["values"] for row in rows])
    axes.set_xticks(range(1, len(rows) + 1), [row["network"] for row in rows], rotation=30)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("perceptibility")
    axes.set_title("of each image's perturbation; boxes: quartiles, whiskers: 1.5 of their range")


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a table, without the values that are lists."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = ["| " + " | ".join(names) + " |"]
    lines.append(
        "|" + "|".join("---" if isinstance(rows[0][n], str) else "---:" for n in names) + "|"
    )
    lines += ["| " + " | ".join(cell(name, row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(name: str, value: Any) -> str:
    """A value for a table."""
    if not isinstance(value, float):
        return str(value)
    if name in ("perceptibility", "lowest", "median", "highest"):
        return f"{value:.2e}"
    return f"{value:.2f}" if name in ("NMS threshold", "seconds an image") else f"{value:.1f}"

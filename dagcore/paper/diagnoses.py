"""Diagnoses of the attacks: how dense targets must be, how fast attacks converge, how visible."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import TypeVar

from matplotlib import colormaps
from matplotlib.figure import Figure

from .. import zoo
from ..errors import ArgumentError
from ..evaluation.progress import Progress
from .cells import Cell, measure_cells
from .reports import Report, Row
from .work import Attack, Perturbation, Setup, make_perturbations, read_all, seconds

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TIMED = 8  # number of images that are timed
DENSENESS = ("FR-VGG-0712",)  # networks that are attacked at every threshold
CONVERGENCE = tuple(entry.name for entry in zoo.ENTRIES)

Key = TypeVar("Key", bound=Hashable)


def denseness(
    setup: Setup,
    counter: Progress,
    networks: Sequence[str] = DENSENESS,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Report:
    """Attack detectors on targets from region networks at several NMS thresholds."""
    for name in networks:
        if not zoo.find(name).two_stage:
            raise ArgumentError(
                f"denseness needs a two-stage detector, whose region network has an NMS threshold, "
                f"got {name}"
            )
    attacks = {
        (name, threshold): setup.attack(name, nms_threshold=threshold)
        for name in networks
        for threshold in thresholds
    }
    make_perturbations(setup, list(attacks.values()), counter)
    spent = seconds(setup, list(attacks.values()), min(TIMED, setup.images))
    scores = before_and_after(setup, counter, "denseness", attacks)
    rows = []
    for (name, threshold), attack in attacks.items():
        made = read_all(setup, attack)
        before, after = scores[name, threshold]
        rows.append(
            {
                "network": name,
                "NMS threshold": threshold,
                "proposals": _mean([one.proposals for one in made]),
                "targets": _mean([one.targets for one in made]),
                "mAP": before,
                "mAP after the attack": after,
                "updates": _mean([one.iterations for one in made]),
                "perceptibility": _mean([one.perceptibility for one in made]),
                "seconds per image": spent[attack],
            }
        )
    return _drawn("denseness", rows, draw_denseness)


def convergence(setup: Setup, counter: Progress, networks: Sequence[str] = CONVERGENCE) -> Report:
    """Measure how many images converge within the budget, and active targets after each update."""
    attacks = {name: setup.attack(name) for name in networks}
    every = with_targets(setup, counter, attacks)
    scores = before_and_after(setup, counter, "convergence", attacks)
    rows = []
    for name, made in every.items():
        before, after = scores[name]
        rows.append(
            {
                "network": name,
                "images with targets": len(made),
                "not converged, %": 100 * _mean([one.status != "converged" for one in made]),
                "updates": _mean([one.iterations for one in made]),
                "perceptibility": _mean([one.perceptibility for one in made]),
                "score": before,
                "score after the attack": after,
                "active": active_shares(made, attacks[name].max_iter),
                "iterations": [one.iterations for one in made],
            }
        )
    return _drawn("convergence", rows, draw_convergence)


def perceptibility(
    setup: Setup, counter: Progress, networks: Sequence[str] = CONVERGENCE
) -> Report:
    """Measure how visible each network's perturbations are: the slides' p over the images."""
    every = with_targets(setup, counter, {name: setup.attack(name) for name in networks})
    rows = []
    for name, made in every.items():
        values = [one.perceptibility for one in made] or [0.0]
        largest = _mean([float(one.values.abs().max()) for one in made])
        rows.append(
            {
                "network": name,
                "images with targets": len(made),
                "perceptibility": fmean(values),
                "lowest": min(values),
                "median": median(values),
                "highest": max(values),
                "largest change of a pixel, of 255": 255 * largest,
                "values": values,
            }
        )
    return _drawn("perceptibility", rows, draw_perceptibility)


def with_targets(
    setup: Setup, counter: Progress, attacks: Mapping[Key, Attack]
) -> dict[Key, list[Perturbation]]:
    """Return the perturbations of each attack, without images that have no targets."""
    make_perturbations(setup, list(attacks.values()), counter)
    every = {key: read_all(setup, attack) for key, attack in attacks.items()}
    return {key: [one for one in made if one.targets] for key, made in every.items()}


def before_and_after(
    setup: Setup, counter: Progress, what: str, attacks: Mapping[Key, Attack]
) -> dict[Key, tuple[float, float]]:
    """Return the scores of networks on clean images and under the attacks on themselves."""
    clean = {key: Cell(attack.networks[0]) for key, attack in attacks.items()}
    attacked = {key: Cell(attack.networks[0], (attack,)) for key, attack in attacks.items()}
    cells = list(dict.fromkeys([*clean.values(), *attacked.values()]))
    scores = measure_cells(setup, cells, counter, what)
    return {key: (scores[clean[key]], scores[attacked[key]]) for key in attacks}


def active_shares(made: Sequence[Perturbation], updates: int) -> list[float]:
    """Return the fraction of targets active after 0, 1, ... updates, averaged over the images."""
    shares = [0.0] * (updates + 1)
    for one in made:
        for m in range(updates + 1):
            left = one.active[min(m, len(one.active) - 1)]
            shares[m] += left / one.targets / len(made)
    return shares


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _drawn(name: str, rows: list[Row], draw: Callable[..., None]) -> Report:
    """Return a report with a figure."""
    pictures = [(f"{name}.png", f"{name}, as in the table above")]
    return Report.of_rows(name, rows, draw=partial(draw, rows=rows), pictures=pictures)


def draw_denseness(figure: Figure, rows: list[Row]) -> None:
    """Plot mAP after the attack, number of targets and time over the threshold."""
    columns = {
        "mAP after the attack": "mAP after the attack, %",
        "targets": "targets per image",
        "seconds per image": "seconds per image",
    }
    panels = figure.subplots(1, 3)
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        for name, group in itertools.groupby(rows, lambda row: row["network"]):
            own = list(group)
            at = [row["NMS threshold"] for row in own]
            axes.plot(at, [row[column] for row in own], "o-", label=name)
            if column == "mAP after the attack":
                axes.axhline(own[0]["mAP"], linestyle=":", color="0.5")
        axes.set(xlabel="NMS threshold", ylabel=label)
        axes.set_ylim(bottom=0)
    panels[0].set_title("dotted: before the attack", fontsize=9)
    panels[1].legend(fontsize=8)


def draw_convergence(figure: Figure, rows: list[Row]) -> None:
    """Plot active targets over updates, and a histogram of the number of updates."""
    left, right = figure.subplots(1, 2)
    for row, colour in zip(rows, itertools.cycle(colormaps["tab20"].colors)):  # type: ignore
        left.plot([100 * share for share in row["active"]], color=colour)
        style = {"histtype": "step", "linewidth": 1.3, "color": colour}
        right.hist(row["iterations"], bins=20, label=row["network"], **style)
    if any(share > 0 for row in rows for share in row["active"]):
        left.set_yscale("log")
    left.set(xlabel="updates", ylabel="active targets, %")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    right.set(xlabel="updates at the end", ylabel="images")
    right.legend(fontsize=7)


def draw_perceptibility(figure: Figure, rows: list[Row]) -> None:
    """Draw a box plot over the images for each network."""
    axes = figure.subplots()
    axes.boxplot([row["values"] for row in rows])
    axes.set_xticks(range(1, len(rows) + 1), [row["network"] for row in rows], rotation=30)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("perceptibility")
    axes.set_title("of each image's perturbation; boxes: quartiles, whiskers: 1.5 of their range")

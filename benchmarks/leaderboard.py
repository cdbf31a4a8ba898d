"""How robust the zoo's networks and the real ones are, by each protocol of `dagcore evaluate`.

    python benchmarks/leaderboard.py [--images 10] [--out build/leaderboard] [--save leaderboard]

Each network is evaluated under every protocol for its task into a folder of its own below --out;
what is there already is not done again, so that a table that was interrupted resumes. Networks of
the zoo are evaluated on test scenes, the two DeepLabs on the annotated photographs of
../shared/real, where that exists.

The radii are chosen to tell the networks apart: in larger balls nothing is left of any.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from bench_real import DEEPLABS, REAL, load_network
from common import save

import dagcore
from dagcore import files, zoo
from dagcore.data import Scenes
from dagcore.evaluation.progress import Silent
from dagcore.evaluation.protocols import PROTOCOLS
from dagcore.evaluation.robustness import told_radius
from dagcore.victims import Victim

RADII = {"zoo": (0.5 / 255, 1 / 255, 2 / 255), "real": (0.05 / 255, 0.1 / 255, 0.25 / 255)}
"""In place of the protocols' own."""
SHORT = {"sea-2024": 1, "cospgd-2024": 1}
"""Protocols that take so long that only the middle one of these radii is used."""
NOTE = (
    "Percent, in memory. Worst case: of all attacks of the protocol, per image for aAcc, by greedy "
    "search for mIoU; for detectors the lowest mAP of an attack, which is named."
)


class Tell(Silent):
    """A line for each image."""

    def __init__(self, what: str) -> None:
        self.what = what

    def finished(self, count: int, what: str, *, passed_over: bool = False) -> None:
        print(f"{self.what}: {what}", flush=True)


def real_examples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The annotated photographs, with their masks."""
    found = []
    for name in ("bird", "dog"):
        image = files.read_image(REAL / "photos" / f"{name}.png")
        labels = files.read_label_map(REAL / "photos" / f"{name}.labels.png")
        found.append((image, torch.where(labels == files.IGNORE, 255, labels)))
    return found


def works(options: argparse.Namespace) -> list[tuple[str, str, Any, Any, str]]:
    """Networks with their task, data, and kind of radii."""
    scenes = Scenes("07", "test", count=options.images)
    found = []
    for entry in zoo.registry.EVERY:
        found.append((entry.name, entry.task, entry.name, scenes, "zoo"))
    if REAL.exists():
        for name in DEEPLABS:
            victim = Victim(load_network(name))
            found.append((name, "segmentation", victim, real_examples(), "real"))
    return [one for one in found if not options.networks or one[0] in options.networks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=10, help="scenes")
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--protocols", nargs="+", choices=list(PROTOCOLS))
    parser.add_argument("--out", type=Path, default=Path("build/leaderboard"))
    parser.add_argument("--save")
    options = parser.parse_args()
    rows, record = [], []
    for name, task, model, data, kind in works(options):
        for protocol in PROTOCOLS.values():
            if not any(entry.task in (None, task) for entry in protocol.attacks):
                continue
            if options.protocols and protocol.name not in options.protocols:
                continue
            radii: Any = None
            if protocol.name != "dag-2017" and task == "segmentation":
                radii = RADII[kind]
                if protocol.name in SHORT:
                    radii = radii[1:2]
            summary = dagcore.evaluate(
                model,
                data,
                protocol.name,
                epsilon=radii,
                out=options.out / f"{name.replace('*', '-star')}-{protocol.name}",
                progress=Tell(f"{name}, {protocol.name}"),
                check=0,
            )
            record.append({"network": name, "protocol": protocol.name, **shortened(summary)})
            rows += table(name, protocol.name, summary)
    command = "python benchmarks/leaderboard.py" + f" --images {options.images}"
    save(options.save, "cpu", rows, record, command, NOTE)


def shortened(summary: dict[str, Any]) -> dict[str, Any]:
    """What of a summary is kept in the repository: mIoU, or mAP, of each attack in memory."""
    measure = "mIoU" if summary["task"] == "segmentation" else "mAP"

    def scores(name: str) -> dict[str, float]:
        return {
            f"{one.get('attack', 'worst case')}, {told_radius(one)}": round(one[measure], 2)
            for one in summary[name]
            if one["stage"] == "memory"
        }

    return {
        **{name: summary[name] for name in ("evaluated", "cost", "seed")},
        f"clean {measure}": summary["clean"][measure],
        measure: {**scores("results"), **scores("worst_case")},
    }


def table(name: str, protocol: str, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each ball."""
    measures = ("aAcc", "mIoU") if summary["task"] == "segmentation" else ("mAP",)
    in_memory = [one for one in summary["results"] if one["stage"] == "memory"]
    balls = list(dict.fromkeys(told_radius(one) for one in in_memory))
    rows = []
    for ball in balls:
        inside = [one for one in in_memory if told_radius(one) == ball]
        worst = [
            one
            for one in summary["worst_case"]
            if told_radius(one) == ball and one["stage"] == "memory"
        ]
        strongest = min(inside, key=lambda one: one[measures[-1]] or 0.0)
        left = worst[0] if worst else strongest
        rows.append(
            {
                "network": name,
                "protocol": protocol,
                "images": summary["evaluated"],
                "ball": ball,
                **{f"clean {m}": f"{summary['clean'][m]:.1f}" for m in measures},
                **{f"worst case {m}": f"{left[m]:.1f}" for m in measures},
                "strongest": f"{strongest['attack']} ({strongest[measures[-1]] or 0.0:.1f})",
            }
        )
    return rows


if __name__ == "__main__":
    main()

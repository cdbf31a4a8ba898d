"""Attack against defence: scores under attackers who know of a defence, and who do not.

Segmentation networks are attacked by CosPGD, and for the worst case also by Auto-PGD on two of
SEA's losses. Detectors are attacked by DAG in a ball, and for the worst case also by TOG's goals.
All attacked images are on the levels of an 8-bit file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import defences, zoo
from ..attacks import APGD, DAG, PGD, CosPGD
from ..attacks.pgd import BallAttack
from ..data import Example
from ..evaluation.kept import keep_json, read_json
from ..evaluation.options import find_device
from ..evaluation.progress import Progress
from ..evaluation.tog import goal_targets
from ..metrics import AveragePrecision, iou, worst_iou
from ..ops import argmax_bilinear
from ..seeds import generator_of, seed_of
from ..victims import Detector, prepare
from .reports import Report, Row
from .work import IGNORE, Setup, run

NETWORKS = ("FCN-VGG", "FCN-VGG-PGD", "DL-VGG", "DL-VGG-PGD", "FR-ZF-07", "FR-ZF-07-DAG")
NONE = "none"
DEFENCES: dict[str, Callable[[Any], Any]] = {
    NONE: lambda victim: victim,
    "JPEG 75": partial(defences.jpeg, quality=75),
    "4 bits": partial(defences.bit_depth, bits=4),
    "median 3": partial(defences.median, size=3),
    "Gaussian 1": partial(defences.gaussian, sigma=1.0),
    "noise 0.03": partial(defences.noise, std=0.03),
    "resize and pad": partial(defences.resize_pad, least=0.8),
    "augmented": defences.augmented,
}
RADII = {"1/255": 1 / 255, "2/255": 2 / 255}  # the second is that of the robust networks
MOST = 20  # maximum number of images: the worst case takes hundreds of passes per image
DRAWS = 4
STEPS, LONGEST, UPDATES = 20, 30, 150  # updates of CosPGD, of each Auto-PGD, and of DAG
OBLIVIOUS, ADAPTIVE, WORST = "oblivious", "adaptive", "worst case"
GOALS = ("vanish", "untargeted")


def defence(
    setup: Setup,
    counter: Progress,
    networks: Sequence[str] = NETWORKS,
    *,
    chosen: Sequence[str] = tuple(DEFENCES),
) -> Report:
    """Measure networks behind defences on clean images and under oblivious and adaptive attacks."""
    cells = [(network, name) for network in networks for name in chosen]
    missing = [cell for cell in cells if known(setup, *cell) is None]
    counter.add("defences", len(cells), done=len(cells) - len(missing))
    for _ in run(setup, make, missing):
        counter.advance("defences")
    rows = [row for cell in cells if (row := known(setup, *cell)) is not None]
    return Report.of_rows(
        "defence",
        rows,
        title="Attack against defence",
        draw=partial(draw, rows=rows),
        pictures=[("defence.png", "What is left at the larger radius")],
        reading=reading(rows),
    )


def path_of(setup: Setup, network: str, name: str) -> Path:
    """Return the path of the file that keeps a row."""
    slug = f"{zoo.find(network).slug}-{name.replace(' ', '-')}"
    return setup.out / "defence" / f"{slug}.json"


def made_of(setup: Setup, network: str) -> dict[str, Any]:
    """Return all that a row depends on."""
    return {
        **setup.made_with([network]),
        "images": min(setup.images, MOST),
        "updates": setup.max_iter,
        "draws": DRAWS,
    }


def known(setup: Setup, network: str, name: str) -> Row | None:
    """Return the kept row, or None if there is none or it is out of date."""
    kept = read_json(path_of(setup, network, name), made_of(setup, network))
    return None if kept is None else dict(kept["row"])


def make(setup: Setup, network: str, name: str) -> None:
    """Measure a network behind a defence, and keep the row."""
    victim: Any = prepare(setup.victim(network))
    victim.classes = setup.victim(network).classes
    defended = DEFENCES[name](victim)
    kind = Detection if isinstance(victim, Detector) else Segmentation
    examples = setup.examples(zoo.find(network).task)
    measured = kind(setup, victim, defended)
    for index in range(min(setup.images, MOST)):
        measured.add(index, examples[index])
    row: Row = {"network": network, "defence": name, "clean": measured.clean()}
    for radius in RADII:
        row |= {f"{radius}, {what}": score for what, score in measured.left(radius).items()}
    keep_json(path_of(setup, network, name), {"row": row}, made_of(setup, network))


class Segmentation:
    """Mean IoU of a segmentation network; the worst case is found by SEA's search over attacks."""

    def __init__(self, setup: Setup, victim: Any, defended: Any) -> None:
        self.setup, self.victim, self.defended = setup, victim, defended
        self.counts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def attacks(self, epsilon: float) -> dict[str, BallAttack]:
        """Return the attack of the oblivious and adaptive columns, and those of the worst case."""
        steps, longest = (self.setup.max_iter or n for n in (STEPS, LONGEST))
        shared: dict[str, Any] = {"epsilon": epsilon, "levels": 256, "ignore_index": IGNORE}
        found: dict[str, BallAttack] = {
            ADAPTIVE: CosPGD(alpha=max(epsilon / 4, 1 / 255), steps=steps, **shared)
        }
        shared |= {"radii": "shrinking", "track": "cross-entropy"}
        for loss in ("masked-cross-entropy", "jensen-shannon"):
            found[loss] = APGD(loss=loss, steps=longest, **shared)
        return found

    def add(self, index: int, example: Example) -> None:
        """Attack an image in every way, and count the predictions."""
        device = find_device(self.setup.device)
        image = example.image[None].to(device)
        assert example.mask is not None
        labels = example.mask[None].to(device)
        self.count("clean", image, labels)
        for radius, epsilon in RADII.items():
            attacks = self.attacks(epsilon)
            victims = {OBLIVIOUS: (self.victim, attacks[ADAPTIVE])}
            for name, attack in attacks.items():
                victims[name] = (adaptive(self.defended), attack)
            for name, (victim, attack) in victims.items():
                number = list(attacks).index(ADAPTIVE if name == OBLIVIOUS else name)
                generator = generator_of(self.setup.seed, 4, index, number)
                result = attack(victim, image, labels, generator=generator)
                self.count(f"{radius} {name}", result.adversarial, labels)

    def count(self, name: str, images: Tensor, labels: Tensor) -> None:
        """Count the classes that the defended network predicts."""
        size = (labels.shape[1], labels.shape[2])
        with torch.no_grad():
            scores = self.defended(images)
        seen = argmax_bilinear(scores.as_subclass(Tensor), size) if scores.dim() == 4 else scores
        there = labels != IGNORE
        seen, true, classes = seen[there].long(), labels[there].long(), len(self.victim.classes)
        hits = seen[seen == true]
        counts = tuple(torch.bincount(x.cpu(), minlength=classes) for x in (hits, seen, true))
        self.counts.setdefault(name, []).append(counts)  # type: ignore[arg-type]

    def clean(self) -> float:
        """Return the score on clean images."""
        return self.score("clean")

    def score(self, name: str) -> float:
        """Return the score on images of one kind."""
        return iou(
            *(torch.stack(part).sum(0) for part in zip(*self.counts[name], strict=True))
        ).mean

    def left(self, radius: str) -> dict[str, float]:
        """Return the scores under attacks of one radius, in percent."""
        names = [name for name in self.counts if name.startswith(f"{radius} ")]
        parts = [
            [torch.stack(part) for part in zip(*self.counts[name], strict=True)] for name in names
        ]
        hits, seen, true = (torch.stack(part) for part in zip(*parts, strict=True))
        return {
            OBLIVIOUS: self.score(f"{radius} {OBLIVIOUS}"),
            ADAPTIVE: self.score(f"{radius} {ADAPTIVE}"),
            WORST: worst_iou(hits, seen, true[0]).score.mean,
        }


class Detection:
    """Mean average precision of a detector; the worst case is the lowest of the attacks."""

    def __init__(self, setup: Setup, victim: Any, defended: Any) -> None:
        self.setup, self.victim, self.defended = setup, victim, defended
        self.measures: dict[str, AveragePrecision] = {}

    def add(self, index: int, example: Example) -> None:
        """Attack an image in every way, and measure the detections."""
        image = example.image[None].to(find_device(self.setup.device))
        self.look("clean", image, example)
        known = adaptive(self.defended)
        for radius, epsilon in RADII.items():
            for name, victim in ((OBLIVIOUS, self.victim), (ADAPTIVE, known)):
                self.look(
                    f"{radius} {name}", self.dag(victim, image, example, epsilon, index), example
                )
            for goal in GOALS:
                self.look(
                    f"{radius} {goal}", self.tog(known, image, example, epsilon, goal), example
                )

    def dag(
        self, victim: Any, image: Tensor, example: Example, epsilon: float, index: int
    ) -> Tensor:
        """Return the image attacked by DAG, with permuted classes."""
        generator = generator_of(self.setup.seed, 5, index)
        aims = victim.dense_targets(image, [example], generator=generator, ignore_index=IGNORE)
        updates = self.setup.max_iter or UPDATES
        attack = DAG(max_iter=updates, epsilon=epsilon, levels=256, ignore_index=IGNORE)
        return attack(
            victim, image, aims.labels, aims.adversarial_labels, boxes=aims.boxes
        ).adversarial

    def tog(
        self, victim: Any, image: Tensor, example: Example, epsilon: float, goal: str
    ) -> Tensor:
        """Return the image attacked by PGD with one of TOG's goals."""
        truth = {"boxes": example.boxes, "labels": example.labels}
        aims = goal_targets(victim, image[0], truth, goals=[goal], ignore_index=IGNORE)[goal]
        wanted = aims.adversarial
        steps = self.setup.max_iter or 10
        alpha = max(epsilon / 4, 1 / 255)
        attack = PGD(
            epsilon=epsilon,
            alpha=alpha,
            steps=steps,
            tolerance=None,
            levels=256,
            ignore_index=IGNORE,
        )
        boxes = None if aims.boxes is None else aims.boxes[None]
        generator = torch.Generator().manual_seed(seed_of(self.setup.seed, 6))
        result = attack(
            victim,
            image,
            aims.labels[None],
            wanted[None] if isinstance(wanted, Tensor) else wanted,
            generator,
            boxes=boxes,
        )
        return result.last

    def look(self, name: str, images: Tensor, example: Example) -> None:
        """Measure the defended detector's detections."""
        if name not in self.measures:
            self.measures[name] = AveragePrecision(len(self.victim.classes))
        with torch.no_grad():
            (found,) = self.defended.detect(images)
        self.measures[name].update(found, example.boxes, example.labels, example.difficult)

    def clean(self) -> float:
        """Return the score on clean images."""
        return self.measures["clean"].compute().mean

    def left(self, radius: str) -> dict[str, float]:
        """Return the scores under attacks of one radius, in percent."""
        found = {
            name.removeprefix(f"{radius} "): measure.compute().mean
            for name, measure in self.measures.items()
            if name.startswith(f"{radius} ")
        }
        return {
            OBLIVIOUS: found[OBLIVIOUS],
            ADAPTIVE: found[ADAPTIVE],
            WORST: min(found.values()),
        }


def adaptive(defended: Any) -> Any:
    """Return the victim of an attacker who knows of the defence, if there is one."""
    return defended.adaptive(DRAWS) if isinstance(defended, defences.Defence) else defended


def reading(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Summarise the table in sentences."""
    lines = []
    for radius in RADII:
        columns = {what: f"{radius}, {what}" for what in (OBLIVIOUS, ADAPTIVE, WORST)}
        bare = {row["network"]: row for row in rows if row["defence"] == NONE}
        behind = [row for row in rows if row["defence"] != NONE and row["network"] in bare]
        if not behind:
            continue
        means = {what: fmean(row[column] for row in behind) for what, column in columns.items()}
        gains = [
            (row[columns[WORST]] - bare[row["network"]][columns[WORST]], row) for row in behind
        ]
        most, best = max(gains, key=lambda pair: pair[0])
        lines.append(
            f"At {radius} transforms leave, in the mean, {means[OBLIVIOUS]:.1f} % to attackers who "
            f"do not know of them, {means[ADAPTIVE]:.1f} % to those who do, and "
            f"{means[WORST]:.1f} % in the worst case. There the largest gain over no defence is "
            f"{most:.1f} points: {best['defence']} on {best['network']}."
        )
        kept = [
            f"{name} keeps {row[columns[WORST]]:.1f} of {row['clean']:.1f} %, {clean} "
            f"{bare[clean][columns[WORST]]:.1f} of {bare[clean]['clean']:.1f} %"
            for name, row in bare.items()
            if (clean := name.rpartition("-")[0]) in bare
        ]
        if kept:
            lines.append(f"Trained against attacks, at {radius}: {'; '.join(kept)}.")
    return lines


def draw(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw bars for each network: the scores behind each defence."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    radius = list(RADII)[-1]
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        own = [row for row in rows if row["network"] == network]
        places = range(len(own))
        axes.bar(places, [row["clean"] for row in own], color="0.9", label="clean")
        for k, what in enumerate((OBLIVIOUS, ADAPTIVE, WORST)):
            values = [row[f"{radius}, {what}"] for row in own]
            axes.bar([p + 0.27 * (k - 1) for p in places], values, 0.25, label=what)
        axes.set_xticks(list(places), [row["defence"] for row in own], rotation=90, fontsize=6)
        axes.set_title(network, fontsize=8)
    panels[0].set_ylabel(f"score, %, at {radius}")
    panels[0].legend(fontsize=6)

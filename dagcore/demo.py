"""`dagcore demo`: photographs of scikit-image, attacked in three ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import files
from .adversary import Adversary, find_class
from .attack import DAG
from .attack_files import make_folder
from .info import versions
from .outcome import Outcome, attack_images, output_files, predict, write
from .report import Reporter, show_table
from .victims import Victim, load
from .victims.segmentation import need

PHOTOGRAPHS = ("chelsea", "astronaut", "coffee", "rocket")
SIZE = (384, 256)  # width, height: 96 targets
TARGET = "strawberry"
PATTERN = "circle"

LOOK_AT = """\
What to look at:
  {permutation}
    The photograph, what the network sees in each cell of it, the change times 10, and what it
    sees afterwards: no cell keeps its class. {image} looks like the original.
  {one_class}
    The same, every cell pushed towards one class, {target}. A cell counts no more as soon as it
    has left its own class, so that few get there.
  {pattern}
    Here each cell counts until it is where it is wanted: {target} in a circle, {background}
    around it.
"active after rounding" counts the targets that are active again once the attacked image is
rounded to 8 bits, as in its PNG: rounding moves a pixel by up to 2.0e-03, as the attack does."""


def photographs() -> Tensor:
    """The photographs, cut to one size: (N, 3, H, W) in [0, 1]."""
    data = need("skimage.data", "demo")
    pixels = [
        np.array(ImageOps.fit(Image.fromarray(getattr(data, name)()), SIZE)) for name in PHOTOGRAPHS
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float() / 255


class Demo:
    """The demo network and the photographs, attacked into a folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.victim: Victim = load("demo")
        self.images = photographs()
        self.labels = predict(self.victim, self.images).argmax(1).int()
        assert self.victim.classes is not None
        self.target = find_class(TARGET, len(self.victim.classes), self.victim.classes)
        make_folder(out)

    def attack(
        self, what: str, adversary: Adversary, photos: Sequence[str], reporter: Reporter
    ) -> list[Outcome]:
        """Attack some of the photographs in one batch, and write what comes of it."""
        assert self.victim.classes is not None
        count = len(photos)
        dag = DAG(goal="reach" if adversary.paints else "leave", ignore_index=files.IGNORE)
        generator = torch.Generator().manual_seed(0)
        chosen = [
            adversary.choose(labels, len(self.victim.classes), generator)
            for labels in self.labels[:count]
        ]
        maps = [labels for labels, _ in chosen if isinstance(labels, Tensor)]
        outcomes = attack_images(
            dag,
            self.victim,
            self.images[:count],
            self.labels[:count],
            torch.stack(maps) if maps else adversary.kind,
            names=[f"{photo}-{what}" for photo in photos],
            generator=generator,
            callback=lambda m, active: reporter.update(what, m, int(active.clamp(min=0).sum())),
        )
        for outcome, (_, classes) in zip(outcomes, chosen, strict=True):
            record = {
                "model": "demo",
                "adversarial": adversary.kind,
                "settings": dataclasses.asdict(dag),
                "seed": 0,
                "versions": versions(),
            }
            write(outcome, self.out, self.victim, goal=dag.goal, record=record | classes)
        reporter.finished(outcomes)
        return outcomes


def run(out: Path) -> None:
    """Attack, write, print."""
    demo = Demo(out)
    background = int(demo.labels[0].flatten().mode().values)
    attacks = {
        "permutation": (Adversary("permutation"), PHOTOGRAPHS),
        "one-class": (Adversary("class", demo.target), PHOTOGRAPHS),
        "pattern": (Adversary(PATTERN, demo.target, background), PHOTOGRAPHS[:1]),
    }
    rows = []
    with Reporter(sum(len(photos) for _, photos in attacks.values())) as reporter:
        for what, (adversary, photos) in attacks.items():
            outcomes = demo.attack(what, adversary, photos, reporter)
            rows += [((p, what), outcome) for p, outcome in zip(photos, outcomes, strict=True)]
    show_table(("photograph", "attack"), rows)
    assert demo.victim.classes is not None
    first = PHOTOGRAPHS[0]
    print(
        LOOK_AT.format(
            permutation=output_files(out, f"{first}-permutation")["figure"],
            image=output_files(out, f"{first}-permutation")["image"].name,
            one_class=output_files(out, f"{first}-one-class")["figure"],
            pattern=output_files(out, f"{first}-pattern")["figure"],
            target=TARGET,
            background=demo.victim.classes[background],
        )
    )

"""`dagcore demo`: photographs of scikit-image and a scene, attacked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .. import files
from ..attacks.dag import DAG
from ..data import Scenes
from ..evaluation.adversary import Adversary, find_class
from ..evaluation.attack_files import Request, make_folder, plan
from ..evaluation.outcome import Outcome, attack_images, output_files, predict, write
from ..info import versions
from ..optional import optional_import
from ..victims import Victim, load
from . import options
from .progress import ImageProgress, Row, show_table

PHOTOGRAPHS = ("chelsea", "astronaut", "coffee", "rocket")
SIZE = (384, 256)  # width, height: 96 targets
TARGET = "strawberry"
PATTERN = "circle"
SCENE = 3  # of the test scenes
SCENE_NETWORKS = ("DL-VGG", "R-FCN-RN101")

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
  {scenes}
    A scene as the zoo's networks are trained on, its segmentation and the objects found in it.
"active after rounding" counts the targets that are active again once the attacked image is
rounded to 8 bits, as in its PNG: rounding moves a pixel by up to 2.0e-03, as the attack does."""


def photographs(names: Sequence[str], size: tuple[int, int]) -> Tensor:
    """Photographs, cut to one size (width, height): (N, 3, H, W) in [0, 1]."""
    data = optional_import("skimage.data", "demo")
    pixels = [
        np.array(ImageOps.fit(Image.fromarray(getattr(data, name)()), size)) for name in names
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float() / 255


class Demo:
    """The demo network and photographs, attacked into a folder."""

    def __init__(self, out: Path, images: Tensor, progress: ImageProgress) -> None:
        self.out, self.images, self.progress = out, images, progress
        self.done = 0
        victim = load("demo")
        assert isinstance(victim, Victim)
        self.victim = victim
        self.labels = predict(self.victim, self.images).argmax(1).int()
        assert self.victim.classes is not None
        self.target = find_class(TARGET, len(self.victim.classes), self.victim.classes)
        make_folder(out)

    def attack(self, what: str, adversary: Adversary, photos: Sequence[str]) -> list[Outcome]:
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
            callback=lambda m, active: self.progress.update(
                what, m, int(active.clamp(min=0).sum())
            ),
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
            self.finished(outcome)
        return outcomes

    def attack_scene(self) -> list[tuple[str, Outcome]]:
        """Attack a scene with networks of the zoo, as `dagcore attack` does."""
        path = self.out / "scene.png"
        files.write_image(path, Scenes("07", "test", count=1, first=SCENE)[0].image)
        rows = []
        for name in SCENE_NETWORKS:
            work = plan(Request(images=[path], out=self.out / name.lower(), model=name))
            for outcome in work.run(
                lambda _, *where, name=name: self.progress.update(name, *where)
            ):
                self.finished(outcome)
                rows.append((name, outcome))
        return rows

    def finished(self, outcome: Outcome) -> None:
        """Count an image."""
        self.done += 1
        self.progress.finished(self.done, outcome.line())


def run(out: Path, names: Sequence[str] = PHOTOGRAPHS, size: tuple[int, int] = SIZE) -> None:
    """Attack photographs of scikit-image, cut to a size (width, height), and a scene."""
    progress = ImageProgress(transient=True)
    demo = Demo(out, photographs(names, size), progress)
    background = int(demo.labels[0].flatten().mode().values)
    attacks = {
        "permutation": (Adversary("permutation"), names),
        "one-class": (Adversary("class", demo.target), names),
        "pattern": (Adversary(PATTERN, demo.target, background), names[:1]),
    }
    rows: list[tuple[Row, Outcome]] = []
    total = sum(len(photos) for _, photos in attacks.values()) + len(SCENE_NETWORKS)
    progress.begin(total, total)
    with progress:
        for what, (adversary, photos) in attacks.items():
            outcomes = demo.attack(what, adversary, photos)
            rows += [((p, what), outcome) for p, outcome in zip(photos, outcomes, strict=True)]
        rows += [((f"scene, {name}", "permutation"), o) for name, o in demo.attack_scene()]
    show_table(("image", "attack"), rows)
    assert demo.victim.classes is not None
    first = names[0]
    print(
        LOOK_AT.format(
            permutation=output_files(out, f"{first}-permutation")["figure"],
            image=output_files(out, f"{first}-permutation")["image"].name,
            one_class=output_files(out, f"{first}-one-class")["figure"],
            pattern=output_files(out, f"{first}-pattern")["figure"],
            target=TARGET,
            background=demo.victim.classes[background],
            scenes=" and ".join(
                str(output_files(out / name.lower(), "scene")["figure"]) for name in SCENE_NETWORKS
            ),
        )
    )


@click.command("demo")
@options.out("Folder for the output.", default="demo")
def command(out: Path) -> None:
    """Attack the photographs of scikit-image and a scene, and say what to look at."""
    run(out)

"""The command `dagcore demo`: attack photographs of scikit-image and a scene."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .. import files
from ..data import Scenes
from ..evaluation.attack_files import Plan, Request
from ..evaluation.driver import Driver, Job
from ..evaluation.options import LEVELS, AttackOptions
from ..evaluation.outcome import Outcome, output_files, write
from ..evaluation.sources import Source
from ..evaluation.summary import warning_of_files
from ..evaluation.targets import ImageTarget
from ..info import versions
from ..optional import optional_import
from ..victims import Detector, Victim, load
from . import options
from .progress import ImageProgress, Row, show_table

PHOTOGRAPHS = ("chelsea", "astronaut", "coffee", "rocket")
SIZE = (384, 256)  # width, height: 96 targets
TARGET = "strawberry"
PATTERN = "circle"
SCENE = 3  # index among the test scenes
SCENE_NETWORKS = ("DL-VGG", "R-FCN-RN101")

LOOK_AT = """\
What to look at:
  {permutation}
    The photograph, what the network sees in each cell of it, the change times 10, and what the
    network sees in the file {image}, which looks like the original.
  {one_class}
    The same, with every cell pushed towards one class, {target}. A cell stops counting as soon
    as it leaves its own class, so few cells reach the new one.
  {pattern}
    Here each cell counts until it has the prescribed class: {target} inside a circle,
    {background} around it.
  {scenes}
    A scene like those that the zoo's networks are trained on, its segmentation, and the objects
    found in it.
{files}

What to try next:
  dagcore attack {scene} --model FCN-VGG --attack pgd --epsilon 2/255 --out attacked
  dagcore evaluate --data scenes --images 20 --model DL-VGG --epsilon 1/255 --out results
  dagcore attack PHOTO.jpg --model MODULE:FUNCTION --out attacked
    attacks your own network, which FUNCTION in MODULE.py returns."""
FILES = {
    "256": "Every image was attacked on the levels of an 8-bit file, so what the network sees in "
    "the PNG is\nwhat was attacked. --levels none attacks the images in memory, and shows what "
    "rounding undoes.",
    "none": '"active after rounding" counts the targets that are active once the attacked image '
    "is\nrounded to 8 bits for its PNG. Rounding moves a pixel by up to 2.0e-03, as much as "
    "the attack does.",
}

EXAMPLES = """
\b
Examples:
  dagcore demo
  dagcore demo --out unrounded --levels none
"""


class Photographs(Source):
    """Photographs of scikit-image, scaled and cropped to one size (width, height)."""

    def __init__(self, names: Sequence[str], size: tuple[int, int]) -> None:
        self.names, self.size = names, size
        self.data = optional_import("skimage.data", "demo")

    def read(self, index: int) -> tuple[Tensor, None]:
        """Return a photograph, and no labels: the network's predictions take their place."""
        photograph = Image.fromarray(getattr(self.data, self.names[index])())
        pixels = np.array(ImageOps.fit(photograph, self.size))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255, None


class Demo:
    """Attacks on the demo network and the zoo's, written to a folder."""

    def __init__(
        self, out: Path, source: Photographs, progress: ImageProgress, levels: str
    ) -> None:
        self.out, self.source, self.progress, self.levels = out, source, progress, levels
        self.scene = out / "scene.png"
        self.rows: list[tuple[Row, Outcome]] = []

    @functools.cached_property
    def victim(self) -> Victim | Detector:
        """The network that sees photographs."""
        return load("demo")

    def attack(self, what: str, count: int, **options: Any) -> ImageTarget:
        """Attack the first `count` photographs, write the results, and return the first target."""
        settings = AttackOptions(model="demo", levels=self.levels, **options)
        cpu = torch.device("cpu")
        driver = Driver(settings, self.victim, self.source, cpu, slots=1)  # a result at a time
        updates: dict[str, Iterator[int]] = {}

        def tell(jobs: list[Job], active: Tensor) -> None:
            (job,) = jobs
            update = next(updates.setdefault(job.name, itertools.count()))
            self.progress.update(f"{job.name}-{what}", update, int(active.clamp(min=0).sum()))

        targets = []
        for job, outcome in driver.run(range(count), callback=tell):
            record = {
                "model": "demo",
                "attack": settings.attack,
                "adversarial": settings.adversarial,
                "settings": dataclasses.asdict(driver.attack),
                "seed": settings.seed,
                "versions": versions(),
            }
            named = dataclasses.replace(outcome, name=f"{job.name}-{what}")
            record |= job.target.record
            write(named, self.out, self.victim, record=record)
            self.finished((job.name, what), named)
            targets.append(job.target)
        return targets[0]

    def attack_scene(self) -> None:
        """Attack networks of the zoo on a scene, as `dagcore attack` does."""
        files.write_image(self.scene, Scenes("07", "test", count=1, first=SCENE)[0].image)
        for name in SCENE_NETWORKS:
            out = self.out / name.lower()
            work = Plan(Request(images=[self.scene], out=out, model=name, levels=self.levels))
            tell = functools.partial(self.progress.update, name)
            for outcome in work.run(lambda _, *where, tell=tell: tell(*where)):
                named = dataclasses.replace(outcome, name=f"{outcome.name}-{name}")
                self.finished((f"scene, {name}", "permutation"), named)

    def finished(self, row: Row, outcome: Outcome) -> None:
        """Keep the outcome of an image, and show the progress."""
        self.rows.append((row, outcome))
        self.progress.finished(len(self.rows), outcome.line())


def run(
    out: Path,
    names: Sequence[str] = PHOTOGRAPHS,
    size: tuple[int, int] = SIZE,
    levels: str = LEVELS[0],
) -> None:
    """Attack photographs of scikit-image, cropped to a size (width, height), and a scene."""
    files.make_folder(out)
    progress = ImageProgress(transient=True)
    demo = Demo(out, Photographs(names, size), progress, levels)
    total = 2 * len(names) + 1 + len(SCENE_NETWORKS)
    progress.begin(total, total)
    with progress:
        demo.attack_scene()  # a result within seconds
        demo.attack("permutation", len(names))
        demo.attack("one-class", len(names), adversarial=TARGET)
        pattern = demo.attack("pattern", 1, adversarial=PATTERN, foreground=TARGET)
    show_table(("image", "attack"), demo.rows)
    outcomes = [outcome.numbers() for _, outcome in demo.rows]
    warning = warning_of_files(outcomes, 0.0, None if levels == "none" else int(levels))
    if warning is not None:
        click.echo(f"dagcore demo: warning: {warning}", err=True)
    assert demo.victim.classes is not None
    attacks = ("permutation", "one-class", "pattern")
    written = {what: output_files(out, f"{names[0]}-{what}") for what in attacks}
    scenes = (output_files(out / name.lower(), "scene")["figure"] for name in SCENE_NETWORKS)
    print(
        LOOK_AT.format(
            **{what.replace("-", "_"): written[what]["figure"] for what in attacks},
            image=written["permutation"]["image"].name,
            target=TARGET,
            background=demo.victim.classes[pattern.record["background"]],
            files=FILES[levels],
            scenes=" and ".join(map(str, scenes)),
            scene=shlex.quote(str(demo.scene)),
        )
    )


@click.command("demo", epilog=EXAMPLES)
@options.out("Output folder.", default="demo")
@options.levels
def command(out: Path, levels: str) -> None:
    """Attack sample photographs and a scene, and explain the results.

    The photographs are scikit-image's, attacked on an ImageNet network. The scene is attacked on a
    segmentation network and a detector of the zoo.
    """
    run(out, levels=levels)

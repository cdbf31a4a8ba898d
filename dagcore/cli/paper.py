"""The commands `dagcore paper all`, `table` and `figure`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..paper.page import EXPERIMENTS, everything
from ..paper.reports import Report
from ..paper.tables import TABLES, measure
from ..paper.work import Setup
from . import options
from .progress import Counter

EXAMPLES = """
\b
Examples:
  dagcore paper all --out paper
  dagcore paper table segmentation --out paper
  dagcore paper figure convergence FCN-VGG DL-VGG --images 20 --out paper
"""
TABLE_EXAMPLES = """
\b
Examples:
  dagcore paper table segmentation
  dagcore paper table detection --images 5 --max-iter 20 --out quick
  dagcore paper table cross-task --data VOCdevkit --weights weights --out voc
"""
ALL_EXAMPLES = """
\b
Examples:
  dagcore paper all
  dagcore paper all --images 5 --max-iter 20 --out quick
  dagcore paper all --data VOCdevkit --weights weights --out voc
"""
FIGURE_EXAMPLES = """
\b
Examples:
  dagcore paper figure fancy
  dagcore paper figure denseness FR-VGG-07 --images 20
  dagcore paper figure defence DL-VGG FR-ZF-07 --device cuda
"""


@click.group("paper", epilog=EXAMPLES)
def command() -> None:
    """Reproduce the paper's experiments on the zoo's networks."""


experiment = options.all_of(
    options.out(
        "Folder for the results. Perturbations kept there are used again.", default="paper"
    ),
    options.count("--images", default=100, help="Number of images to attack."),
    options.count(
        "--max-iter",
        help="Maximum number of updates, for a quick look.  [default: that of each experiment]",
    ),
    options.seed(),
    options.device,
    click.option(
        "--data",
        default="scenes",
        metavar="scenes|DIR",
        help="The test scenes, or the test images of VOC2007 in a VOCdevkit folder.",
    ),
    click.option(
        "--weights",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        help="Folder with NETWORK.safetensors or NETWORK.pth.  [default: the zoo's weights]",
    ),
    options.count("--jobs", help="Parallel processes.  [default: one per core, one on a GPU]"),
)


@command.command("table", epilog=TABLE_EXAMPLES)
@click.argument("name", type=click.Choice([table.name for table in TABLES]))
@experiment
def table(name: str, **given: Any) -> None:
    """Make one of the paper's tables.

    It has the scores of networks under their own perturbations and those of other networks: alone,
    summed, and permuted. The paper's numbers stand beside them in brackets.
    """
    setup = Setup(**given)
    (chosen,) = (table for table in TABLES if table.name == name)
    with Counter() as counter:
        report = measure(setup, chosen, counter).report()
    show(setup, report, "In brackets: the paper's numbers, on PASCAL VOC.\n")


@command.command("all", epilog=ALL_EXAMPLES)
@experiment
def all_(**given: Any) -> None:
    """Make every table, figure and example, and one page with all of them, index.html.

    Results that exist are used again. A run that was interrupted resumes where it stopped.
    """
    setup = Setup(**given)
    with Counter() as counter:
        lines = everything(setup, counter)
    for line in lines:
        click.echo(line)
    click.echo(f"written to {setup.out / 'index.html'}")


@command.command("figure", epilog=FIGURE_EXAMPLES)
@click.argument("name", type=click.Choice(tuple(EXPERIMENTS)))
@click.argument("networks", nargs=-1, metavar="[NETWORK]...")
@experiment
def figure(name: str, networks: tuple[str, ...], **given: Any) -> None:
    """Make a figure and its table, for NETWORKs or for those of the experiment.

    \b
    denseness       two-stage detectors under more and less dense proposals
    convergence     active targets over updates, images that do not converge
    perceptibility  how visible each network's perturbations are
    fancy           prescribed segmentations, several networks fooled at
                    once, noise seen as an object (takes no NETWORK)
    defence         networks behind transforms or trained against attacks,
                    under oblivious, adaptive and worst-case attacks
    why             what networks do along perturbations and random
                    directions, and what perturbations are made of
    """
    setup = Setup(**given)
    with Counter() as counter:
        report = EXPERIMENTS[name](setup, counter, *([networks] if networks else []))
    show(setup, report)


def show(setup: Setup, report: Report, note: str = "") -> None:
    """Write a report, and print its table."""
    paths = report.write(setup)
    click.echo(f"{report.markdown()}\n{note}written to {', '.join(map(str, paths))}")

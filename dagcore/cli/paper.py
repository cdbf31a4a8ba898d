"""`dagcore paper all`, `table` and `figure`."""

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


@click.group("paper")
def command() -> None:
    """The paper's experiments, on the zoo's networks."""


experiment = options.all_of(
    options.out(
        "Folder for the results. Perturbations that it has are used again.", default="paper"
    ),
    options.count("--images", default=100, help="Images to attack."),
    options.count(
        "--max-iter",
        help="Updates at the most, for a quick look.  [default: each experiment's own]",
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
        help="Folder with NETWORK.safetensors or NETWORK.pth.  [default: the zoo's own]",
    ),
    options.count("--jobs", help="Processes side by side.  [default: one per core, one on a GPU]"),
)


@command.command("table")
@click.argument("name", type=click.Choice([table.name for table in TABLES]))
@experiment
def table(name: str, **given: Any) -> None:
    """Make one of the paper's tables.

    Networks attacked by their own perturbations and by others', alone, added up and permuted. It
    is shown beside the paper's own numbers.
    """
    setup = Setup(**given)
    (chosen,) = (table for table in TABLES if table.name == name)
    with Counter() as counter:
        report = measure(setup, chosen, counter).report()
    show(setup, report, "In brackets the paper's, on PASCAL VOC.\n")


@command.command("all")
@experiment
def all_(**given: Any) -> None:
    """Make every table, figure and example, and one page with all of them, index.html.

    What is already there is used again; a run that was interrupted goes on where it stopped.
    """
    setup = Setup(**given)
    with Counter() as counter:
        lines = everything(setup, counter)
    for line in lines:
        click.echo(line)
    click.echo(f"written to {setup.out / 'index.html'}")


@command.command("figure")
@click.argument("name", type=click.Choice(tuple(EXPERIMENTS)))
@click.argument("networks", nargs=-1, metavar="[NETWORK]...")
@experiment
def figure(name: str, networks: tuple[str, ...], **given: Any) -> None:
    """Make a figure with its table, of NETWORKs or of the paper's.

    denseness: two-stage detectors attacked with more and less dense proposals. convergence: active
    targets against updates, and which images do not end within the budget. perceptibility: how
    visible each network's perturbations are. fancy: prescribed segmentations, several networks
    fooled at once, noise that is seen as an object.
    """
    setup = Setup(**given)
    with Counter() as counter:
        report = EXPERIMENTS[name](setup, counter, *([networks] if networks else []))
    show(setup, report)


def show(setup: Setup, report: Report, note: str = "") -> None:
    """Write a report, and show its table."""
    paths = report.write(setup)
    click.echo(f"{report.markdown()}\n{note}written to {', '.join(map(str, paths))}")

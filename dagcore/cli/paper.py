"""`dagcore paper all`, `table` and `figure`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ArgumentError
from ..files import atomic_write
from ..paper import page
from ..paper.diagnoses import Row, convergence, denseness, markdown, perceptibility
from ..paper.fancy import fancy
from ..paper.reading import findings, text
from ..paper.tables import TABLES, measure
from ..paper.work import Setup
from . import options
from .progress import Counter

DIAGNOSES = {
    "denseness": denseness,
    "convergence": convergence,
    "perceptibility": perceptibility,
}


@click.group("paper")
def command() -> None:
    """The paper's experiments, on the zoo's networks."""


experiment = options.all_of(
    options.out(
        "Folder for the results. Perturbations that it has are used again.", default="paper"
    ),
    options.count("--images", default=100, help="Images to attack."),
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
@click.argument("name", type=click.Choice(tuple(TABLES)))
@experiment
def table(name: str, **given: Any) -> None:
    """Make one of the paper's tables.

    Networks attacked by their own perturbations and by others', alone, added up and permuted. It
    is shown beside the paper's own numbers.
    """
    setup = Setup(**given)
    with Counter() as counter:
        made = measure(setup, name, counter)
    paths = made.write(setup)
    click.echo(made.markdown())
    click.echo("In brackets the paper's, on PASCAL VOC.")
    click.echo(f"written to {', '.join(map(str, paths))}")


@command.command("all")
@experiment
def everything(**given: Any) -> None:
    """Make every table, figure and example, and one page with all of them, index.html.

    What is already there is used again; a run that was interrupted goes on where it stopped.
    """
    setup = Setup(**given)
    with Counter() as counter:
        scores, made = {}, []
        for name in TABLES:
            scores[name] = measure(setup, name, counter)
            scores[name].write(setup)
        for diagnose in DIAGNOSES.values():
            made.append(diagnose(setup, counter))
            made[-1].write(setup)
        examples = fancy(setup, counter)
        write_fancy(setup, examples)
    path = setup.out / "index.html"
    page.write(path, page.page(setup, scores, made, examples))
    for line in text(findings({name: known.rows for name, known in scores.items()})):
        click.echo(line)
    click.echo(f"written to {path}")


def write_fancy(setup: Setup, rows: list[Row]) -> Path:
    """Write the examples' numbers as a table, whole or not at all."""
    path = setup.out / "fancy.md"
    with atomic_write(path) as temporary:
        temporary.write_text(
            markdown([{name: row[name] for name in row if name != "picture"} for row in rows])
        )
    return path


@command.command("figure")
@click.argument("name", type=click.Choice((*DIAGNOSES, "fancy")))
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
        if name == "fancy":
            if networks:
                raise ArgumentError(f"fancy has networks of its own, got {', '.join(networks)}")
            rows = fancy(setup, counter)
            path = write_fancy(setup, rows)
            click.echo(path.read_text())
            click.echo(f"written to {setup.out / 'fancy'}, {path}")
            return
        made = DIAGNOSES[name](setup, counter, networks or None)
    paths = made.write(setup)
    click.echo(paths["md"].read_text())
    click.echo(f"written to {', '.join(map(str, paths.values()))}")

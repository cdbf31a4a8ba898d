"""The bodies of `dagcore paper`."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import ArgumentError
from ..files import atomic_write
from ..paper import page
from ..paper.diagnoses import Row, convergence, denseness, markdown, perceptibility
from ..paper.fancy import fancy
from ..paper.reading import findings, text
from ..paper.tables import TABLES, measure
from ..paper.work import Setup
from .progress import Counter

DIAGNOSES = {
    "denseness": denseness,
    "convergence": convergence,
    "perceptibility": perceptibility,
}


def table(name: str, setup: Setup) -> None:
    """Make a table, and say where it is."""
    with Counter() as counter:
        made = measure(setup, name, counter)
    paths = made.write(setup)
    click.echo(made.markdown())
    click.echo("In brackets the paper's, on PASCAL VOC.")
    click.echo(f"written to {', '.join(map(str, paths))}")


def everything(setup: Setup) -> None:
    """Make all tables, figures and examples, and the page."""
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


def figure(name: str, setup: Setup, networks: tuple[str, ...]) -> None:
    """Make a figure and its table, or the fancy examples, and say where they are."""
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

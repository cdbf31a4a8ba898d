"""The bodies of `dagcore paper`."""

from __future__ import annotations

import click

from ..report import Counter
from .diagnoses import convergence, denseness
from .tables import measure
from .work import Setup

DIAGNOSES = {"denseness": denseness, "convergence": convergence}


def table(name: str, setup: Setup) -> None:
    """Make a table, and say where it is."""
    with Counter() as counter:
        made = measure(setup, name, counter)
    paths = made.write(setup)
    click.echo(made.markdown())
    click.echo("In brackets the paper's, on PASCAL VOC.")
    click.echo(f"written to {', '.join(map(str, paths))}")


def figure(name: str, setup: Setup, networks: tuple[str, ...]) -> None:
    """Make a figure and its table, and say where they are."""
    with Counter() as counter:
        made = DIAGNOSES[name](setup, counter, networks or None)
    paths = made.write(setup)
    click.echo(paths["md"].read_text())
    click.echo(f"written to {', '.join(map(str, paths.values()))}")

"""The command `dagcore attack`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..evaluation import faults
from ..evaluation.attack_files import Plan, Request
from ..evaluation.summary import warnings_of
from . import options
from .progress import ImageProgress, show_table

EXAMPLES = """
\b
Examples:
  dagcore attack cat.jpg --model demo --out attacked
  dagcore attack *.png --model fcn_resnet50 --weights fcn.pth --out attacked
  dagcore attack street.png --model mynets.fcn:make --labels street_labels.png \\
      --adversarial runner-up --out attacked
  dagcore attack cat.jpg --model demo --adversarial "text:DAG" --foreground 9 \\
      --tolerance 0.01 --out attacked
"""


@click.command("attack", epilog=EXAMPLES)
@click.argument("images", nargs=-1, required=True, type=options.FILE, metavar="IMAGE...")
@options.out("Output folder.", required=True)
@options.attack(required=True)
def command(images: tuple[Path, ...], model: str, **settings: Any) -> None:
    """Attack one or more images.

    Each IMAGE is attacked on its own. The output folder gets four files for it: NAME.png (the
    attacked image), NAME.perturbation.safetensors, NAME.json (results and all settings) and
    NAME.figure.png.
    """
    outcomes = []
    with faults.of_model(model):
        work = Plan(Request(images=images, model=model, **settings))
        names = work.source.keys
        with ImageProgress(transient=True) as progress:
            progress.begin(len(names), len(names))
            for outcome in work.run(lambda k, *where: progress.update(names[k], *where)):
                outcomes.append(outcome)
                progress.finished(len(outcomes), outcome.line())
    show_table(["image"], [([outcome.name], outcome) for outcome in outcomes])
    for outcome in outcomes:
        if outcome.notes:
            click.echo(f"{outcome.name}:{outcome.remarks()}", err=True)
    for warning in warnings_of(work.records, work.driver.attack):
        click.echo(f"dagcore attack: warning: {warning}", err=True)
    click.echo(f"written to {work.request.out}")

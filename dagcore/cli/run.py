"""The command `dagcore run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..evaluation import Settings, faults, run
from . import options
from .progress import ImageProgress

EXAMPLES = """
\b
Examples:
  dagcore run --data scenes --model DL-VGG --out results
  dagcore run --data photos --labels maps --model fcn_resnet50 --weights fcn.pth --out results
  dagcore run --data VOCdevkit --set 2007/test --model R-FCN-RN50 --weights voc.pth --out results
  torchrun --nproc-per-node 8 -m dagcore run --config run.toml
"""


@click.command("run", epilog=EXAMPLES)
@options.data_set
@options.attack(required=False)
@options.work("Number of images to draw a figure of.")
@click.option("--perturbations", is_flag=True, help="Also write the perturbations, unrounded.")
@click.pass_context
def command(context: click.Context, /, config: Path | None, **given: Any) -> int:
    """Attack a data set, in one process or, under torchrun, in many.

    The output folder gets images/NAME.png, images.jsonl (one line per image), summary.json,
    speed.json, settings.toml and some figures. A run that was killed resumes where it stopped when
    the same command is given again. Images that are broken, or whose labels are, are skipped, and
    images.jsonl records the reason.
    """
    settings = Settings.of(options.merged(context, config, given))
    with faults.of_model(settings.model):
        return run(settings, ImageProgress())

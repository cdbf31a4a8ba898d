"""`dagcore run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..evaluation import Settings, faults, run
from ..evaluation.settings import read_toml
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
@click.option(
    "--config",
    type=options.FOLDER,
    metavar="FILE",
    help="Settings as TOML, by the names of the options; options on the command line count more.",
)
@click.option(
    "--data",
    metavar="scenes|DIR",
    help="The test scenes, a VOCdevkit folder, or a folder of images, to which --labels belongs.",
)
@options.out("Folder for the results.")
@click.option(
    "--set", metavar="A/B", help="Of scenes FAMILY/SPLIT, of VOC YEAR/LIST.  [default: .../test]"
)
@click.option("--images", type=int, metavar="NUMBER", help="Images at the most.  [default: all]")
@options.attack(required=False)
@click.option(
    "--slots",
    type=int,
    metavar="NUMBER",
    help="Images attacked at a time.  [default: 1 on the CPU, 8 on a GPU]",
)
@click.option("--prepare/--no-prepare", default=True, help="Attack a faster copy of the network.")
@click.option("--perturbations", is_flag=True, help="Write them too, unrounded.")
@click.option(
    "--figures", type=int, metavar="NUMBER", default=4, help="Images to make a figure of."
)
@click.option("--strict", is_flag=True, help="Stop at an image that cannot be attacked.")
@click.pass_context
def command(context: click.Context, /, config: Path | None, **given: Any) -> int:
    """Attack a data set into a folder, by one process or, under torchrun, by many.

    A run that was killed goes on where it stopped when the same command is given again. The folder
    gets images/NAME.png, images.jsonl with one line an image, summary.json, speed.json,
    settings.toml and some figures. An image that is broken or whose labels are is put on record
    with the reason, and passed over.
    """
    kept = {} if config is None else read_toml(config)
    for name, value in kept.items():
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            given[name] = value
    settings = Settings.of(given)
    with faults.of_model(settings.model):
        return run(settings, ImageProgress())

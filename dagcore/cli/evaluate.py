"""`dagcore evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..evaluation import faults, reports
from ..evaluation.evaluate import run_evaluation
from ..evaluation.evaluator import GRIDS, EvaluationSettings
from ..evaluation.protocols import PROTOCOLS
from . import options
from .progress import EvaluationProgress

EXAMPLES = """
\b
Examples:
  dagcore evaluate --data scenes --model DL-VGG --out results
  dagcore evaluate --data photos --labels maps --model fcn_resnet50 --weights fcn.pth \\
      --epsilon 2/255,4/255 --out results
  dagcore evaluate --data VOCdevkit --model R-FCN-RN50 --weights voc.pth \\
      --protocol detection-tog-2020 --out results
  torchrun --nproc-per-node 8 -m dagcore evaluate --config evaluation.toml
  dagcore evaluate --compare results others
"""


@click.command("evaluate", epilog=EXAMPLES)
@options.data_set
@options.network(required=False)
@click.option(
    "--protocol",
    metavar="NAME|FILE",
    default="sea-2024",
    help=f"Which attacks: {', '.join(PROTOCOLS)}, or a TOML file.",
)
@click.option(
    "--epsilon",
    metavar="NUMBERS",
    help="Radii in place of the protocol's, for images in 0..1: 4/255,8/255.",
)
@click.option(
    "--levels",
    type=click.Choice(tuple(GRIDS)),
    default="none",
    help="Attack images in memory (none), on the levels of 8-bit files (256), or both. What is "
    "left of an attack in 8-bit files is always measured.",
)
@click.option(
    "--skip-fooled/--no-skip-fooled",
    default=True,
    help="An image without a right pixel is not attacked again in a larger ball.",
)
@options.count(
    "--check",
    least=0,
    default=2,
    help="Images on which the evaluation itself is checked (gradients, plateaus, ...).",
)
@click.option(
    "--surrogate",
    metavar="SPEC",
    help="Another network, whose adversarial examples are checked to be no stronger.",
)
@options.work("Worst images to make a figure of.")
@options.device
@options.seed()
@click.option(
    "--compare",
    nargs=2,
    type=options.FOLDER,
    metavar="A B",
    help="Put the results in two folders side by side, and do nothing else.",
)
@click.pass_context
def command(
    context: click.Context,
    /,
    config: Path | None,
    compare: tuple[Path, Path] | None,
    **given: Any,
) -> int:
    """Measure robustness by a named protocol, at worst case, into a folder.

    Each image is attacked by all attacks of the protocol. The folder gets report.html, report.md,
    summary.json, images.jsonl with one line an image, and images/NAME.png, the worst example of
    each in 8 bits. An evaluation that was killed resumes where it stopped.
    """
    if compare is not None:
        click.echo(reports.compare(*compare))
        return 0
    settings = EvaluationSettings.of(options.merged(context, config, given))
    with faults.of_model(settings.model):
        return run_evaluation(settings, EvaluationProgress())

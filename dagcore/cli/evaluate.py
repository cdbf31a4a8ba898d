"""The command `dagcore evaluate`."""

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
    help=f"Protocol with the attacks to run: {', '.join(PROTOCOLS)}, or a TOML file.",
)
@click.option(
    "--epsilon",
    metavar="NUMBERS",
    help="Radii instead of the protocol's, for images in 0..1, such as 4/255,8/255.",
)
@click.option(
    "--levels",
    type=click.Choice(tuple(GRIDS)),
    default="none",
    help="Attack images in memory (none), on the levels of an 8-bit file (256), or both. Scores "
    "after rounding to 8 bits are measured in any case.",
)
@click.option(
    "--skip-fooled/--no-skip-fooled",
    default=True,
    help="Skip the larger balls for an image that has no correct pixel left.",
)
@options.count(
    "--check",
    least=0,
    default=2,
    help="Number of images on which the evaluation itself is checked (gradients, plateaus, ...).",
)
@click.option(
    "--surrogate",
    metavar="SPEC",
    help="Another network for the same classes, given like --model. A check tries its adversarial "
    "examples on the network, whose own should be stronger.",
)
@options.work("Number of worst images to draw a figure of.")
@options.device
@options.seed()
@click.option(
    "--compare",
    nargs=2,
    type=options.FOLDER,
    metavar="A B",
    help="Only print the results in two folders side by side.",
)
@click.pass_context
def command(
    context: click.Context,
    /,
    config: Path | None,
    compare: tuple[Path, Path] | None,
    **given: Any,
) -> int:
    """Measure worst-case robustness under a named protocol.

    Each image is attacked by every attack of the protocol. The output folder gets report.html,
    report.md, summary.json, images.jsonl (one line per image) and images/NAME.png (each image's
    worst adversarial example, in 8 bits). An evaluation that was killed resumes where it stopped
    when the same command is given again.
    """
    if compare is not None:
        click.echo(reports.compare(*compare))
        return 0
    settings = EvaluationSettings.of(options.merged(context, config, given))
    with faults.of_model(settings.model):
        return run_evaluation(settings, EvaluationProgress())

"""Options that several commands share, and the functions that read their values."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..checks import GOALS, LOSSES, NORMS, fraction
from ..evaluation.options import ATTACKS, LEVELS, parse_size
from ..evaluation.settings import read_toml

Decorator = Callable[[Any], Any]

FOLDER = click.Path(path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def size(_: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    """Parse a size WIDTHxHEIGHT into (height, width)."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error


def existing(_: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Return the path; raise a usage error if it does not exist."""
    if path is not None and not path.exists():
        raise click.UsageError(f"{parameter.opts[0]} {path} does not exist")
    return path


def all_of(*options: Decorator) -> Decorator:
    """Combine several options, in order, into one decorator."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


def number(name: str, **settings: Any) -> Decorator:
    """Return an option for a number, which may be written as a fraction such as 0.5/255."""

    def read(_: click.Context, parameter: click.Parameter, value: Any) -> float | None:
        try:
            return None if value is None else fraction(str(parameter.name), value)
        except ValueError as error:
            raise click.BadParameter(f"{error}.") from error

    return click.option(name, metavar="NUMBER", callback=read, **settings)


def count(name: str, *, least: int = 1, **settings: Any) -> Decorator:
    """Return an option for an integer of at least `least`."""
    return click.option(name, type=click.IntRange(min=least), metavar="NUMBER", **settings)


def out(content: str, **settings: Any) -> Decorator:
    """Return the option `--out`, the folder that a command writes to."""
    return click.option("--out", type=FOLDER, metavar="DIR", help=content, **settings)


def seed(default: int | None = 0, note: str = "") -> Decorator:
    """Return the option `--seed`, the seed of all random choices."""
    return count("--seed", least=0, default=default, help=f"Seed of all random choices.{note}")


device = click.option(
    "--device", metavar="NAME", help="cpu, cuda or cuda:NUMBER.  [default: cuda if there is a GPU]"
)


def model(*, note: str = "", **settings: Any) -> Decorator:
    """Return the options `--model` and `--weights`."""
    return all_of(
        click.option(
            "--model",
            metavar="SPEC",
            help="The network: one of the zoo (DL-VGG, R-FCN-RN50, ...; see dagcore zoo list), a "
            "segmentation network or detector of torchvision (fcn_resnet50, "
            f"fasterrcnn_resnet50_fpn, ...), demo, or package.module:function for your own.{note}",
            **settings,
        ),
        click.option(
            "--weights",
            type=FILE,
            metavar="FILE",
            help="State dict (.pth or .safetensors) for a network of the zoo or of torchvision.  "
            "[default: the zoo's shipped weights, torchvision's download]",
        ),
    )


levels = click.option(
    "--levels",
    type=click.Choice(LEVELS),
    default=LEVELS[0],
    show_default=True,
    help="Attack images on the 256 levels of an 8-bit file, or in memory without rounding (none).",
)


def network(*, required: bool) -> Decorator:
    """Return the options for the network, its input size and the labels."""
    return all_of(
        model(required=required),
        click.option(
            "--size",
            metavar="WIDTHxHEIGHT",
            help="Input size of a network that takes one size only. Images are resized to it "
            "differentiably, and files keep their size.  [default: no resizing]",
        ),
        click.option(
            "--labels",
            type=FOLDER,
            callback=existing,
            metavar="FILE|DIR",
            help="True labels: a folder with NAME.png for each image, whose values are classes "
            "(255: ignored), or such a file for a single image. For detectors NAME.xml as in VOC, "
            "or one .json as in COCO.  [default: the network's prediction on the clean image]",
        ),
    )


data_set = all_of(
    click.option(
        "--config",
        type=FOLDER,
        metavar="FILE",
        help="TOML file with settings, named as the options are. Options on the command line take "
        "precedence.",
    ),
    click.option(
        "--data",
        metavar="scenes|DIR",
        help="scenes, a VOCdevkit folder, or a folder of images. --set chooses a part of scenes or "
        "VOC; --labels gives the labels of a folder of images.",
    ),
    out("Folder for the results."),
    click.option(
        "--set",
        metavar="A/B",
        help="Part of the data: FAMILY/SPLIT for scenes, YEAR/LIST for VOC.  "
        "[default: 07/test for scenes, 2007/test for VOC]",
    ),
    click.option(
        "--images",
        type=int,
        metavar="NUMBER",
        help="Maximum number of images.  [default: all; 200 of the scenes]",
    ),
)


def work(figures: str) -> Decorator:
    """Return the options for how a data set is processed."""
    return all_of(
        click.option(
            "--slots",
            type=int,
            metavar="NUMBER",
            help="Number of images attacked at a time.  [default: 1 on the CPU, 8 on a GPU]",
        ),
        click.option(
            "--prepare/--no-prepare", default=True, help="Attack a faster copy of the network."
        ),
        click.option("--figures", type=int, metavar="NUMBER", default=4, help=figures),
        click.option("--strict", is_flag=True, help="Stop if an image cannot be attacked."),
    )


def merged(context: click.Context, config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Merge settings of a file with those of the command line, which take precedence."""
    kept = {} if config is None else read_toml(config)
    for name, value in kept.items():
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            given[name] = value
    return given


def attack(*, required: bool) -> Decorator:
    """Return the options of an attack: the fields of `AttackOptions`, and `--labels`."""
    return all_of(
        network(required=required),
        click.option(
            "--attack",
            type=click.Choice(tuple(ATTACKS)),
            default="dag",
            show_default=True,
            help="Dense Adversary Generation (dag), or an attack on a dense loss in a ball: PGD, "
            "SegPGD, CosPGD or Auto-PGD (apgd).",
        ),
        click.option(
            "--adversarial",
            metavar="HOW",
            help="Adversarial labels: permutation (of the classes, at random), random (for each "
            "target), runner-up (the best wrong class), a class (number or name), vanish (the "
            "background, for detectors), or a pattern: circle, square, stripes, text:WORDS or "
            "mask:FILE. With DAG a pattern implies --goal reach. untargeted: no adversarial "
            "labels; only with a dense loss.  [default: permutation for DAG, untargeted for the "
            "others]",
        ),
        click.option(
            "--foreground",
            metavar="CLASS",
            help="Class inside the pattern.  [default: a random class that is not in the image]",
        ),
        click.option(
            "--background",
            metavar="CLASS",
            help="Class outside the pattern.  [default: the most frequent label]",
        ),
        click.option(
            "--loss",
            type=click.Choice(LOSSES),
            help="Loss of PGD and Auto-PGD.  [default: cross-entropy]",
        ),
        click.option(
            "--norm",
            type=click.Choice(NORMS),
            help="Norm of the ball. Not for DAG.  [default: linf]",
        ),
        number("--gamma", help="Step length of DAG, for images in 0..1.  [default: 0.5/255]"),
        number(
            "--alpha",
            help="Step length of PGD, SegPGD and CosPGD, for images in 0..1.  [default: 0.01]",
        ),
        count("--max-iter", least=0, help="Maximum number of updates of DAG.  [default: 200]"),
        count(
            "--steps",
            least=0,
            help="Maximum number of updates of the other attacks.  [default: 20; Auto-PGD: 100]",
        ),
        count(
            "--restarts",
            help="Number of runs from different random points. Not for DAG.  [default: 1]",
        ),
        click.option(
            "--goal",
            type=click.Choice(GOALS),
            help="Goal of DAG: that no target keeps its label (leave), or that every target gets "
            "its adversarial label (reach).  [default: leave; reach for a pattern]",
        ),
        number(
            "--epsilon",
            help="Radius of the ball around the image, for images in 0..1. With --norm linf it is "
            "the largest change of a pixel.  [default: none for DAG, 8/255 for the others]",
        ),
        number("--tolerance", default="0", help="Fraction of the targets that may stay active."),
        number(
            "--margin",
            help="Margin of DAG: lead that a wrong class (with --goal reach the adversarial label) "
            "needs before a target counts as fooled, in units of the scores.  [default: 0]",
        ),
        levels,
        device,
        seed(),
    )

"""Options that several commands have, each written once, and what their values are read by."""

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
    """Read a size WIDTHxHEIGHT as (height, width)."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error


def existing(_: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file or folder that is not there."""
    if path is not None and not path.exists():
        raise click.UsageError(f"{parameter.opts[0]} {path} does not exist")
    return path


def all_of(*options: Decorator) -> Decorator:
    """Several options in order."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


def number(name: str, **settings: Any) -> Decorator:
    """A number, also written as a fraction: 0.5/255."""

    def read(_: click.Context, parameter: click.Parameter, value: Any) -> float | None:
        try:
            return None if value is None else fraction(str(parameter.name), value)
        except ValueError as error:
            raise click.BadParameter(f"{error}.") from error

    return click.option(name, metavar="NUMBER", callback=read, **settings)


def count(name: str, *, least: int = 1, **settings: Any) -> Decorator:
    """An integer that is at least `least`."""
    return click.option(name, type=click.IntRange(min=least), metavar="NUMBER", **settings)


def out(content: str, **settings: Any) -> Decorator:
    """The folder that a command writes to."""
    return click.option("--out", type=FOLDER, metavar="DIR", help=content, **settings)


def seed(default: int | None = 0, note: str = "") -> Decorator:
    """The seed of everything that is drawn."""
    return count("--seed", least=0, default=default, help=f"Seed of all random choices.{note}")


device = click.option(
    "--device", metavar="NAME", help="cpu, cuda or cuda:NUMBER.  [default: cuda where there is one]"
)


def model(*, note: str = "", **settings: Any) -> Decorator:
    """The network, and its weights."""
    return all_of(
        click.option(
            "--model",
            metavar="SPEC",
            help="The network: one of the zoo's (DL-VGG, R-FCN-RN50, ...: see dagcore zoo list), a "
            "segmentation network or detector of torchvision (fcn_resnet50, "
            f"fasterrcnn_resnet50_fpn, ...), demo, or package.module:function for your own.{note}",
            **settings,
        ),
        click.option(
            "--weights",
            type=FILE,
            metavar="FILE",
            help="State dict for a network of the zoo or of torchvision (.pth or .safetensors).  "
            "[default: the zoo's own, torchvision's download]",
        ),
    )


levels = click.option(
    "--levels",
    type=click.Choice(LEVELS),
    default=LEVELS[0],
    show_default=True,
    help="Attack images as their 8-bit files hold them, at 256 levels, or as they are in memory: "
    "none.",
)


def network(*, required: bool) -> Decorator:
    """What is attacked, the size it takes, and the labels."""
    return all_of(
        model(required=required),
        click.option(
            "--size",
            metavar="WIDTHxHEIGHT",
            help="Size that images are resized to for a network that takes one size only, "
            "differentiably: the files keep their size.  [default: images as they are]",
        ),
        click.option(
            "--labels",
            type=FOLDER,
            callback=existing,
            metavar="FILE|DIR",
            help="True labels: a folder with NAME.png for each image, whose values are classes "
            "(255: ignored), or the file of a single image; for detectors NAME.xml as in VOC, or "
            "one .json as in COCO.  [default: what the network sees in the clean image]",
        ),
    )


data_set = all_of(
    click.option(
        "--config",
        type=FOLDER,
        metavar="FILE",
        help="Settings as TOML, by the names of the options; options on the command line "
        "count more.",
    ),
    click.option(
        "--data",
        metavar="scenes|DIR",
        help="The test scenes, a VOCdevkit folder, or a folder of images, to which --labels "
        "belongs.",
    ),
    out("Folder for the results."),
    click.option(
        "--set",
        metavar="A/B",
        help="Of scenes FAMILY/SPLIT, of VOC YEAR/LIST.  [default: .../test]",
    ),
    click.option(
        "--images", type=int, metavar="NUMBER", help="Images at the most.  [default: all]"
    ),
)


def work(figures: str) -> Decorator:
    """How work on a data set is done."""
    return all_of(
        click.option(
            "--slots",
            type=int,
            metavar="NUMBER",
            help="Images attacked at a time.  [default: 1 on the CPU, 8 on a GPU]",
        ),
        click.option(
            "--prepare/--no-prepare", default=True, help="Attack a faster copy of the network."
        ),
        click.option("--figures", type=int, metavar="NUMBER", default=4, help=figures),
        click.option("--strict", is_flag=True, help="Stop at an image that cannot be attacked."),
    )


def merged(context: click.Context, config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Settings from a file, and over them those from the command line."""
    kept = {} if config is None else read_toml(config)
    for name, value in kept.items():
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            given[name] = value
    return given


def attack(*, required: bool) -> Decorator:
    """What is attacked by what, where, and how: the fields of `AttackOptions` and the labels."""
    return all_of(
        network(required=required),
        click.option(
            "--attack",
            type=click.Choice(tuple(ATTACKS)),
            default="dag",
            show_default=True,
            help="Dense Adversary Generation, or an attack on a dense loss in a ball: PGD, SegPGD, "
            "CosPGD, Auto-PGD.",
        ),
        click.option(
            "--adversarial",
            metavar="HOW",
            help="Adversarial labels: permutation (of the classes, at random), random (each "
            "target), runner-up, a class (its number or name), vanish (for detectors: the "
            "background), or a pattern: circle, square, stripes, text:WORDS, mask:FILE. For DAG a "
            "pattern implies --goal reach. untargeted: none, for a dense loss alone.  [default: "
            "permutation for DAG, untargeted for the others]",
        ),
        click.option(
            "--foreground",
            metavar="CLASS",
            help="Class inside the pattern.  [default: one that is not in the image, at random]",
        ),
        click.option(
            "--background",
            metavar="CLASS",
            help="Class outside the pattern.  [default: the most frequent label]",
        ),
        click.option(
            "--loss",
            type=click.Choice(LOSSES),
            help="Of PGD and Auto-PGD.  [default: cross-entropy]",
        ),
        click.option(
            "--norm", type=click.Choice(NORMS), help="Of the ball; not of DAG.  [default: linf]"
        ),
        number("--gamma", help="Step length of DAG, for images in 0..1.  [default: 0.5/255]"),
        number(
            "--alpha",
            help="Step length of PGD, SegPGD and CosPGD, for images in 0..1.  [default: 0.01]",
        ),
        count("--max-iter", least=0, help="Updates of DAG at the most.  [default: 200]"),
        count(
            "--steps",
            least=0,
            help="Updates of the others at the most.  [default: 20, of Auto-PGD 100]",
        ),
        count(
            "--restarts",
            help="Runs from different random points; not of DAG, which has none.  [default: 1]",
        ),
        click.option(
            "--goal",
            type=click.Choice(GOALS),
            help="Of DAG: until no target is right, or until all are at their adversarial label.  "
            "[default: leave, reach for a pattern]",
        ),
        number(
            "--epsilon",
            help="Radius of the ball around the image, for images in 0..1: with the norm linf, the "
            "largest change of a pixel.  [default: none for DAG, 8/255 for the others]",
        ),
        number("--tolerance", default="0", help="Fraction of the targets that may be left active."),
        number(
            "--margin",
            help="Of DAG: by how much a target must be won to count no more, in the units of the "
            "scores.  [default: 0]",
        ),
        levels,
        device,
        seed(),
    )

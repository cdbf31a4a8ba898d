"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .. import __version__, info
from ..checks import GOALS, fraction
from ..metrics import PROTOCOLS

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


RUN_EXAMPLES = """
\b
Examples:
  dagcore run --data scenes --model DL-VGG --out results
  dagcore run --data photos --labels maps --model fcn_resnet50 --weights fcn.pth --out results
  dagcore run --data VOCdevkit --set 2007/test --model R-FCN-RN50 --weights voc.pth --out results
  torchrun --nproc-per-node 8 -m dagcore run --config run.toml
"""


def number(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Read a number, also as a fraction: 0.5/255."""
    try:
        return None if value is None else fraction("it", value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error


FOLDER = click.Path(path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dagcore")
def cli() -> None:
    """Dense Adversary Generation: adversarial examples for segmentation and detection."""


@cli.command(epilog=EXAMPLES)
@click.argument("images", nargs=-1, required=True, type=FILE, metavar="IMAGE...")
@click.option(
    "--model",
    required=True,
    metavar="SPEC",
    help="The network: one of the zoo's (DL-VGG, R-FCN-RN50, ...: see dagcore zoo list), a "
    "segmentation network or detector of torchvision (fcn_resnet50, fasterrcnn_resnet50_fpn, "
    "...), demo, or package.module:function for your own.",
)
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="Folder for the output.")
@click.option(
    "--weights",
    type=FILE,
    help="State dict for a network of the zoo or of torchvision (.pth or .safetensors).  "
    "[default: the zoo's own, torchvision's download]",
)
@click.option(
    "--labels",
    type=click.Path(exists=True, path_type=Path),
    metavar="FILE|DIR",
    help="True labels: an image whose values are classes (255: ignored), or a folder with "
    "NAME.png for each image; for detectors NAME.xml as in VOC, or one .json as in COCO.  "
    "[default: what the network sees in the clean image]",
)
@click.option(
    "--adversarial",
    default="permutation",
    show_default=True,
    metavar="HOW",
    help="Adversarial labels: permutation (of the classes, at random), random (each target), "
    "runner-up, a class (its number or name), vanish (for detectors: the background), or a "
    "pattern: circle, square, stripes, text:WORDS, mask:FILE. A pattern implies --goal reach.",
)
@click.option(
    "--foreground",
    metavar="CLASS",
    help="Class inside the pattern.  [default: one that is not in the image, at random]",
)
@click.option(
    "--background",
    metavar="CLASS",
    help="Class outside the pattern.  [default: the most frequent label]",
)
@click.option(
    "--gamma",
    callback=number,
    metavar="NUMBER",
    default="0.5/255",
    show_default=True,
    help="Step length, for images in 0..1.",
)
@click.option(
    "--max-iter",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    default=200,
    show_default="200",
    help="Updates at the most.",
)
@click.option(
    "--goal",
    type=click.Choice(GOALS),
    help="Until no target is right, or until all are at their adversarial label.  [default: leave]",
)
@click.option(
    "--epsilon",
    callback=number,
    metavar="NUMBER",
    help="Largest change of a pixel, for images in 0..1.",
)
@click.option(
    "--tolerance",
    callback=number,
    metavar="NUMBER",
    default="0",
    show_default=True,
    help="Fraction of the targets that may be left active.",
)
@click.option("--device", help="cpu, cuda or cuda:NUMBER.  [default: cuda where there is one]")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    default=0,
    show_default="0",
    help="Of all random choices.",
)
def attack(**options: Any) -> None:
    """Attack images, each on its own.

    For each IMAGE the folder gets NAME.png (the attacked image), NAME.perturbation.safetensors,
    NAME.json (the numbers and all settings) and NAME.figure.png.
    """
    from ..evaluation.attack_files import Request, plan
    from .progress import Reporter, show_table

    work = plan(Request(**options))
    outcomes = []
    with Reporter(len(work.jobs)) as reporter:
        names = [job.image.name for job in work.jobs]
        for outcome in work.run(lambda k, m, active: reporter.update(names[k], m, active)):
            outcomes.append(outcome)
            reporter.finished([outcome])
    show_table(["image"], [([outcome.name], outcome) for outcome in outcomes])
    click.echo(f"written to {work.request.out}")


@cli.command("run", epilog=RUN_EXAMPLES)
@click.option(
    "--config",
    type=FOLDER,
    metavar="FILE",
    help="Settings as TOML, by the names of the options; options on the command line count more.",
)
@click.option(
    "--data",
    metavar="scenes|DIR",
    help="The test scenes, a VOCdevkit folder, or a folder of images.",
)
@click.option("--model", metavar="SPEC", help="The network, as for dagcore attack.")
@click.option("--out", type=FOLDER, metavar="DIR", help="Folder for the results.")
@click.option("--weights", type=FILE, help="State dict, as for dagcore attack.")
@click.option(
    "--labels",
    type=FOLDER,
    metavar="DIR|FILE",
    help="For a folder of images: a folder with NAME.png, for detectors NAME.xml as in VOC, or a "
    "file in COCO's format.  [default: what the network sees in the clean image]",
)
@click.option(
    "--set", metavar="A/B", help="Of scenes FAMILY/SPLIT, of VOC YEAR/LIST.  [default: .../test]"
)
@click.option("--images", type=int, metavar="NUMBER", help="Images at the most.  [default: all]")
@click.option("--adversarial", metavar="HOW", help="As for dagcore attack.")
@click.option("--foreground", metavar="CLASS", help="Class inside a pattern.")
@click.option("--background", metavar="CLASS", help="Class outside a pattern.")
@click.option("--gamma", metavar="NUMBER", help="Step length.  [default: 0.5/255]")
@click.option("--max-iter", type=int, metavar="NUMBER", help="Updates.  [default: 200]")
@click.option("--goal", type=click.Choice(GOALS), help="[default: leave; reach for a pattern]")
@click.option("--epsilon", metavar="NUMBER", help="Largest change of a pixel.  [default: none]")
@click.option(
    "--tolerance", metavar="NUMBER", help="Fraction of targets left active.  [default: 0]"
)
@click.option("--device", help="cpu, cuda or cuda:NUMBER.  [default: a GPU where there is one]")
@click.option("--seed", type=int, metavar="NUMBER", help="Of all random choices.  [default: 0]")
@click.option(
    "--slots",
    type=int,
    metavar="NUMBER",
    help="Images attacked at a time.  [default: 1 on the CPU, 8 on a GPU]",
)
@click.option(
    "--prepare/--no-prepare",
    default=None,
    help="Attack a faster copy of the network.  [default: prepare]",
)
@click.option("--perturbations", is_flag=True, default=None, help="Write them too, unrounded.")
@click.option(
    "--figures", type=int, metavar="NUMBER", help="Images to make a figure of.  [default: 4]"
)
@click.option(
    "--strict", is_flag=True, default=None, help="Stop at an image that cannot be attacked."
)
def run_data_set(config: Path | None, **options: Any) -> int:
    """Attack a data set into a folder, by one process or, under torchrun, by many.

    A run that was killed goes on where it stopped when the same command is given again. The folder
    gets images/NAME.png, images.jsonl with one line an image, summary.json, speed.json,
    settings.toml and some figures. An image that is broken or whose labels are is put on record
    with the reason, and passed over.
    """
    from ..evaluation import Settings, run
    from ..evaluation.settings import read_toml

    given = {} if config is None else read_toml(config)
    given |= {name: value for name, value in options.items() if value is not None}
    return run(Settings.of(given))


@cli.command()
@click.option(
    "--out", type=FOLDER, default="demo", show_default=True, metavar="DIR", help="Folder."
)
def demo(out: Path) -> None:
    """Attack the photographs of scikit-image, and say what to look at."""
    from . import demo as demonstration

    demonstration.run(out)


def size(_: click.Context, __: click.Parameter, value: str) -> tuple[int, int]:
    """Read a size: WIDTHxHEIGHT."""
    width, _cross, height = value.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise click.BadParameter(f"{value!r} is no size like 512x384.")
    return int(height), int(width)


@cli.command("bench")
@click.option("--model", metavar="SPEC", help="A segmentation network, as for dagcore attack.")
@click.option("--weights", type=FILE, help="State dict, as for dagcore attack.")
@click.option(
    "--size",
    callback=size,
    default="512x512",
    show_default=True,
    metavar="WIDTHxHEIGHT",
    help="Of the images for the network.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default="1", help="Images at a time."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=9,
    show_default="9",
    help="Of all sides in turn.",
)
@click.option("--device", help="cpu, cuda or cuda:NUMBER.  [default: cuda where there is one]")
@click.option("--json", "path", type=FOLDER, metavar="FILE", help="Keep all times there.")
def run_bench(
    model: str | None,
    weights: Path | None,
    size: tuple[int, int],
    batch: int,
    rounds: int,
    device: str | None,
    path: Path | None,
) -> None:
    """Time the ops on this machine, and an attack's updates on a network.

    Each beside the plain PyTorch reference and beside its floor: a copy of what an op reads, the
    bare network's gradient for an update. Medians and quartiles; the sides run in alternation.
    """
    from ..evaluation.targets import find_device
    from .bench import bench

    bench(model, weights, (batch, *size), rounds, str(find_device(device)), path)


@cli.command("info")
@click.option(
    "--require-cuda-kernels",
    is_flag=True,
    help="Exit with status 1 unless every op has its CUDA kernel.",
)
def show_info(require_cuda_kernels: bool) -> int:
    """Show versions, native kernels and devices."""
    return info.show(require_cuda_kernels)


@cli.group()
def zoo() -> None:
    """The paper's twelve networks: list, train and measure them."""


@zoo.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def zoo_list(as_json: bool) -> None:
    """Show the networks, and what is known about their weights."""
    from . import zoo as commands

    commands.show_list(as_json)


@zoo.command("train")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--out",
    type=FOLDER,
    default="zoo",
    show_default=True,
    metavar="DIR",
    help="Folder for checkpoints, losses and weights. A training that it has begun goes on.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Networks trained side by side, the cores shared among them.  [default: one per core]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="Of all random choices.  [default: each network's own, made from its name]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Images that each network sees.  [default: as many as the shipped one has seen]",
)
@click.option("--device", help="cpu, cuda or cuda:NUMBER.  [default: cuda where there is one]")
@click.option(
    "--install/--no-install",
    default=True,
    show_default=True,
    help="Put the weights into the package, where their names find them.",
)
def zoo_train(names: tuple[str, ...], **options: Any) -> None:
    """Train networks from scratch on scenes, all twelve where none is named.

    For each NAME the folder gets checkpoint, losses (NAME.jsonl, NAME.png) and
    NAME.safetensors.
    """
    from . import zoo as commands

    commands.train(names, **options)


@zoo.command("evaluate")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    metavar="NUMBER",
    help="Test scenes.",
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default=PROTOCOLS[0],
    show_default=True,
    help="Of detectors' average precision.",
)
@click.option("--device", help="cpu, cuda or cuda:NUMBER.  [default: cuda where there is one]")
def zoo_evaluate(names: tuple[str, ...], images: int, protocol: str, device: str | None) -> None:
    """Measure shipped networks on unseen scenes, all twelve where none is named."""
    from . import zoo as commands

    commands.show_scores(names, images, protocol, device)


@cli.group()
def paper() -> None:
    """The paper's experiments, on the zoo's networks."""


def experiment(command: Any) -> Any:
    """The options that all of the paper's experiments have."""
    options = [
        click.option(
            "--out",
            type=FOLDER,
            default="paper",
            show_default=True,
            metavar="DIR",
            help="Folder for the results. Perturbations that it has are used again.",
        ),
        click.option(
            "--images",
            type=click.IntRange(min=1),
            default=100,
            show_default=True,
            metavar="NUMBER",
            help="Images to attack.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            metavar="NUMBER",
            default=0,
            show_default="0",
            help="Of all random choices.",
        ),
        click.option(
            "--device", help="cpu, cuda or cuda:NUMBER.  [default: cuda where there is one]"
        ),
        click.option(
            "--data",
            default="scenes",
            show_default=True,
            metavar="scenes|DIR",
            help="The test scenes, or the test images of VOC2007 in a VOCdevkit folder.",
        ),
        click.option(
            "--weights",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            metavar="DIR",
            help="Folder with NETWORK.safetensors or NETWORK.pth.  [default: the zoo's own]",
        ),
        click.option(
            "--jobs",
            type=click.IntRange(min=1),
            metavar="NUMBER",
            help="Processes side by side.  [default: one per core, one on a GPU]",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@paper.command("all")
@experiment
def paper_all(**options: Any) -> None:
    """Make every table, figure and example, and one page with all of them, index.html.

    What is already there is used again; a run that was interrupted goes on where it stopped.
    """
    from ..paper import Setup
    from . import paper as commands

    commands.everything(Setup(**options))


@paper.command("table")
@click.argument("name", type=click.Choice(("segmentation", "detection", "cross-task")))
@experiment
def paper_table(name: str, **options: Any) -> None:
    """Make one of the paper's tables.

    Networks attacked by their own perturbations and by others', alone, added up and permuted. It
    is shown beside the paper's own numbers.
    """
    from ..paper import Setup
    from . import paper as commands

    commands.table(name, Setup(**options))


@paper.command("figure")
@click.argument("name", type=click.Choice(("denseness", "convergence", "perceptibility", "fancy")))
@click.argument("networks", nargs=-1, metavar="[NETWORK]...")
@experiment
def paper_figure(name: str, networks: tuple[str, ...], **options: Any) -> None:
    """Make a figure with its table, of NETWORKs or of the paper's.

    denseness: two-stage detectors attacked with more and less dense proposals. convergence: active
    targets against updates, and which images do not end within the budget. perceptibility: how
    visible each network's perturbations are. fancy: prescribed segmentations, several networks
    fooled at once, noise that is seen as an object.
    """
    from ..paper import Setup
    from . import paper as commands

    commands.figure(name, Setup(**options), networks)


def run(argv: Sequence[str]) -> int:
    """Run a command line; bad input gives one line on stderr, and exit status 2."""
    arguments = list(argv) or ["--help"]
    program = f"dagcore {arguments[0]}" if arguments[0] in cli.commands else "dagcore"
    try:
        status = cli.main(arguments, prog_name="dagcore", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.Abort:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except click.ClickException as error:
        message = error.format_message()
    except ModuleNotFoundError as error:
        message = f'{error.name} is missing: pip install "dagcore[cli]"'
    except (ValueError, TypeError, OSError, ImportError) as error:
        message = str(error)
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2

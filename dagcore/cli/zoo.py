"""The commands `dagcore zoo list`, `train` and `evaluate`."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import queue
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import click
import torch

from ..data import SCENE_CLASSES, Example, Scenes
from ..data.scenes import MATERIAL
from ..defences.training import INNER, inner
from ..errors import ArgumentError
from ..evaluation.options import find_device
from ..files import atomic_write
from ..metrics import PROTOCOLS, Score
from ..processes import cores, pool
from ..zoo import training
from ..zoo.checkpoint import read_metadata
from ..zoo.evaluation import evaluate
from ..zoo.registry import ENTRIES, EVERY, Adversary, Entry, build, find, load
from . import options
from .progress import Counter, TrainingProgress, print_table

TELL_SECONDS = 0.5  # between two messages of a process

EXAMPLES = """
\b
Examples:
  dagcore zoo list
  dagcore zoo evaluate DL-VGG FR-VGG-07 --images 100
  dagcore zoo train FCN-VGG --out zoo
"""
LIST_EXAMPLES = """
\b
Examples:
  dagcore zoo list
  dagcore zoo list --json
"""
EVALUATE_EXAMPLES = """
\b
Examples:
  dagcore zoo evaluate
  dagcore zoo evaluate FR-ZF-07 --images 50 --protocol coco
  dagcore zoo evaluate DL-VGG --material 0
"""
TRAIN_EXAMPLES = """
\b
Examples:
  dagcore zoo train DL-VGG
  dagcore zoo train "FCN-Alex*" --samples 8000 --start-samples 16000 --out quick
  dagcore zoo train FCN-VGG --adversarial pgd --epsilon 4/255 --steps 7
"""


def entries(names: Sequence[str], default: Sequence[Entry]) -> list[Entry]:
    """Return the entries of `names`, or the default if there are no names."""
    return list(dict.fromkeys(find(name) for name in names)) or list(default)


def facts(entry: Entry) -> dict[str, Any]:
    """Return what `list` shows of a network; what only weights can tell is None without them."""
    with torch.device("meta"):
        network = build(entry.name, num_classes=len(SCENE_CLASSES))
    there = entry.path.is_file()
    known = read_metadata(entry.path) if there else {"training_set": entry.training_set}
    content = entry.path.read_bytes() if there else None
    return {
        "name": entry.name,
        "task": entry.task,
        "training_set": known.get("training_set"),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "bytes": None if content is None else len(content),
        "measure": measure_of(entry),
        "score": known.get("score"),
        "sha256": None if content is None else hashlib.sha256(content).hexdigest(),
    }


def measure_of(entry: Entry, protocol: str = "voc2007") -> str:
    """Return the name of a network's score."""
    return "mIoU" if entry.task == "segmentation" else f"mAP ({protocol})"


@click.group("zoo", epilog=EXAMPLES)
def command() -> None:
    """List, train and evaluate the zoo's networks: the paper's twelve and FCOS-VGG."""


@command.command("list", epilog=LIST_EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_list(as_json: bool) -> None:
    """List the networks, and what is known about their weights."""
    rows = [facts(entry) for entry in EVERY]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = ("name", "task", "trained on", ">parameters", ">size", "measure", ">score", "SHA-256")
    table = []
    for row in rows:
        missing = row["sha256"] is None
        size = "-" if missing else f"{row['bytes'] / 1e6:.2f} MB"
        parameters = f"{row['parameters'] / 1e6:.2f} M"
        sha256 = "not trained yet" if missing else row["sha256"][:12]
        known = (row[key] for key in ("name", "task", "training_set"))
        table.append([*known, parameters, size, row["measure"], percent(row["score"]), sha256])
    print_table(columns, table)


def percent(value: float | None) -> str:
    """Format a score for a table."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


@command.command("evaluate", epilog=EVALUATE_EXAMPLES)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@options.count("--images", default=200, help="Number of test scenes.")
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default=PROTOCOLS[0],
    help="Protocol of average precision, for detectors.",
)
@options.number(
    "--material",
    default=MATERIAL,
    show_default=True,
    help="Contrast of the materials that tell the classes apart; 0 removes them.",
)
@options.device
def show_scores(
    names: tuple[str, ...], images: int, protocol: str, material: float, device: str | None
) -> None:
    """Evaluate networks on unseen scenes.

    Without NAME, all networks with weights are evaluated. The scores are shown beside those stored
    with the weights.
    """
    where = find_device(device)
    # Load all networks before the first is evaluated.
    default = [entry for entry in EVERY if entry.path.is_file()] or EVERY
    loaded = [(entry, load(entry.name, device=where)) for entry in entries(names, default)]
    scenes = Scenes("07", "test", count=images, material=material)
    table = []
    counter = Counter(transient=True)

    def counted(what: str) -> Iterator[Example]:
        counter.add(what, len(scenes))
        for scene in scenes:
            yield scene
            counter.advance(what)

    with counter:
        measured = [
            (entry, evaluate(network, counted(entry.name), protocol=protocol))
            for entry, network in loaded
        ]
    for entry, score in measured:
        known = read_metadata(entry.path)
        keys = {"voc2007": "score", "coco": "coco"}
        key = "score" if entry.task == "segmentation" else keys.get(protocol, "")
        scores = percent(score.mean), percent(known.get(key))
        what = entry.name, measure_of(entry, protocol)
        table.append([*what, *scores, worst(score, known["classes"])])
    print_table(("name", "measure", ">score", ">when trained", "worst class"), table)


def worst(score: Score, classes: Sequence[str]) -> str:
    """Return the class with the lowest score, and that score."""
    known = [(v, c) for v, c in zip(score.per_class, classes, strict=True) if not math.isnan(v)]
    return "-" if not known else f"{min(known)[1]} ({min(known)[0]:.1f})"


@command.command("train", epilog=TRAIN_EXAMPLES)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@options.out(
    "Folder for checkpoints, losses and weights. A training run begun there is resumed.",
    default="zoo",
)
@options.count(
    "--jobs",
    help="Number of networks trained in parallel, sharing the cores.  [default: one per core]",
)
@options.seed(default=None, note="  [default: made from each network's name]")
@options.count(
    "--samples",
    help="Number of images that each network sees.  [default: as for the shipped weights]",
)
@options.count(
    "--start-samples",
    help="Number of crops that each backbone sees first.  [default: as for the shipped weights]",
)
@options.count(
    "--test-scenes",
    default=200,
    show_default=True,
    help="Number of unseen scenes on which each trained network is measured.",
)
@click.option(
    "--adversarial",
    type=click.Choice(INNER),
    help="Train against this attack, on half of each batch. NAME becomes NAME-ATTACK.",
)
@options.number(
    "--epsilon", default="2/255", show_default=True, help="Radius of the attack's L-infinity ball."
)
@options.count("--steps", default=3, show_default=True, help="Number of updates of the attack.")
@options.device
@click.option(
    "--install",
    is_flag=True,
    help="Copy the weights into the package, over those that are loaded by name.",
)
def train(
    names: tuple[str, ...],
    jobs: int | None,
    device: str | None,
    install: bool,
    adversarial: str | None,
    epsilon: float,
    steps: int,
    **given: Any,
) -> None:
    """Train networks on scenes.

    Without NAME, the paper's twelve networks and FCOS-VGG are trained. The backbones are trained
    first, on crops, each once for all networks that have it. Each training runs in its own process.
    For each network and each backbone the folder gets a checkpoint (NAME.pt), the losses
    (NAME.jsonl, NAME.png) and the weights (NAME.safetensors).
    """
    adversary = None
    if adversarial is not None:
        inner(adversarial, epsilon, steps)  # raises if one of them is invalid
        adversary = Adversary(adversarial, epsilon, steps)
    chosen = entries(names, ENTRIES)
    if adversary is not None:
        chosen = [entry.against(adversary) for entry in chosen]
    if install and not set(chosen) <= set(EVERY):
        others = ", ".join(entry.name for entry in chosen if entry not in EVERY)
        raise ArgumentError(
            "--install requires networks that the zoo ships, with the same --adversarial, "
            f"--epsilon and --steps, got {others}"
        )
    settings = {**given, "device": str(find_device(device))}
    jobs = min(jobs or cores(), len(chosen))
    messages: Any = multiprocessing.get_context("spawn").Queue()
    followers: dict[tuple[str, float], list[Entry]] = {}
    for entry in chosen:
        followers.setdefault((entry.backbone, entry.width), []).append(entry)
    with TrainingProgress() as progress, pool(jobs, prepare, (messages,)) as processes:
        starts = {processes.submit(work_start, *of, settings): of for of in followers}
        networks: dict[Future[Path], Entry] = {}
        while starts or networks:
            waiting = [*starts, *networks]
            done, _ = wait(waiting, timeout=TELL_SECONDS, return_when=FIRST_COMPLETED)
            drain(messages, progress)
            for future in done:
                if future in networks:
                    collect(future, networks.pop(future), install, progress)
                    continue
                future.result()
                for entry in followers[starts.pop(future)]:
                    networks[processes.submit(work, entry, settings)] = entry


def collect(future: Future[Path], entry: Entry, install: bool, progress: TrainingProgress) -> None:
    """Install the weights of a finished training if wanted, and report its score."""
    path = future.result()
    known = read_metadata(path)
    if install:
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(entry.path) as temporary:
            shutil.copyfile(path, temporary)
    where = entry.path if install else path
    score = f"{measure_of(entry)} {percent(known['score'])}"
    progress.tell(f"{entry.name}: {score}, written to {where}")


def drain(messages: Any, progress: TrainingProgress) -> None:
    """Show the progress that the processes have sent."""
    while True:
        try:
            progress.update(messages.get_nowait())
        except queue.Empty:
            return


_messages: Any = None


def prepare(messages: Any) -> None:
    """Set up a process for trainings: keep the queue that it sends its progress to."""
    global _messages
    _messages = messages


def work_start(backbone: str, width: float, settings: Mapping[str, Any]) -> Path:
    """Train one backbone; called in a process of its own."""
    own = {"out": settings["out"], "device": settings["device"]}
    samples = settings["start_samples"]
    return training.train_start(backbone, width=width, samples=samples, callback=teller(), **own)


def work(entry: Entry, settings: Mapping[str, Any]) -> Path:
    """Train one network; called in a process of its own."""
    return training.train(entry, callback=teller(), **settings)


def teller() -> Callable[[training.Progress], None]:
    """Return a callback that sends a training's progress now and then, and at its end."""
    told = 0.0

    def tell(progress: training.Progress) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= TELL_SECONDS or progress.samples == progress.total:
            told = now
            _messages.put(progress)

    return tell

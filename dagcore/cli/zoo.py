"""`dagcore zoo list`, `train` and `evaluate`."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import queue
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import click
import torch

from ..data import SCENE_CLASSES
from ..evaluation.options import find_device
from ..files import atomic_write
from ..metrics import PROTOCOLS, Score
from ..processes import cores, pool
from ..zoo import training
from ..zoo.checkpoint import read_metadata
from ..zoo.evaluation import evaluate
from ..zoo.registry import ENTRIES, Entry, build, find, load
from . import options
from .progress import TrainingProgress, print_table

TELL_SECONDS = 0.5  # from one message of a process to the next


def entries(names: Sequence[str]) -> list[Entry]:
    """The entries of some names, all of them where there are none."""
    return list(dict.fromkeys(find(name) for name in names)) or list(ENTRIES)


def facts(entry: Entry) -> dict[str, Any]:
    """What `list` says of a network; None where there are no weights to say it of."""
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
    """The name of a network's score."""
    return "mIoU" if entry.task == "segmentation" else f"mAP ({protocol})"


@click.group("zoo")
def command() -> None:
    """The zoo's networks, the paper's twelve and FCOS-VGG: list, train and measure them."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show_list(as_json: bool) -> None:
    """Show the networks, and what is known about their weights."""
    rows = [facts(entry) for entry in ENTRIES]
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
    """A score for a table."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


@command.command("evaluate")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@options.count("--images", default=200, help="Test scenes.")
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default=PROTOCOLS[0],
    help="Protocol of the detectors' average precision.",
)
@options.device
def show_scores(names: tuple[str, ...], images: int, protocol: str, device: str | None) -> None:
    """Measure networks on unseen scenes, all of the zoo where none is named.

    The scores are shown beside those in the files of the weights.
    """
    where = find_device(device)
    # All of them before the first is measured.
    loaded = [(entry, load(entry.name, device=where)) for entry in entries(names)]
    table = []
    for entry, network in loaded:
        score = evaluate(network, count=images, protocol=protocol)
        known = read_metadata(entry.path)
        keys = {"voc2007": "score", "coco": "coco"}
        key = "score" if entry.task == "segmentation" else keys.get(protocol, "")
        scores = percent(score.mean), percent(known.get(key))
        what = entry.name, measure_of(entry, protocol)
        table.append([*what, *scores, worst(score, known["classes"])])
    print_table(("name", "measure", ">score", ">when trained", "worst class"), table)


def worst(score: Score, classes: Sequence[str]) -> str:
    """The class of lowest score."""
    known = [(v, c) for v, c in zip(score.per_class, classes, strict=True) if not math.isnan(v)]
    return "-" if not known else f"{min(known)[1]} ({min(known)[0]:.1f})"


@command.command("train")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@options.out(
    "Folder for checkpoints, losses and weights. A training that it has begun goes on.",
    default="zoo",
)
@options.count(
    "--jobs",
    help="Networks trained side by side, the cores shared among them.  [default: one per core]",
)
@options.seed(default=None, note="  [default: each network's own, made from its name]")
@options.count(
    "--samples",
    help="Images that each network sees.  [default: as many as the shipped one has seen]",
)
@options.device
@click.option(
    "--install/--no-install",
    default=True,
    help="Put the weights into the package, where their names find them.",
)
def train(
    names: tuple[str, ...], jobs: int | None, device: str | None, install: bool, **given: Any
) -> None:
    """Train networks from scratch on scenes, all of the zoo where none is named.

    Each in a process of its own. For each NAME the folder gets checkpoint, losses (NAME.jsonl,
    NAME.png) and NAME.safetensors.
    """
    chosen, settings = entries(names), {**given, "device": str(find_device(device))}
    jobs = min(jobs or cores(), len(chosen))
    messages: Any = multiprocessing.get_context("spawn").Queue()
    with TrainingProgress() as progress, pool(jobs, prepare, (messages,)) as processes:
        running = {processes.submit(work, entry.name, settings): entry for entry in chosen}
        while running:
            done, _ = wait(running, timeout=TELL_SECONDS, return_when=FIRST_COMPLETED)
            drain(messages, progress)
            for future in done:
                collect(future, running.pop(future), install, progress)


def collect(future: Future[Path], entry: Entry, install: bool, progress: TrainingProgress) -> None:
    """Take a finished training's weights."""
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
    """Show what the processes have told."""
    while True:
        try:
            progress.update(messages.get_nowait())
        except queue.Empty:
            return


_messages: Any = None


def prepare(messages: Any) -> None:
    """Set up a process for trainings."""
    global _messages
    _messages = messages


def work(name: str, settings: dict[str, Any]) -> Path:
    """Train one network in a process of its own."""
    told = 0.0

    def tell(progress: training.Progress) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= TELL_SECONDS or progress.samples == progress.total:
            told = now
            _messages.put(progress)

    return training.train(name, callback=tell, **settings)

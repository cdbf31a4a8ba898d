"""The bodies of `dagcore zoo list`, `train` and `evaluate`."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import queue
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..data import SCENE_CLASSES
from ..evaluation.targets import find_device
from ..files import atomic_write
from ..metrics import Score
from ..processes import cores, pool
from ..zoo import training
from ..zoo.checkpoint import read_metadata
from ..zoo.evaluation import evaluate
from ..zoo.registry import ENTRIES, Entry, build, find, load
from .progress import LINE_SECONDS, PLAIN_WIDTH, Bars

TELL_SECONDS = 0.5  # from one message of a process to the next


def entries(names: Sequence[str]) -> list[Entry]:
    """The entries of some names, all of them where there are none."""
    return list(dict.fromkeys(find(name) for name in names)) or list(ENTRIES)


def facts(entry: Entry) -> dict[str, Any]:
    """What `list` says of a network; None where there are no weights to say it of."""
    with torch.device("meta"):
        network = build(entry.name, num_classes=len(SCENE_CLASSES))
    found: dict[str, Any] = {
        "name": entry.name,
        "task": entry.task,
        "training_set": entry.training_set,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "bytes": None,
        "measure": measure_of(entry),
        "score": None,
        "sha256": None,
    }
    if entry.path.is_file():
        metadata = read_metadata(entry.path)
        content = entry.path.read_bytes()
        found |= {
            "training_set": metadata.get("training_set"),
            "bytes": len(content),
            "score": metadata.get("score"),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    return found


def measure_of(entry: Entry, protocol: str = "voc2007") -> str:
    """The name of a network's score."""
    return "mIoU" if entry.task == "segmentation" else f"mAP ({protocol})"


def show_list(as_json: bool) -> None:
    """Print what there is."""
    rows = [facts(entry) for entry in ENTRIES]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("name", "task", "trained on", "parameters", "size", "measure", "score"):
        right = column in ("parameters", "size", "score")
        table.add_column(column, justify="right" if right else "left")
    table.add_column("SHA-256")
    for row in rows:
        missing = row["sha256"] is None
        table.add_row(
            row["name"],
            row["task"],
            row["training_set"],
            f"{row['parameters'] / 1e6:.2f} M",
            "-" if missing else f"{row['bytes'] / 1e6:.2f} MB",
            row["measure"],
            percent(row["score"]),
            "not trained yet" if missing else row["sha256"][:12],
        )
    console().print(table)


def percent(value: float | None) -> str:
    """A score for a table."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def console() -> Console:
    """Stdout, wide enough where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def show_scores(names: Sequence[str], images: int, protocol: str, device: str | None) -> None:
    """Measure networks and print their scores beside those in their files."""
    where = find_device(device)
    # All of them before the first is measured.
    loaded = [(entry, load(entry.name, device=where)) for entry in entries(names)]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("name")
    table.add_column("measure")
    table.add_column("score", justify="right")
    table.add_column("when trained", justify="right")
    table.add_column("worst class")
    for entry, network in loaded:
        score = evaluate(network, count=images, protocol=protocol)
        known = read_metadata(entry.path)
        before = {"voc2007": known.get("score"), "coco": known.get("coco")}.get(protocol)
        if entry.task == "segmentation":
            before = known.get("score")
        table.add_row(
            entry.name,
            measure_of(entry, protocol),
            percent(score.mean),
            percent(before),
            worst(score, known["classes"]),
        )
    console().print(table)


def worst(score: Score, classes: Sequence[str]) -> str:
    """The class of lowest score."""
    known = [(v, c) for v, c in zip(score.per_class, classes, strict=True) if not math.isnan(v)]
    return "-" if not known else f"{min(known)[1]} ({min(known)[0]:.1f})"


def train(
    names: Sequence[str],
    *,
    out: Path,
    jobs: int | None,
    seed: int | None,
    samples: int | None,
    device: str | None,
    install: bool,
) -> None:
    """Train networks side by side, each in a process of its own, and install their weights."""
    chosen, where = entries(names), str(find_device(device))
    jobs = min(jobs or cores(), len(chosen))
    options = {"out": out, "seed": seed, "samples": samples, "device": where}
    messages: Any = multiprocessing.get_context("spawn").Queue()
    with Watch() as watch, pool(jobs, prepare, (messages,)) as processes:
        running = {processes.submit(work, entry.name, options): entry for entry in chosen}
        while running:
            done, _ = wait(running, timeout=TELL_SECONDS, return_when=FIRST_COMPLETED)
            drain(messages, watch)
            for future in done:
                collect(future, running.pop(future), install, watch)


def collect(future: Future[Path], entry: Entry, install: bool, watch: Watch) -> None:
    """Take a finished training's weights."""
    path = future.result()
    known = read_metadata(path)
    if install:
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(entry.path) as temporary:
            shutil.copyfile(path, temporary)
    where = entry.path if install else path
    watch.finished(entry.name, f"{measure_of(entry)} {percent(known['score'])}, written to {where}")


def drain(messages: Any, watch: Watch) -> None:
    """Show what the processes have told."""
    while True:
        try:
            watch.update(messages.get_nowait())
        except queue.Empty:
            return


_messages: Any = None


def prepare(messages: Any) -> None:
    """Set up a process for trainings."""
    global _messages
    _messages = messages


def work(name: str, options: dict[str, Any]) -> Path:
    """Train one network in a process of its own."""
    told = 0.0

    def tell(progress: training.Progress) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= TELL_SECONDS or progress.samples == progress.total:
            told = now
            _messages.put(progress)

    return training.train(name, callback=tell, **options)


class Watch(Bars):
    """Shows trainings on stderr: bars on a terminal, else a line for each now and then."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.tasks: dict[str, Any] = {}
        self.first: dict[str, tuple[float, int]] = {}
        self.line: dict[str, float] = {}

    def update(self, progress: training.Progress) -> None:
        """Show where a training stands."""
        now, name = time.monotonic(), progress.name
        start, before = self.first.setdefault(name, (now, progress.samples))
        speed = (progress.samples - before) / (now - start) if now > start else 0.0
        text = f"loss {progress.loss:.3f}  {speed:.0f} images/s"
        if self.bars is not None:
            if name not in self.tasks:
                self.tasks[name] = self.bars.add_task(name, total=progress.total, text="")
            self.bars.update(self.tasks[name], completed=progress.samples, text=text)
        elif now - self.line.get(name, -math.inf) >= LINE_SECONDS:
            self.line[name] = now
            left = (progress.total - progress.samples) / speed if speed else math.nan
            rest = "" if math.isnan(left) else f"  {left / 60:.1f} min left"
            self.tell(f"{name}: {progress.samples}/{progress.total}  {text}{rest}")

    def finished(self, name: str, text: str) -> None:
        """Say how a training ended."""
        self.tell(f"{name}: {text}")

    def tell(self, line: str) -> None:
        """Print a line, above the bars where there are bars."""
        if self.bars is not None:
            self.bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

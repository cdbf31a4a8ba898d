"""Progress on stderr and tables on stdout."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..evaluation.outcome import Outcome
from ..evaluation.reports import tables
from ..evaluation.robustness import told_radius

if TYPE_CHECKING:
    from typing_extensions import Self  # in Python 3.10

    from ..zoo import training


Row = Sequence[str]

PLAIN_WIDTH = 120  # of tables where stdout is not a terminal
MEASURES = ("aAcc", "mIoU", "mAcc", "mAP", "AP50 (COCO)")
OUTCOMES_WIDTH = 140  # likewise, of the table of outcomes
LINE_SECONDS = 15  # between two plain lines


class Bars:
    """Progress on stderr while a `with` block runs: bars on a terminal, plain lines elsewhere.

    Each piece of work has a name, and a bar of its own.
    """

    def __init__(self, *, transient: bool = False) -> None:
        self.transient, self.silent = transient, False
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.done: dict[str, int] = {}
        self.total: dict[str, int] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._told: dict[str, float] = {}

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if console.is_terminal and not self.silent:
            self.bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("elapsed,"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=console,
                transient=self.transient,
            )
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def begun(self, what: str, total: int, done: int) -> None:
        """Begin a piece of work of `total` items, of which `done` are done already."""
        self.total[what], self.done[what] = total, done
        self._began[what] = time.monotonic(), done

    def rate(self, what: str) -> float:
        """Return the number of items done per second."""
        begin, before = self._began[what]
        return (self.done[what] - before) / max(time.monotonic() - begin, 1e-9)

    def left(self, what: str) -> str:
        """Return the estimated time left, as text; empty while it is unknown."""
        rate = self.rate(what)
        if not rate:
            return ""
        seconds = round((self.total[what] - self.done[what]) / rate)
        return f"{datetime.timedelta(seconds=seconds)} left"

    def draw(self, what: str, state: str = "") -> None:
        """Update the bar of a piece of work, if bars are shown."""
        if self.bars is None:
            return
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=self.total[what], state="")
        self.bars.update(self.tasks[what], completed=self.done[what], state=state)

    def show(self, what: str, state: str = "") -> None:
        """Show the progress of a piece of work; plain lines only now and then, and at its end."""
        self.draw(what, state)
        now, ended = time.monotonic(), self.done[what] == self.total[what]
        if self.bars is None and (
            ended or now - self._told.get(what, -LINE_SECONDS) >= LINE_SECONDS
        ):
            self._told[what] = now
            count = f"{what}: {self.done[what]}/{self.total[what]}"
            self.tell("  ".join(filter(None, (count, state, "" if ended else self.left(what)))))

    def tell(self, line: str) -> None:
        """Print a line, above the bars if bars are shown."""
        if self.bars is not None:
            self.bars.console.print(line, markup=False, highlight=False, emoji=False)
        else:
            print(line, file=sys.stderr, flush=True)


class Counter(Bars):
    """Progress of several pieces of work: the `Progress` of the paper's experiments."""

    def add(self, what: str, total: int, *, done: int = 0) -> None:
        """Announce a piece of work of `total` items, of which `done` are done already."""
        self.begun(what, total, done)
        self.draw(what)

    def advance(self, what: str, count: int = 1) -> None:
        """Count `count` more items as done."""
        self.done[what] += count
        self.show(what)


class TrainingProgress(Bars):
    """Progress of trainings, with a bar for each network."""

    def update(self, progress: training.Progress) -> None:
        """Show the progress of a training."""
        name = progress.name
        if name not in self.total:
            self.begun(name, progress.total, progress.samples)
        self.done[name] = progress.samples
        self.show(name, f"loss {progress.loss:.3f}  {self.rate(name):.0f} images/s")


class ImageProgress(Bars):
    """Progress of images: how many all ranks have done, images per second, active targets.

    On a terminal only images that were passed over get a line. Elsewhere each image gets one, with
    the time left.
    """

    before = 0
    active = ""

    def begin(self, total: int, missing: int, *, silent: bool = False) -> None:
        """Announce the images, of which `missing` are not done yet; only the first rank shows."""
        self.silent, self.before = silent, total - missing
        self.begun("images", total, self.before)

    def update(self, name: str, update: int, active: int) -> None:
        """Show the progress of the attack on an image."""
        self._draw(f"{name}: update {update}, {active} targets active")

    def watched(self, keys: Sequence[object], active: Tensor) -> None:
        """Show the number of active targets of the images under attack; -1 marks stopped images."""
        if self.bars is not None:
            self._draw(f"{int(active.clamp(min=0).sum())} targets active")

    def finished(self, count: int, what: str, *, passed_over: bool = False) -> None:
        """Show the outcome of an image, after which all ranks have finished `count` images."""
        self.done["images"] = self.before + count
        if self.silent or self.bars is not None:
            if passed_over:
                self.tell(what)
        else:
            speed = f"{self.rate('images'):.2f} images/s, {self.left('images')}"
            self.tell(f"[{self.done['images']}/{self.total['images']}] {what} · {speed}")
        self._draw(self.active)

    def _draw(self, active: str) -> None:
        self.active = active
        speed = f"{self.rate('images'):.2f} images/s" if self.done["images"] > self.before else ""
        self.draw("images", " · ".join(filter(None, (speed, active))))

    def summary(self, summary: Mapping[str, Any], speed: float | None) -> None:
        """Print the summary of a run, and the number of images attacked per second."""
        rows = []
        for name, value in summary.items():
            if name in ("failed", "warnings"):
                continue
            told = str(value)
            if isinstance(value, float):
                told = f"{value:.1f}"
            elif isinstance(value, Mapping) and "before" in value:
                told = ", ".join(
                    f"{stage.replace('_', ' ')} {one['mean']:.1f} %"
                    for stage, one in value.items()
                    if one["mean"] is not None
                )
            elif isinstance(value, Mapping):
                form = ".2e" if name.startswith("perceptibility") else ".4g"
                told = ", ".join(f"{what} {number:{form}}" for what, number in value.items())
            if value is not None and told:
                rows.append([name, told])
        if speed is not None:
            rows.append(["images/s", f"{speed:.3g}"])
        if summary["failed"]:
            rows.append(["passed over", f"{len(summary['failed'])}, with reasons in images.jsonl"])
        print_table(("", ""), [(Text(name, "dim"), told) for name, told in rows], heads=False)


class EvaluationProgress(ImageProgress):
    """Progress of an evaluation, and the scores under each attack of its protocol."""

    def summary(self, summary: Mapping[str, Any], speed: float | None) -> None:
        """Print the scores under each attack and in the worst case."""
        if summary["clean"] is None:
            return
        measures = [name for name in MEASURES if summary["clean"].get(name) is not None]

        def where(one: Mapping[str, Any]) -> str:
            return f"{told_radius(one)}, {tables.told_view(one)}"

        def row(name: str, ball: str, scores: Mapping[str, Any]) -> list[str]:
            told = [scores.get(measure) for measure in measures]
            return [name, ball, *("" if one is None else f"{one:.2f}" for one in told)]

        rows = [row("clean", "", summary["clean"])]
        for one in summary["results"]:
            rows.append(row(one["attack"], where(one), one))
        for one in summary["worst_case"]:
            rows.append(row("worst case", where(one), one))
        print_table(("", "", *(f">{measure}, %" for measure in measures)), rows)
        if summary["failed"]:
            print(
                f"{len(summary['failed'])} of {summary['images']} images passed over, with reasons "
                "in report.html"
            )
        if speed is not None:
            print(f"{speed:.3g} images/s")


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    width: int = PLAIN_WIDTH,
    heads: bool = True,
) -> None:
    """Print a table on stdout, `width` wide where stdout is not a terminal.

    A column whose name begins with ">" is aligned to the right.
    """
    table = Table(box=box.SIMPLE_HEAD, show_header=heads)
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width).print(table)


# Numbers are aligned to the right.
COLUMNS = (
    ">targets",
    ">correct when clean",
    ">updates",
    "status",
    ">active",
    ">active after rounding",
    ">perceptibility",
)


def show_table(names: Sequence[str], rows: Sequence[tuple[Row, Outcome]]) -> None:
    """Print a table of outcomes, with each outcome's row of `names` in front."""
    table: list[list[str | Text]] = []
    for row, outcome in rows:
        status = str(outcome.status) if outcome.to_fool else "nothing to fool"
        status = status if outcome.targets else "no targets"
        active = str(outcome.left), str(outcome.active_after_rounding)
        counts = str(outcome.targets), str(outcome.correct_before), str(outcome.iterations)
        table.append([*map(Text, row), *counts, status, *active, f"{outcome.perceptibility:.2e}"])
    print_table([*names, *COLUMNS], table, width=OUTCOMES_WIDTH)

"""Progress on stderr and tables on stdout."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..evaluation.outcome import Outcome

if TYPE_CHECKING:
    from typing_extensions import Self  # in Python 3.10

Row = Sequence[str]

PLAIN_WIDTH = 120  # where stdout is no terminal
LINE_SECONDS = 15  # from one plain line to the next


class Bars:
    """Progress on stderr: bars where it is a terminal, shown while a `with` block runs."""

    def __init__(
        self, *columns: ProgressColumn, transient: bool = False, silent: bool = False
    ) -> None:
        console = Console(stderr=True)
        self.bars: Progress | None = None
        if console.is_terminal and not silent:
            self.bars = Progress(*columns, console=console, transient=transient)

    def __enter__(self) -> Self:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bars is not None:
            self.bars.stop()


class Reporter(Bars):
    """Images done, update and active targets: a bar on a terminal, a line per image elsewhere."""

    def __init__(self, total: int) -> None:
        super().__init__(
            TextColumn("images"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            transient=True,
        )
        self.total, self.done = total, 0
        if self.bars is not None:
            self.task = self.bars.add_task("", total=total)

    def update(self, what: str, update: int, active: int) -> None:
        """Show where an attack stands."""
        if self.bars is not None:
            text = f"{what}: update {update}, {active} targets active"
            self.bars.update(self.task, description=text.replace("[", r"\["))

    def finished(self, outcomes: Sequence[Outcome]) -> None:
        """Count finished images."""
        for outcome in outcomes:
            self.done += 1
            if self.bars is None:
                line = f"[{self.done}/{self.total}] {outcome.line()}"
                print(line, file=sys.stderr, flush=True)
        if self.bars is not None:
            self.bars.update(self.task, completed=self.done)


class RunReporter(Bars):
    """Images done of all ranks' and a second, active targets, time left; lines elsewhere.

    On a terminal what happened to an image is a line only where it was passed over; elsewhere
    each image has one.
    """

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__(
            TextColumn("images"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            silent=silent,
        )
        self.silent = silent
        self.total, self.before, self.started = 0, 0, 0.0
        self.speed, self.active = "", ""

    def begin(self, total: int, missing: int) -> None:
        """Announce the images, of which some are done already."""
        self.total, self.before, self.started = total, total - missing, time.monotonic()
        if self.bars is not None:
            self.task = self.bars.add_task("", total=total, completed=self.before)

    def watched(self, keys: Sequence[object], active: Tensor) -> None:
        """Hear of the active targets of the images under attack, -1 of those that stopped."""
        if self.bars is not None:
            self.active = f"{int(active.clamp(min=0).sum())} targets active"
            self._describe()

    def finished(self, count: int, what: str, *, passed_over: bool = False) -> None:
        """Hear what became of an image, of which so many have been finished by all ranks."""
        if self.silent:
            if passed_over:
                print(what, file=sys.stderr, flush=True)
            return
        done, seconds = self.before + count, time.monotonic() - self.started
        rate = count / seconds
        left = datetime.timedelta(seconds=round((self.total - done) / rate))
        self.speed = f"{rate:.2f} images/s"
        if self.bars is None:
            line = f"[{done}/{self.total}] {what} · {self.speed}, {left} left"
            print(line, file=sys.stderr, flush=True)
            return
        if passed_over:
            self.bars.console.print(what, markup=False, highlight=False, emoji=False)
        self.bars.update(self.task, completed=done)
        self._describe()

    def _describe(self) -> None:
        assert self.bars is not None
        text = " · ".join(filter(None, (self.speed, self.active)))
        self.bars.update(self.task, description=text)


def show_summary(summary: Mapping[str, Any], speed: float | None) -> None:
    """Print the summary of a run."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in summary.items():
        if name == "failed":
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
            table.add_row(name, told)
    if speed is not None:
        table.add_row("images/s", f"{speed:.3g}")
    if summary["failed"]:
        table.add_row("passed over", f"{len(summary['failed'])}, with reasons in images.jsonl")
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


def figures_of(outcome: Outcome) -> list[str]:
    """What a table says of an outcome, in the order of `COLUMNS`."""
    return [
        str(outcome.targets),
        str(outcome.iterations),
        str(outcome.status) if outcome.targets else "no targets",
        str(outcome.active[-1]),
        str(outcome.active_after_rounding),
        f"{outcome.perceptibility:.2e}",
    ]


COLUMNS = ("targets", "updates", "status", "active", "active after rounding", "perceptibility")


def show_table(names: Sequence[str], rows: Sequence[tuple[Row, Outcome]]) -> None:
    """Print a table of outcomes, each with columns of its own in front."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "status" else "right")
    for row, outcome in rows:
        table.add_row(*map(Text, row), *figures_of(outcome))
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(table)


class Counter(Bars):
    """How far several pieces of work are: a bar for each on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.total: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.told = 0.0
        self.tasks: dict[str, TaskID] = {}

    def add(self, what: str, total: int, *, done: int = 0) -> None:
        """Announce a piece of work, of which some may be done already."""
        self.total[what], self.done[what] = total, done
        if self.bars is not None:
            self.tasks[what] = self.bars.add_task(what, total=total, completed=done)

    def advance(self, what: str, count: int = 1) -> None:
        """Count what has been done."""
        self.done[what] += count
        if self.bars is not None:
            self.bars.update(self.tasks[what], completed=self.done[what])
            return
        now = time.monotonic()
        if self.done[what] == self.total[what] or now - self.told >= LINE_SECONDS:
            self.told = now
            print(f"{what}: {self.done[what]}/{self.total[what]}", file=sys.stderr, flush=True)

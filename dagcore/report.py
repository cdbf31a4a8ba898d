"""Progress on stderr and tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

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

from .outcome import Outcome

if TYPE_CHECKING:
    from typing_extensions import Self  # in Python 3.10

Row = Sequence[str]

PLAIN_WIDTH = 120  # where stdout is no terminal
LINE_SECONDS = 15  # from one plain line to the next


class Bars:
    """Progress on stderr: bars where it is a terminal, shown while a `with` block runs."""

    def __init__(self, *columns: ProgressColumn, transient: bool = False) -> None:
        console = Console(stderr=True)
        self.bars: Progress | None = None
        if console.is_terminal:
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
                line = (
                    f"[{self.done}/{self.total}] {outcome.name}: {outcome.status} after "
                    f"{outcome.iterations} updates, {outcome.active[-1]} targets active"
                )
                print(line, file=sys.stderr, flush=True)
        if self.bars is not None:
            self.bars.update(self.task, completed=self.done)


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
        table.add_row(*(cell.replace("[", r"\[") for cell in row), *figures_of(outcome))
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

"""`dagcore run`: attack the images of a data set in slots, and write each as it finishes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .driver import Driver, Job
from .outcome import Outcome, draw
from .progress import ImageProgress
from .ranks import Ranks
from .settings import Settings
from .store import NUMBERS, Record
from .summary import STAGES, summarise, tally, warnings_of
from .work import Work, carry_out


class Run(Work):
    """A run, as each rank carries it out."""

    command = "run"
    form = 3
    numbers = NUMBERS

    def __init__(self, settings: Settings, ranks: Ranks, progress: ImageProgress) -> None:
        super().__init__(settings, ranks, progress)
        self.settings = settings
        self.driver = Driver(
            settings,
            self.victim,
            self.source,
            self.device,
            attacked=self.attacked,
            slots=self.slots,
        )
        self.in_flight = self.driver.in_flight
        count = len(self.source.names)
        wanted = min(settings.figures, count)
        self.drawn = {k * count // wanted for k in range(wanted)}

    def probe(self) -> None:
        """Raise if the first usable image cannot be attacked."""
        self.driver.probe()

    def attack(self, numbers: Iterator[int]) -> Iterator[str]:
        """Attack images as they are claimed, and write the results. Yield a line for each image."""
        finished = self.driver.run(
            numbers,
            failed=None if self.settings.strict else self.failed,
            callback=self.progress.watched,
        )
        with contextlib.closing(finished):  # type: ignore[type-var]  # it is a generator
            for job, outcome in finished:
                self.keep(job, outcome)
                yield outcome.line()

    def keep(self, job: Job, outcome: Outcome) -> None:
        """Write the result of an image."""
        if job.number in self.drawn:
            path = self.folder.path("figures", job.name, "png")
            draw(outcome, path, self.victim, note=outcome.note())
        self.folder.write(
            job.number,
            job.name,
            outcome,
            self.record(job, outcome),
            perturbation=self.settings.perturbations,
        )

    def record(self, job: Job, outcome: Outcome) -> Record:
        """Return the record of an image."""
        stages = dict(zip(STAGES, (outcome.predicted, outcome.attacked), strict=True))
        judged: Record
        if job.target.truth is not None:
            found = {
                stage: {name: values.tolist() for name, values in one.items()}
                for stage, one in stages.items()
                if isinstance(one, Mapping)
            }
            judged = {"truth": flagged(job.target.truth), "seen": found}
        else:
            labels = job.target.labels.cpu()
            judged = {
                "pixels": {
                    stage: tally(one, labels)
                    for stage, one in stages.items()
                    if isinstance(one, Tensor)
                }
            }
        return {
            "number": job.number,
            **outcome.numbers(),
            **job.target.record,
            "generator_seed": job.seed,
            **judged,
        }

    def finish(self, records: dict[int, Record], speed: float | None) -> list[str]:
        """Write and show the summary, and return the warnings."""
        made = list(records.values())
        summary = summarise(made, self.victim.classes, self.settings.tolerance)
        warnings = warnings_of(made, self.driver.attack, prepared=self.settings.prepare)
        summary["warnings"] = warnings
        self.folder.finish(records, summary)
        self.progress.summary(summary, speed)
        return warnings


def flagged(truth: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return true boxes as records store them, with flags for each box."""
    values = {name: value.tolist() for name, value in truth.items()}
    for flags in ("difficult", "iscrowd"):
        values.setdefault(flags, [False] * len(values["labels"]))
    return values


def run(settings: Settings, progress: ImageProgress) -> int:
    """Attack a data set. Images that an earlier run with the same settings finished are skipped.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        ValueError, TypeError, OSError, ImportError: if a setting is invalid. The message names the
            setting and the problem.
    """
    return carry_out(lambda ranks: Run(settings, ranks, progress))

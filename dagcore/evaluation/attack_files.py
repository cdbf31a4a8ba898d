"""`dagcore attack`: image files in, attacked files out. All input is checked before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import files
from ..errors import ArgumentError
from ..info import versions
from .driver import Driver, Job
from .options import AttackOptions, find_device, find_victim
from .outcome import Outcome, output_files, write
from .sources import ImageFiles

# Called with (index of the image, update, active targets).
Callback = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(AttackOptions):
    """Options of `dagcore attack`."""

    images: Sequence[Path]
    out: Path
    labels: Path | None = None


class Plan:
    """A request whose input has been checked.

    Raises:
        ValueError, TypeError, OSError, ImportError: if an argument is invalid. The message names
            the argument and the problem.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        request.build()
        self.device = find_device(request.device)
        paths = list(request.images)
        for path in paths:
            files.probe_image(path)
        victim = find_victim(request, self.device)
        of_many = request.labels is not None and request.labels.suffix == ".json"
        keys = [path.as_posix() if of_many else path.name for path in paths]  # COCO lists paths
        self.source = ImageFiles(paths, list(map(str, paths)), keys, request.labels, victim)
        self._check_outputs()
        self.driver = Driver(request, victim, self.source, self.device)
        self.driver.check(budget=files.MAX_PIXELS)
        files.make_folder(request.out)

    def run(self, callback: Callback) -> Iterator[Outcome]:
        """Attack the images one by one, in order, and write the results."""
        updates = [0] * len(self.source.paths)
        self.records: list[dict[str, Any]] = []

        def tell(jobs: list[Job], active: Tensor) -> None:
            for job, count in zip(jobs, active.tolist(), strict=True):
                callback(job.number, updates[job.number], count)
                updates[job.number] += 1

        numbers = range(len(self.source.paths))
        for job, outcome in self.driver.run(numbers, callback=tell):
            self.records.append(outcome.numbers() | job.target.record)
            outcome = dataclasses.replace(outcome, name=self.source.paths[job.number].stem)
            write(
                outcome,
                self.request.out,
                self.driver.victim,
                record=self._record(job) | job.target.record,
            )
            yield outcome

    def _record(self, job: Job) -> dict[str, Any]:
        request, labels = self.request, self.source.truth_file(job.number)
        return {
            "file": job.name,
            "labels": "prediction" if labels is None else str(labels),
            "model": request.model,
            "weights": None if request.weights is None else str(request.weights),
            "size": request.size,
            "attack": request.attack,
            "adversarial": request.adversarial,
            "settings": dataclasses.asdict(self.driver.attack),
            "seed": request.seed,
            "index": job.number,
            "generator_seed": job.seed,
            "device": str(self.device),
            "versions": versions(),
        }

    def _check_outputs(self) -> None:
        """Raise if two images would be written to one file, or one over its input."""
        out, paths = self.request.out, self.source.paths
        labels = map(self.source.truth_file, range(len(paths)))
        inputs = {path.resolve() for path in (*paths, *labels) if path is not None}
        taken: dict[Path, Path] = {}
        for given in paths:
            for path in output_files(out, given.stem).values():
                if path.resolve() in inputs:
                    raise ArgumentError(f"--out {out}: {path} is an input and would be overwritten")
                if path in taken:
                    raise ArgumentError(
                        f"{taken[path]} and {given} would both be written to {path}: "
                        "write them to different folders"
                    )
                taken[path] = given

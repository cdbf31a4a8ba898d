"""`dagcore attack`: image files in, attacked files out. All input is checked before any work."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..errors import ArgumentError
from ..info import versions
from ..victims import Detector, Victim, load
from .outcome import Outcome, attack_images, output_files, write
from .targets import AttackOptions, Truth, TruthFiles, aims_of, find_device, seed_of, size_of

# Called with (index of the image, update, active targets).
Callback = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(AttackOptions):
    """The command line, as it was given."""

    images: Sequence[Path]
    out: Path
    labels: Path | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """One image, with its true labels or None for what the network sees in it."""

    image: Path
    labels: Path | None


class Plan:
    """A request whose input has been checked; made by `plan`."""

    def __init__(self, request: Request, victim: Victim | Detector, device: torch.device) -> None:
        self.request, self.victim, self.device = request, victim, device
        self.attack = request.attack()
        self.aims = aims_of(request, victim)
        self.truths = None if request.labels is None else TruthFiles(request.labels, victim)
        self.jobs = [Job(path, self._find_labels(path)) for path in request.images]
        check_outputs(request.out, self.jobs)
        for job in self.jobs:
            image = self._read(job)
            self.aims.settle(str(job.image), image)
            self.aims.check(str(job.image), image, self._truth(job, image))

    def run(self, callback: Callback) -> Iterator[Outcome]:
        """Attack each image alone, in order, and write what comes of it."""
        for index, job in enumerate(self.jobs):
            image = self._read(job)
            seed = seed_of(self.request.seed, index)
            generator = torch.Generator().manual_seed(seed)
            aim = self.aims.aim(str(job.image), image, self._truth(job, image), generator)
            (outcome,) = attack_images(
                self.attack,
                self.victim,
                image[None],
                aim.labels[None],
                aim.adversarial if isinstance(aim.adversarial, str) else aim.adversarial[None],
                boxes=None if aim.at is None else aim.at[None],
                names=[job.image.stem],
                generator=generator,
                callback=partial(_tell, callback, index),
            )
            record = self._record(job, index, seed) | aim.record
            write(outcome, self.request.out, self.victim, goal=self.attack.goal, record=record)
            yield outcome

    def _read(self, job: Job) -> Tensor:
        return files.read_image(job.image).to(self.device)

    def _find_labels(self, image: Path) -> Path | None:
        if self.truths is None:
            return None
        if len(self.request.images) > 1 and not self.truths.of_many:
            raise ArgumentError(
                f"--labels must be a folder with NAME.{self.truths.ending} for each of "
                f"{len(self.request.images)} images, got the file {self.request.labels}"
            )
        return self.truths.find(image.name)

    def _truth(self, job: Job, image: Tensor) -> Truth:
        return None if self.truths is None else self.truths.read(job.image.name, size_of(image))

    def _record(self, job: Job, index: int, generator_seed: int) -> dict[str, Any]:
        request = self.request
        return {
            "file": str(job.image),
            "labels": "prediction" if job.labels is None else str(job.labels),
            "model": request.model,
            "weights": None if request.weights is None else str(request.weights),
            "adversarial": request.adversarial,
            "settings": dataclasses.asdict(self.attack),
            "seed": request.seed,
            "index": index,
            "generator_seed": generator_seed,
            "device": str(self.device),
            "versions": versions(),
        }


def plan(request: Request) -> Plan:
    """Check a request and load its network.

    Raises:
        ValueError, TypeError, OSError, ImportError: what is wrong, and with which argument.
    """
    request.attack()
    device = find_device(request.device)
    for path in request.images:
        files.read_image(path)
    made = Plan(request, load(request.model, request.weights, device), device)
    make_folder(request.out)
    return made


def _tell(callback: Callback, index: int, update: int, active: Tensor) -> None:
    callback(index, update, int(active[0]))


def check_outputs(out: Path, jobs: Sequence[Job]) -> None:
    """Raise if two images would be written to one file, or one over its input."""
    inputs = {path.resolve() for job in jobs for path in (job.image, job.labels) if path}
    taken: dict[Path, Path] = {}
    for job in jobs:
        for path in output_files(out, job.image.stem).values():
            if path.resolve() in inputs:
                raise ArgumentError(f"--out {out}: {path} is an input and would be overwritten")
            if path in taken:
                raise ArgumentError(
                    f"{taken[path]} and {job.image} would both be written to {path}: "
                    "attack them into different folders"
                )
            taken[path] = job.image


def make_folder(out: Path) -> None:
    """Make the folder for the output; raise where nothing can be written to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out} must be a folder that can be written to")

"""Evaluate a network: run all attacks of a protocol on every image of a data set."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, files
from ..attacks import APGD, Result
from ..engine import ScoreModel, frozen
from ..engine.stream import Sample
from ..errors import ArgumentError, ArgumentTypeError
from ..losses import UNTARGETED
from ..perturbation import perceptibility, round_to_8_bits
from ..seeds import generator_of, seed_of
from ..victims import Detector
from ..victims.load import load
from . import reports, validity
from .figures import attack_figure
from .options import AttackOptions, KnownAttack
from .predict import Prediction, predict
from .progress import ImageProgress
from .protocols import Entry, Protocol, find_protocol
from .ranks import Ranks
from .robustness import (
    STAGES,
    STEPS,
    Cell,
    correct_of,
    summarise,
    told_radius,
    warnings_of,
    worst_images,
)
from .run import flagged
from .settings import DataSettings
from .soundness import findings
from .store import Record
from .summary import tally
from .targets import ImageTarget, TargetRules, UnfitImageError, rules_for
from .tog import GOALS, goal_targets
from .truth import Truth
from .work import Work, digest

GRIDS: dict[str, tuple[int | None, ...]] = {"none": (None,), "256": (256,), "both": (None, 256)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings(DataSettings):
    """Settings of an evaluation: the network, the data set and the protocol.

    Attributes:
        protocol: name of a protocol, or a TOML file; see `protocols.find_protocol`.
        epsilon: radii to use instead of the protocol's, for images in 0..1.
        levels: "none" attacks images in memory, as most protocols do, and measures the examples
            both in memory and rounded to 8-bit files. "256" attacks images on the 256 levels of
            such files. "both" does both.
        skip_fooled: whether to skip the larger balls of an attack once an image has no correct
            pixel left. The example of the smaller ball lies in the larger ball too.
        check: number of images on which the evaluation itself is checked; see `validity`.
        surrogate: name of another network, to check that its adversarial examples are not stronger
            than the network's own.
    """

    protocol: str = "sea-2024"
    epsilon: tuple[float, ...] | None = None
    levels: str = "none"
    skip_fooled: bool = True
    check: int = 2
    surrogate: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("levels", self.levels, GRIDS)
        checks.integer("check", self.check, at_least=0)
        if self.epsilon is not None and not self.epsilon:
            raise ArgumentError("epsilon must have at least one radius, got none")
        for epsilon in self.epsilon or ():
            checks.number("epsilon", epsilon, above=0)


@dataclasses.dataclass(eq=False)
class Job:
    """An image under evaluation, with its results so far."""

    number: int
    name: str
    image: Tensor
    """Image (3, H, W) on the network's device."""
    target: ImageTarget
    notes: list[str]
    clean: dict[str, Any]
    truth: dict[str, Any] | None
    """True boxes as stored in the record, for detectors; None for segmentation."""
    cells: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    aims: dict[str, Any] = dataclasses.field(default_factory=dict)
    """For detectors: labels, adversarial labels and boxes, by how adversarial labels are chosen."""
    worst: tuple[int, str, Tensor] | None = None
    """The worst example so far: its number of correct pixels or objects, its attack, its image."""

    def __repr__(self) -> str:
        return repr(self.name)


class Evaluation(Work):
    """An evaluation, as each rank runs it."""

    command = "evaluate"
    form = 1
    numbers = ("num_classes", "notes", "clean", "cells")

    def __init__(
        self,
        settings: EvaluationSettings,
        ranks: Ranks,
        progress: ImageProgress,
        *,
        protocol: Protocol | None = None,
        **others: Any,
    ) -> None:
        self.protocol = find_protocol(settings.protocol) if protocol is None else protocol
        self.settings = settings
        super().__init__(settings, ranks, progress, **others)
        self.task = "detection" if isinstance(self.victim, Detector) else "segmentation"
        self.entries = self.protocol.attacks_for(self.task)
        balls = [entry for entry in self.entries if entry.in_a_ball]
        if settings.epsilon is not None:
            if not balls:
                raise ArgumentError(
                    f"epsilon must not be given for {self.protocol.name}, which has no radii"
                )
            if not any(entry.norm == self.protocol.norm for entry in balls):
                raise ArgumentError(
                    f"epsilon must not be given for {self.protocol.name}, which has no attack in "
                    f"its norm, {self.protocol.norm}"
                )
        self.rules = self._rules("vanish" if self.task == "detection" else UNTARGETED)
        self.surrogate = self._surrogate()
        self.weights: Tensor | None = None
        self.ready: Job | None = None
        self.first: dict[str, Any] | None = None

    def _rules(self, adversarial: str) -> TargetRules:
        """Return the target rules for one way to choose adversarial labels."""
        options = AttackOptions(
            model=self.settings.model,
            weights=self.settings.weights,
            size=self.settings.size,
            attack="pgd" if adversarial == UNTARGETED else "dag",
            adversarial=adversarial,
        )
        return rules_for(options, self.attacked)

    def _surrogate(self) -> Any:
        """Load the surrogate for the transfer check; None if there is none."""
        given = self.settings.surrogate
        if given is None:
            return None
        if self.task == "detection":
            raise ArgumentError(
                "--surrogate requires a segmentation network as --model, got "
                f"{self.settings.model}, a detector"
            )
        try:
            return load(given, device=self.device)
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise ArgumentError(f"--surrogate {given}: {error}") from error

    def made_with(self) -> dict[str, Any]:
        """Return what the results depend on besides the settings."""
        record = json.dumps(self.protocol.record(), sort_keys=True)
        return {
            **super().made_with(),
            "name of the protocol": self.protocol.name,
            "digest of the protocol": hashlib.sha256(record.encode()).hexdigest(),
            **({} if self.has_weights or self.first is None else {"first image": self._first()}),
        }

    @property
    def has_weights(self) -> bool:
        """Whether the network has parameters, by which it can be identified."""
        return isinstance(self.victim, nn.Module) and any(True for _ in self.victim.parameters())

    def _first(self) -> str:
        """Return a hash of the first image's prediction, to identify networks without weights."""
        assert self.first is not None
        return hashlib.sha256(json.dumps(self.first).encode()).hexdigest()

    def probe(self) -> None:
        """Raise if the first usable image cannot be attacked. Keep its clean pass."""
        for number in range(len(self.source.names)):
            try:
                image, truth = self.source.read(number)
            except (OSError, ValueError):
                continue
            self.in_flight.add(self.source.names[number])
            with contextlib.suppress(UnfitImageError):
                self.ready = self.look(number, image, truth)
            self.in_flight.discard(self.source.names[number])
            if self.ready is not None:
                break
        self.first = None if self.ready is None else self.ready.clean
        if self.ready is not None and self.surrogate is not None:
            self._check_surrogate(self.ready)

    def _check_surrogate(self, job: Job) -> None:
        """Raise unless the surrogate runs and has as many classes as the network."""
        try:
            with frozen(self.surrogate), torch.no_grad():
                scores = ScoreModel(self.surrogate)(job.image[None], job.target.labels[None])
        except Exception as error:  # a network can raise anything
            raise ArgumentError(
                f"--surrogate {self.settings.surrogate} failed with {type(error).__name__}: {error}"
            ) from error
        if scores.shape[1] != self.rules.num_classes:
            raise ArgumentError(
                f"--surrogate must have {self.rules.num_classes} classes like --model, "
                f"{self.settings.surrogate} has {scores.shape[1]}"
            )

    def balanced(self) -> Tensor:
        """Return class weights (C,): 1 over the number of pixels of each class, scaled to sum to 1.

        Classes without a pixel in the data set have weight 0. Images that cannot be attacked are
        not counted.
        """
        counts = torch.zeros(self.rules.num_classes, dtype=torch.int64)
        for number, name in enumerate(self.source.names):
            with contextlib.suppress(OSError, ValueError, ArgumentTypeError):
                image, truth = self.source.read(number)
                if truth is None:
                    truth = self._target(number, image, truth).labels.cpu()
                self.rules.check(name, image.to(self.device), truth)
                assert isinstance(truth, Tensor)
                labels = files.void_as_ignored(truth, len(counts))
                labels = labels[labels != files.IGNORE].long()
                counts += torch.bincount(labels, minlength=len(counts))
        weights = torch.where(counts > 0, 1 / counts.clamp(min=1).double(), 0.0)
        return (weights / weights.sum().clamp(min=1e-300)).float().to(self.device)

    def _target(self, number: int, image: Tensor, truth: Truth) -> ImageTarget:
        name, source = self.source.names[number], generator_of((self.settings.seed, number))
        return self.rules.target(name, image.to(self.device), truth, source)

    def look(self, number: int, image: Tensor, truth: Truth) -> Job:
        """Run the network on a clean image (3, H, W), and return the image as a job.

        Raises:
            ArgumentError: if the image, its truth or the network cannot be evaluated.
        """
        self._check(self.source.names[number], image)
        target = self._target(number, image, truth)
        prediction = predict(self.victim, image.to(self.device), _size(target))
        return Job(
            number,
            self.source.names[number],
            image.to(self.device),
            target,
            self.source.notes(number),
            _judged(prediction, target),
            None if target.truth is None else flagged(target.truth),
        )

    def _jobs(self, numbers: Sequence[int]) -> Iterator[Job]:
        for number in numbers:
            self.in_flight.add(self.source.names[number])
            ready, self.ready = self.ready, None
            if ready is not None and ready.number == number:
                yield ready
                continue
            try:
                yield self.look(number, *self.source.read(number))
            except (OSError, ArgumentError, ArgumentTypeError) as error:
                self.in_flight.discard(self.source.names[number])
                if self.settings.strict:
                    raise ArgumentError(f"{self.source.names[number]}: {error}") from error
                self.failed(number, " ".join(str(error).split()))

    def attack(self, numbers: Iterator[int]) -> Iterator[str]:
        """Run all attacks on the images, `slots` images at a time. Yield a line for each image."""
        while chunk := list(islice(numbers, self.slots)):
            jobs = list(self._jobs(chunk))
            if jobs and self.weights is None and any(e.class_weights for e in self.entries):
                self.weights = self.balanced()
            for levels in GRIDS[self.settings.levels]:
                for position, entry in enumerate(self.entries):
                    self._attack_all(jobs, entry, position, levels)
            for job in jobs:
                self.keep(job)
                self.in_flight.discard(job.name)
                yield self.line(job)

    def _check(self, name: str, image: Tensor) -> None:
        """Raise if the pixel values of an image (3, H, W) cannot be attacked."""
        entry = self.entries[0]
        for levels in GRIDS[self.settings.levels]:
            attack = entry.build(self.protocol.radii(entry, self.settings.epsilon)[0], levels)
            try:
                attack.check_pixels("images", image[None])
                attack.fitted("images", image[None])
            except ArgumentError as error:
                raise UnfitImageError(f"{name}: {error}") from error

    def _attack_all(
        self, jobs: Sequence[Job], entry: Entry, position: int, levels: int | None
    ) -> None:
        """Run one attack on the images at each of its radii."""
        fooled: dict[int, dict[str, Any]] = {}
        for epsilon in self.protocol.radii(entry, self.settings.epsilon):
            for number, cell in fooled.items():
                job = next(job for job in jobs if job.number == number)
                job.cells.append({**cell, "epsilon": epsilon, "forward": 0, "backward": 0})
            samples = [
                self._sample(job, entry, position) for job in jobs if job.number not in fooled
            ]
            attack = entry.build(epsilon, levels, self.weights if entry.class_weights else None)
            results = attack.stream(
                self.attacked, samples, self.slots, callback=self.progress.watched
            )
            with contextlib.closing(results):  # type: ignore[type-var]  # it is a generator
                for result in results:
                    cell = self._cell(result, entry, attack, epsilon)
                    if self._is_fooled(cell):
                        fooled[result.key.number] = {**cell, "example_of": epsilon}

    def _is_fooled(self, cell: Cell) -> bool:
        """Whether no pixel is correct, in memory or in the file: larger balls can be skipped.

        Always False for detectors: their mAP also counts detections where there is no object.
        """
        if not self.settings.skip_fooled or self.task == "detection":
            return False
        return not any(correct_of(cell, None, stage) for stage in STAGES if stage in cell)

    def _sample(self, job: Job, entry: Entry, position: int) -> Sample:
        labels, adversarial, boxes = job.target.labels, entry.aims, None
        if self.task == "detection":
            labels, adversarial, boxes = self._aims(job, entry)
        seed = seed_of((self.settings.seed, job.number, position))
        return Sample(job.image, labels, adversarial, boxes, seed=seed, key=job)

    def _aims(self, job: Job, entry: Entry) -> tuple[Any, ...]:
        """Return labels, adversarial labels and boxes for a detector, computed once per rule."""
        of_tog = entry.attack != "dag" and entry.aims in GOALS
        if of_tog and entry.aims not in job.aims:
            wanted = {e.aims for e in self.entries if e.attack != "dag" and e.aims in GOALS}
            assert isinstance(self.attacked, Detector)
            assert isinstance(job.target.truth, Mapping)
            job.aims |= {
                name: (goal.labels, goal.adversarial, goal.boxes)
                for name, goal in goal_targets(
                    self.attacked,
                    job.image,
                    job.target.truth,
                    goals=[name for name in GOALS if name in wanted],
                    ignore_index=files.IGNORE,
                ).items()
            }
        key = entry.aims if of_tog else f"{entry.aims} of DAG"
        if key not in job.aims:
            target = self._rules(entry.aims).target(
                job.name,
                job.image,
                job.target.truth,
                generator_of((self.settings.seed, job.number)),
            )
            job.aims[key] = (target.labels, target.adversarial, target.boxes)
        found: tuple[Any, ...] = job.aims[key]
        return found

    def _cell(
        self, result: Result, entry: Entry, attack: KnownAttack, epsilon: float | None
    ) -> dict[str, Any]:
        """Measure the result of an attack on an image, and add it to the image's job."""
        levels = attack.levels
        job: Job = result.key
        size = _size(job.target)
        example = (result.last if entry.returns == "last" else result.adversarial)[0]
        file = round_to_8_bits(example)
        stages = {"file": predict(self.victim, file, size)}
        if levels is None:
            stages = {"memory": predict(self.victim, example, size), **stages}
        cell: dict[str, Any] = {
            "attack": entry.name,
            "norm": entry.norm if entry.in_a_ball else None,
            "epsilon": epsilon,
            "levels": levels,
            "status": result.status[0].value,
            "iterations": int(result.iterations[0]),
            "forward": int(result.iterations[0]) + 1,
            "backward": int(result.iterations[0]),
            "perceptibility": float(perceptibility((example - job.image)[None])[0]),
            **{stage: _judged(seen, job.target) for stage, seen in stages.items()},
        }
        if entry.aims == UNTARGETED and entry.returns == "best" and self.task == "segmentation":
            cell["correct_by_step"] = _by_step(result, attack)
        job.cells.append(cell)
        correct = correct_of(cell, job.truth, "file")
        if job.worst is None or correct < job.worst[0]:
            job.worst = correct, f"{entry.name}, {told_radius(cell)}", file.cpu()
        return cell

    def keep(self, job: Job) -> None:
        """Write the worst example of an image, and its record."""
        assert job.worst is not None
        counted = job.target.labels != files.IGNORE
        files.write_image(self.folder.path("images", job.name, "png"), job.worst[2])
        record: Record = {
            "number": job.number,
            "name": job.name,
            "status": "evaluated",
            "notes": job.notes,
            **job.target.record,
            "targets": int(counted.sum()),
            "correct_before": int((job.target.correct & counted).sum()),
            "worst": {"attack": job.worst[1], "correct": job.worst[0]},
            "clean": job.clean,
            "cells": job.cells,
        }
        if job.truth is not None:
            record["truth"] = job.truth
        self.folder.write_record(job.number, record)

    def line(self, job: Job) -> str:
        """Return the result of an image in one line."""
        assert job.worst is not None
        correct = correct_of({"file": job.clean}, job.truth, "file")
        what = "pixels" if self.task == "segmentation" else "objects"
        notes = f" ({'; '.join(job.notes)})" if job.notes else ""
        return f"{job.name}: {correct} {what} correct, {job.worst[0]} after {job.worst[1]}{notes}"

    def finish(self, records: dict[int, Record], speed: float | None) -> list[str]:
        """Write the summary and the report, show the summary, and return the warnings."""
        made = list(records.values())
        summary = summarise(made, self.protocol, self.victim.classes, self.task)
        made_with = self.made_with()
        same = ("digest of the weights", "names and sizes of the images")
        summary |= {
            "network": self.settings.model,
            "data": self.data(),
            **{name: made_with[name] for name in same},
            **{name: getattr(self.settings, name) for name in ("levels", "skip_fooled", "seed")},
            "versions": self.versions(),
        }
        summary["checks"] = findings(self, made, summary)
        summary["warnings"] = warnings_of(made, summary)
        doubtful = [one["name"] for one in summary["checks"] if one["verdict"] == validity.FLAGGED]
        if doubtful:
            summary["warnings"].append(
                f"{len(doubtful)} checks of the evaluation are flagged, so its results may be "
                f"misleading: {', '.join(doubtful)}"
            )
        if digest(self.victim) != self.digest:
            summary["warnings"].append(
                f"{self.settings.model} has changed its weights or buffers while it was attacked, "
                "so the results depend on the order of the images"
            )
        worst = worst_images(made, self.settings.figures)
        summary["figures"] = [self._figure(record) for record in worst]
        self.folder.keep_only("figures", [one["path"] for one in summary["figures"]])
        self.folder.finish(records, summary)
        reports.write(self.folder.out, summary, records)
        self.progress.summary(summary, speed)
        return list(summary["warnings"])

    def again(self, record: Record) -> tuple[Tensor, ImageTarget]:
        """Read an evaluated image again, and return it with its targets."""
        image, truth = self.source.read(record["number"])
        return image.to(self.device), self._target(record["number"], image, truth)

    def _figure(self, record: Record) -> dict[str, str]:
        """Draw the figure of an image's worst example."""
        name, (image, target) = record["name"], self.again(record)
        example = files.read_image(self.folder.path("images", name, "png")).to(self.device)
        note = f"{record['worst']['attack']}, rounded to 8 bits"
        path = self.folder.path("figures", name, "png")
        attack_figure(
            path,
            image=image,
            adversarial=example,
            predicted=predict(self.victim, image, _size(target)),
            attacked=predict(self.victim, example, _size(target)),
            classes=self.victim.classes,
            palette=getattr(self.victim, "palette", None),
            note=note,
        )
        relative = path.relative_to(self.folder.out).as_posix()
        return {"name": name, "path": relative, "note": note}

    def data(self) -> str:
        """Return the data set in words."""
        parts = [str(self.settings.data), self.settings.set or ""]
        return " ".join(filter(None, parts))


def _size(target: ImageTarget) -> tuple[int, int]:
    """Return (rows, columns) of the label map, or (1, 1) for detectors, which have none."""
    height, width = target.labels.shape[-2:] if target.labels.dim() > 1 else (1, 1)
    return height, width


def _judged(seen: Prediction, target: ImageTarget) -> dict[str, Any]:
    """Return a prediction as records store it: pixel counts per class, or detections."""
    if isinstance(seen, Tensor):
        return {"pixels": tally(seen, target.labels.cpu())}
    return {"seen": {name: values.tolist() for name, values in seen.items()}}


def _by_step(result: Result, attack: KnownAttack) -> dict[int, int]:
    """Return the number of correct pixels in the best example so far, by number of updates.

    The counts are the attack's own. With shrinking balls, only updates in the last ball are
    included, because only they count.
    """
    last = int(result.iterations[0])  # 2 more than SEA's steps: a change of radius counts
    first = attack.schedule().max_iter - attack.phases[-1][0] if isinstance(attack, APGD) else 0
    best = result.active[first : last + 1, 0].cummin(0).values.tolist()
    steps = sorted({first, *STEPS, (first + last) // 2, last})
    return {step: best[step - first] for step in steps if first <= step <= last}

"""`dagcore attack`: image files in, attacked files out. All input is checked before any work."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import files
from .adversary import Adversary, find_class, is_pattern
from .attack import DAG
from .data.coco import CocoBoxes
from .data.voc import read_voc_boxes
from .info import versions
from .outcome import Outcome, attack_images, output_files, predict, see, write
from .victims import Detector, Targets, Victim, load
from .victims.detection import KINDS as BOX_KINDS

# Called with (index of the image, update, active targets).
Callback = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The command line, as it was given."""

    images: Sequence[Path]
    out: Path
    model: str
    weights: Path | None = None
    labels: Path | None = None
    adversarial: str = "permutation"
    foreground: str | None = None
    background: str | None = None
    gamma: float = 0.5 / 255
    max_iter: int = 200
    goal: str | None = None
    epsilon: float | None = None
    tolerance: float = 0.0
    device: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """One image, with its true labels or None for what the network sees in it."""

    image: Path
    labels: Path | None


class Plan(abc.ABC):
    """A request whose input has been checked; made by `plan`."""

    def __init__(self, request: Request, victim: Any, device: torch.device) -> None:
        self.request, self.victim, self.device = request, victim, device
        self.attack = _settings(request)
        self.jobs = [Job(path, find_labels(request, path, self.ending)) for path in request.images]
        check_outputs(request.out, self.jobs)

    ending = "png"
    """Of the files with labels in a folder."""

    def run(self, callback: Callback) -> Iterator[Outcome]:
        """Attack each image alone, in order, and write what comes of it."""
        for index, job in enumerate(self.jobs):
            image = self._read(job)
            seed = seed_of(self.request.seed, index)
            generator = torch.Generator().manual_seed(seed)
            aim = self.aim(job, image, generator)
            (outcome,) = attack_images(
                self.attack,
                self.victim,
                image[None],
                aim.labels[None],
                aim.adversarial if isinstance(aim.adversarial, str) else aim.adversarial[None],
                at=None if aim.at is None else aim.at[None],
                names=[job.image.stem],
                generator=generator,
                callback=partial(_tell, callback, index),
            )
            record = self._record(job, index, seed) | aim.record
            write(outcome, self.request.out, self.victim, goal=self.attack.goal, record=record)
            yield outcome

    @abc.abstractmethod
    def aim(self, job: Job, image: Tensor, generator: torch.Generator) -> Aim:
        """The targets of an image (3, H, W)."""

    def _read(self, job: Job) -> Tensor:
        return files.read_image(job.image).to(self.device)

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

    def _refused(self, job: Job, image: Tensor, error: Exception) -> ValueError:
        reason = str(error).partition("\n")[0]
        return ValueError(
            f"model {self.request.model!r} cannot take {job.image} "
            f"({image.shape[2]} x {image.shape[1]} pixels): {reason}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Aim:
    """What an attack on one image aims at; see `dagcore.Sample`."""

    labels: Tensor
    adversarial: Tensor | str
    record: dict[str, Any]
    """What the image's JSON says of it."""
    at: Tensor | None = None


def plan(request: Request) -> Plan:
    """Check a request and load its network.

    Raises:
        ValueError, TypeError, OSError, ImportError: what is wrong, and with which argument.
    """
    _settings(request)
    device = find_device(request.device)
    for path in request.images:
        files.read_image(path)
    victim = load(request.model, request.weights, device)
    made: Plan
    if isinstance(victim, Detector):
        made = BoxPlan(request, victim, device)
    else:
        made = MapPlan(request, victim, device)
    make_folder(request.out)
    return made


def _tell(callback: Callback, index: int, update: int, active: Tensor) -> None:
    callback(index, update, int(active[0]))


class MapPlan(Plan):
    """An attack on a segmentation network, whose targets are pixels or cells."""

    def __init__(self, request: Request, victim: Victim, device: torch.device) -> None:
        super().__init__(request, victim, device)
        sizes = {job: size_of(files.read_image(job.image)) for job in self.jobs}
        self.maps: dict[tuple[int, int], tuple[int, int, int]] = {}  # (H, W) -> (C, h, w)
        for job, size in sizes.items():
            if size not in self.maps:
                self.maps[size] = self._score_map(job)
        self.num_classes = next(iter(self.maps.values()))[0]
        self.adversary = Adversary.parse(
            request.adversarial,
            request.foreground,
            request.background,
            self.num_classes,
            self.victim.classes,
        )
        for job, size in sizes.items():
            shape = self._targets(size)
            if job.labels is not None:
                labels = read_labels(job.labels, self.num_classes, self._label_sizes(size))
                shape = (labels.shape[0], labels.shape[1])
            self.adversary.check(*shape)

    def aim(self, job: Job, image: Tensor, generator: torch.Generator) -> Aim:
        """Labels from a file, or those that the network sees."""
        size = size_of(image)
        if job.labels is None:
            labels = see(self.victim, image[None], self._targets(size))[0].int()
        else:
            found = read_labels(job.labels, self.num_classes, self._label_sizes(size))
            labels = found.to(self.device)
        adversarial, chosen = self.adversary.choose(labels, self.num_classes, generator)
        shape = {"num_classes": self.num_classes, "label_map": list(labels.shape)}
        return Aim(labels, adversarial, shape | chosen)

    def _targets(self, size: tuple[int, int]) -> tuple[int, int]:
        """How many rows and columns of targets an image of a size (H, W) has, without labels."""
        return list(self._label_sizes(size))[-1 if self.victim.cells else 0]

    def _label_sizes(self, size: tuple[int, int]) -> dict[tuple[int, int], str]:
        """The sizes that a label map for an image of a size (H, W) may have, and whose they are."""
        _, height, width = self.maps[size]
        of_scores = {(height, width): "the model's score map"}
        fits = height <= size[0] and width <= size[1]  # scores are enlarged only
        return {size: "the image"} | of_scores if fits else of_scores

    def _score_map(self, job: Job) -> tuple[int, int, int]:
        image = self._read(job)
        try:
            shape = tuple(predict(self.victim, image[None]).shape[1:])
        except RuntimeError as error:
            raise self._refused(job, image, error) from error
        if len(shape) != 3:
            raise ValueError(
                f"model {self.request.model!r} must return scores of shape (N, C, h, w), "
                f"got {(1, *shape)}"
            )
        num_classes, height, width = shape
        return num_classes, height, width


class BoxPlan(Plan):
    """An attack on a detector, whose targets are proposals, anchors or queries near objects."""

    ending = "xml"

    def __init__(self, request: Request, victim: Detector, device: torch.device) -> None:
        super().__init__(request, victim, device)
        if is_pattern(request.adversarial):
            raise ValueError(f"--adversarial {request.adversarial} goes with segmentation only")
        for option, value in (
            ("--foreground", request.foreground),
            ("--background", request.background),
        ):
            if value is not None:
                raise ValueError(f"{option} goes with a pattern only")
        self.coco: CocoBoxes | None = None
        if request.labels is not None and request.labels.suffix == ".json":
            self.coco = CocoBoxes(request.labels, victim.object_classes())
        first = self._targets(self.jobs[0], self._read(self.jobs[0]), "vanish", None)
        self.num_classes = first.num_classes
        self.goal = None
        if request.adversarial not in (*BOX_KINDS, "runner-up"):
            self.goal = self._class(request.adversarial)
        sizes = {size_of(self._read(self.jobs[0]))}
        for n, job in enumerate(self.jobs[1:], start=1):
            image = self._read(job)
            truth = self._truth(job, image)
            if truth is not None:
                victim.check_truth(n, truth, image[None], self.num_classes)
            if size_of(image) not in sizes:
                sizes.add(size_of(image))
                self._targets(job, image, "vanish", None)

    def aim(self, job: Job, image: Tensor, generator: torch.Generator) -> Aim:
        """Proposals near true objects, or near those that the detector finds."""
        kind = self.request.adversarial
        drawn = kind if kind in BOX_KINDS else "vanish"
        targets = self._targets(job, image, drawn, generator)
        labels = targets.labels[0]
        adversarial: Tensor | str = targets.adversarial_labels[0]
        record: dict[str, Any] = {
            "num_classes": self.num_classes,
            "proposals": int(targets.proposals[0]),
        }
        if self.goal is not None:
            adversarial = torch.where(labels == files.IGNORE, files.IGNORE, self.goal)
            record["class"] = self.goal
        elif kind == "runner-up":
            adversarial = kind
        return Aim(labels, adversarial, record, None if targets.at is None else targets.at[0])

    def _targets(
        self, job: Job, image: Tensor, kind: str, generator: torch.Generator | None
    ) -> Targets:
        truth = self._truth(job, image)
        try:
            found: Targets = self.victim.dense_targets(
                image[None],
                None if truth is None else [truth],
                adversarial=kind,
                generator=generator,
                ignore_index=files.IGNORE,
            )
        except RuntimeError as error:
            raise self._refused(job, image, error) from error
        return found

    def _truth(self, job: Job, image: Tensor) -> dict[str, Tensor] | None:
        """The true boxes of an image; None where the detector's own take their place."""
        if job.labels is None:
            return None
        size = size_of(image)
        if self.coco is not None:
            boxes, labels, crowd = self.coco(job.image.name, size)
            return {"boxes": boxes[~crowd], "labels": labels[~crowd]}
        classes = self.victim.object_classes()
        if classes is None:
            raise ValueError(
                f"model {self.request.model!r} names no classes, which {job.labels} needs"
            )
        boxes, labels, _ = read_voc_boxes(job.labels, size, classes)
        return {"boxes": boxes, "labels": labels}

    def _class(self, name: str) -> int:
        try:
            return find_class(name, self.num_classes, self.victim.classes)
        except ValueError as error:
            raise ValueError(
                f"--adversarial must be {', '.join(BOX_KINDS)}, runner-up or a class for a "
                f"detector: {error}"
            ) from error


def _settings(request: Request) -> DAG:
    paints = is_pattern(request.adversarial)
    if paints and request.goal == "leave":
        raise ValueError("--goal must be reach for a pattern, got leave")
    goal = request.goal or ("reach" if paints else "leave")
    if goal == "reach" and request.adversarial == "runner-up":
        raise ValueError("--adversarial runner-up goes with --goal leave only")
    return DAG(
        gamma=request.gamma,
        max_iter=request.max_iter,
        goal=goal,
        epsilon=request.epsilon,
        tolerance=request.tolerance,
        ignore_index=files.IGNORE,
    )


def find_device(name: str | None) -> torch.device:
    """The device to run on: a GPU where there is one, unless told otherwise."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {name} is not there: torch sees {count} CUDA devices, try cpu")
    return device


def find_labels(request: Request, image: Path, ending: str) -> Path | None:
    """The file with the labels of an image; of a detector, .json holds those of many."""
    given = request.labels
    if given is None:
        return None
    if not given.is_dir():
        if len(request.images) > 1 and not (ending == "xml" and given.suffix == ".json"):
            raise ValueError(
                f"--labels must be a folder with NAME.{ending} for each of {len(request.images)} "
                f"images, got the file {given}"
            )
        return given
    path = given / f"{image.stem}.{ending}"
    if not path.is_file():
        raise FileNotFoundError(f"--labels: {path} does not exist, but {image} needs it")
    return path


def size_of(image: Tensor) -> tuple[int, int]:
    """Height and width of an image (3, H, W)."""
    return image.shape[1], image.shape[2]


def read_labels(path: Path, num_classes: int, sizes: dict[tuple[int, int], str]) -> Tensor:
    """A label map (h, w) of one of some sizes, each with whose it is."""
    labels = files.read_label_map(path)
    if tuple(labels.shape) not in sizes:
        allowed = [f"{w} x {h} pixels, the size of {whose}" for (h, w), whose in sizes.items()]
        raise ValueError(
            f"label map {path} must have {' or '.join(allowed)}, "
            f"got {labels.shape[1]} x {labels.shape[0]}"
        )
    counted = labels[labels != files.IGNORE]
    if counted.numel() and int(counted.max()) >= num_classes:
        raise ValueError(
            f"label map {path} must hold classes below {num_classes} (255 is ignored), "
            f"got {int(counted.max())}"
        )
    return labels


def check_outputs(out: Path, jobs: Sequence[Job]) -> None:
    """Raise if two images would be written to one file, or one over its input."""
    inputs = {path.resolve() for job in jobs for path in (job.image, job.labels) if path}
    taken: dict[Path, Path] = {}
    for job in jobs:
        for path in output_files(out, job.image.stem).values():
            if path.resolve() in inputs:
                raise ValueError(f"--out {out}: {path} is an input and would be overwritten")
            if path in taken:
                raise ValueError(
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


def seed_of(seed: int, index: int) -> int:
    """The seed of one image's generator: no two images of any two runs share theirs."""
    (word,) = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return int(word >> np.uint64(1))

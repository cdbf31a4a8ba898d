"""`dagcore attack`: image files in, attacked files out. All input is checked before any work."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import files
from .adversary import Adversary, is_pattern
from .attack import DAG
from .info import versions
from .outcome import Outcome, attack_images, output_files, predict, see, write
from .victims import load

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
    """One image, with its labels or None for the network's own prediction."""

    image: Path
    labels: Path | None


class Plan:
    """A request whose input has been checked.

    Raises:
        ValueError, TypeError, OSError, ImportError: what is wrong, and with which argument.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.attack = _settings(request)
        self.device = find_device(request.device)
        self.jobs = [Job(path, find_labels(request, path)) for path in request.images]
        check_outputs(request.out, self.jobs)
        sizes = {job: size_of(files.read_image(job.image)) for job in self.jobs}
        self.victim = load(request.model, request.weights, self.device)
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
        make_folder(request.out)

    def run(self, callback: Callback) -> Iterator[Outcome]:
        """Attack each image alone, in order, and write what comes of it."""
        for index, job in enumerate(self.jobs):
            yield self._run(index, job, callback)

    def _run(self, index: int, job: Job, callback: Callback) -> Outcome:
        image = files.read_image(job.image).to(self.device)
        size = size_of(image)
        generator_seed = seed_of(self.request.seed, index)
        generator = torch.Generator().manual_seed(generator_seed)
        if job.labels is None:
            labels = see(self.victim, image[None], self._targets(size))[0].int()
        else:
            found = read_labels(job.labels, self.num_classes, self._label_sizes(size))
            labels = found.to(self.device)
        adversarial, chosen = self.adversary.choose(labels, self.num_classes, generator)
        (outcome,) = attack_images(
            self.attack,
            self.victim,
            image[None],
            labels[None],
            adversarial if isinstance(adversarial, str) else adversarial[None],
            names=[job.image.stem],
            generator=generator,
            callback=lambda update, active: callback(index, update, int(active[0])),
        )
        record = self._record(job, index, generator_seed, tuple(labels.shape)) | chosen
        write(outcome, self.request.out, self.victim, goal=self.attack.goal, record=record)
        return outcome

    def _record(
        self, job: Job, index: int, generator_seed: int, targets: tuple[int, ...]
    ) -> dict[str, Any]:
        request = self.request
        return {
            "file": str(job.image),
            "labels": "prediction" if job.labels is None else str(job.labels),
            "model": request.model,
            "weights": None if request.weights is None else str(request.weights),
            "num_classes": self.num_classes,
            "label_map": list(targets),
            "adversarial": request.adversarial,
            "settings": dataclasses.asdict(self.attack),
            "seed": request.seed,
            "index": index,
            "generator_seed": generator_seed,
            "device": str(self.device),
            "versions": versions(),
        }

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
        image = files.read_image(job.image).to(self.device)
        try:
            shape = tuple(predict(self.victim, image[None]).shape[1:])
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"model {self.request.model!r} cannot take {job.image} "
                f"({image.shape[2]} x {image.shape[1]} pixels): {reason}"
            ) from error
        if len(shape) != 3:
            raise ValueError(
                f"model {self.request.model!r} must return scores of shape (N, C, h, w), "
                f"got {(1, *shape)}"
            )
        num_classes, height, width = shape
        return num_classes, height, width


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


def find_labels(request: Request, image: Path) -> Path | None:
    """The label map that belongs to an image."""
    given = request.labels
    if given is None:
        return None
    if not given.is_dir():
        if len(request.images) > 1:
            raise ValueError(
                f"--labels must be a folder with NAME.png for each of {len(request.images)} "
                f"images, got the file {given}"
            )
        return given
    path = given / f"{image.stem}.png"
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

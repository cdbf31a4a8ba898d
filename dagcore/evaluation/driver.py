"""The pipeline behind every command: source -> targets -> stream -> measurement.

Each image is decoded once. The attacked network runs once on the clean image, for labels and
prediction. On the CPU with one slot, this pass is also the attack's first evaluation. The network
itself runs once on the attacked image as stored in its 8-bit file.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..attacks import DAG, Result
from ..engine import ScoreModel, frozen
from ..engine.devices import device_for
from ..engine.stream import Deferred, Sample
from ..errors import ArgumentError, ArgumentTypeError
from ..losses import LossObjective
from ..ops import argmax_bilinear
from ..perturbation import perceptibility, round_to_8_bits
from ..seeds import generator_of, seed_of
from ..victims import Detector, Victim
from .options import AttackOptions
from .outcome import Outcome
from .predict import Prediction
from .sources import Source
from .targets import ImageTarget, UnfitImageError, rules_for
from .truth import Truth

Failed = Callable[[int, str], None]
"""Callback for images that cannot be attacked. It is called with the number and the reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """An image to be attacked."""

    number: int
    name: str
    image: Tensor
    """Image (3, H, W) on the network's device."""
    target: ImageTarget
    seed: int
    """Seed of the image's random choices."""
    notes: list[str]
    """Notes on the image for the user."""

    def __repr__(self) -> str:
        return repr(self.name)


class Driver:
    """Attacks the images of a source.

    Args:
        options: options of the attack.
        victim: the network, which judges the attacked images.
        source: source of the images.
        device: device of the network.
        attacked: network to attack instead of `victim`, such as a faster copy. None attacks
            `victim`.
        slots: number of images that are attacked at the same time.
    """

    def __init__(
        self,
        options: AttackOptions,
        victim: Victim | Detector,
        source: Source,
        device: torch.device,
        *,
        attacked: Any = None,
        slots: int = 1,
    ) -> None:
        self.attack = options.build()
        self.options, self.victim, self.source, self.device = options, victim, source, device
        self.attacked = victim if attacked is None else attacked
        self.rules = rules_for(options, self.attacked)
        self.slots = slots
        # Whether the engine takes the scores of the clean image as its first evaluation.
        begins_there = not self.attack.random_start
        self.reuse = device.type == "cpu" and slots == 1 and begins_there
        self.stopping = threading.Event()
        self.in_flight: set[str] = set()
        self._ready: dict[int, Job] = {}
        self._read: dict[int, tuple[Tensor, Truth]] = {}

    def probe(self) -> None:
        """Raise if the options do not fit the network, by trying the first usable image."""
        for number in range(len(self.source.names)):
            try:
                image, truth = self.source.read(number)
            except (OSError, ValueError):
                continue
            name = self.source.names[number]
            self.in_flight.add(name)
            try:
                self._ready[number] = self.job(number, image, truth)
            except UnfitImageError:
                self.in_flight.discard(name)
                continue
            self.in_flight.discard(name)
            return

    def check(self, budget: int) -> None:
        """Raise if any image cannot be attacked. Keep up to `budget` pixels of decoded images."""
        for number, name in enumerate(self.source.names):
            image, truth = self.source.read(number)
            if number == 0:
                self._ready[number] = self.job(number, image, truth)
                continue
            self.rules.check(name, image.to(self.device), truth)
            budget -= image[0].numel()
            if budget >= 0:
                self._read[number] = (image * 255).round().byte(), truth

    def read(self, number: int) -> tuple[Tensor, Truth]:
        """Return an image and its truth. No image is decoded twice."""
        if number not in self._read:
            return self.source.read(number)
        levels, truth = self._read.pop(number)
        return levels.float() / 255, truth

    def job(self, number: int, image: Tensor, truth: Truth) -> Job:
        """Run the network on a clean image (3, H, W), and return the image as a job.

        Raises:
            ArgumentError: if the image, its truth or the network cannot be attacked.
        """
        name = self.source.names[number]
        image, index = image.to(self.device), (self.options.seed, number)
        target = self.rules.target(name, image, truth, generator_of(index), with_graph=self.reuse)
        return Job(number, name, image, target, seed_of(index), self.source.notes(number))

    def run(
        self,
        numbers: Iterable[int],
        *,
        failed: Failed | None = None,
        callback: Callable[[list[Any], Tensor], None] | None = None,
    ) -> Iterator[tuple[Job, Outcome]]:
        """Attack images and measure the results.

        Args:
            numbers: numbers of the images, taken one by one as slots become free.
            failed: called for each image that cannot be attacked. If None, such images raise.
            callback: called with (jobs under attack, their active targets); see `DAG.stream`.

        Yields:
            Each job with its outcome, as it finishes.
        """
        self.stopping.clear()
        results = self.attack.stream(
            self.attacked, self._samples(numbers, failed), self.slots, callback=callback
        )
        try:
            for result in results:
                yield result.key, self.measured(result)
                self.in_flight.discard(result.key.name)
        finally:
            self.stopping.set()
            results.close()  # type: ignore[attr-defined]  # it is a generator

    def _samples(self, numbers: Iterable[int], failed: Failed | None) -> Iterator[Any]:
        for number in numbers:
            if self.stopping.is_set():
                return
            yield _Image(self, number, failed)

    def measured(self, result: Result) -> Outcome:
        """Measure the result of an attack on one image."""
        job: Job = result.key
        written = round_to_8_bits(result.adversarial)
        again, attacked = self._judge(written, job)
        return Outcome(
            name=job.name,
            image=job.image.cpu(),
            adversarial=result.adversarial[0].cpu(),
            predicted=job.target.prediction,
            attacked=attacked,
            status=result.status[0],
            iterations=int(result.iterations[0]),
            active=(active := [count for count in result.active[:, 0].tolist() if count >= 0]),
            left=int(result.left[0]),
            to_fool=active[0] if isinstance(self.attack, DAG) else self._to_fool(job.target),
            targets=int(result.targets[0]),
            correct_before=self._correct(job.target),
            active_after_rounding=again,
            perceptibility=float(result.perceptibility[0]),
            perceptibility_after_rounding=float(perceptibility(written - job.image[None])[0]),
            notes=job.notes,
        )

    def _correct(self, target: ImageTarget) -> int:
        """Return how many of the counted targets are correct on the clean image."""
        correct = torch.where(target.correct, target.labels, files.IGNORE)[None]
        count = self.attack.objective().count(target.num_classes, correct, target.aims)
        return int(count)

    def _to_fool(self, target: ImageTarget) -> int:
        """Return how many targets are active on the clean image. Attacks may start elsewhere."""
        objective = self.attack.objective()
        assert isinstance(objective, LossObjective)
        active = objective.active(
            target.num_classes, target.labels[None], target.aims, target.seen[None]
        )
        return int(active)

    def _judge(self, written: Tensor, job: Job) -> tuple[int, Prediction]:
        """Return the number of active targets of an image (1, 3, H, W), and its prediction."""
        victim, target = self.victim, job.target
        labels, aims = target.labels[None], target.aims
        boxes = None if target.boxes is None else target.boxes[None]
        scores_of = ScoreModel(victim)
        prediction: Prediction
        with device_for(written.device).current(), frozen(victim), torch.no_grad():
            if isinstance(victim, Detector):
                with victim.encoded(written.clone()):
                    scores = scores_of(written, labels, boxes)
                    (found,) = victim.detect(written.clone())
                prediction = {key: value.cpu() for key, value in found.items()}
            else:
                scores = scores_of(written, labels)
                height, width = labels.shape[1:]
                prediction = argmax_bilinear(
                    scores, (height, width), align_corners=scores_of.align_corners
                )[0].cpu()
        active = self.attack.active_targets(
            scores, labels, aims, align_corners=scores_of.align_corners
        )
        return int(active[0]), prediction


class _Image(Deferred):
    """An image that is decoded when it is fetched, and evaluated when a slot is free."""

    def __init__(self, driver: Driver, number: int, failed: Failed | None) -> None:
        self.driver, self.number, self.failed = driver, number, failed
        self.error: Exception | None = None
        self.ready = driver._ready.pop(number, None)
        if not self.ready:
            driver._ready.clear()  # numbers only rise: what is left is done, or another rank's
        self.read: tuple[Tensor, Truth] | None = None
        if self.ready is None:
            try:
                self.read = driver.read(number)
            except (OSError, ValueError) as error:
                self.error = error

    def sample(self) -> Sample | None:
        """Return the image with its targets. Raise if it cannot be attacked."""
        driver, job = self.driver, self.ready
        driver.in_flight.add(driver.source.names[self.number])
        if self.error is not None:
            raise ArgumentError(str(self.error)) from self.error
        if job is None:
            assert self.read is not None
            try:
                job = driver.job(self.number, *self.read)
            except (ArgumentTypeError, ArgumentError) as error:
                if self.failed is not None:
                    raise
                raise type(error)(f"{driver.source.names[self.number]}: {error}") from error
        known = job.target.known
        target = dataclasses.replace(job.target, known=None)  # to be freed during the attack
        key = dataclasses.replace(job, target=target)
        return Sample(
            job.image,
            target.labels,
            target.adversarial,
            target.boxes,
            seed=job.seed,
            key=key,
            known=known,
        )

    def refused(self, error: Exception) -> bool:
        """Report an image that cannot be attacked. Return False for the network's own errors."""
        if self.failed is None or not isinstance(error, (ArgumentError, ArgumentTypeError)):
            return False
        self.driver.in_flight.discard(self.driver.source.names[self.number])
        self.failed(self.number, " ".join(str(error).split()))
        return True

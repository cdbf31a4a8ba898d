"""Attacks on a stream of images in slots: when one image stops, the next takes its place."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentTypeError
from .devices import Device, device_for
from .loop import Finished, Schedule, Slots, Step
from .networks import Assign, Network, Networks, Targets
from .runs import Run, Runs

StreamCallback = Callable[[list[Any], Tensor], None]
"""Called with the keys of the images under attack and their active targets, -1 if stopped."""

GRACE = 0.02  # seconds that a CPU waits for samples to fill its slots, before an iteration
PerNetwork = Tensor | str | Sequence["Tensor | str | None"] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One image to attack.

    For a joint attack `labels`, `adversarial_labels` and `boxes` are sequences with one entry per
    network.
    """

    image: Tensor
    """(3, H, W) floating point."""
    labels: Tensor | Sequence[Tensor]
    """(*T) uint8, int32 or int64."""
    adversarial_labels: PerNetwork = None
    """(*T), or how to choose them; None for the attack's default."""
    boxes: PerNetwork = None
    """(P, 4), the boxes at which a detector computes its scores; see `DAG.__call__`."""
    start: Tensor | None = None
    """(3, H, W), where to begin instead of at the image; see `DAG.__call__`."""
    seed: int | None = None
    """Seed of the sample's random choices, at least 0; drawn if None."""
    key: Any = None
    """Any value that identifies the image; returned with its result."""
    known: tuple[Tensor, Tensor] | None = None
    """The image (1, 3, H, W) as a leaf, and the scores that the model has computed from it, with
    their graph. This saves the first evaluation if the image is alone in its slots."""

    def each(self, networks: int) -> list[tuple[Any, Any, Any]]:
        """Return labels, adversarial labels and boxes for each of the networks."""
        columns = []
        for name in ("labels", "adversarial_labels", "boxes"):
            value = getattr(self, name)
            alone = networks == 1 and not isinstance(value, Sequence)
            if alone or value is None or isinstance(value, (Tensor, str)):
                value = [value] * networks
            if not isinstance(value, Sequence) or len(value) != networks:
                raise ArgumentTypeError(
                    f"{name} must be a sequence with an entry for each of {networks} networks, got "
                    + (f"{len(value)}" if isinstance(value, Sequence) else type(value).__name__)
                )
            columns.append(value)
        return list(zip(*columns, strict=True))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """Return the same sample with `change` applied to the tensors, other than key and known."""

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            return list(map(changed, value)) if isinstance(value, (list, tuple)) else value

        names = [field.name for field in dataclasses.fields(self)]
        names = [name for name in names if name not in ("seed", "key", "known")]
        return dataclasses.replace(self, **{name: changed(getattr(self, name)) for name in names})


class Deferred(abc.ABC):
    """A sample that the attacking thread makes once a slot is free."""

    @abc.abstractmethod
    def sample(self) -> Sample | None:
        """Make the sample; None if there is none."""

    def refused(self, error: Exception) -> bool:
        """Return whether an error of the sample was handled, so that the stream can continue."""
        return False


class Prefetcher:
    """Fetches samples in a separate thread while the device works.

    At most `ahead` samples wait, on a GPU in pinned memory. They are copies: a source may reuse its
    buffers.
    """

    def __init__(self, samples: Iterable[Any], ahead: int, device: Device) -> None:
        self._samples = samples
        self._device, self._beside = device, device.beside()
        self._queue: queue.Queue[Sample | Deferred | None] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self.error: BaseException | None = None
        self.exhausted = False
        self._thread = threading.Thread(target=self._fetch, name="dagcore-prefetch", daemon=True)
        self._thread.start()

    def next(self, wait: float | None) -> Sample | Deferred | None:
        """Return the next sample; None if none has arrived yet or, once `exhausted`, none will.

        `wait` is in seconds; None waits for as long as it takes.
        """
        if self.exhausted:
            return None
        try:
            sample = self._queue.get(block=wait != 0, timeout=wait)
        except queue.Empty:
            return None
        self.exhausted = sample is None
        return sample

    def close(self) -> None:
        """Stop fetching: at once or, if the source hangs, when the process ends."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:  # make room for the one sample that the thread may still hold
                self._queue.get_nowait()
        self._thread.join(timeout=1)

    def _fetch(self) -> None:
        try:
            with self._beside:
                for sample in self._samples:
                    if self._closed.is_set():
                        return
                    if isinstance(sample, Sample):
                        sample = sample.with_tensors(self._device.kept)
                    self._queue.put(sample)
                    del sample  # the queue owns it, and the next may take long to come
                    if self._closed.is_set():  # before another one is made
                        return
        except BaseException as error:  # any error is passed to the consumer
            self.error = error
        finally:
            if not self._closed.is_set():
                self._queue.put(None)


def device_of(model: object) -> torch.device | None:
    """Return the device of a module's parameters; None if unknown."""
    if isinstance(model, nn.Module):
        tensor = next(model.parameters(), None)
        return None if tensor is None else tensor.device
    return None


class Stream:
    """The slots of a stream, in one group for each form of image.

    Args:
        parts: the networks, without slots.
        step: as for `Slots`.
        schedule: as for `Slots`.
        slots: number of images under attack at a time.
        device: where samples are moved.
        runs: number and starting points of the runs of each image.
        check: returns a sample ready to be attacked; raises if it cannot be.
        assign: returns a sample's adversarial labels for each network, and the seed of its runs.
        callback: called with (keys, counts (N, K)).
    """

    def __init__(
        self,
        parts: Sequence[Network],
        step: Step,
        schedule: Schedule,
        slots: int,
        device: Device,
        runs: Runs,
        *,
        check: Callable[[Sample], Sample],
        assign: Callable[[Sample], tuple[list[Assign], int | None]],
        callback: StreamCallback | None = None,
    ) -> None:
        self.parts, self.step, self.schedule = parts, step, schedule
        self.slots, self.device, self.runs = slots, device, runs
        self.check, self.assign = check, assign
        # Not a method: it would keep all slots alive with the stream, and the stream with them.
        self.report: Any = None
        if callback is not None:
            self.report = lambda _, runs, counts: callback([run.key for run in runs], counts)
        self.grace = GRACE if device.synchronous else 0.0
        self.groups: dict[Any, tuple[Slots, Networks]] = {}
        self.error: BaseException | None = None  # to be raised once all images have finished

    @property
    def in_flight(self) -> int:
        """Number of images under attack."""
        return sum(slots.in_flight for slots, _ in self.groups.values())

    def run(self, prefetcher: Prefetcher) -> Iterator[Finished]:
        """Yield outcomes as images finish; an error of the source is raised after all before it."""
        while True:
            if self.error is None:
                with self.device.current():
                    self.error = self.fill(prefetcher)
            if not self.in_flight:
                break
            for outcome in self.iterate():
                if outcome.error is None:
                    yield outcome
                else:
                    self.error = self.error or outcome.error
        if self.error is not None:
            raise self.error

    def fill(self, prefetcher: Prefetcher) -> BaseException | None:
        """Give free slots to waiting samples; return an error of the source or of a sample."""
        while self.in_flight < self.slots:
            sample = prefetcher.next(self.grace if self.in_flight else None)
            if sample is None:
                return prefetcher.error
            try:
                made = sample.sample() if isinstance(sample, Deferred) else sample
                if made is not None:
                    self.admit(made)
            except (TypeError, ValueError) as refused:
                if not (isinstance(sample, Deferred) and sample.refused(refused)):
                    return refused
        return None

    def admit(self, sample: Sample) -> None:
        """Take a sample into a slot of its form."""
        if not isinstance(sample, Sample):
            raise ArgumentTypeError(f"samples must be dagcore.Sample, got {type(sample).__name__}")
        sample = self.check(sample).with_tensors(self.device.moved)
        each = sample.each(len(self.parts))
        key = (form(sample.image), *(tuple(map(form, one)) for one in each))
        with device_for(sample.image.device).current(), torch.inference_mode(False):
            if key not in self.groups:
                # Drop forms that are no longer in use, or memory would grow with their number.
                self.groups = {k: one for k, one in self.groups.items() if one[0].in_flight}
                opened = [
                    part.open(self.slots, labels, boxes)
                    for part, (labels, _, boxes) in zip(self.parts, each, strict=True)
                ]
                networks = Networks(opened)
                slots = Slots(
                    networks, self.step, self.schedule, self.slots, sample.image, self.report
                )
                self.groups[key] = slots, networks
            slots, networks = self.groups[key]
            assigned, seed = self.assign(sample)
            run = Run(sample.key, seed)
            start = self.runs.start(sample.image, run) if sample.start is None else sample.start
            known = sample.known if len(self.parts) == 1 else None
            targets = [
                Targets(labels[None], assign, None if boxes is None else boxes[None], known)
                for (labels, _, boxes), assign in zip(each, assigned, strict=True)
            ]
            taken = slots.admit([run], sample.image[None], start[None])
            try:
                networks.admit(taken, targets)
            except BaseException:
                networks.take_back(taken)
                slots.take_back(taken)
                raise

    def iterate(self) -> Iterator[Finished]:
        """Run one iteration of every group, and yield the outcomes."""
        for slots, _ in list(self.groups.values()):
            if not slots.in_flight:
                continue
            try:
                with slots.device.current():
                    with torch.inference_mode(False):
                        slots.iterate()
                    outcomes = (self.runs.over(one, slots) for one in slots.collect())
                    finished = [one for one in outcomes if one is not None]
            except BaseException:
                for other, _ in self.groups.values():  # outcomes that had finished are not lost
                    with other.device.current():
                        finished = other.collect(wait=True)
                    yield from (self.runs.best(one) for one in finished)
                raise
            yield from finished


def form(value: object) -> Any:
    """Return what values must have in common for their images to share slots."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    return value == "runner-up"

"""Attacking a stream of images in slots: when one stops, the next takes its place."""

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
"""Called with the keys of the images under attack and their active targets, -1 where stopped."""

GRACE = 0.02  # seconds in which a fast source can fill the slots of a CPU, before an iteration
PerNetwork = Tensor | str | Sequence["Tensor | str | None"] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One image to attack.

    For a joint attack `labels`, `adversarial_labels` and `boxes` are sequences with an entry for
    each network.
    """

    image: Tensor
    """(3, H, W) floating point."""
    labels: Tensor | Sequence[Tensor]
    """(*T) uint8, int32 or int64."""
    adversarial_labels: PerNetwork = None
    """(*T), or how to choose them; None for "permutation"."""
    boxes: PerNetwork = None
    """(P, 4), what a detector's scores are read at; see `DAG.__call__`."""
    start: Tensor | None = None
    """(3, H, W), where to begin, if not at the image itself; see `DAG.__call__`."""
    seed: int | None = None
    """Of its random choices, at least 0; drawn if None."""
    key: Any = None
    """Whatever the caller knows the image by; handed back with its result."""
    known: tuple[Tensor, Tensor] | None = None
    """The image (1, 3, H, W) as a leaf, and the scores that the model has computed from it, with
    their graph: saves the first evaluation where the image is alone in its slots."""

    def each(self, networks: int) -> list[tuple[Any, Any, Any]]:
        """Labels, adversarial labels and boxes at each of so many networks."""
        columns = []
        for name in ("labels", "adversarial_labels", "boxes"):
            value = getattr(self, name)
            alone = networks == 1 and not isinstance(value, Sequence)
            if alone or value is None or isinstance(value, (Tensor, str)):
                value = [value] * networks
            if not isinstance(value, Sequence) or len(value) != networks:
                raise ArgumentTypeError(
                    f"{name} must be given for each of {networks} networks, "
                    f"got {type(value).__name__}"
                )
            columns.append(value)
        return list(zip(*columns, strict=True))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """The same sample with every tensor but the key changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            return list(map(changed, value)) if isinstance(value, (list, tuple)) else value

        names = [field.name for field in dataclasses.fields(self)]
        names = [name for name in names if name not in ("seed", "key", "known")]
        return dataclasses.replace(self, **{name: changed(getattr(self, name)) for name in names})


class Deferred(abc.ABC):
    """A sample that is made when there is a slot for it, in the thread that attacks."""

    @abc.abstractmethod
    def sample(self) -> Sample | None:
        """The sample; None if there is none after all."""

    def refused(self, error: Exception) -> bool:
        """Whether an error of the sample's has been dealt with, and the stream is to go on."""
        return False


class Prefetcher:
    """Samples, fetched by a thread of their own while the device works.

    At most `ahead` of them wait; on a GPU they wait in pinned memory. They are copies: a source may
    use its buffers again.
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
        """The next sample; None if none is there yet, or, once `exhausted`, none will come.

        `wait` is in seconds; None for as long as it takes.
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
        """Stop fetching: at once, or, where the source itself hangs, with the process."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:  # room in the queue, so that the thread sees that it is to stop
                self._queue.get(timeout=0.05)
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
                    del sample  # which is the queue's: the next may be long in coming
                    if self._closed.is_set():  # before another one is made
                        return
        except BaseException as error:  # handed to the consumer, whatever it is
            self.error = error
        finally:
            if not self._closed.is_set():
                self._queue.put(None)


def device_of(model: object) -> torch.device | None:
    """Where a module's parameters are; None if that cannot be told."""
    if isinstance(model, nn.Module):
        tensor = next(model.parameters(), None)
        return None if tensor is None else tensor.device
    return None


class Stream:
    """The slots of a stream, one group for each form of image.

    Args:
        parts: the networks, without slots.
        step: as for `Slots`.
        schedule: likewise.
        slots: images under attack at a time.
        device: where samples are moved.
        runs: how often each image is run, and from where.
        check: gives a sample as it is attacked; raises for one that cannot be.
        assign: how a sample gets its adversarial labels at each network, and the seed of its runs.
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
        # Not a method, which would keep all slots alive with the stream, and the stream with them.
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
        """Outcomes as images finish; an error of the source's once all before it have."""
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
        """Give free slots to the samples that are there; an error of the source or of a sample."""
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
                # Forms that nobody has any more make room, or memory would grow with their number.
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
        """One iteration of every group."""
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
                for other, _ in self.groups.values():  # what had finished is not lost
                    with other.device.current():
                        finished = other.collect(wait=True)
                    yield from (self.runs.best(one) for one in finished)
                raise
            yield from finished


def form(value: object) -> Any:
    """What the values of images that share slots have in common."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    return value == "runner-up"

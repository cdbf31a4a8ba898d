"""Attacking a stream of images in slots: when one stops, the next takes its place."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import ArgumentTypeError
from .loop import Outcome, Settings, Slots
from .scores import ScoreModel


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One image to attack."""

    image: Tensor
    """(3, H, W) floating point."""
    labels: Tensor
    """(*T) uint8, int32 or int64."""
    adversarial_labels: Tensor | str | None = None
    """(*T), or how to choose them; None for "permutation"."""
    boxes: Tensor | None = None
    """(P, 4) that a detector takes; see `DAG.__call__`."""
    start: Tensor | None = None
    """(3, H, W), where to begin, if not at the image itself; see `DAG.__call__`."""
    key: Any = None
    """Whatever the caller knows the image by; handed back with its result."""


class Stack(NamedTuple):
    """Samples of one form, one upon another."""

    places: list[int]
    """Where each was among all."""
    images: Tensor
    labels: Tensor
    adversarial_labels: Tensor | str | None
    boxes: Tensor | None


def stacked(samples: Sequence[Sample]) -> Iterator[Stack]:
    """Samples as batches for `DAG.__call__`, those of one form together; none has a start."""
    groups: dict[Any, list[int]] = {}
    for k, sample in enumerate(samples):
        forms = (
            (value.shape, value.dtype) if isinstance(value, Tensor) else value
            for value in (sample.image, sample.labels, sample.adversarial_labels, sample.boxes)
        )
        groups.setdefault(tuple(forms), []).append(k)
    for places in groups.values():
        group = [samples[k] for k in places]
        aims = [s.adversarial_labels for s in group if isinstance(s.adversarial_labels, Tensor)]
        boxes = [s.boxes for s in group if s.boxes is not None]
        yield Stack(
            places,
            torch.stack([sample.image for sample in group]),
            torch.stack([sample.labels for sample in group]),
            torch.stack(aims) if aims else group[0].adversarial_labels,
            torch.stack(boxes) if boxes else None,
        )


# Called with the keys of the images under attack and their active targets, -1 where one stopped.
StreamCallback = Callable[[list[Any], Tensor], None]
Assign = Callable[[Tensor, int], "Tensor | str"]


class Prefetcher:
    """Samples, fetched by a thread of their own while the device works.

    At most `ahead` of them wait; on a GPU they wait in pinned memory.
    """

    def __init__(self, samples: Iterable[Sample], ahead: int, device: torch.device | None) -> None:
        self._samples = samples
        self._pin = device is not None and device.type == "cuda"
        self._queue: queue.Queue[Sample | None] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self.error: BaseException | None = None
        self.exhausted = False
        self._thread = threading.Thread(target=self._fetch, name="dagcore-feed", daemon=True)
        self._thread.start()

    def next(self, *, wait: bool) -> Sample | None:
        """The next sample; None if none is there yet, or, once `exhausted`, none will come."""
        if self.exhausted:
            return None
        try:
            sample = self._queue.get(block=wait)
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
            for sample in self._samples:
                if self._closed.is_set():
                    return
                self._queue.put(self._pinned(sample))
                if self._closed.is_set():  # before another one is made
                    return
        except BaseException as error:  # handed to the consumer, whatever it is
            self.error = error
        finally:
            if not self._closed.is_set():
                self._queue.put(None)

    def _pinned(self, sample: Sample) -> Sample:
        if not self._pin or not isinstance(sample, Sample):
            return sample
        fields = {
            field.name: value.pin_memory()
            for field in dataclasses.fields(sample)
            if isinstance(value := getattr(sample, field.name), Tensor)
            and value.device.type == "cpu"
            and field.name != "key"
        }
        return dataclasses.replace(sample, **fields)


def device_of(model: object) -> torch.device | None:
    """Where a module's parameters are; None if that cannot be told."""
    if isinstance(model, nn.Module):
        tensor = next(model.parameters(), None)
        return None if tensor is None else tensor.device
    return None


class Stream:
    """The slots of a stream, one group for each size of image."""

    def __init__(
        self,
        reader: ScoreModel,
        settings: Settings,
        slots: int,
        device: torch.device | None,
        check: Callable[[Sample], None],
        assign: Callable[[Sample], Assign],
        callback: StreamCallback | None = None,
    ) -> None:
        self.reader = reader
        self.settings = settings
        self.slots = slots
        self.device = device
        self.check = check
        self.assign = assign
        self.callback = callback
        self.groups: dict[Any, Slots] = {}

    @property
    def in_flight(self) -> int:
        """Number of images under attack."""
        return sum(group.in_flight for group in self.groups.values())

    def run(self, feed: Prefetcher) -> Iterator[Outcome]:
        """Outcomes as images finish; an error of the source's once all before it have."""
        error: BaseException | None = None
        while True:
            while error is None and self.in_flight < self.slots:
                sample = feed.next(wait=self.in_flight == 0)
                if sample is None:
                    error = feed.error
                    break
                try:
                    self.admit(sample)
                except (TypeError, ValueError) as refused:
                    error = refused
            if not self.in_flight:
                break
            yield from self.iterate()
        if error is not None:
            raise error

    def admit(self, sample: Sample) -> None:
        """Take a sample into a slot of its size."""
        if not isinstance(sample, Sample):
            raise ArgumentTypeError(f"samples must be dagcore.Sample, got {type(sample).__name__}")
        self.check(sample)
        image, labels, adversarial, boxes, start = (
            value.to(self.device, non_blocking=True)
            if isinstance(value, Tensor) and self.device is not None
            else value
            for value in (
                sample.image,
                sample.labels,
                sample.adversarial_labels,
                sample.boxes,
                sample.start,
            )
        )
        assert isinstance(image, Tensor)
        assert isinstance(labels, Tensor)
        assert boxes is None or isinstance(boxes, Tensor)
        assert start is None or isinstance(start, Tensor)
        moved = dataclasses.replace(
            sample, image=image, labels=labels, adversarial_labels=adversarial, start=start
        )
        kind = adversarial.dtype if isinstance(adversarial, Tensor) else adversarial == "runner-up"
        more = None if boxes is None else (boxes.shape, boxes.dtype)
        key = (image.shape, image.dtype, image.device, labels.shape, labels.dtype, kind, more)
        if key not in self.groups:
            # Sizes that nobody has any more make room, or memory would grow with their number.
            self.groups = {k: group for k, group in self.groups.items() if group.in_flight}
            with torch.inference_mode(False):
                self.groups[key] = Slots(
                    self.reader, self.settings, self.slots, image, labels, boxes, self._report
                )
        with torch.inference_mode(False):
            self.groups[key].admit(
                [sample],
                image[None],
                labels[None],
                self.assign(moved),
                boxes=None if boxes is None else boxes[None],
                start=None if start is None else start[None],
            )

    def _report(self, _: int, tags: list[Any], counts: Tensor) -> None:
        if self.callback is not None:
            going = [(tag.key, k) for k, tag in enumerate(tags[: len(counts)]) if tag is not None]
            places = torch.tensor([k for _, k in going], dtype=torch.int64)
            self.callback([key for key, _ in going], counts[places])

    def iterate(self) -> Iterator[Outcome]:
        """One iteration of every group."""
        for group in list(self.groups.values()):
            if not group.in_flight:
                continue
            try:
                with torch.inference_mode(False):
                    group.iterate()
            except BaseException:
                for other in self.groups.values():  # what had finished is not lost
                    yield from self.collect(other, wait=True)
                raise
            yield from self.collect(group)

    def collect(self, group: Slots, *, wait: bool = False) -> Iterator[Outcome]:
        """Outcomes of a group's finished images, whose slots are free from then on."""
        done = group.finished(wait=wait)
        outcomes = [group.outcome(k) for k in done]
        group.release(done)
        yield from outcomes


def validate_slots(slots: object) -> None:
    """Raise unless there is at least one slot."""
    checks.integer("slots", slots, at_least=1)

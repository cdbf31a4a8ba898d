"""Resumable work on a data set, by one or more processes that claim the images one by one."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import info
from ..errors import ArgumentError
from ..victims import Detector, Victim, prepare
from . import faults
from .options import find_device, find_victim
from .progress import ImageProgress
from .ranks import Ranks, connect
from .settings import DataSettings
from .sources import Source, source_of
from .store import FAILED, Folder, Record

SIGNAL_SECONDS = 5  # after a signal, during which others are ignored

SourceFor = Callable[[DataSettings, "Victim | Detector"], Source]

T = TypeVar("T")


class Interrupted(BaseException):
    """Raised by a signal that asks the process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Work(abc.ABC):
    """Work on a data set, as each rank does it for the images that it claims.

    Args:
        settings: the network, the data set, and options for the work.
        ranks: processes that share the work.
        progress: object that is told about every image.
        victim: network to use instead of the one named in the settings.
        source_for: function that returns the images for a network, instead of those named in the
            settings.
        silent: whether to print nothing, and to issue warnings with Python's `warnings`.
    """

    command: str
    """Name of the command in messages."""
    form: int
    """Version of the records' format. It rises when older records can no longer be resumed."""
    numbers: Sequence[str]
    """Keys that the record of an image must have."""

    def __init__(
        self,
        settings: DataSettings,
        ranks: Ranks,
        progress: ImageProgress,
        *,
        victim: Victim | Detector | None = None,
        source_for: SourceFor = source_of,
        silent: bool = False,
    ) -> None:
        self.options, self.ranks, self.progress = settings, ranks, progress
        own = ranks.device() if settings.device in (None, "cuda") else None
        self.device = find_device(own or settings.device)
        self.silent = silent
        self.victim = find_victim(settings, self.device) if victim is None else victim
        self.digest = digest(self.victim)
        self.source = source_for(settings, self.victim)
        self.attacked = self._prepared()
        self.slots = settings.slots or (1 if self.device.type == "cpu" else 8)
        self.folder = Folder(settings.out, self.numbers)
        self.in_flight: set[str] = set()

    @abc.abstractmethod
    def probe(self) -> None:
        """Raise unless network, data and settings fit together."""

    @abc.abstractmethod
    def attack(self, numbers: Iterator[int]) -> Iterator[str]:
        """Attack images as they are claimed, and keep the results. Yield a line for each image."""

    @abc.abstractmethod
    def finish(self, records: dict[int, Record], speed: float | None) -> list[str]:
        """Summarise all records on the first rank, show the summary, and return the warnings."""

    def _prepared(self) -> Any:
        """Return the network to attack: a prepared copy, or the victim itself."""
        if not self.options.prepare:
            return self.victim
        try:
            if isinstance(self.victim, Detector):
                return prepare(self.victim)
            return prepare(self.victim, low_resolution=False if self.victim.cells else None)
        except (TypeError, ValueError, RuntimeError) as error:
            if str(error).startswith("model must return"):  # fails unprepared too
                raise
            one_size = ", --size WIDTHxHEIGHT resizes images for a network that takes one size"
            raise ArgumentError(
                f"--model {self.options.model} cannot be prepared ({error}): --no-prepare attacks "
                "it unprepared"
                + one_size
                * (str(error).startswith("example") and self.options.size is None)
            ) from error

    def made_with(self) -> dict[str, Any]:
        """Return what the results depend on besides the settings."""
        return {
            "form of the records": self.form,
            "images": len(self.source.names),
            "names and sizes of the images": self.source.digest(),
            "digest of the weights": self.digest,
        }

    def versions(self) -> dict[str, Any]:
        """Return the versions that the last bits of the results depend on."""
        device = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        known = {name: version for name, version in info.versions().items() if version}
        return {**known, "device": device}

    def model_faults(self) -> contextlib.AbstractContextManager[None]:
        """Report errors of the network as the user's, with the images that may have caused them."""
        return faults.of_model(self.options.model, self.in_flight)

    def tell(self, kind: str, text: str) -> None:
        """Report a note, a warning or the end of the work to the user."""
        if not self.silent:
            print(f"dagcore {self.command}: {kind + ': ' if kind else ''}{text}", file=sys.stderr)
        elif kind == "warning":
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def claimed(self, missing: list[int]) -> Iterator[int]:
        """Yield the numbers of the images that this rank claims."""
        while (place := self.ranks.claim()) < len(missing):
            number = missing[place]
            try:
                self.folder.check_name(self.source.names[number])
            except ArgumentError as error:
                if self.options.strict:
                    raise
                self.failed(number, str(error))
                continue
            yield number

    def failed(self, number: int, reason: str) -> None:
        """Record that an image cannot be attacked."""
        name = self.source.names[number]
        record = {"number": number, "name": name, "status": FAILED, "reason": reason}
        self.folder.write_record(number, record)
        self.progress.finished(
            self.ranks.count(), f"{name}: passed over: {reason}", passed_over=True
        )


def digest(victim: object) -> str:
    """Return a hash of a network's weights and buffers."""
    if not isinstance(victim, nn.Module):
        return "unknown"
    total = hashlib.sha256()
    for name, value in victim.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if isinstance(value, Tensor):
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total.update(raw.numpy().tobytes())
    return total.hexdigest()


def carry_out(make: Callable[[Ranks], Work]) -> int:
    """Do the work on a data set. Images that were finished with the same settings are skipped.

    Args:
        make: function that creates the work of a rank.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped the work.

    Raises:
        ValueError, TypeError, OSError, ImportError: if a setting is invalid. The message names the
            setting and the problem.
    """
    ranks = connect()
    with contextlib.ExitStack() as stack:
        try:
            work = agreed(ranks, lambda: begin(make(ranks)))
            missing = agreed(ranks, lambda: missing_images(work, stack))
            missing = ranks.gather(missing)[0]
            started = time.monotonic()
            with stopped_by_signals():
                attacked = sum(ranks.gather(agreed(ranks, lambda: attack_all(work, missing))))
                seconds = time.monotonic() - started
                agreed(ranks, lambda: finish(work, attacked, seconds))
        except Interrupted as stop:
            if ranks.rank == 0:
                count = len(work.source.names)
                have = len(work.folder.read(count))
                done = f"{have} of {count} images are done"
                work.tell("", f"stopped by {stop}, {done}: run the same command again to resume")
            return 128 + stop.number
        ranks.close()
    return 0


def agreed(ranks: Ranks, step: Callable[[], T]) -> T:
    """Run a step, and return its result if it succeeds on all ranks. Otherwise end all ranks."""
    made: list[T] = []
    failed: Exception | None = None
    try:
        made.append(step())
    except Exception as error:  # of any kind: the first rank reports it
        failed = error
        ranks.stop()
    ranks.agree(failed)
    return made[0]


def begin(work: Work) -> Work:
    """Check that network, data and settings fit together."""
    with work.model_faults():
        work.probe()
    return work


def missing_images(work: Work, stack: contextlib.ExitStack) -> list[int]:
    """Lock the folder and return the images still to be attacked, on the first rank only."""
    if work.ranks.rank > 0:
        return []
    stack.enter_context(work.folder.locked())
    changed = work.folder.begin(work.options, work.made_with(), work.versions())
    notes = ["; ".join(changed), work.source.note]
    for note in filter(None, notes):
        work.tell("note", note)
    count = len(work.source.names)
    done = {k for k, one in work.folder.read(count).items() if one["status"] != FAILED}
    return [k for k in range(count) if k not in done]


def attack_all(work: Work, missing: list[int]) -> int:
    """Attack the images that this rank claims, and return their number."""
    count = 0
    work.progress.begin(len(work.source.names), len(missing), silent=work.ranks.rank > 0)
    with work.progress, work.model_faults():
        lines = work.attack(work.claimed(missing))
        with contextlib.closing(lines):  # type: ignore[type-var]  # it is a generator
            for line in lines:
                count += 1
                work.progress.finished(work.ranks.count(), line)
    return count


def finish(work: Work, attacked: int, seconds: float) -> None:
    """Write and show the summary, on the first rank."""
    if work.ranks.rank > 0:
        return
    names = work.source.names
    records = work.folder.read(len(names))
    if list(records) != list(range(len(names))):
        absent = [name for k, name in enumerate(names) if k not in records]
        raise ArgumentError(
            f"--out {work.folder.out} must have a record of each of {len(names)} images, "
            f"{len(absent)} are missing ({', '.join(absent[:3])}, ...): do all processes share "
            "the folder? Run the same command again to resume"
        )
    told = work.finish(records, attacked / seconds if attacked else None)
    if attacked:
        work.folder.add_speed(
            {
                "images": attacked,
                "seconds": seconds,
                "images per second": attacked / seconds,
                "processes": work.ranks.world,
                "threads of each": torch.get_num_threads(),
                "slots of each": work.slots,
                **work.versions(),
            }
        )
    if not work.silent:
        print(f"written to {work.folder.out}")
    for warning in told:
        work.tell("warning", warning)
    failed = [record for record in records.values() if record["status"] == FAILED]
    if len(failed) == len(records):
        first = failed[0]
        raise ArgumentError(f"no image could be attacked: {first['name']}: {first['reason']}")


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Interrupted`. Further signals soon after are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    first: float | None = None  # time of the first signal

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None or now - first > SIGNAL_SECONDS:  # the first may have been swallowed
            first = now
            raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        if first is None:
            for number, handler in before.items():
                signal.signal(number, handler)

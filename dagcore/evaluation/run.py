"""A run: images claimed one by one, attacked in slots, written as they finish."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import info
from ..errors import ArgumentError
from ..victims import Detector, prepare
from . import faults
from .driver import Driver, Job
from .options import find_device, find_victim
from .outcome import Outcome, draw
from .progress import ImageProgress
from .ranks import Ranks, connect
from .settings import Settings
from .sources import source_of
from .store import FAILED, Folder, Record
from .summary import STAGES, summarise, tally, warnings_of

RECORDS = 3  # raised where old records cannot be gone on from
SIGNAL_SECONDS = 5  # from a signal to the next that counts

T = TypeVar("T")


class Interrupted(BaseException):
    """A signal to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Work:
    """What every rank of a run has."""

    def __init__(self, settings: Settings, ranks: Ranks, progress: ImageProgress) -> None:
        self.settings, self.ranks, self.progress = settings, ranks, progress
        own = ranks.device() if settings.device in (None, "cuda") else None
        self.device = find_device(own or settings.device)
        self.victim = find_victim(settings, self.device)
        self.source = source_of(settings, self.victim)
        self.driver = Driver(
            settings,
            self.victim,
            self.source,
            self.device,
            attacked=self._prepared(),
            slots=settings.slots or (1 if self.device.type == "cpu" else 8),
        )
        self.folder = Folder(settings.out)
        count = len(self.source.names)
        wanted = min(settings.figures, count)
        self.drawn = {k * count // wanted for k in range(wanted)}

    def _prepared(self) -> Any:
        """The network as it is attacked."""
        if not self.settings.prepare:
            return self.victim
        try:
            if isinstance(self.victim, Detector):
                return prepare(self.victim)
            return prepare(self.victim, low_resolution=False if self.victim.cells else None)
        except (TypeError, ValueError, RuntimeError) as error:
            if str(error).startswith("model must return"):  # prepared or not
                raise
            one_size = ", --size WIDTHxHEIGHT resizes images for a network that takes one size"
            raise ArgumentError(
                f"--model {self.settings.model} cannot be prepared ({error}): --no-prepare attacks "
                "it as it is"
                + one_size
                * (str(error).startswith("example") and self.settings.size is None)
            ) from error

    def made_with(self) -> dict[str, Any]:
        """What results follow from beside the settings."""
        return {
            "form of the records": RECORDS,
            "images": len(self.source.names),
            "names and sizes of the images": self.source.digest(),
            "digest of the weights": digest(self.victim),
        }

    def versions(self) -> dict[str, Any]:
        """What they follow from in their last bits."""
        device = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        known = {name: version for name, version in info.versions().items() if version}
        return {**known, "device": device}

    def model_faults(self) -> contextlib.AbstractContextManager[None]:
        """Tell of errors of the network as the user's, at the images that it may be that of."""
        return faults.of_model(self.settings.model, self.driver.in_flight)

    def claimed(self, missing: list[int]) -> Iterator[int]:
        """Images as this rank gets to them."""
        while (place := self.ranks.claim()) < len(missing):
            number = missing[place]
            try:
                self.folder.check_name(self.source.names[number])
            except ArgumentError as error:
                if self.settings.strict:
                    raise
                self.failed(number, str(error))
                continue
            yield number

    def failed(self, number: int, reason: str) -> None:
        """Put on record that an image cannot be attacked."""
        name = self.source.names[number]
        record = {"number": number, "name": name, "status": FAILED, "reason": reason}
        self.folder.write_record(number, record)
        self.progress.finished(
            self.ranks.count(), f"{name}: passed over: {reason}", passed_over=True
        )

    def keep(self, job: Job, outcome: Outcome) -> None:
        """Write what came of an image."""
        if job.number in self.drawn:
            path = self.folder.path("figures", job.name, "png")
            draw(outcome, path, self.victim, note=outcome.note(leaves=self.settings.leaves))
        self.folder.write(
            job.number,
            job.name,
            outcome,
            self.record(job, outcome),
            perturbation=self.settings.perturbations,
        )

    def record(self, job: Job, outcome: Outcome) -> Record:
        """The numbers of an image."""
        stages = dict(zip(STAGES, (outcome.predicted, outcome.attacked), strict=True))
        judged: Record
        if job.target.truth is not None:
            found = {
                stage: {name: values.tolist() for name, values in one.items()}
                for stage, one in stages.items()
                if isinstance(one, Mapping)
            }
            truth = {name: values.tolist() for name, values in job.target.truth.items()}
            for flags in ("difficult", "iscrowd"):
                truth.setdefault(flags, [False] * len(truth["labels"]))
            judged = {"truth": truth, "seen": found}
        else:
            labels = job.target.labels.cpu()
            judged = {
                "pixels": {
                    stage: tally(one, labels)
                    for stage, one in stages.items()
                    if isinstance(one, Tensor)
                }
            }
        return {
            "number": job.number,
            **outcome.numbers(),
            **job.target.record,
            "generator_seed": job.seed,
            **judged,
        }


def digest(victim: object) -> str:
    """The weights of a network in one number."""
    if not isinstance(victim, nn.Module):
        return "unknown"
    total = hashlib.sha256()
    for name, value in victim.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if isinstance(value, Tensor):
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total.update(raw.numpy().tobytes())
    return total.hexdigest()


def run(settings: Settings, progress: ImageProgress) -> int:
    """Attack a data set; what an earlier run of the same settings has done is not done again.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped it.

    Raises:
        ValueError, TypeError, OSError, ImportError: what is wrong, and with which setting.
    """
    ranks = connect()
    with contextlib.ExitStack() as stack:
        try:
            work = agreed(ranks, lambda: begin(settings, ranks, progress))
            missing = agreed(ranks, lambda: missing_images(work, stack))
            missing = ranks.gather(missing)[0]
            started = time.monotonic()
            with stopped_by_signals():
                attacked = sum(ranks.gather(agreed(ranks, lambda: attack_all(work, missing))))
        except Interrupted as stop:
            if ranks.rank == 0:
                count = len(work.source.names)
                have = len(work.folder.read(count))
                print(
                    f"dagcore run: {stop} after {have} of {count} images: the same command goes "
                    "on from there",
                    file=sys.stderr,
                )
            return 128 + stop.number
        if ranks.rank == 0:
            finish(work, attacked, time.monotonic() - started)
        ranks.close()
    return 0


def agreed(ranks: Ranks, step: Callable[[], T]) -> T:
    """What a step gives, once it has ended well on all ranks; else all of them end."""
    made: list[T] = []
    failed: Exception | None = None
    try:
        made.append(step())
    except Exception as error:  # told by the first rank, whatever it is
        failed = error
        ranks.stop()
    ranks.agree(failed)
    return made[0]


def begin(settings: Settings, ranks: Ranks, progress: ImageProgress) -> Work:
    """Load what is needed, and see whether it goes together."""
    work = Work(settings, ranks, progress)
    with work.model_faults():
        work.driver.probe()
    return work


def missing_images(work: Work, stack: contextlib.ExitStack) -> list[int]:
    """The images that are still to be attacked, on the first rank, which locks the folder."""
    if work.ranks.rank > 0:
        return []
    stack.enter_context(work.folder.locked())
    changed = work.folder.begin(work.settings, work.made_with(), work.versions())
    if changed:
        print(f"dagcore run: note: {'; '.join(changed)}", file=sys.stderr)
    if work.source.note:
        print(f"dagcore run: note: {work.source.note}", file=sys.stderr)
    count = len(work.source.names)
    done = {k for k, one in work.folder.read(count).items() if one["status"] != FAILED}
    return [k for k in range(count) if k not in done]


def attack_all(work: Work, missing: list[int]) -> int:
    """Attack the images that this rank gets to; how many these were."""
    count = 0
    work.progress.begin(len(work.source.names), len(missing), silent=work.ranks.rank > 0)
    with work.progress, work.model_faults():
        finished = work.driver.run(
            work.claimed(missing),
            failed=None if work.settings.strict else work.failed,
            callback=work.progress.watched,
        )
        with contextlib.closing(finished):  # type: ignore[type-var]  # it is a generator
            for job, outcome in finished:
                work.keep(job, outcome)
                count += 1
                work.progress.finished(work.ranks.count(), outcome.line())
    return count


def finish(work: Work, attacked: int, seconds: float) -> None:
    """Write the summary, and show it."""
    names = work.source.names
    records = work.folder.read(len(names))
    if list(records) != list(range(len(names))):
        absent = [name for k, name in enumerate(names) if k not in records]
        raise ArgumentError(
            f"--out {work.folder.out} must have a record of each of {len(names)} images, of "
            f"{len(absent)} there is none ({', '.join(absent[:3])}, ...): do all processes share "
            "the folder? The same command goes on from there"
        )
    attack = work.driver.attack
    made = list(records.values())
    summary = summarise(made, work.victim.classes, work.settings.tolerance)
    warnings = warnings_of(made, attack, prepared=work.settings.prepare)
    summary["warnings"] = warnings
    work.folder.finish(records, summary)
    if attacked:
        work.folder.add_speed(
            {
                "images": attacked,
                "seconds": seconds,
                "images per second": attacked / seconds,
                "processes": work.ranks.world,
                "threads of each": torch.get_num_threads(),
                "slots of each": work.driver.slots,
                **work.versions(),
            }
        )
    work.progress.summary(summary, attacked / seconds if attacked else None)
    print(f"written to {work.folder.out}")
    for warning in warnings:
        print(f"dagcore run: warning: {warning}", file=sys.stderr)
    if not summary["attacked"]:
        first = summary["failed"][0]
        raise ArgumentError(f"no image could be attacked: {first['name']}: {first['reason']}")


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Interrupted`; more of them soon after do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    first: float | None = None  # when the first came

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

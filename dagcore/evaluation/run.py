"""A run: images claimed one by one, attacked in slots, written as they finish."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import info
from ..attacks.dag import Result
from ..engine.stream import Sample
from ..errors import ArgumentError
from ..labels import assign
from ..perturbation import round_to_8_bits
from ..victims import Detector, load, prepare
from .outcome import Outcome, draw, look, measure
from .progress import ImageProgress
from .ranks import Ranks, connect
from .settings import Settings
from .sources import Source, source_of
from .store import FAILED, Folder, Record
from .summary import STAGES, summarise, tally
from .targets import ImageTarget, Truth, Unfit, aims_of, find_device, seed_of

PATIENCE = 5  # seconds from a signal to the next that counts

T = TypeVar("T")


class Interrupted(BaseException):
    """A signal to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Claimed(NamedTuple):
    """An image that this rank attacks."""

    number: int
    name: str
    image: Tensor
    aim: ImageTarget
    seed: int
    generator: torch.Generator
    """From the seed on, as far as the aim has drawn."""


class Work:
    """What every rank of a run has."""

    def __init__(self, settings: Settings, ranks: Ranks, progress: ImageProgress) -> None:
        self.settings, self.ranks, self.progress = settings, ranks, progress
        own = ranks.device() if settings.device in (None, "cuda") else None
        self.device = find_device(own or settings.device)
        self.attack = settings.attack()
        self.victim = load(settings.model, settings.weights, self.device)
        self.source: Source = source_of(settings, self.victim)
        self.aims = aims_of(settings, self.victim)
        self.attacked = self._prepared()
        self.slots = settings.slots or (1 if self.device.type == "cpu" else 8)
        self.folder = Folder(settings.out)
        # The victim looks at images in two threads, one of which prepares the next image.
        self.looking = threading.Lock()
        self.in_flight: set[str] = set()
        self.stopping = threading.Event()
        count = len(self.source.names)
        wanted = min(settings.figures, count)
        self.drawn = {k * count // wanted for k in range(wanted)}

    def _prepared(self) -> Any:
        """The network as it is attacked."""
        if not self.settings.prepare:
            try:
                return copy.deepcopy(self.victim)  # another thread looks at images with the victim
            except Exception as error:  # a module may hold anything
                raise ArgumentError(
                    f"--model {self.settings.model} must be a network that can be copied: {error}"
                ) from error
        try:
            cells = getattr(self.victim, "cells", False)
            return prepare(self.victim, low_resolution=False if cells else None)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"--model {self.settings.model} cannot be prepared ({error}): --no-prepare attacks "
                "it as it is"
            ) from error

    def made_with(self) -> dict[str, Any]:
        """What results follow from beside the settings."""
        return {
            "images": len(self.source.names),
            "names and sizes of the images": self.source.digest(),
            "digest of the weights": digest(self.victim),
        }

    def versions(self) -> dict[str, Any]:
        """What they follow from in their last bits."""
        device = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        known = {name: version for name, version in info.versions().items() if version}
        return {**known, "device": device}

    def probe(self) -> None:
        """Raise where the rules do not go with the network, before any work.

        What the first image shows that the network takes; one after the other is tried.
        """
        for number, name in enumerate(self.source.names):
            try:
                image = self.source.read(number)[0].to(self.device)
            except (OSError, ValueError):
                continue
            with contextlib.suppress(Unfit):
                self.aims.settle(name, image)
                return

    @contextlib.contextmanager
    def models_faults(self) -> Iterator[None]:
        """Tell of errors of the model, which is the user's own and fails in any way at all.

        Raises:
            ValueError: the error, with the images that the model may have failed on.
        """
        try:
            yield
        except (OSError, TypeError, ValueError):
            raise
        except Exception as error:
            at = ", ".join(sorted(self.in_flight)) or "the next images"
            raise ArgumentError(
                f"--model {self.settings.model} failed with {type(error).__name__}: {error}, at "
                f"one of {at}"
            ) from error

    def claimed(self, missing: list[int]) -> Iterator[Sample]:
        """Images as this rank gets to them; those that cannot be attacked are put on record."""
        while not self.stopping.is_set() and (place := self.ranks.claim()) < len(missing):
            number = missing[place]
            name = self.source.names[number]
            try:
                self.folder.check_name(name)
                image, truth = self.source.read(number)
                with self.looking:
                    one = self._aim(number, name, image.to(self.device), truth)
                sample = self._sample(one)
                self.attack._check_sample(self.attacked, sample, name)
            except (OSError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                if self.settings.strict:
                    raise ArgumentError(f"{name}: {reason}") from error
                self.failed(number, name, reason)
                continue
            self.in_flight.add(name)
            yield sample

    def _aim(self, number: int, name: str, image: Tensor, truth: Truth) -> Claimed:
        self.aims.settle(name, image)
        self.aims.check(name, image, truth)
        seed = seed_of(self.settings.seed, number)
        generator = torch.Generator().manual_seed(seed)
        aim = self.aims.aim(name, image, truth, generator)
        return Claimed(number, name, image, aim, seed, generator)

    def _sample(self, one: Claimed) -> Sample:
        adversarial = one.aim.adversarial
        if isinstance(adversarial, str) and adversarial != "runner-up":
            # Not drawn by the stream, whose images come in any order.
            drawn = assign(
                adversarial,
                one.aim.labels[None],
                self.aims.num_classes,
                self.attack.ignore_index,
                one.generator,
            )
            adversarial = drawn if isinstance(drawn, str) else drawn[0]
        return Sample(one.image, one.aim.labels, adversarial, boxes=one.aim.at, key=one)

    def failed(self, number: int, name: str, reason: str) -> None:
        """Put on record that an image cannot be attacked."""
        record = {"number": number, "name": name, "status": FAILED, "reason": reason}
        self.folder.write_record(number, record)
        self.progress.finished(
            self.ranks.count(), f"{name}: passed over: {reason}", passed_over=True
        )

    def keep(self, result: Result) -> Outcome:
        """Measure and write what came of an image."""
        one: Claimed = result.key
        with self.looking:
            outcome, record = self._measured(one, result)
        if one.number in self.drawn:
            path = self.folder.path("figures", one.name, "png")
            draw(outcome, path, self.victim, note=outcome.note(self.attack.goal))
        self.folder.write(
            one.number, one.name, outcome, record, perturbation=self.settings.perturbations
        )
        self.in_flight.discard(one.name)
        return outcome

    def _measured(self, one: Claimed, result: Result) -> tuple[Outcome, Record]:
        (outcome,) = measure(
            self.attack,
            self.victim,
            one.image[None],
            one.aim.labels[None],
            result,
            boxes=None if one.aim.at is None else one.aim.at[None],
            names=[one.name],
        )
        return outcome, self.record(one, outcome)

    def record(self, one: Claimed, outcome: Outcome) -> Record:
        """The numbers of an image."""
        numbers = outcome.numbers()
        size = tuple(one.aim.labels.shape)
        rounded = round_to_8_bits(outcome.adversarial.to(self.device))[None]
        (after_rounding,) = look(self.victim, rounded, size)
        seen = dict(zip(STAGES, (outcome.predicted, outcome.attacked, after_rounding), strict=True))
        labels = one.aim.labels.cpu()
        judged: Record
        if isinstance(self.victim, Detector):
            found = {
                stage: {name: values.tolist() for name, values in one.items()}
                for stage, one in seen.items()
                if isinstance(one, Mapping)
            }
            assert one.aim.boxes is not None
            truth = {name: values.tolist() for name, values in one.aim.boxes.items()}
            truth.setdefault("difficult", [False] * len(truth["labels"]))
            judged = {"truth": truth, "seen": found}
        else:
            judged = {
                "pixels": {
                    stage: tally(one, labels)
                    for stage, one in seen.items()
                    if isinstance(one, Tensor)
                }
            }
        return {
            "number": one.number,
            **numbers,
            **one.aim.record,
            "generator_seed": one.seed,
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
    with work.models_faults():
        work.probe()
    return work


def missing_images(work: Work, stack: contextlib.ExitStack) -> list[int]:
    """The images that are still to be attacked, on the first rank, which locks the folder."""
    if work.ranks.rank > 0:
        return []
    stack.enter_context(work.folder.locked())
    changed = work.folder.begin(work.settings, work.made_with(), work.versions())
    if changed:
        print(f"dagcore run: note: {'; '.join(changed)}", file=sys.stderr)
    count = len(work.source.names)
    done = {k for k, one in work.folder.read(count).items() if one["status"] != FAILED}
    return [k for k in range(count) if k not in done]


def attack_all(work: Work, missing: list[int]) -> int:
    """Attack the images that this rank gets to; how many these were."""
    count = 0
    work.progress.begin(len(work.source.names), len(missing), silent=work.ranks.rank > 0)
    with work.progress, work.models_faults():
        results = work.attack.stream(
            work.attacked, work.claimed(missing), work.slots, callback=work.progress.watched
        )
        try:
            for result in results:
                outcome = work.keep(result)
                count += 1
                work.progress.finished(work.ranks.count(), outcome.line())
        finally:
            work.stopping.set()
            results.close()  # type: ignore[attr-defined]  # it is a generator
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
    summary = summarise(list(records.values()), work.victim.classes, work.attack.tolerance)
    work.folder.finish(records, summary)
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
    work.progress.summary(summary, attacked / seconds if attacked else None)
    print(f"written to {work.folder.out}")
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
        if first is None or now - first > PATIENCE:  # the first may have been swallowed
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

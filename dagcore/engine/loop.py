"""Images under attack in slots, each on its own, without waiting for the device.

An attack is an objective, a step and a schedule (`Objective`, `Step`, `Schedule`); the loop runs
any of them and knows nothing else. A slot holds one image. All state of an image is rows of named
tensors on the device, and an iteration changes them in place, so that iterations can follow each
other without a synchronisation and be replayed as a CUDA graph. An image that has stopped is not
touched any more; learning of it late changes no result.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress, repeat
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import ops
from .devices import device_for
from .graph import Graph
from .readback import Readback

EAGER = 3  # of full slots before a CUDA graph is captured: libraries settle on their kernels
NEVER = sys.maxsize  # the iteration at which a free slot was taken
UNTOLD = torch.iinfo(torch.int32).max  # a count that a replay was to write

State = dict[str, Tensor]
"""Named tensors, a row for each slot."""


class Seed(NamedTuple):
    """What an objective finds at the scores."""

    seed: Tensor
    """Like the scores."""
    active: Tensor
    """(N,) int32, active targets; below 0 for a label out of range."""
    loss: Tensor | None = None
    """(N,) float64, what the seed is the gradient of."""


class Objective(Protocol):
    """What counts at the scores of a network, and what to seed its backward pass with."""

    @property
    def tells_loss(self) -> bool:
        """Whether `seed` has a loss."""

    @property
    def default(self) -> str:
        """How adversarial labels are chosen where nobody says it."""

    def assign(
        self,
        wanted: Tensor | str | None,  # (N, *T)
        labels: Tensor,  # (N, *T)
        num_classes: int,
        generator: torch.Generator | None,
    ) -> Tensor | str:
        """Adversarial labels (N, *T), given or drawn; or a word in their place, as "runner-up"."""

    def count(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> Tensor:
        """Number of targets that count, (N,) int64; labels out of range are not looked for."""

    def begin(self, labels: Tensor) -> State:
        """State of its own for the targets of new images (N, *T), by names that no part uses."""

    def seed(
        self,
        scores: Tensor,  # (N, C, *T), or maps (N, C, h, w) below the labels' size
        labels: Tensor,  # (N, *T)
        adversarial: Tensor | str,  # (N, *T)
        *,
        align_corners: bool,
        state: State,
    ) -> Seed:
        """What to seed, without a synchronisation.

        `state` has the images' rows, such as "updates", those of `begin`, and the number of
        "targets" that count and of those that are "allowed" to be active; what the objective
        writes there, it finds again. Without rows of its own it is asked for active targets alone.
        """

    def refuse(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> None:
        """Raise an error that names the label that is out of range. May synchronise."""


class Step(Protocol):
    """How a gradient moves the images."""

    def begin(self, images: Tensor, start: Tensor) -> State:
        """State of its own for new images (N, *), by names that no other part uses.

        An "x" among it is what the attack begins at in place of `start` (N, *).
        """

    def move(self, state: State, seen: Evaluation, going: Tensor) -> Tensor:
        """Move state["x"] in place where `going` (N,), within a distance of state["origin"].

        Called after every evaluation, so that a step can keep what has been best. Where
        `seen.gradient` is None, no image is going. A row "best" is what an attack gives back in
        place of "x", a row "best_active" how many targets are active there, and a row "done" says
        which images are done, in place of `seen.done`.

        Returns:
            (N,) bool: which of the going images took the step; the others are as they were.
        """


class Schedule(Protocol):
    """How long it goes on."""

    @property
    def max_iter(self) -> int:
        """Updates at the most."""

    @property
    def patience(self) -> int:
        """An image has stalled when so many steps in a row could not be taken."""

    def begin(self, images: Tensor) -> State:
        """State of its own for new images, as for a step."""

    def allowed(self, targets: Tensor) -> Tensor:
        """How many of its targets may be active in an image that is done, (N,) float64."""


class Evaluation(NamedTuple):
    """What the images under attack are like now."""

    active: Tensor
    """(N, K) int32, active targets at each of K networks."""
    wanted: Tensor
    """(N,) bool, whether there is something to gain by a step."""
    done: Tensor | None
    """(N,) bool; None where that is what is not wanted."""
    gradient: Tensor | None
    """(N, *) of the images; None where no image may move."""
    loss: Tensor | None = None
    """(N, K) float64, at each network, of objectives that tell it."""


class Aims(NamedTuple):
    """What an image is attacked at, at each of K networks."""

    targets: Tensor  # (K,), how many count
    labels: tuple[Tensor, ...]  # (*T)
    adversarial_labels: tuple[Tensor | str, ...]  # (*T), or a word
    boxes: tuple[Tensor | None, ...]  # (*), what else the model takes


class Evaluator(Protocol):
    """Evaluates the images: `Networks`, or what an attack brings itself."""

    @property
    def networks(self) -> int:
        """K."""

    @property
    def tells_loss(self) -> bool:
        """Whether evaluations have a loss."""

    @property
    def capturable(self) -> bool:
        """Whether an evaluation launches the same each time, and can be a CUDA graph."""

    @property
    def states(self) -> Sequence[State]:
        """Rows of its own for each slot, which move with those of the loop."""

    def advance(self, state: State) -> None:
        """What the host has to do before an evaluation; may replace tensors of the loop."""

    def evaluate(self, state: State, may_move: Tensor, *, synchronous: bool) -> Evaluation:
        """Evaluate the first N slots, the rows in `state`.

        Args:
            state: rows of the images that have a slot.
            may_move: (N,) bool.
            synchronous: whether values may be read, to save a backward pass.
        """

    def refuse(self, slot: int) -> None:
        """Raise for a label of a slot's image that is out of range."""

    def aims(self, slot: int) -> Aims:
        """What a slot's image was attacked at, copied out."""


class Finished(NamedTuple):
    """One image when it stops."""

    tag: Any  # as given to `Slots.admit`
    image: Tensor  # (*), the best where the step keeps it
    last: Tensor  # (*)
    origin: Tensor  # (*)
    iterations: int
    status: int
    left: int  # active targets of the image, at all networks together
    active: Tensor  # (M + 1, K)
    loss: Tensor | None  # (M + 1, K)
    aims: Aims
    error: Exception | None = None  # why it could not be attacked after all


def first_rows(state: State, count: int, capacity: int) -> State:
    """The rows of the first slots."""
    return state if count == capacity else {name: rows[:count] for name, rows in state.items()}


def _note(state: State, loss: Tensor) -> None:
    """Write the losses (N, K) of the images that run into their history."""
    history = state["losses"]
    place = state["updates"].view(-1, 1, 1).expand(-1, 1, loss.shape[1])
    told = torch.where(state["running"].view(-1, 1, 1), loss[:, None], history.gather(1, place))
    history.scatter_(1, place, told)


class Slots:
    """Images of one size under attack together.

    Args:
        evaluator: what evaluates them.
        step: how they move.
        schedule: how long.
        capacity: number of slots.
        image: one of the images, for their size, dtype and device.
        callback: called with (iteration, tags, counts (N, K)) as they become known.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        step: Step,
        schedule: Schedule,
        capacity: int,
        image: Tensor,  # (*)
        callback: Callable[[int, list[Any], Tensor], None] | None = None,
    ) -> None:
        self.evaluator, self.step, self.schedule = evaluator, step, schedule
        self.capacity, self.callback = capacity, callback
        self.device = device_for(image.device)
        self.synchronous = self.device.synchronous
        self.state = self._rows(image.new_empty((0, *image.shape)))
        self.count = 0  # slots from here on have never been taken, or were closed up
        self.free: list[int] = []  # slots below whose image has stopped and been released
        self.tags: list[Any] = [None] * capacity
        self.since = [NEVER] * capacity  # iteration at which a slot was taken
        self.iteration = 0
        self.eager = 0  # iterations of full slots, up to EAGER
        self.stopped: set[int] = set()  # slots that are known to have stopped, and not told yet
        self.errors: dict[int, Exception] = {}  # of those that cannot be attacked
        # Between two updates `patience` steps can fail, each after as many evaluations that see
        # nothing to gain: those of a round of a universal perturbation.
        self.most = (schedule.max_iter + 1) * schedule.patience**2
        self.readback = Readback(self.device)
        self.graph = Graph(self.device)

    @property
    def in_flight(self) -> int:
        """Number of images under attack."""
        return self.count - len(self.free)

    def _begin(self, images: Tensor, start: Tensor) -> State:
        """The rows of new images (N, *)."""
        new, device = len(images), images.device
        history = (new, self.schedule.max_iter + 1, self.evaluator.networks)
        losses = {}
        if self.evaluator.tells_loss:
            losses["losses"] = torch.full(history, math.nan, dtype=torch.float64, device=device)
        return {
            "x": start,
            "origin": images,
            "running": torch.ones(new, dtype=torch.bool, device=device),
            "may_move": torch.full((new,), self.schedule.max_iter > 0, device=device),
            "updates": torch.zeros(new, dtype=torch.int64, device=device),
            "stuck": torch.zeros(new, dtype=torch.int64, device=device),
            "status": torch.zeros(new, dtype=torch.int8, device=device),
            "history": torch.full(history, -1, dtype=torch.int32, device=device),
            **losses,
            **self.step.begin(images, start),
            **self.schedule.begin(images),
        }

    def _rows(self, none: Tensor) -> State:
        rows = self._begin(none, none)
        return {name: t.new_zeros((self.capacity, *t.shape[1:])) for name, t in rows.items()}

    def admit(self, tags: list[Any], images: Tensor, start: Tensor | None = None) -> slice:
        """Take images (N, *) into fresh slots, or a single one into a released slot.

        Returns:
            Their slots, which the evaluator must be told of.
        """
        first = self.free.pop() if self.free and len(tags) == 1 else self.count
        taken = slice(first, first + len(tags))
        self.count = max(self.count, taken.stop)
        self.tags[taken] = tags
        self.since[taken] = [self.iteration] * len(tags)
        images = images.detach()
        begin = images if start is None else start.detach()
        for name, values in self._begin(images, begin).items():
            self.state[name][taken] = values
        return taken

    def take_back(self, taken: slice) -> None:
        """Give back the slots of images that cannot be attacked after all."""
        self.state["running"][taken] = self.state["may_move"][taken] = False
        self._forget(range(taken.start, taken.stop))
        if taken.stop == self.count:
            self.count = taken.start
        else:
            self.free += range(taken.start, taken.stop)

    def iterate(self) -> None:
        """One evaluation of every image, and one update of those that still run."""
        self.evaluator.advance(self.state)
        replay = None
        if self.evaluator.capturable and self.count == self.capacity:
            if self.eager < EAGER:
                self.eager += 1
            else:
                replay = self.graph.captured(self.evaluate_and_update)
        if replay is None:
            self.evaluate_and_update()
        else:
            self.counts.fill_(UNTOLD)
            replay()
        self.readback.add(self.iteration, self.counts, self.state["running"][: self.count])
        self.iteration += 1

    def evaluate_and_update(self) -> None:
        """The device's part of an iteration; no decision of the host's depends on its outcome."""
        state = first_rows(self.state, self.count, self.capacity)
        may_move = state["may_move"]
        seen = self.evaluator.evaluate(state, may_move, synchronous=self.synchronous)
        going = may_move & seen.wanted
        if seen.loss is not None:
            _note(state, seen.loss)
        moved = self.step.move(state, seen, going)
        wanted, done = seen.wanted, seen.done
        if "done" in state:
            done = state["done"]
            wanted = wanted & ~done
        self.counts = ops.settle_(
            state["running"],
            may_move,
            state["updates"],
            state["stuck"],
            state["status"],
            state["history"],
            seen.active,
            wanted,
            moved,
            done,
            self.schedule.max_iter,
            self.schedule.patience,
        )

    def finished(self, *, wait: bool = False) -> list[int]:
        """Slots whose image is known to have stopped, in rising order; with `wait`, all of them.

        Raises:
            RuntimeError: iterations that change nothing, which would go on for ever.
        """
        for iteration, counts, running in self.readback.known(wait):
            known = [k for k in range(len(counts)) if self.since[k] <= iteration]
            going, worst = running.tolist(), [min(row) for row in counts.tolist()]
            self.stopped.update(k for k in known if not going[k])
            self._check_progress(iteration, going, worst)
            if min(worst) < -1:
                self.errors.update({k: self._error(k) for k in known if worst[k] < -1})
                self.stopped.update(self.errors)
            known = [k for k in known if k not in self.errors]
            if self.callback is not None and known:
                self.callback(iteration, [self.tags[k] for k in known], counts[known])
        stopped, self.stopped = sorted(self.stopped), set()
        return stopped

    def _error(self, slot: int) -> Exception:
        """Why the evaluator counts less than no active targets in a slot."""
        try:
            self.evaluator.refuse(slot)
        except (TypeError, ValueError) as error:
            return error
        return RuntimeError("active targets were counted below 0, with no label out of range")

    def _check_progress(self, iteration: int, going: list[bool], counts: list[int]) -> None:
        """Raise if an iteration did nothing, or if an image is evaluated again and again."""
        if UNTOLD in counts:
            raise RuntimeError(
                "an iteration that was captured as a CUDA graph did nothing when it was replayed"
            )
        unstopped = chain(going, repeat(True))  # slots taken since are told of later
        oldest = min(compress(self.since, unstopped), default=NEVER)
        if iteration - oldest >= self.most:
            raise RuntimeError(
                f"an image is still under attack after {iteration - oldest + 1} evaluations, where "
                f"max_iter={self.schedule.max_iter} and patience={self.schedule.patience} allow "
                f"{self.most}: its evaluator finds it neither done nor worth a step"
            )

    def outcome(self, slot: int) -> Finished:
        """What became of a finished slot's image, copied out; waits for the device."""
        state = self.state
        if slot in self.errors:
            state["running"][slot] = state["may_move"][slot] = False
        updates = state["updates"][slot]
        if "best_active" in state:
            left = state["best_active"][slot]
        else:
            left = state["history"][slot].index_select(0, updates.view(1)).sum()
        numbers = self.device.read(updates, state["status"][slot], left).wait()
        iterations, status, remaining = map(int, numbers)
        last = state["x"][slot].clone()
        return Finished(
            self.tags[slot],
            state["best"][slot].clone() if "best" in state else last,
            last,
            state["origin"][slot].clone(),
            iterations,
            status,
            remaining,
            state["history"][slot].clone(),
            state["losses"][slot].clone() if "losses" in state else None,
            self.evaluator.aims(slot),
            self.errors.get(slot),
        )

    def release(self, slots: list[int]) -> None:
        """Free finished slots, for other images.

        On the CPU the rest close up, in order: an iteration costs what its images cost. Elsewhere
        slots stay where they are, for the graph that was captured with them.
        """
        if not slots:
            return
        self._forget(slots)
        if not self.synchronous:
            self.free += slots
            return
        kept = [k for k in range(self.count) if k not in slots]
        index = torch.tensor(kept, dtype=torch.int64)
        for state in (self.state, *self.evaluator.states):
            for rows in state.values():
                rows[: len(kept)] = rows[index]
        self.tags[: len(kept)] = [self.tags[k] for k in kept]
        self.since[: len(kept)] = [self.since[k] for k in kept]
        self._forget(range(len(kept), self.count))
        self.count = len(kept)

    def _forget(self, slots: Iterable[int]) -> None:
        """Let go of what is known of images whose slots are free."""
        for k in slots:
            self.tags[k], self.since[k] = None, NEVER
            self.stopped.discard(k)
            self.errors.pop(k, None)

    def collect(self, *, wait: bool = False) -> list[Finished]:
        """Outcomes of the images that have finished, whose slots are free from then on."""
        done = self.finished(wait=wait)
        outcomes = [self.outcome(k) for k in done]
        self.release(done)
        return outcomes

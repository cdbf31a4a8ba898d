"""The loop that attacks images in slots, each on its own, without waiting for the device.

An attack consists of an objective, a step and a schedule (`Objective`, `Step`, `Schedule`); the
loop runs any of them and knows nothing else. A slot holds one image. The state of an image is one
row in each of several named tensors on the device. An iteration changes them in place, so that
iterations can follow each other without synchronisation and be replayed as a CUDA graph. An image
that has stopped is no longer changed, so it does not matter how late the host learns that it has.
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

EAGER = 3  # iterations of full slots before a capture: libraries choose their kernels
NEVER = sys.maxsize  # stands for the iteration at which a free slot was taken
UNTOLD = torch.iinfo(torch.int32).max  # placeholder for a count that a replay must write

State = dict[str, Tensor]
"""Named tensors with one row per slot."""


class Seed(NamedTuple):
    """What an objective computes from the scores."""

    seed: Tensor
    """Gradient of the objective with respect to the scores, with their shape and dtype."""
    active: Tensor
    """(N,) int32, number of active targets; negative if a label is out of range."""
    loss: Tensor | None = None
    """(N,) float64, the loss to report; the seed is its gradient unless another loss is tracked."""


class Objective(Protocol):
    """Defines which targets count at the scores of a network, and what seeds its backward pass."""

    @property
    def tells_loss(self) -> bool:
        """Whether `seed` returns a loss."""

    @property
    def default(self) -> str:
        """How adversarial labels are chosen by default."""

    def assign(
        self,
        wanted: Tensor | str | None,  # (N, *T)
        labels: Tensor,  # (N, *T)
        num_classes: int,
        generator: torch.Generator | None,
    ) -> Tensor | str:
        """Return adversarial labels (N, *T), given or drawn, or a word for none, as "runner-up"."""

    def count(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> Tensor:
        """Count the targets that count, (N,) int64; labels out of range are not looked for."""

    def begin(self, labels: Tensor) -> State:
        """Return the objective's state for new labels (N, *T), under names that no part uses."""

    def seed(
        self,
        scores: Tensor,  # (N, C, *T), or maps (N, C, h, w) below the labels' size
        labels: Tensor,  # (N, *T)
        adversarial: Tensor | str,  # (N, *T)
        *,
        align_corners: bool,
        state: State,
    ) -> Seed:
        """Return the seed of the backward pass, without synchronising.

        `state` holds the rows of the images, such as "updates", those of `begin`, and the number of
        "targets" that count and the number "allowed" to be active. What the objective writes there
        is kept. If its own rows are missing, only the active targets are wanted.
        """

    def refuse(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> None:
        """Raise an error that names the label that is out of range. May synchronise."""


class Step(Protocol):
    """Moves the images along a gradient."""

    def begin(self, images: Tensor, start: Tensor) -> State:
        """Return the step's state for new images (N, *), under names that no other part uses.

        An entry "x" is where the attack begins instead of `start` (N, *).
        """

    def move(self, state: State, seen: Evaluation, going: Tensor) -> Tensor:
        """Move state["x"] in place where `going` (N,), within a distance of state["origin"].

        This is called after every evaluation, so that a step can keep the best image. If
        `seen.gradient` is None, no image is going. Optional rows of the state: "best" is returned
        by the attack instead of "x"; "best_active" is its number of active targets; "done" marks
        the images that are done, instead of `seen.done`.

        Returns:
            (N,) bool: which of the going images took the step; the others are unchanged.
        """


class Schedule(Protocol):
    """Says when an image stops."""

    @property
    def max_iter(self) -> int:
        """Maximum number of updates."""

    @property
    def patience(self) -> int:
        """Number of failed steps in a row after which an image has stalled."""

    def begin(self, images: Tensor) -> State:
        """Return the schedule's state for new images, as for a step."""

    def allowed(self, targets: Tensor) -> Tensor:
        """Return how many targets of an image may be active when it is done, (N,) float64."""


class Evaluation(NamedTuple):
    """The result of evaluating the images under attack."""

    active: Tensor
    """(N, K) int32, active targets at each of K networks."""
    wanted: Tensor
    """(N,) bool, whether a step is wanted for an image."""
    done: Tensor | None
    """(N,) bool, whether an image is done; None if those that want no step are."""
    gradient: Tensor | None
    """(N, *) gradient with respect to the images; None if no image may move."""
    loss: Tensor | None = None
    """(N, K) float64, the loss at each network, if the objective tells it."""


class Aims(NamedTuple):
    """The targets of one image, at each of K networks."""

    targets: Tensor  # (K,), number of targets that count
    labels: tuple[Tensor, ...]  # (*T)
    adversarial_labels: tuple[Tensor | str, ...]  # (*T), or a word
    boxes: tuple[Tensor | None, ...]  # (*), other inputs of the model


class Evaluator(Protocol):
    """Evaluates the images: `Networks`, or an object of the attack's own."""

    @property
    def networks(self) -> int:
        """Number K of networks."""

    @property
    def tells_loss(self) -> bool:
        """Whether evaluations have a loss."""

    @property
    def capturable(self) -> bool:
        """Whether each evaluation launches the same work, so that a CUDA graph can capture it."""

    @property
    def states(self) -> Sequence[State]:
        """The evaluator's own rows for each slot, which move with those of the loop."""

    def advance(self, state: State) -> None:
        """Do the host's work before an evaluation; may replace tensors of the loop."""

    def evaluate(self, state: State, may_move: Tensor, *, synchronous: bool) -> Evaluation:
        """Evaluate the first N slots, whose rows are in `state`.

        Args:
            state: rows of the images that have a slot.
            may_move: (N,) bool.
            synchronous: whether values may be read, to save a backward pass.
        """

    def refuse(self, slot: int) -> None:
        """Raise for a label of a slot's image that is out of range."""

    def aims(self, slot: int) -> Aims:
        """Return a copy of the targets of a slot's image."""


class Finished(NamedTuple):
    """An image that has stopped."""

    tag: Any  # as given to `Slots.admit`
    image: Tensor  # (*), the best one if the step keeps it
    last: Tensor  # (*)
    origin: Tensor  # (*)
    iterations: int
    status: int
    left: int  # active targets of the image, over all networks
    active: Tensor  # (M + 1, K)
    loss: Tensor | None  # (M + 1, K)
    aims: Aims
    error: Exception | None = None  # why it could not be attacked


def first_rows(state: State, count: int, capacity: int) -> State:
    """Return the rows of the first `count` slots."""
    return state if count == capacity else {name: rows[:count] for name, rows in state.items()}


def _note(state: State, loss: Tensor) -> None:
    """Write the losses (N, K) of the running images into their history."""
    history = state["losses"]
    place = state["updates"].view(-1, 1, 1).expand(-1, 1, loss.shape[1])
    told = torch.where(state["running"].view(-1, 1, 1), loss[:, None], history.gather(1, place))
    history.scatter_(1, place, told)


class Slots:
    """Images of one size that are attacked together.

    Args:
        evaluator: evaluates the images.
        step: moves them.
        schedule: stops them.
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
        self.count = 0  # slots from here on are unused
        self.free: list[int] = []  # released slots below `count`
        self.tags: list[Any] = [None] * capacity
        self.since = [NEVER] * capacity  # iteration at which a slot was taken
        self.iteration = 0
        self.eager = 0  # iterations of full slots, up to EAGER
        self.stopped: set[int] = set()  # slots known to have stopped, not yet reported
        self.errors: dict[int, Exception] = {}  # by slot, why it cannot be attacked
        # Between two updates `patience` steps can fail, each after as many evaluations that want no
        # step, which are the batches of a round of a universal perturbation.
        self.most = (schedule.max_iter + 1) * schedule.patience**2
        self.readback = Readback(self.device)
        self.graph = Graph(self.device)

    @property
    def in_flight(self) -> int:
        """Number of images under attack."""
        return self.count - len(self.free)

    def _begin(self, images: Tensor, start: Tensor) -> State:
        """Return the rows of new images (N, *)."""
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
        """Put images (N, *) into unused slots, or a single one into a released slot.

        Returns:
            Their slots, of which the evaluator must be told.
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
        """Free the slots of images that cannot be attacked after all."""
        self.state["running"][taken] = self.state["may_move"][taken] = False
        self._forget(range(taken.start, taken.stop))
        if taken.stop == self.count:
            self.count = taken.start
        else:
            self.free += range(taken.start, taken.stop)

    def iterate(self) -> None:
        """Evaluate every image once, and update those that still run."""
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
        """Run the device's part of an iteration; the host does not branch on its outcome."""
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
        """Return the slots known to have stopped, in rising order; with `wait`, all that have.

        Raises:
            RuntimeError: iterations change nothing, and would never end.
        """
        for iteration, counts, running in self.readback.known(wait):
            known = [k for k in range(len(counts)) if self.since[k] <= iteration]
            going, worst = running.tolist(), [min(row) for row in counts.tolist()]
            self.stopped.update(k for k in known if not going[k])
            self._check_progress(iteration, going, worst)
            if min(worst) < -1:
                self.errors.update({k: self.error(k) for k in known if worst[k] < -1})
                self.stopped.update(self.errors)
            known = [k for k in known if k not in self.errors]
            if self.callback is not None and known:
                self.callback(iteration, [self.tags[k] for k in known], counts[known])
        stopped, self.stopped = sorted(self.stopped), set()
        return stopped

    def error(self, slot: int) -> Exception:
        """Return the reason why the evaluator reports a negative count for a slot."""
        try:
            self.evaluator.refuse(slot)
        except (TypeError, ValueError) as error:
            return error
        return RuntimeError("the number of active targets is negative, with no label out of range")

    def _check_progress(self, iteration: int, going: list[bool], counts: list[int]) -> None:
        """Raise if an iteration did nothing, or if an image is evaluated again and again."""
        if UNTOLD in counts:
            raise RuntimeError(
                "an iteration that was captured as a CUDA graph did nothing when it was replayed"
            )
        unstopped = chain(going, repeat(True))  # slots taken since report later
        oldest = min(compress(self.since, unstopped), default=NEVER)
        if iteration - oldest >= self.most:
            raise RuntimeError(
                f"an image is still under attack after {iteration - oldest + 1} evaluations, but "
                f"max_iter={self.schedule.max_iter} and patience={self.schedule.patience} allow "
                f"{self.most}: its evaluator says neither that it is done nor that it wants a step"
            )

    def outcome(self, slot: int) -> Finished:
        """Return a copy of the outcome of a finished slot; waits for the device."""
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
        """Free finished slots for other images.

        On the CPU the remaining slots close up, in order, so that an iteration costs only what its
        images cost. Elsewhere slots stay in place, for the graph that was captured with them.
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
        """Drop what is known about the images of freed slots."""
        for k in slots:
            self.tags[k], self.since[k] = None, NEVER
            self.stopped.discard(k)
            self.errors.pop(k, None)

    def collect(self, *, wait: bool = False) -> list[Finished]:
        """Return the outcomes of finished images, and free their slots."""
        done = self.finished(wait=wait)
        outcomes = [self.outcome(k) for k in done]
        self.release(done)
        return outcomes

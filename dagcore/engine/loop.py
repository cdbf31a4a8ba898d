"""The attack loop on the fused ops: `reference.dag` in slots, without waiting for the device.

A slot holds one image under attack. All state of an image (its iterate, its counts, whether it
still runs) stays on the device, and an iteration changes it in place, so that iterations can follow
each other without a synchronisation and be replayed as a CUDA graph. An image that has stopped is
not touched any more; learning of it late changes no result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, ops
from ..errors import ArgumentError
from ..reference import (
    BUDGET,
    CONVERGED,
    STALLED,
    allowance,
    counted_targets,
    input_gradient,
    seed_op,
    step_scale,
    targets,
)
from .graph import Graph
from .memory import freed_memory_kept
from .readback import Readback
from .scores import ScoreModel

# Called with (update, active targets of each image, -1 where it has stopped).
Callback = Callable[[int, Tensor], None]

EAGER = 3  # iterations before a CUDA graph is captured: libraries settle on their kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of an attack; see `dagcore.DAG`."""

    gamma: float = 0.5 / 255
    max_iter: int = 200
    goal: str = "leave"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    epsilon: float | None = None
    tolerance: float = 0.0
    ignore_index: int = 255
    backend: str = "native"

    def __post_init__(self) -> None:
        checks.number("gamma", self.gamma, above=0)
        checks.integer("max_iter", self.max_iter, at_least=0, at_most=2**31 - 2)
        checks.choice("goal", self.goal, checks.GOALS)
        if self.bounds is not None:
            checks.bounds(self.bounds)
        if self.epsilon is not None:
            checks.number("epsilon", self.epsilon, above=0)
        checks.number("tolerance", self.tolerance)
        if not 0 <= self.tolerance < 1:
            raise ArgumentError(f"tolerance must be a fraction in [0, 1), got {self.tolerance}")
        checks.integer("ignore_index", self.ignore_index)
        checks.choice("backend", self.backend, ("native", "reference"))


class Outcome(NamedTuple):
    """One image when it stops."""

    tag: Any  # as given to `Slots.admit`
    image: Tensor  # (*)
    iterations: int
    status: int
    active: Tensor  # (M + 1,)
    targets: int
    adversarial_labels: Tensor | None  # (*T), None for the runner-up


class Slots:
    """Images of one size under attack together, each on its own."""

    def __init__(
        self,
        reader: ScoreModel,
        settings: Settings,
        capacity: int,
        image: Tensor,  # (*): of the size, dtype and device of all
        labels: Tensor,  # (*T)
        boxes: Tensor | None = None,  # (*): likewise
        callback: Callable[[int, list[Any], Tensor], None] | None = None,
    ) -> None:
        self.reader = reader
        self.settings = settings
        self.capacity = capacity
        self.callback = callback
        device = image.device
        self.synchronous = device.type == "cpu"
        self.x = image.new_zeros((capacity, *image.shape))
        self.origin = torch.zeros_like(self.x)
        self.labels = labels.new_zeros((capacity, *labels.shape))
        self.boxes = None if boxes is None else boxes.new_zeros((capacity, *boxes.shape))
        self.adversarial: Tensor | None = None
        self.running = torch.zeros(capacity, dtype=torch.bool, device=device)
        self.updates = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.status = torch.zeros(capacity, dtype=torch.int8, device=device)
        self.allowed = torch.zeros(capacity, dtype=torch.float64, device=device)
        self.history = torch.full(
            (settings.max_iter + 1, capacity), -1, dtype=torch.int32, device=device
        )
        self.count = 0  # slots from here on have never been taken, or were closed up
        self.free: list[int] = []  # slots below whose image has stopped and been released
        self.tags: list[Any] = [None] * capacity
        self.since = [0] * capacity  # iteration at which a slot was taken
        self.iteration = 0
        self.num_classes: int | None = None
        self.undrawn: list[tuple[int, int, Callable[[Tensor, int], Tensor | str]]] = []
        self.watch = Readback(device)
        self.graph: Graph | None = None if self.synchronous else Graph(self)

    @property
    def in_flight(self) -> int:
        """Number of images under attack."""
        return self.count - len(self.free)

    def admit(
        self,
        tags: list[Any],
        images: Tensor,  # (K, *)
        labels: Tensor,  # (K, *T)
        assign: Callable[[Tensor, int], Tensor | str],
        boxes: Tensor | None = None,  # (K, *)
        start: Tensor | None = None,  # (K, *)
    ) -> None:
        """Take images into fresh slots, or a single one into a released slot.

        `assign(labels, num_classes)` gives their adversarial labels (K, *T), or "runner-up": the
        same of the two for all images of one `Slots`.
        """
        first = self.free.pop() if self.free and len(tags) == 1 else self.count
        last = first + len(tags)
        self.count = max(self.count, last)
        taken = slice(first, last)
        self.tags[taken] = tags
        self.since[taken] = [self.iteration] * len(tags)
        self.x[taken] = (images if start is None else start).detach()
        self.origin[taken] = images.detach()
        self.labels[taken] = labels
        if boxes is not None:
            assert self.boxes is not None
            self.boxes[taken] = boxes.detach()
        self.running[taken] = True
        self.updates[taken] = 0
        self.history[:, taken] = -1
        self.undrawn.append((first, last, assign))
        if self.num_classes is not None:
            self._draw()

    def _draw(self) -> None:
        """Settle the adversarial labels of newcomers: possible once the classes are known."""
        assert self.num_classes is not None
        settings = self.settings
        for first, last, assign in self.undrawn:
            labels = self.labels[first:last]
            drawn = assign(labels, self.num_classes)
            if isinstance(drawn, Tensor):
                if self.adversarial is None:
                    self.adversarial = drawn.new_zeros(self.labels.shape)
                self.adversarial[first:last] = drawn
            if settings.tolerance:
                counted = targets(
                    self.num_classes, labels, drawn, settings.goal, settings.ignore_index
                )
                self.allowed[first:last] = allowance(counted, settings.tolerance)
        self.undrawn.clear()

    def iterate(self) -> None:
        """One evaluation of every image, and one update of those that still run."""
        if self.graph is not None and self.count == self.capacity and self.iteration >= EAGER:
            self.graph.replay()
        else:
            self.evaluate_and_update()
        counts = torch.where(self.evaluated, self.active, -1)
        self.watch.add(self.iteration, counts, self.running[: self.count])
        self.iteration += 1

    def evaluate_and_update(self) -> None:
        """The device's part of an iteration; no decision of the host's depends on its outcome."""
        settings, taken = self.settings, slice(0, self.count)
        x, labels, running, updates = (
            self.x[taken],
            self.labels[taken],
            self.running[taken],
            self.updates[taken],
        )
        lower, upper = settings.bounds or (None, None)
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            scores = self.reader(leaf, labels, None if self.boxes is None else self.boxes[taken])
        if self.num_classes is None:
            self.num_classes = scores.shape[1]
            self._draw()
        adversarial = "runner-up" if self.adversarial is None else self.adversarial[taken]
        seed, active = seed_op(ops, scores, labels, self.reader.align_corners)(
            scores, labels, adversarial, goal=settings.goal, ignore_index=settings.ignore_index
        )
        self.evaluated, self.active = running.clone(), active
        history, row = self.history[:, taken], updates[None]
        history.scatter_(0, row, torch.where(running, active, history.gather(0, row)[0])[None])
        done = active <= self.allowed[taken]
        going = running & ~done & (updates < settings.max_iter)
        moved = going
        if not self.synchronous or bool(going.any()):
            gradient = input_gradient(scores, leaf, seed)
            del scores, seed, leaf  # not to be held through the next forward pass
            norms = ops.linf_step_(
                x,
                self.origin[taken],
                gradient,
                torch.where(going, active, 0),
                gamma=settings.gamma,
                lower=lower,
                upper=upper,
                epsilon=settings.epsilon,
            )
            moved = going & (step_scale(norms, settings.gamma) > 0)
        status = self.status[taken]
        status.masked_fill_(running & done, CONVERGED)
        status.masked_fill_(running & ~done & ~going, BUDGET)
        status.masked_fill_(going & ~moved, STALLED)
        running.copy_(moved)
        updates.add_(moved)

    def finished(self, *, wait: bool = False) -> list[int]:
        """Slots whose image is known to have stopped, in rising order; with `wait`, all of them."""
        stopped: set[int] = set()
        for iteration, counts, running in self.watch.known(wait):
            known = [
                k for k in range(len(counts)) if self.since[k] <= iteration and k not in self.free
            ]
            self._refuse_bad_labels(counts, known)
            if self.callback is not None:
                self.callback(iteration, self.tags, counts)
            going = running.tolist()
            stopped.update(k for k in known if not going[k])
        return sorted(stopped)

    def _refuse_bad_labels(self, counts: Tensor, known: list[int]) -> None:
        """A count below -1 is how an op reports an out-of-range label without synchronising."""
        values = counts.tolist()
        for k in known:
            if values[k] < -1:
                assert self.num_classes is not None
                adversarial = None if self.adversarial is None else self.adversarial[k : k + 1]
                counted_targets(
                    self.num_classes,
                    self.labels[k : k + 1],
                    adversarial,
                    self.settings.ignore_index,
                )

    def outcome(self, slot: int) -> Outcome:
        """What became of a finished slot's image, copied out."""
        assert self.num_classes is not None
        one, settings = slice(slot, slot + 1), self.settings
        adversarial = "runner-up" if self.adversarial is None else self.adversarial[one]
        counted = targets(
            self.num_classes, self.labels[one], adversarial, settings.goal, settings.ignore_index
        )
        return Outcome(
            self.tags[slot],
            self.x[slot].clone(),
            int(self.updates[slot]),
            int(self.status[slot]),
            self.history[:, slot].clone(),
            int(counted),
            None if self.adversarial is None else self.adversarial[slot].clone(),
        )

    def release(self, slots: list[int]) -> None:
        """Free finished slots, for other images.

        On the CPU the rest close up, in order: an iteration costs what its images cost. Elsewhere
        slots stay where they are, for the graph that was captured with them.
        """
        if not slots:
            return
        if not self.synchronous:
            self.free += slots
            return
        kept = [k for k in range(self.count) if k not in slots]
        index = torch.tensor(kept, dtype=torch.int64)
        per_slot = [self.x, self.origin, self.labels, self.running, self.updates, self.status]
        per_slot += [self.allowed]
        for tensor in (*per_slot, self.adversarial, self.boxes):
            if tensor is not None:
                tensor[: len(kept)] = tensor[index]
        self.history[:, : len(kept)] = self.history[:, index]
        self.tags[: len(kept)] = [self.tags[k] for k in kept]
        self.since[: len(kept)] = [self.since[k] for k in kept]
        self.count = len(kept)


def run(
    reader: ScoreModel,
    settings: Settings,
    images: Tensor,  # (N, *)
    labels: Tensor,  # (N, *T)
    assign: Callable[[Tensor, int], Tensor | str],
    *,
    boxes: Tensor | None = None,  # (N, *)
    start: Tensor | None = None,  # (N, *)
    callback: Callback | None = None,
) -> list[Outcome]:
    """Algorithm 1 for each image of a batch; outcomes in the order of the images."""
    if not len(images):
        return []
    total = len(images)

    def report(update: int, tags: list[Any], counts: Tensor) -> None:
        if callback is not None and bool((counts >= 0).any()):
            of_all = torch.full((total,), -1, dtype=torch.int32)
            of_all[torch.tensor(tags[: len(counts)])] = counts
            callback(update, of_all)

    first = None if boxes is None else boxes[0]
    slots = Slots(reader, settings, total, images[0], labels[0], first, report)
    slots.admit(list(range(total)), images, labels, assign, boxes, start)
    outcomes: dict[int, Outcome] = {}
    with freed_memory_kept() if slots.synchronous else nullcontext():
        while len(outcomes) < total:
            slots.iterate()
            done = slots.finished()
            outcomes.update({slots.tags[k]: slots.outcome(k) for k in done})
            slots.release(done)
    return [outcomes[n] for n in range(total)]

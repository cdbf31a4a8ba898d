"""Networks that evaluate images under attack, each with its own objective and targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from .loop import Aims, Evaluation, Objective, Schedule, State, first_rows
from .scores import ScoreModel

HALF_SCALE = 2.0**-10  # factor of the seeds of float16 scores

Assign = Callable[[Tensor, int], "Tensor | str"]
"""Assigns adversarial labels to labels (N, *T), given the number of classes."""


class Targets(NamedTuple):
    """The targets of images, for one network."""

    labels: Tensor  # (N, *T)
    assign: Assign
    boxes: Tensor | None = None  # (N, *), other inputs of the model
    known: tuple[Tensor, Tensor] | None = None  # of a single image: the leaf, its scores


class Network:
    """A network with its targets in the slots.

    The adversarial labels of new images are drawn at the first evaluation, which reveals the number
    of classes.
    """

    def __init__(self, model: Callable[..., Any], objective: Objective, schedule: Schedule) -> None:
        self.model, self.objective, self.schedule = ScoreModel(model), objective, schedule
        self.state: State = {}
        self.capacity = 0
        self.num_classes: int | None = None
        self.kept = ""  # a word instead of adversarial labels, as "runner-up"
        self.undrawn: list[tuple[slice, Assign]] = []
        self.known: tuple[Tensor, Tensor] | None = None  # of the last admitted image

    def open(self, capacity: int, labels: Tensor, boxes: Tensor | None) -> Network:
        """Return the same network with slots for targets like those of one image: (*T), (*)."""
        opened = Network(self.model.model, self.objective, self.schedule)
        opened.model = self.model  # it checks the scores only once
        opened.capacity = capacity
        opened.state["labels"] = labels.new_zeros((capacity, *labels.shape))
        if boxes is not None:
            opened.state["boxes"] = boxes.new_zeros((capacity, *boxes.shape))
        for name, dtype in (("targets", torch.int64), ("allowed", torch.int32)):
            opened.state[name] = torch.zeros(capacity, dtype=dtype, device=labels.device)
        for name, rows in self.objective.begin(labels.new_empty((0, *labels.shape))).items():
            opened.state[name] = rows.new_zeros((capacity, *rows.shape[1:]))
        return opened

    def admit(self, taken: slice, targets: Targets) -> None:
        """Take the targets of new images."""
        self.state["labels"][taken] = targets.labels
        if targets.boxes is not None:
            self.state["boxes"][taken] = targets.boxes.detach()
        for name, rows in self.objective.begin(targets.labels).items():
            self.state[name][taken] = rows
        self.undrawn.append((taken, targets.assign))
        self.known = targets.known
        if self.num_classes is not None:
            self._draw(self.num_classes)

    def take_back(self, taken: slice) -> None:
        """Drop images that cannot be attacked after all."""
        self.undrawn = [one for one in self.undrawn if one[0] != taken]
        self.known = None

    def _draw(self, num_classes: int) -> None:
        self.num_classes = num_classes
        for taken, assign in self.undrawn:
            labels = self.state["labels"][taken]
            drawn = assign(labels, num_classes)
            if not isinstance(drawn, Tensor):
                self.kept = drawn
            else:
                if "adversarial" not in self.state:
                    rows = (self.capacity, *labels.shape[1:])
                    self.state["adversarial"] = drawn.new_zeros(rows)
                self.state["adversarial"][taken] = drawn
            counted = self.objective.count(num_classes, labels, drawn)
            self.state["targets"][taken] = counted
            self.state["allowed"][taken] = self.schedule.allowed(counted)
        self.undrawn.clear()

    def _adversarial(self, rows: slice) -> Tensor | str:
        return self.state["adversarial"][rows] if "adversarial" in self.state else self.kept

    def evaluate(self, state: State, may_move: Tensor, *, synchronous: bool) -> Evaluation:
        """Evaluate the images; see `loop.Evaluator`.

        The gradient of images that may not move or that have no active targets is arbitrary.
        """
        x = state["x"]
        own = first_rows(self.state, x.shape[0], self.capacity)
        labels = own["labels"]
        known, self.known = self.known, None
        if synchronous and known is not None and torch.equal(known[0], x):
            leaf, scores = known[0], self.model.read(known[1])
        else:
            leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                scores = self.model(leaf, labels, own.get("boxes"))
        if self.num_classes is None:
            self._draw(scores.shape[1])
            own = first_rows(self.state, x.shape[0], self.capacity)
        seed, active, loss = self.objective.seed(
            scores,
            labels,
            own.get("adversarial", self.kept),
            align_corners=self.model.align_corners,
            state={**state, **own},
        )
        wanted = active > own["allowed"]
        if "provisional" in state:
            wanted = wanted | state["provisional"]
        if synchronous and not any((may_move & wanted).tolist()):
            gradient = None
        else:
            gradient = input_gradient(scores, leaf, seed)
        losses = None if loss is None else loss[:, None]
        return Evaluation(active[:, None], wanted, None, gradient, losses)

    def refuse(self, slot: int) -> None:
        """Raise for a label of a slot's image that is out of range."""
        assert self.num_classes is not None
        one = slice(slot, slot + 1)
        self.objective.refuse(self.num_classes, self.state["labels"][one], self._adversarial(one))

    def adversarial_labels(self, slot: int) -> Tensor | str:
        """Return a copy of an image's adversarial labels (*T), or the word for them."""
        rows = self._adversarial(slice(slot, slot + 1))
        return rows[0].clone() if isinstance(rows, Tensor) else rows


class Networks:
    """One network, or several that the same image is to fool.

    If there are several, the gradient of each is divided by its L-infinity norm before they are
    added, so that no network outweighs the others.
    """

    capturable = True

    def __init__(self, parts: Sequence[Network]) -> None:
        self.parts = parts
        self.networks = len(parts)
        self.states = [part.state for part in parts]
        self.tells_loss = all(part.objective.tells_loss for part in parts)

    def admit(self, taken: slice, targets: Sequence[Targets]) -> None:
        """Take the targets of new images for each network."""
        for part, own in zip(self.parts, targets, strict=True):
            part.admit(taken, own)

    def take_back(self, taken: slice) -> None:
        """Drop images that cannot be attacked after all."""
        for part in self.parts:
            part.take_back(taken)

    def advance(self, state: State) -> None:
        """Do nothing: all that an evaluation needs is in the slots."""

    def evaluate(self, state: State, may_move: Tensor, *, synchronous: bool) -> Evaluation:
        """Evaluate the images with every network; see `loop.Evaluator`."""
        if len(self.parts) == 1:
            return self.parts[0].evaluate(state, may_move, synchronous=synchronous)
        total: Tensor | None = None
        seen = []
        for part in self.parts:
            own = part.evaluate(state, may_move, synchronous=synchronous)
            seen.append(own._replace(gradient=None))
            if own.gradient is not None:
                gradient = normalised(own.gradient, own.wanted)
                total = gradient if total is None else total.add_(gradient)
        return Evaluation(
            torch.cat([own.active for own in seen], 1),
            torch.stack([own.wanted for own in seen]).any(0),
            None,
            total,
            torch.cat([own.loss for own in seen if own.loss is not None], 1)
            if self.tells_loss
            else None,
        )

    def refuse(self, slot: int) -> None:
        """Raise for a label of a slot's image that is out of range."""
        for part in self.parts:
            part.refuse(slot)

    def aims(self, slot: int) -> Aims:
        """Return a copy of the targets of a slot's image."""
        states = self.states
        return Aims(
            torch.stack([state["targets"][slot] for state in states]),
            tuple(state["labels"][slot].clone() for state in states),
            tuple(part.adversarial_labels(slot) for part in self.parts),
            tuple(state["boxes"][slot].clone() if "boxes" in state else None for state in states),
        )


def input_gradient(scores: Tensor, x: Tensor, seed: Tensor) -> Tensor:
    """Run the backward pass from a seed at the scores to the images, up to a factor."""
    if not scores.requires_grad:
        raise ArgumentError(
            "model must compute its scores from the images differentiably, got scores without a "
            "gradient (does it run under torch.no_grad, or detach?)"
        )
    if scores.dtype == torch.float16:  # a sum over all targets may overflow
        seed = seed * HALF_SCALE
    (gradient,) = torch.autograd.grad(scores, x, seed, allow_unused=True)
    if gradient is None:
        raise ArgumentError(
            "model must compute its scores from the images, got scores that do not depend on them"
        )
    return gradient


def normalised(gradient: Tensor, wanted: Tensor) -> Tensor:
    """Divide each image's gradient by its L-infinity norm; 0 if not possible or not wanted."""
    norms = gradient.abs().flatten(1).amax(1)
    usable = wanted & norms.isfinite() & (1 / norms).isfinite()
    rows = (-1, *[1] * (gradient.dim() - 1))
    scale = torch.where(usable, 1 / norms, 0).view(rows)
    return torch.where(usable.view(rows), gradient, 0) * scale

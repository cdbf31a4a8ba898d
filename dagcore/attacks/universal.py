"""Universal perturbations: one for many images, along the sum of their normalised gradients."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks
from ..engine import frozen
from ..engine.devices import device_for
from ..engine.loop import Aims, Evaluation, Finished, Slots, State, Step
from ..engine.networks import input_gradient, normalised
from ..engine.scores import ScoreModel
from ..engine.stream import Sample, form
from ..errors import ArgumentError, ArgumentTypeError
from ..labels import assign
from ..ops.fallback import CONVERGED
from ..perturbation import fit, perceptibility, round_to_levels, value_range
from .apgd import APGD
from .base import Attack, Callback, check_sample, check_shared, held
from .original import original_of
from .result import Result, gather
from .steps import ProjectedStep


def universal_perturbation(
    attack: Attack,
    model: Callable[..., Any],
    samples: Sequence[Sample],
    batch_size: int = 8,
    generator: torch.Generator | None = None,
    *,
    callback: Callback | None = None,
) -> Result:
    """Make one perturbation for all images, in the manner of Moosavi-Dezfooli et al., CVPR 2017.

    Each update evaluates the next `batch_size` samples, cycling through all of them, and takes the
    attack's step along the sum of their gradients. Each gradient is normalised first, so that no
    image outweighs the others: with `DAG`, the step is gamma times the sum over its L-infinity
    norm. The attack ends after its maximum number of updates, or when in a whole round no sample
    has more active targets than the tolerance allows. An image smaller than the perturbation gets
    the upper left part of the perturbation.

    Args:
        attack: the settings. Its bounds apply to the images, its epsilon to the perturbation;
            without an epsilon only the number of updates limits it. The perturbation begins at zero
            and is made in a single run, whose last iterate is returned: random starts, restarts and
            the backend are ignored. `APGD`, which compares losses, must see all samples in each
            update.
        model: as for `DAG.__call__`.
        samples: the images and their targets, at least one. They are read and checked when their
            turn comes, once in each round. Where adversarial labels are "permutation" (the default
            of `DAG`), all samples share one permutation of the classes without fixed points.
        batch_size: number of samples per update.
        generator: source of the random choices.
        callback: called with (update, active targets (1,) of the batch that the update saw).

    Returns:
        A `Result` whose perturbation, (1, 3, H, W), has the largest height and width among the
        images that were read. Use `dagcore.perturbation.fit` to crop or pad it to an image.

    Raises:
        TypeError, ValueError: a wrong argument; the message names it, what was required and what
            came.
    """
    check_shared(attack)
    checks.integer("batch_size", batch_size, at_least=1)
    checks.generator(generator)
    checks.callback(callback)
    if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
        raise ArgumentTypeError(f"samples must be a sequence, got {type(samples).__name__}")
    if not len(samples):
        raise ArgumentError("samples must have at least one image, got none")
    if isinstance(attack, APGD) and batch_size < len(samples):
        raise ArgumentError(
            f"batch_size must be at least the number of samples, {len(samples)}, for APGD, which "
            f"compares the losses of its updates, got {batch_size}"
        )
    rounds = Rounds(attack, model, samples, batch_size, generator)

    def report(update: int, _: list[Any], counts: Tensor) -> None:
        if callback is not None:
            callback(update, counts[:, 0])

    first = rounds.batch[0].image
    device = device_for(first.device)
    with held([model], device), device.current(), torch.inference_mode(False):
        slots = Slots(
            rounds,
            _step(attack),
            dataclasses.replace(attack.schedule(), patience=rounds.batches),  # type: ignore[type-var]
            1,
            first,
            report,
        )
        slots.admit([None], torch.zeros_like(first)[None])
        outcomes: list[Finished] = []
        while not outcomes:
            slots.iterate()
            # Read the counts without delay: only if the attack continues may the next batch be read
            # and the perturbation grow.
            outcomes = slots.collect(wait=True)
        if outcomes[0].error is not None:
            raise outcomes[0].error
        network = original_of(model, first.device)
        if network is not None and outcomes[0].status == CONVERGED:
            rounds.warn_at(network, outcomes[0].image)
    result = gather(outcomes, attack.bounds)
    return dataclasses.replace(
        result,
        perceptibility=perceptibility(result.perturbation, rounds.value_range[None]),
        adversarial_labels="given" if rounds.table is None else rounds.table,
    )


def _step(attack: Attack) -> Step:
    """Return the step of a perturbation; with levels, it moves by whole levels either way."""
    bounds, levels = None, None
    if attack.levels is not None and attack.bounds is not None:
        width = attack.bounds[1] - attack.bounds[0]
        bounds, levels = (-width, width), 2 * attack.levels - 1
    step: Any = attack.step()
    kept = {"keep": False} if isinstance(step, ProjectedStep) else {}
    return cast(Step, dataclasses.replace(step, bounds=bounds, levels=levels, **kept))


class Rounds:
    """Evaluates one batch of images after another, all under the same perturbation."""

    networks = 1
    capturable = False
    states: Sequence[State] = ()

    def __init__(
        self,
        attack: Attack,
        model: Callable[..., Any],
        samples: Sequence[Sample],
        batch_size: int,
        generator: torch.Generator | None,
    ) -> None:
        self.attack, self.samples, self.generator = attack, samples, generator
        self.model = ScoreModel(model)
        self.objective = attack.objective()
        self.tells_loss = self.objective.tells_loss
        self.schedule = attack.schedule()
        self.batch_size = batch_size
        self.batches = -(-len(samples) // batch_size)  # in one round
        self.evaluations = 0
        self.batch = self._read(0)
        device = self.batch[0].image.device
        self.fooled = torch.zeros(1, dtype=torch.int64, device=device)  # batches fooled in a row
        self.targets = torch.zeros(1, dtype=torch.int64, device=device)
        self.value_range = torch.zeros((), dtype=torch.float64, device=device)
        self.table: Tensor | None = None  # the permutation of the classes
        self.seen: list[tuple[int, Tensor, Tensor | str]] = []  # labels of the current batch

    def _read(self, evaluation: int) -> list[Sample]:
        """Read and check the samples of an evaluation."""
        begin = evaluation % self.batches * self.batch_size
        batch: list[Sample] = []
        for k in range(begin, min(begin + self.batch_size, len(self.samples))):
            sample, name = self.samples[k], f"samples[{k}]"
            if not isinstance(sample, Sample):
                raise ArgumentTypeError(
                    f"{name} must be a dagcore.Sample, got {type(sample).__name__}"
                )
            if sample.start is not None:
                raise ArgumentError(f"{name}: start must be None for a universal perturbation")
            sample = check_sample([self.attack], [self.model.model], sample, name)
            like = self.batch[0].image if evaluation else (batch or [sample])[0].image
            if sample.image.dim() != 3 or sample.image.shape[0] != like.shape[0]:
                raise ArgumentError(
                    f"{name}: image must have shape ({like.shape[0]}, H, W), "
                    f"got {tuple(sample.image.shape)}"
                )
            checks.tensor(f"{name}: image", sample.image, (like.dtype,))
            batch.append(sample)
        return batch

    def advance(self, state: State) -> None:
        """Read the next batch, and enlarge the perturbation if its images are larger."""
        if self.evaluations:
            self.batch = self._read(self.evaluations)
        self.evaluations += 1
        sizes = [state["x"].shape[2:], *(sample.image.shape[1:] for sample in self.batch)]
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        size = state["x"].shape
        if (height, width) != tuple(size[2:]):
            for name, rows in state.items():
                if rows.shape == size:
                    state[name] = fit(rows, (height, width))
        self.seen = []

    def evaluate(self, state: State, may_move: Tensor, *, synchronous: bool) -> Evaluation:
        """Evaluate the current batch under the perturbation; see `loop.Evaluator`."""
        r = state["x"]
        total, left, wanted, losses = None, [], [], []
        for images, labels, aims, boxes in _stacked(self.batch):
            leaf = images + fit(r, images.shape[2:])
            if self.attack.bounds:
                leaf = leaf.clamp(*self.attack.bounds)
            if self.attack.bounds and self.attack.levels:  # the sum lies on them up to rounding
                leaf = round_to_levels(leaf, self.attack.levels, self.attack.bounds)
            leaf = leaf.detach().requires_grad_()
            with torch.enable_grad():
                scores = self.model(leaf, labels, boxes)
            classes = scores.shape[1]
            adversarial = self._assign(aims, labels, classes)
            self.seen.append((classes, labels, adversarial))
            seed, active, loss = self.objective.seed(
                scores, labels, adversarial, align_corners=self.model.align_corners, state=state
            )
            losses += [] if loss is None else [loss]
            counted = self.objective.count(classes, labels, adversarial)
            if self.evaluations <= self.batches:
                self.targets += counted.sum()
                own = value_range(images, self.attack.bounds).max()
                self.value_range = torch.maximum(self.value_range, own)
            own_wanted = active > self.schedule.allowed(counted)
            left.append(active)
            wanted.append(own_wanted)
            if not synchronous or bool((may_move & own_wanted).any()):
                gradient = normalised(input_gradient(scores, leaf, seed), own_wanted)
                part = fit(gradient.sum(0, keepdim=True), r.shape[2:])
                total = part if total is None else total.add_(part)
        active, any_wanted = torch.cat(left), torch.cat(wanted).any(0, keepdim=True)
        bad = active.min()  # below 0 where a label is out of range
        count = torch.where(bad < 0, bad, active.sum(dtype=torch.int32))
        self.fooled = torch.where(any_wanted, 0, self.fooled + 1)
        if "provisional" in state:
            any_wanted = any_wanted | state["provisional"]
        loss = torch.cat(losses).sum().view(1, 1) if losses else None
        return Evaluation(count.view(1, 1), any_wanted, self.fooled >= self.batches, total, loss)

    def warn_at(self, network: nn.Module, perturbation: Tensor) -> None:
        """Evaluate another network once on every image, and warn if targets are active there."""
        at = Rounds(self.attack, network, self.samples, self.batch_size, self.generator)
        at.table = self.table
        state, left = {"x": perturbation[None]}, 0
        still = torch.zeros(1, dtype=torch.bool, device=perturbation.device)
        with frozen(network):
            for _ in range(at.batches):
                at.advance(state)
                seen = at.evaluate(state, still, synchronous=True)
                left += int(seen.active) if bool(seen.wanted) else 0
        if left:
            warnings.warn(
                f"the perturbation fools the prepared network, but leaves {left} targets active on "
                "the network itself: make it on the network itself, or with a margin",
                RuntimeWarning,
                stacklevel=3,
            )

    def _assign(self, wanted: Tensor | str | None, labels: Tensor, classes: int) -> Tensor | str:
        wanted = self.objective.default if wanted is None else wanted
        if isinstance(wanted, Tensor) or wanted != "permutation":
            return self.objective.assign(wanted, labels, classes, self.generator)
        if self.table is None:
            every = torch.arange(classes, device=labels.device)[None]
            drawn = assign("permutation", every, classes, -1, self.generator)
            assert isinstance(drawn, Tensor)
            self.table = drawn[0]
        ignored = self.attack.ignore_index
        return torch.where(labels.long() == ignored, labels, self.table[labels.long() % classes])

    def refuse(self, slot: int) -> None:
        """Raise for a label of the current batch that is out of range."""
        for classes, labels, adversarial in self.seen:
            self.objective.refuse(classes, labels, adversarial)

    def aims(self, slot: int) -> Aims:
        """Return the number of targets of all samples evaluated so far."""
        return Aims(self.targets.clone(), (), ("given",), ())


def _stacked(samples: Sequence[Sample]) -> Iterator[tuple[Tensor, Tensor, Any, Tensor | None]]:
    """Yield stacked images, labels, adversarial labels and boxes of samples of the same form."""
    groups: dict[Any, list[tuple[Any, ...]]] = {}
    for sample in samples:
        aims = sample.adversarial_labels
        values = (sample.image, sample.labels, aims, sample.boxes)
        key = (*map(form, values), None if isinstance(aims, Tensor) else aims)
        groups.setdefault(key, []).append(values)
    for group in groups.values():
        yield tuple(  # type: ignore[misc]
            torch.stack(list(own)) if isinstance(own[0], Tensor) else own[0]
            for own in zip(*group, strict=True)
        )

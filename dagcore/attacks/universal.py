"""One perturbation for many images: `DAG` on the sum of their normalised gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, ops
from ..engine import ScoreModel, frozen
from ..engine.memory import freed_memory_kept
from ..engine.stream import Sample, stacked
from ..errors import ArgumentError, ArgumentTypeError
from ..labels import assign
from ..perturbation import fit, perceptibility
from ..reference import allowance, input_gradient, seed_op, step_scale, targets
from .dag import DAG
from .joint import normalised


@dataclasses.dataclass(frozen=True, eq=False)
class UniversalResult:
    """A perturbation that was made on several images."""

    perturbation: Tensor
    """(3, H, W), of the largest height and width among the images."""
    iterations: int
    """Updates applied."""
    active: list[float]
    """Share of the targets that was active in each batch that was looked at, the last included."""
    perceptibility: float
    """In units of the [0, 1] range."""


def universal_perturbation(
    attack: DAG,
    model: Callable[..., Any],
    samples: Sequence[Sample],
    batch_size: int = 8,
    generator: torch.Generator | None = None,
) -> UniversalResult:
    """Make one perturbation for all images, in the manner of Moosavi-Dezfooli et al., CVPR 2017.

    Each update looks at the next `batch_size` of the samples, which come round again and again,
    and adds gamma times the L-infinity normalised sum of their gradients, each normalised before,
    so that no image outweighs the others. It ends after `max_iter` updates, or when no sample of a
    whole round has more active targets than the tolerance allows. An image smaller than the
    perturbation takes its upper left part.

    Args:
        attack: the settings. Its bounds hold for the images, its epsilon for the perturbation:
            without one nothing limits it but the number of updates. Its backend does not matter.
        model: as for `DAG.__call__`.
        samples: the images and their targets, at least one, looked up again in each round. Where
            adversarial labels are not given, or "permutation", one permutation of the classes
            without fixed points holds for all of them.
        batch_size: samples an update.
        generator: source of the random choices.

    Raises:
        TypeError, ValueError: the argument, what was required and what came.
    """
    checks.integer("batch_size", batch_size, at_least=1)
    if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
        raise ArgumentTypeError(f"samples must be a sequence, got {type(samples).__name__}")
    if not len(samples):
        raise ArgumentError("samples must have at least one image, got none")
    for k, sample in enumerate(samples):
        if not isinstance(sample, Sample):
            raise ArgumentTypeError(f"samples must be dagcore.Sample, got {type(sample).__name__}")
        if sample.start is not None:
            raise ArgumentError(f"samples[{k}]: start must be None for a universal perturbation")
        attack._check_sample(model, sample, f"samples[{k}]")
        like = samples[0].image
        if sample.image.dim() != 3 or sample.image.shape[0] != like.shape[0]:
            raise ArgumentError(
                f"samples[{k}]: image must have shape ({like.shape[0]}, H, W), "
                f"got {tuple(sample.image.shape)}"
            )
        checks.tensor(f"samples[{k}]: image", sample.image, (like.dtype,))
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        if samples[0].image.device.type == "cpu":
            stack.enter_context(freed_memory_kept())
        stack.enter_context(torch.inference_mode(False))
        return _run(attack, ScoreModel(model), samples, batch_size, generator)


def _run(
    attack: DAG,
    reader: ScoreModel,
    samples: Sequence[Sample],
    batch_size: int,
    generator: torch.Generator | None,
) -> UniversalResult:
    lower, upper = attack.bounds or (None, None)
    first = samples[0].image
    size = tuple(max(sample.image.shape[axis] for sample in samples) for axis in (1, 2))
    r = first.new_zeros((1, first.shape[0], *size))
    table: Tensor | None = None
    shares: list[float] = []
    batches = -(-len(samples) // batch_size)  # of one round
    fooled = stuck = 0  # batches in a row
    updates = 0
    for k in itertools.count():
        begin = k % batches * batch_size
        batch = [samples[n] for n in range(begin, min(begin + batch_size, len(samples)))]
        total = torch.zeros_like(r)
        left, counted, done = 0, 0, True
        for _, images, labels, aims, boxes in stacked(batch):
            moved = images + fit(r, images.shape[2:])
            leaf = moved.clamp(lower, upper) if attack.bounds else moved
            leaf = leaf.detach().requires_grad_()
            with torch.enable_grad():
                scores = reader(leaf, labels, boxes)
            classes, ignored = scores.shape[1], attack.ignore_index
            if aims is None or aims == "permutation":
                if table is None:
                    every = torch.arange(classes, device=labels.device)[None]
                    drawn = assign("permutation", every, classes, -1, generator)
                    assert isinstance(drawn, Tensor)
                    table = drawn[0]
                aims = torch.where(labels == ignored, labels, table[labels.long() % classes])
            else:
                aims = assign(aims, labels, classes, ignored, generator)
            seed, active = seed_op(ops, scores, labels, reader.align_corners)(
                scores, labels, aims, goal=attack.goal, ignore_index=ignored
            )
            whole = targets(classes, labels, aims, attack.goal, ignored)
            wanted = active > allowance(whole, attack.tolerance)
            left, counted = left + int(active.sum()), counted + int(whole.sum())
            if updates < attack.max_iter and bool(wanted.any()):
                done = False
                own = normalised(input_gradient(scores, leaf, seed), wanted)
                total += fit(own.sum(0, keepdim=True), size)
        shares.append(left / max(1, counted))
        fooled = fooled + 1 if done else 0
        if updates == attack.max_iter or fooled == batches:
            break
        if done:
            continue
        norms = ops.linf_step_(
            r,
            torch.zeros_like(r),
            total,
            torch.ones(1, dtype=torch.int32, device=r.device),
            gamma=attack.gamma,
            lower=None,
            upper=None,
            epsilon=attack.epsilon,
        )
        stepped = bool((step_scale(norms, attack.gamma) > 0).all())
        stuck = 0 if stepped else stuck + 1
        if stuck == batches:
            break  # no image has a gradient any more
        updates += stepped
    return UniversalResult(
        perturbation=r[0],
        iterations=updates,
        active=shares,
        perceptibility=float(perceptibility(r, attack._range())[0]),
    )

"""The attack as users call it: `DAG`, its settings, and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from . import checks, engine, ops, reference
from .labels import KINDS, assign
from .perturbation import perceptibility


class Status(str, Enum):
    """Why an image stopped."""

    CONVERGED = "converged"  # no more active targets than the tolerance allows
    BUDGET = "budget"  # max_iter updates were applied, and targets are left
    STALLED = "stalled"  # the gradient was zero or not finite

    def __str__(self) -> str:
        return self.value


_STATUS = {
    reference.CONVERGED: Status.CONVERGED,
    reference.BUDGET: Status.BUDGET,
    reference.STALLED: Status.STALLED,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What an attack on N images found."""

    adversarial: Tensor
    """(N, 3, H, W) attacked images; always the last iterate, whatever the status."""
    perturbation: Tensor
    """(N, 3, H, W) adversarial - images."""
    iterations: Tensor
    """(N,) int32, updates applied."""
    converged: Tensor
    """(N,) bool."""
    status: tuple[Status, ...]
    """Why each image stopped."""
    active: Tensor
    """(max_iter + 1, N) int32: active targets after 0, 1, ... updates; -1 once an image stopped."""
    perceptibility: Tensor
    """(N,) sqrt(mean over pixels of ||r_k||_2^2), in units of the [0, 1] range."""
    adversarial_labels: Tensor | None
    """The adversarial labels, given or drawn; None for "runner-up"."""

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{status.value} after {int(m)} updates (p={float(p):.2e})"
            for status, m, p in zip(self.status, self.iterations, self.perceptibility, strict=True)
        )
        return f"Result({shown})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DAG:
    """Dense Adversary Generation: Algorithm 1 of Xie et al., ICCV 2017.

    Args:
        gamma: step length in the L-infinity norm, in the units of the images. The paper's is 0.5
            for images in 0..255, which is the default for images in [0, 1].
        max_iter: updates at the most (the paper: 200 for segmentation, 150 for detection).
        goal: "leave": until no target is classified as its label; "reach": until every target is
            classified as its adversarial label.
        bounds: valid range of the images, None for no clipping (the paper has none).
        epsilon: radius of the L-infinity ball around the clean image, None for none.
        tolerance: an image is done when at most this fraction of its targets is active.
        ignore_index: label of the targets that never count.
        backend: "native", or "reference" for the plain PyTorch loop.

    Raises:
        TypeError, ValueError: a setting out of its range.
    """

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
        checks.integer("max_iter", self.max_iter, at_least=0)
        checks.choice("goal", self.goal, checks.GOALS)
        if self.bounds is not None:
            if not isinstance(self.bounds, (tuple, list)) or len(self.bounds) != 2:
                raise ValueError(f"bounds must be (lower, upper) or None, got {self.bounds!r}")
            for name, bound in zip(("bounds[0]", "bounds[1]"), self.bounds, strict=True):
                checks.number(name, bound)
            if not self.bounds[0] < self.bounds[1]:
                raise ValueError(f"bounds must be (lower, upper) or None, got {self.bounds!r}")
        if self.epsilon is not None:
            checks.number("epsilon", self.epsilon, above=0)
        checks.number("tolerance", self.tolerance)
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be a fraction in [0, 1), got {self.tolerance}")
        checks.integer("ignore_index", self.ignore_index)
        checks.choice("backend", self.backend, ("native", "reference"))

    def __call__(
        self,
        model: Callable[[Tensor], Any],
        images: Tensor,  # (N, 3, H, W)
        labels: Tensor,  # (N, *T)
        adversarial_labels: Tensor | str | None = None,  # (N, *T)
        generator: torch.Generator | None = None,
        *,
        callback: engine.Callback | None = None,
    ) -> Result:
        """Attack a batch of images, each on its own.

        Args:
            model: maps images (N, 3, H, W) to scores (N, C, *T) before softmax: any callable. An
                nn.Module is run in eval mode without gradients of its parameters, and put back
                as it was. {"out": scores} and .logits are understood.
            images: (N, 3, H, W) floating point, within `bounds`; left as they are.
            labels: (N, *T) uint8, int32 or int64: true classes, or `ignore_index`.
            adversarial_labels: (N, *T) likewise, or how to choose them: "permutation" (the
                default), "random" or "runner-up"; see `dagcore.labels.assign`.
            generator: source of the random choices.
            callback: called with (update, active targets (N,)) as they become known, on a GPU a
                few iterations late; backend "native" only.

        Raises:
            TypeError, ValueError: the argument, what was required and what came.
        """
        self._check(images, labels, adversarial_labels, generator)
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k != "backend"}
        settings["generator"] = generator
        loop: Callable[..., reference.Trace] = reference.dag
        if self.backend == "native":
            loop = engine.run
            settings["callback"] = callback
        elif callback is not None:
            raise ValueError("callback must be None for backend='reference', which calls none")

        def scores_of(x: Tensor) -> Tensor:
            scores = engine.read_scores(model(x), x)
            self._check_scores(scores, labels)
            return scores

        with engine.frozen(model), torch.inference_mode(False):
            trace = loop(
                scores_of,
                images,
                labels,
                "permutation" if adversarial_labels is None else adversarial_labels,
                **settings,
            )
        perturbation = trace.images - images.detach()
        return Result(
            adversarial=trace.images,
            perturbation=perturbation,
            iterations=trace.iterations,
            converged=trace.status == reference.CONVERGED,
            status=tuple(_STATUS[code] for code in trace.status.tolist()),
            active=trace.active,
            perceptibility=perceptibility(perturbation, self._range()),
            adversarial_labels=trace.adversarial_labels,
        )

    def count_active(
        self,
        model: Callable[[Tensor], Any],
        images: Tensor,  # (N, 3, H, W)
        labels: Tensor,  # (N, *T)
        adversarial_labels: Tensor | str,  # (N, *T)
    ) -> Tensor:
        """Active targets of given images, (N,) int32: say, after rounding them to 8 bits.

        Arguments as for the attack itself; pass a result's `adversarial_labels`.
        """
        self._check(images, labels, adversarial_labels, None)
        with engine.frozen(model), torch.no_grad():
            scores = engine.read_scores(model(images), images)
            self._check_scores(scores, labels)
            adversarial = assign(adversarial_labels, labels, scores.shape[1], self.ignore_index)
            counter = ops.dag_seed if self.backend == "native" else reference.dag_seed
            _, active = counter(
                scores, labels, adversarial, goal=self.goal, ignore_index=self.ignore_index
            )
        return active

    def _range(self) -> float:
        return 1.0 if self.bounds is None else float(self.bounds[1] - self.bounds[0])

    def _check(
        self,
        images: Tensor,
        labels: Tensor,
        adversarial_labels: Tensor | str | None,
        generator: torch.Generator | None,
    ) -> None:
        checks.tensor("images", images, checks.FLOAT_DTYPES)
        if images.dim() < 2:
            raise ValueError(f"images must have shape (N, 3, H, W), got {tuple(images.shape)}")
        checks.tensor("labels", labels, checks.LABEL_DTYPES)
        if labels.dim() < 1 or len(labels) != len(images):
            raise ValueError(
                f"labels must have one map for each of {len(images)} images, "
                f"got shape {tuple(labels.shape)}"
            )
        checks.device("labels", labels, "images", images)
        if isinstance(adversarial_labels, Tensor):
            checks.tensor("adversarial_labels", adversarial_labels, checks.LABEL_DTYPES)
            checks.shape("adversarial_labels", adversarial_labels, tuple(labels.shape), "labels")
            checks.device("adversarial_labels", adversarial_labels, "images", images)
        elif adversarial_labels is not None:
            checks.choice("adversarial_labels", adversarial_labels, KINDS)
            if adversarial_labels == "runner-up" and self.goal == "reach":
                raise ValueError(
                    "adversarial_labels must be given or drawn for goal='reach', got 'runner-up'"
                )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if not images.numel():
            return
        low, high = (float(value) for value in torch.aminmax(images.detach()))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("images must be finite, got a NaN or an infinity")
        limits = images.new_tensor(self.bounds or (low, high)).tolist()  # in the images' precision
        if low < limits[0] or high > limits[1]:
            raise ValueError(
                f"images must lie within bounds {self.bounds}, got values in [{low:g}, {high:g}]"
            )
        spacing = torch.finfo(images.dtype).eps / 2 * max(abs(low), abs(high))
        if self.gamma < spacing:
            raise ValueError(
                f"gamma must be at least the spacing of {checks.names([images.dtype])} images, "
                f"{spacing:.2e}, for a step to count, got {self.gamma:.2e}: use float32 images"
            )

    def _check_scores(self, scores: Tensor, labels: Tensor) -> None:
        if scores.shape[2:] != labels.shape[1:]:
            raise ValueError(
                f"labels must have shape {(len(labels), *scores.shape[2:])} to match the model's "
                f"scores {tuple(scores.shape)}, got {tuple(labels.shape)}"
            )
        checks.device("scores of model", scores, "labels", labels)

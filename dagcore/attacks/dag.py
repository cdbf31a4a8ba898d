"""The attack as users call it: `DAG`, its settings, and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .. import checks, ops, reference
from ..engine import ScoreModel, frozen
from ..engine import loop as engine
from ..engine.memory import freed_memory_kept
from ..engine.stream import (
    Assign,
    Prefetcher,
    Sample,
    Stream,
    StreamCallback,
    device_of,
    validate_slots,
)
from ..errors import ArgumentError, ArgumentTypeError
from ..labels import KINDS, assign
from ..perturbation import perceptibility


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
    targets: Tensor
    """(N,) int32, targets that count: neither ignored nor, for "leave", meant for their label.

    An image that has none is left alone: it is converged from the start."""
    adversarial_labels: Tensor | None
    """The adversarial labels, given or drawn; None for "runner-up"."""
    key: Any = None
    """The sample's key, for results of a stream."""

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{status.value} after {int(m)} updates (p={float(p):.2e})"
            for status, m, p in zip(self.status, self.iterations, self.perceptibility, strict=True)
        )
        return f"Result({shown})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DAG(engine.Settings):
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

    def __call__(
        self,
        model: Callable[[Tensor], Any],
        images: Tensor,  # (N, 3, H, W)
        labels: Tensor,  # (N, *T)
        adversarial_labels: Tensor | str | None = None,  # (N, *T)
        generator: torch.Generator | None = None,
        *,
        boxes: Tensor | None = None,  # (N, *)
        start: Tensor | None = None,  # (N, 3, H, W)
        callback: engine.Callback | None = None,
    ) -> Result:
        """Attack a batch of images, each on its own.

        Args:
            model: maps images (N, 3, H, W) to scores (N, C, *T) before softmax: any callable. An
                nn.Module is run in eval mode without gradients of its parameters, and put back
                as it was. {"out": scores} and .logits are understood. Scores (N, C, h, w) below
                the labels' size are read through bilinear interpolation (with corners aligned if
                the model has a true attribute `align_corners`).
            images: (N, 3, H, W) floating point, within `bounds`; left as they are.
            labels: (N, *T) uint8, int32 or int64: true classes, or `ignore_index`.
            adversarial_labels: (N, *T) likewise, or how to choose them: "permutation" (the
                default), "random" or "runner-up"; see `dagcore.labels.assign`.
            generator: source of the random choices.
            boxes: of a detector, (N, P, 4) in pixels, as `dagcore.victims.Detector.dense_targets`
                finds them; the model is called as model(images, boxes). None for any other model.
                A model of your own may take any floating tensor (N, *) in their place.
            start: where to begin, (N, 3, H, W) like `images` and within `epsilon` of them, if not
                at the images themselves: say, what an attack on a faster victim ended with (then
                pass its result's `adversarial_labels` too, or others are drawn). The perturbation
                and `epsilon` count from `images` all the same.
            callback: called with (update, active targets (N,)) as they become known, on a GPU a
                few iterations late; backend "native" only.

        Raises:
            TypeError, ValueError: the argument, what was required and what came.
        """
        self._check(images, labels, adversarial_labels, generator)
        check_boxes(model, boxes, images)
        if start is not None:
            self._check_start(start, images)
        if callback is not None and not callable(callback):
            raise ArgumentTypeError(f"callback must be callable, got {type(callback).__name__}")
        wanted = "permutation" if adversarial_labels is None else adversarial_labels
        reader = ScoreModel(model)
        with frozen(model), torch.inference_mode(False):
            if self.backend == "native":
                outcomes = engine.run(
                    reader,
                    self,
                    images,
                    labels,
                    self._assign(wanted, generator),
                    boxes=boxes,
                    start=start,
                    callback=callback,
                )
                return self._gather(images, outcomes)
            if callback is not None:
                raise ArgumentError(
                    "callback must be None for backend='reference', which calls none"
                )
            settings = dataclasses.asdict(self)
            del settings["backend"]
            trace = reference.dag(
                lambda x, boxes=None: reader(x, labels, boxes),
                images,
                labels,
                wanted,
                align_corners=reader.align_corners,
                generator=generator,
                boxes=boxes,
                start=start,
                **settings,
            )
            return self._result(images, trace)

    def stream(
        self,
        model: Callable[[Tensor], Any],
        samples: Iterable[Sample],
        slots: int = 8,
        generator: torch.Generator | None = None,
        *,
        callback: StreamCallback | None = None,
    ) -> Iterator[Result]:
        """Attack images one by one as they come, `slots` at a time, results as they finish.

        As soon as an image stops, the next takes its slot, so that no image waits for a slower
        one. Each result equals what the image would give alone, up to the network's own
        arithmetic. Samples are fetched by a thread of their own; images may differ in size. The
        model is in eval mode, and on the CPU freed memory stays with the process (see
        `dagcore.freed_memory_kept`), until the iterator ends or is closed.

        Args:
            model: as for a batch. Samples are moved to the device of its parameters.
            samples: an iterable of `dagcore.Sample`, a DataLoader with `batch_size=None` included.
            slots: images under attack at a time.
            generator: source of the random choices, which do not depend on `slots`.
            callback: called with (keys of the images under attack, active targets of each) as they
                become known, on a GPU a few iterations late; -1 for an image that has stopped.

        Yields:
            A `Result` of one image (N = 1), with the sample's `key`.

        Raises:
            TypeError, ValueError: a wrong argument or sample. An error of the source or of a
                sample is raised once all images before it have finished; an error of the model,
                after all results that were already there.
        """
        validate_slots(slots)
        if self.backend != "native":
            raise ArgumentError(f"backend must be 'native' to stream, got {self.backend!r}")
        checks.generator(generator)
        return self._stream(model, samples, slots, generator, callback)

    def _stream(
        self,
        model: Callable[[Tensor], Any],
        samples: Iterable[Sample],
        slots: int,
        generator: torch.Generator | None,
        callback: StreamCallback | None,
    ) -> Iterator[Result]:
        def check(sample: Sample) -> None:
            self._check_sample(model, sample, f"sample {sample.key!r}")

        def assign_to(sample: Sample) -> Assign:
            wanted = sample.adversarial_labels
            if isinstance(wanted, Tensor):
                return self._assign(wanted[None], None)
            # A seed of its own for each sample: slots finish in any order.
            device = "cpu" if generator is None else generator.device
            seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
            own = torch.Generator().manual_seed(int(seed))
            return self._assign("permutation" if wanted is None else wanted, own)

        device = device_of(model)
        work = Stream(ScoreModel(model), self, slots, device, check, assign_to, callback)
        with (
            frozen(model),
            nullcontext() if device is not None and device.type != "cpu" else freed_memory_kept(),
            closing(Prefetcher(samples, slots, device)) as feed,
        ):
            for outcome in work.run(feed):
                sample = outcome.tag
                image = sample.image[None].to(outcome.image.device)
                result = self._gather(image, [outcome])
                yield dataclasses.replace(result, key=sample.key)

    def count_active(
        self,
        model: Callable[[Tensor], Any],
        images: Tensor,  # (N, 3, H, W)
        labels: Tensor,  # (N, *T)
        adversarial_labels: Tensor | str,  # (N, *T)
        boxes: Tensor | None = None,  # (N, *)
    ) -> Tensor:
        """Active targets of given images, (N,) int32: say, after rounding them to 8 bits.

        Arguments as for the attack itself; pass a result's `adversarial_labels`.
        """
        self._check(images, labels, adversarial_labels, None)
        check_boxes(model, boxes, images)
        reader = ScoreModel(model)
        with frozen(model), torch.no_grad():
            scores = reader(images, labels, boxes)
            adversarial = assign(adversarial_labels, labels, scores.shape[1], self.ignore_index)
            module = ops if self.backend == "native" else reference
            _, active = reference.seed_op(module, scores, labels, reader.align_corners)(
                scores, labels, adversarial, goal=self.goal, ignore_index=self.ignore_index
            )
        return active

    def _assign(self, wanted: Tensor | str, generator: torch.Generator | None) -> Assign:
        """Adversarial labels, given or drawn once the number of classes is known."""
        return lambda labels, num_classes: assign(
            wanted, labels, num_classes, self.ignore_index, generator
        )

    def _gather(self, images: Tensor, outcomes: list[engine.Outcome]) -> Result:
        """The result of a batch from the outcomes of its images."""
        device = images.device
        given = [o.adversarial_labels for o in outcomes if o.adversarial_labels is not None]
        trace = reference.Trace(
            torch.stack([o.image for o in outcomes]) if outcomes else images.detach().clone(),
            torch.tensor([o.iterations for o in outcomes], dtype=torch.int32, device=device),
            torch.tensor([o.status for o in outcomes], dtype=torch.int8, device=device),
            torch.stack([o.active for o in outcomes], dim=1)
            if outcomes
            else torch.empty((self.max_iter + 1, 0), dtype=torch.int32, device=device),
            torch.tensor([o.targets for o in outcomes], dtype=torch.int32, device=device),
            torch.stack(given) if given else None,
        )
        return self._result(images, trace)

    def _result(self, images: Tensor, trace: reference.Trace) -> Result:
        perturbation = trace.images - images.detach()
        return Result(
            adversarial=trace.images,
            perturbation=perturbation,
            iterations=trace.iterations,
            converged=trace.status == reference.CONVERGED,
            status=tuple(_STATUS[code] for code in trace.status.tolist()),
            active=trace.active,
            targets=trace.targets,
            perceptibility=perceptibility(perturbation, self._range()),
            adversarial_labels=trace.adversarial_labels,
        )

    def _range(self) -> float:
        return 1.0 if self.bounds is None else float(self.bounds[1] - self.bounds[0])

    def _check(self, images: Any, labels: Any, adversarial_labels: Any, generator: Any) -> None:
        checks.tensor("images", images, checks.FLOAT_DTYPES)
        if images.dim() < 2:
            raise ArgumentError(f"images must have shape (N, 3, H, W), got {tuple(images.shape)}")
        checks.tensor("labels", labels, checks.LABEL_DTYPES)
        if labels.dim() < 1 or len(labels) != len(images):
            raise ArgumentError(
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
                raise ArgumentError(
                    "adversarial_labels must be given or drawn for goal='reach', got 'runner-up'"
                )
        checks.generator(generator)
        self._check_pixels("images", images)

    def _check_sample(self, model: object, sample: Sample, name: str) -> None:
        image, labels, adversarial, boxes = (
            value[None] if isinstance(value, Tensor) else value
            for value in (sample.image, sample.labels, sample.adversarial_labels, sample.boxes)
        )
        try:
            self._check(image, labels, adversarial, None)
            check_boxes(model, boxes, sample.image[None])
            if sample.start is not None:
                self._check_start(sample.start, sample.image)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _check_start(self, start: Any, images: Tensor) -> None:
        checks.tensor("start", start, (images.dtype,))
        checks.shape("start", start, tuple(images.shape), "images")
        checks.device("start", start, "images", images)
        self._check_pixels("start", start)
        if self.epsilon is None or not images.numel():
            return
        away = float((start.double() - images.double()).abs().max())
        rounding = torch.finfo(images.dtype).eps * float(images.abs().max())
        if away > self.epsilon + rounding:
            raise ArgumentError(
                f"start must lie within epsilon={self.epsilon:g} of images, got {away:g} away"
            )

    def _check_pixels(self, name: str, images: Tensor) -> None:
        if not images.numel():
            return
        low, high = (float(value) for value in torch.aminmax(images.detach()))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ArgumentError(f"{name} must be finite, got a NaN or an infinity")
        limits = images.new_tensor(self.bounds or (low, high)).tolist()  # in the images' precision
        if low < limits[0] or high > limits[1]:
            raise ArgumentError(
                f"{name} must lie within bounds {self.bounds}, got values in [{low:g}, {high:g}]"
            )
        spacing = torch.finfo(images.dtype).eps / 2 * max(abs(low), abs(high))
        if self.gamma < spacing:
            raise ArgumentError(
                f"gamma must be at least the spacing of {checks.names([images.dtype])} images, "
                f"{spacing:.2e}, for a step to count, got {self.gamma:.2e}: use float32 images"
            )


def check_boxes(model: object, boxes: Any, images: Tensor) -> None:
    """Raise unless the boxes are what the model takes, as far as that can be told."""
    if boxes is not None:
        checks.tensor("boxes", boxes, checks.FLOAT_DTYPES)
        if boxes.dim() < 1 or len(boxes) != len(images):
            raise ArgumentError(
                f"boxes must have one entry for each of {len(images)} images, "
                f"got shape {tuple(boxes.shape)}"
            )
        checks.device("boxes", boxes, "images", images)
    own = getattr(model, "check_boxes", None)
    if own is not None:
        own(boxes, images)

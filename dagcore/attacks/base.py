"""`Attack`, the base class of all attacks: an objective, a step and a schedule behind one call."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..engine import frozen
from ..engine.devices import Device, device_for
from ..engine.loop import Finished, Objective, Schedule, Slots, Step
from ..engine.networks import Assign, Network, Networks, Targets
from ..engine.runs import Run, Runs
from ..engine.scores import ScoreModel
from ..engine.stream import Prefetcher, Sample, Stream, StreamCallback, device_of
from ..errors import ArgumentError, ArgumentTypeError
from ..levels import radius
from ..perturbation import round_to_levels
from .original import Originals
from .result import Result, gather

Callback = Callable[[int, Tensor], None]
"""Called with the number of the update and the active targets (N,) of each image, -1 for images
that have stopped."""


class Attack(abc.ABC):
    """Base class of attacks, which treat each image of a batch on its own.

    A subclass defines the objective, the step and the schedule, and checks its settings.
    """

    bounds: tuple[float, float] | None = (0.0, 1.0)
    """Valid range of the images, None for no clipping."""
    epsilon: float | None = None
    """Radius of the ball around the clean image, None for no ball."""
    ignore_index: int = 255
    """Label of the targets that never count."""
    norm: str = "linf"
    """Norm of the ball: "linf" or "l2"."""
    levels: int | None = None
    """Number of levels between the bounds that images lie on, None for any value."""
    restarts: int = 1
    """Number of runs per image, each from a different random point; the best is returned."""
    random_start = False
    """Whether the starting points are random, so that each image needs a seed."""
    alone: bool = False
    """Whether the attack supports only one image and one network, so neither joint nor
    universal."""
    backend: str = "native"
    """The implementation that runs the attack; only "native" supports streams."""

    @abc.abstractmethod
    def objective(self) -> Objective:
        """Return the objective: which targets count, and what seeds the backward pass."""

    @abc.abstractmethod
    def step(self) -> Step:
        """Return the step, which moves the images along a gradient."""

    @abc.abstractmethod
    def schedule(self) -> Schedule:
        """Return the schedule, which says when an image stops."""

    def __call__(
        self,
        model: Callable[..., Any],
        images: Tensor,  # (N, 3, H, W)
        labels: Tensor,  # (N, *T)
        adversarial_labels: Tensor | str | None = None,  # (N, *T)
        generator: torch.Generator | None = None,
        *,
        boxes: Tensor | None = None,  # (N, P, 4)
        start: Tensor | None = None,  # (N, 3, H, W)
        callback: Callback | None = None,
    ) -> Result:
        """Attack a batch of images, each on its own.

        Args:
            model: any callable that maps images (N, 3, H, W) to scores (N, C, *T) before softmax.
                An nn.Module runs in eval mode without gradients of its parameters; both are
                restored afterwards. Outputs {"out": scores} and .logits are understood. Scores
                (N, C, h, w) smaller than the labels are interpolated bilinearly (with aligned
                corners if the model has a true attribute `align_corners`, or wraps a model of
                dagcore.victims that has one).
            images: (N, 3, H, W) floating point, within `bounds`; not modified.
            labels: (N, *T) uint8, int32 or int64: true classes, or `ignore_index`.
            adversarial_labels: (N, *T) likewise, or how to choose them: "permutation" or "random";
                "runner-up" for `DAG` with the goal "leave" and for the loss "dag"; "untargeted" for
                all other losses. None: "permutation" for `DAG` and the loss "dag", else
                "untargeted". See `dagcore.labels.assign`.
            generator: source of the random choices.
            boxes: the boxes (N, P, 4), floating point, at which a detector computes its scores, or
                any other input (N, *) of the model for each image. The model is then called as
                model(images, boxes). See `dagcore.victims.Detector`.
            start: where to begin instead of at the images, (N, 3, H, W) like `images` and within
                `epsilon` of them. For example, the result of an attack on a faster victim (then
                pass its `adversarial_labels` too). The perturbation and `epsilon` are still
                measured from `images`.
            callback: called with (update, active targets (N,)) as they become known, on a GPU a few
                iterations late.

        Raises:
            TypeError, ValueError: a wrong argument; the message names it, what was required and
                what came.
        """
        self.check(model, images, labels, adversarial_labels, boxes, generator)
        self.check_start(start, images)
        checks.callback(callback)
        images, start = self.fitted("images", images), self.fitted_start(start)
        return self._attack(
            model, images, labels, adversarial_labels, generator, boxes, start, callback
        )

    def _attack(
        self,
        model: Callable[..., Any],
        images: Tensor,
        labels: Tensor,
        adversarial_labels: Tensor | str | None,
        generator: torch.Generator | None,
        boxes: Tensor | None,
        start: Tensor | None,
        callback: Callback | None,
    ) -> Result:
        """Run the attack on arguments that have been checked."""
        targets = Targets(labels, self.assign(adversarial_labels, generator), boxes)
        networks = [self.network(model)]
        return run_batch(self, networks, images, [targets], start, generator, callback)

    def last_iterate(
        self,
        model: Callable[..., Any],
        images: Tensor,  # (N, 3, H, W)
        labels: Tensor,  # (N, *T)
        adversarial_labels: Tensor | str | None = None,  # (N, *T)
        generator: torch.Generator | None = None,
        *,
        boxes: Tensor | None = None,  # (N, P, 4)
    ) -> Tensor:
        """Return the last iterate of a single run without evaluating it; for adversarial training.

        The result is the attack's `last` with restarts=1, but it saves about one forward pass. It
        always runs natively, whatever the `backend`.

        Args:
            model, images, labels, adversarial_labels, generator, boxes: as for the attack.

        Returns:
            (N, 3, H, W).

        Raises:
            TypeError, ValueError: a wrong argument; the message names it, what was required and
                what came.
        """
        self.check(model, images, labels, adversarial_labels, boxes, generator)
        images = self.fitted("images", images)
        if not len(images):
            return images
        targets = Targets(labels, self.assign(adversarial_labels, generator), boxes)
        device = device_for(images.device)
        with held([model], device), device.current(), torch.inference_mode(False):
            runs = Runs(1, self.random_point)
            seeds = [Run(n, self.seed(generator)) for n in range(len(images))]
            start = torch.stack([runs.start(*one) for one in zip(images, seeds, strict=True)])
            slots = open_slots(self, [self.network(model)], images, [targets], start)
            for _ in range(self.schedule().max_iter):
                slots.evaluate_and_update()
                if slots.synchronous and not bool(slots.state["running"].any()):
                    break
            wrong = slots.state["history"].amin((1, 2)) < -1
            if bool(wrong.any()):
                raise slots.error(int(wrong.int().argmax()))
            return slots.state["x"]

    def stream(
        self,
        model: Callable[..., Any],
        samples: Iterable[Sample],
        slots: int = 8,
        generator: torch.Generator | None = None,
        *,
        callback: StreamCallback | None = None,
    ) -> Iterator[Result]:
        """Attack images one by one as they arrive, `slots` at a time, and yield each result.

        As soon as an image stops, the next one takes its slot, so no image waits for a slower one.
        Each result equals that of the image attacked alone, up to rounding in the network. A
        separate thread fetches and copies the samples; images may differ in size. Until the
        iterator ends or is closed, the model stays in eval mode, and on the CPU freed memory stays
        with the process (see `dagcore.freed_memory_kept`).

        Args:
            model: as for a batch. Samples are moved to the device of its parameters.
            samples: an iterable of `dagcore.Sample`, for example a DataLoader with
                `batch_size=None`.
            slots: number of images under attack at a time.
            generator: source of the random choices, which do not depend on `slots`.
            callback: called with (keys of the images under attack, active targets of each) as they
                become known, on a GPU a few iterations late; -1 for an image that has stopped.

        Yields:
            A `Result` of one image (N = 1), with the sample's `key`.

        Raises:
            TypeError, ValueError: a wrong argument or sample. An error of the source or of a sample
                is raised once all images before it have finished; an error of the model, after all
                results that were ready.
        """
        if self.backend != "native":
            raise ArgumentError(f"backend must be 'native' to stream, got {self.backend!r}")
        return run_stream(self, [self.network(model)], samples, slots, generator, callback)

    def count_active(
        self,
        model: Callable[..., Any],
        images: Tensor,  # (N, 3, H, W)
        labels: Tensor,  # (N, *T)
        adversarial_labels: Tensor | str,  # (N, *T)
        boxes: Tensor | None = None,  # (N, P, 4)
    ) -> Tensor:
        """Count the active targets of given images, for example after rounding to 8 bits.

        Args:
            model, images, labels, boxes: as for the attack.
            adversarial_labels: those of the attack's `Result`.

        Returns:
            (N,) int32.

        Raises:
            TypeError, ValueError: a wrong argument; the message names it, what was required and
                what came.
        """
        if adversarial_labels is None:
            raise ArgumentError("adversarial_labels must be those of the attack's result, got None")
        self.check(model, images, labels, adversarial_labels, boxes)
        scores_of = ScoreModel(model)
        with device_for(images.device).current(), frozen(model), torch.no_grad():
            scores = scores_of(images, labels, boxes)
        return self.active_targets(
            scores, labels, adversarial_labels, align_corners=scores_of.align_corners
        )

    def active_targets(
        self,
        scores: Tensor,  # (N, C, *T), or maps (N, C, h, w) below the labels' size
        labels: Tensor,  # (N, *T)
        adversarial_labels: Tensor | str,  # (N, *T)
        *,
        align_corners: bool = False,
    ) -> Tensor:
        """Count the active targets at given scores, (N,) int32."""
        objective = self.objective()
        adversarial = objective.assign(adversarial_labels, labels, scores.shape[1], None)
        active = objective.seed(
            scores, labels, adversarial, align_corners=align_corners, state={}
        ).active
        if bool((active < 0).any()):
            objective.refuse(scores.shape[1], labels, adversarial)
        return active

    def network(self, model: Callable[..., Any]) -> Network:
        """Wrap a model as a network that this attack evaluates."""
        return Network(model, self.objective(), self.schedule())

    def assign(self, wanted: Tensor | str | None, generator: torch.Generator | None) -> Assign:
        """Return a function that assigns adversarial labels once the number of classes is known."""
        objective = self.objective()
        return lambda labels, num_classes: objective.assign(wanted, labels, num_classes, generator)

    def check(
        self,
        model: object,
        images: Any,
        labels: Any,
        adversarial_labels: Any,
        boxes: Any,
        generator: Any = None,
    ) -> None:
        """Raise unless a batch can be attacked."""
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
            if not isinstance(adversarial_labels, str):
                raise ArgumentTypeError(
                    "adversarial_labels must be a torch.Tensor, a string or None, "
                    f"got {type(adversarial_labels).__name__}"
                )
            self.check_kind(adversarial_labels)
        checks.generator(generator)
        self.check_pixels("images", images)
        check_boxes(model, boxes, images)

    def seed(self, generator: torch.Generator | None) -> int | None:
        """Draw the seed of an image's random points; None if the attack has none."""
        return drawn_seed(generator) if self.random_start else None

    def random_point(self, image: Tensor, seed: int, run: int) -> Tensor | None:
        """Return where a run of an image (*) with this seed starts; None for the image itself."""
        return None

    def check_grid(self) -> None:
        """Raise unless bounds and levels go together; warn if epsilon reaches no other level."""
        if self.bounds is not None:
            checks.bounds(self.bounds)
        if self.levels is None:
            return
        checks.level_count("levels", self.levels)
        if self.bounds is None:
            raise ArgumentError(f"bounds must be given with levels={self.levels}, got None")
        if self.epsilon is not None and not radius(self.epsilon, self.bounds, self.levels):
            warnings.warn(
                f"epsilon={self.epsilon:g} is less than the spacing of "
                f"{self.levels} levels in {self.bounds}: no image can change",
                RuntimeWarning,
                stacklevel=4,
            )

    def check_kind(self, adversarial_labels: Any) -> None:
        """Raise unless adversarial labels can be chosen by this name."""
        raise ArgumentTypeError(
            f"adversarial_labels must be a torch.Tensor or None, got {adversarial_labels!r}"
        )

    def check_pixels(self, name: str, images: Tensor) -> None:
        """Raise unless images are finite and within the bounds. Reads values: synchronises."""
        if not images.numel():
            return
        low, high = (float(value) for value in torch.aminmax(images.detach()))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ArgumentError(f"{name} must be finite, got a NaN or an infinity")
        limits = torch.tensor(self.bounds or (low, high), dtype=images.dtype).tolist()
        if max(limits[0] - low, high - limits[1]) > self.rounding(images.dtype):
            hint = ": divide by 255, or set bounds=(0, 255)" * (limits == [0, 1] and high > 8)
            raise ArgumentError(
                f"{name} must lie within bounds {self.bounds}, "
                f"got values in [{low:.9g}, {high:.9g}]{hint}"
            )
        self.check_spacing(torch.finfo(images.dtype).eps / 2 * max(abs(low), abs(high)), images)

    def rounding(self, dtype: torch.dtype) -> float:
        """Return how far rounding, say in a resize, may put images off their bounds or levels."""
        largest = max(map(abs, self.bounds)) if self.bounds else 1.0
        return max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps) * largest

    def fitted(self, name: str, images: Tensor) -> Tensor:
        """Return checked images without the rounding that puts them off the bounds or levels.

        Raises:
            ValueError: images between the levels. Reads values: synchronises.
        """
        if self.bounds is None or not images.numel():
            return images
        images = images.detach()
        low, high = torch.aminmax(images)
        limits = torch.tensor(self.bounds, dtype=images.dtype, device=images.device)
        if bool((low < limits[0]) | (high > limits[1])):
            images = images.clamp(*limits)
        if self.levels is None:
            return images
        step = (self.bounds[1] - self.bounds[0]) / (self.levels - 1)
        spacing = torch.finfo(images.dtype).eps / 2 * max(map(abs, self.bounds))
        if step < 4 * spacing:
            raise ArgumentError(
                f"levels must be at least four times the spacing of {checks.names([images.dtype])} "
                f"{name} apart ({spacing:.2g}), got {self.levels} levels {step:.2g} apart: "
                "use float32"
            )
        on = round_to_levels(images, self.levels, self.bounds)
        away = (on - images).abs()
        if float(away.max()) > self.rounding(images.dtype):
            worst = float(images.reshape(-1)[int(away.argmax())])
            helper = f"round_to_levels({name}, {self.levels}, {self.bounds})"
            if self.levels == 256:
                helper = f"round_to_8_bits({name}, {self.bounds})"
            raise ArgumentError(
                f"{name} must lie on {self.levels} levels between {self.bounds[0]:g} and "
                f"{self.bounds[1]:g}, got {worst:.9g}, which is {float(away.max()) / step:.2g} of "
                f"a level away: round them first, with dagcore.perturbation.{helper}"
            )
        return on

    def fitted_start(self, start: Tensor | None) -> Tensor | None:
        """Return a checked start clamped to the bounds; it may lie between the levels."""
        return start if start is None or self.bounds is None else start.clamp(*self.bounds)

    def check_spacing(self, spacing: float, images: Tensor) -> None:  # noqa: B027
        """Raise if the dtype of the images is too coarse for the steps."""

    def check_start(self, start: Any, images: Tensor) -> None:
        """Raise unless an attack on these images can begin at `start`."""
        if start is None:
            return
        checks.tensor("start", start, (images.dtype,))
        checks.shape("start", start, tuple(images.shape), "images")
        checks.device("start", start, "images", images)
        self.check_pixels("start", start)
        linf = self.norm == "linf"
        if self.epsilon is None or not images.numel():
            return
        away = (start.double() - images.double()).flatten(1)
        away = float(torch.linalg.vector_norm(away, math.inf if linf else 2, dim=1).max())
        rounding = torch.finfo(images.dtype).eps * float(images.abs().max())
        rounding *= 1 if linf else math.sqrt(images[0].numel())
        if away > self.epsilon + rounding:
            raise ArgumentError(
                f"start must lie within epsilon={self.epsilon:g} of images"
                f"{'' if linf else ' in the L2 norm'}, got {away:g} away"
            )


def check_sample(
    attacks: Sequence[Attack], models: Sequence[object], sample: Sample, name: str
) -> Sample:
    """Check a sample for the attacks, and return it with its image and start fitted to the bounds.

    Raises:
        TypeError, ValueError: a sample that cannot be attacked.
    """

    def batched(value: Any) -> Any:
        dense = isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided
        return value[None] if dense else value  # check() refuses what is not dense

    try:
        if sample.seed is not None:
            checks.integer("seed", sample.seed, at_least=0, at_most=2**63 - 1)
        each = sample.each(len(models))
        for attack, model, one in zip(attacks, models, each, strict=True):
            labels, adversarial, boxes = map(batched, one)
            attack.check(model, batched(sample.image), labels, adversarial, boxes)
        attacks[0].check_start(batched(sample.start), batched(sample.image))
        return dataclasses.replace(
            sample,
            image=attacks[0].fitted("images", sample.image),
            start=attacks[0].fitted_start(sample.start),
        )
    except (ArgumentTypeError, ArgumentError) as error:
        raise type(error)(f"{name}: {error}") from error


def check_shared(attack: Attack) -> None:
    """Raise unless the attack can make one perturbation for several networks or images."""
    if not isinstance(attack, Attack):
        raise ArgumentTypeError(f"attack must be an Attack, such as DAG(), got {attack!r}")
    if attack.alone:
        raise ArgumentError(
            "attack must support several networks or images at a time, as DAG and PGD do, "
            f"got {type(attack).__name__}"
        )


def check_boxes(model: object, boxes: Any, images: Tensor) -> None:
    """Raise unless the model can take these `boxes`, as far as that can be checked here."""
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
        return
    given = 1 if boxes is None else 2
    if not checks.accepts(model, given):
        what = "images alone, as no boxes are given" if boxes is None else "images and boxes"
        raise ArgumentError(f"model must accept {what}, got {type(model).__name__}, which does not")


def drawn_seed(generator: torch.Generator | None) -> int:
    """Draw a seed from a generator."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


@contextlib.contextmanager
def held(models: Iterable[object], device: Device) -> Iterator[None]:
    """Keep models in eval mode, and on the CPU freed memory, while they are attacked."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(frozen(model))
        stack.enter_context(device.attacking())
        yield


def run_batch(
    attack: Attack,
    networks: Sequence[Network],
    images: Tensor,  # (N, *)
    targets: Sequence[Targets],
    start: Tensor | None,
    generator: torch.Generator | None,
    callback: Callback | None,
    *,
    attacks: Sequence[Attack] | None = None,
) -> Result:
    """Attack checked images on one network, or on several with one attack of `attacks` for each."""
    total, joint = len(images), attacks is not None
    models = [network.model.model for network in networks]

    def report(update: int, places: list[Any], counts: Tensor) -> None:
        if callback is not None and bool((counts >= 0).any()):
            of_all = torch.full((total, len(networks)), -1, dtype=torch.int32)
            of_all[torch.tensor([run.key for run in places])] = counts
            callback(update, of_all.T if joint else of_all[:, 0])

    if not total:
        return _nothing(attack, images, targets, joint=joint)
    device = device_for(images.device)
    with held(models, device), device.current(), torch.inference_mode(False):
        runs = Runs(attack.restarts, attack.random_point)
        tags = [Run(n, attack.seed(generator)) for n in range(total)]
        if start is None and attack.random_start:
            start = torch.stack([runs.start(*one) for one in zip(images, tags, strict=True)])
        slots = open_slots(attack, networks, images, targets, start, report, tags)
        outcomes: dict[int, Finished] = {}
        while len(outcomes) < total:
            slots.iterate()
            for outcome in slots.collect():
                if outcome.error is not None:
                    raise outcome.error
                if (best := runs.over(outcome, slots)) is not None:
                    outcomes[best.tag] = best
        originals = Originals(attacks or [attack], models)
        for outcome in outcomes.values():
            originals.look(outcome)
        originals.warn()
        return gather([outcomes[n] for n in range(total)], attack.bounds, joint=joint)


def open_slots(
    attack: Attack,
    networks: Sequence[Network],
    images: Tensor,  # (N, *), N at least 1
    targets: Sequence[Targets],
    start: Tensor | None = None,
    report: Callable[[int, list[Any], Tensor], None] | None = None,
    tags: Sequence[Any] | None = None,
) -> Slots:
    """Return slots that hold the images, tagged with `tags` or else numbered."""
    count = len(images)
    opened = Networks(
        [
            network.open(count, own.labels[0], None if own.boxes is None else own.boxes[0])
            for network, own in zip(networks, targets, strict=True)
        ]
    )
    slots = Slots(opened, attack.step(), attack.schedule(), count, images[0], report)
    tags = range(count) if tags is None else tags
    opened.admit(slots.admit(list(tags), images, start), targets)
    return slots


ENOUGH_CLASSES = 4  # for every loss, targeted or not


def _nothing(attack: Attack, images: Tensor, targets: Sequence[Targets], *, joint: bool) -> Result:
    """Return the result of an empty batch."""
    networks = len(targets)
    history = attack.schedule().max_iter + 1
    count = images.new_zeros(0, dtype=torch.int32)
    active = count.new_zeros((history, networks, 0))
    aims = tuple(own.assign(own.labels, ENOUGH_CLASSES) for own in targets)
    return Result(
        adversarial=images.detach().clone(),
        perturbation=images.detach().clone(),
        iterations=count,
        status=(),
        active=active if joint else active[:, 0],
        perceptibility=images.new_zeros(0, dtype=torch.promote_types(images.dtype, torch.float32)),
        targets=count.new_zeros((networks, 0)) if joint else count,
        last=images.detach().clone(),
        left=count,
        loss=None,
        adversarial_labels=aims if joint else aims[0],
    )


def run_stream(
    attack: Attack,
    networks: Sequence[Network],
    samples: Iterable[Sample],
    slots: int,
    generator: torch.Generator | None,
    callback: StreamCallback | None,
    *,
    attacks: Sequence[Attack] | None = None,
) -> Iterator[Result]:
    """Attack samples on one network, or on several with one attack of `attacks` for each."""
    checks.integer("slots", slots, at_least=1)
    checks.generator(generator)
    checks.callback(callback)
    joint, rules = attacks is not None, attacks or [attack]
    models = [network.model.model for network in networks]

    def check(sample: Sample) -> Sample:
        return check_sample(rules, models, sample, f"sample {sample.key!r}")

    def assign(sample: Sample) -> tuple[list[Assign], int | None]:
        # A separate seed for each sample, as slots finish in any order.
        own, seed = generator, sample.seed
        if seed is None:
            seed = attack.seed(generator)
        wanted = [adversarial for _, adversarial, _ in sample.each(len(networks))]
        if not all(isinstance(one, Tensor) for one in wanted):
            seed = drawn_seed(generator) if seed is None else seed
            own = torch.Generator().manual_seed(seed)
        return [rule.assign(one, own) for rule, one in zip(rules, wanted, strict=True)], seed

    def report(keys: list[Any], counts: Tensor) -> None:
        assert callback is not None
        callback(keys, counts if joint else counts[:, 0])

    def results() -> Iterator[Result]:
        device = device_for(next(filter(None, map(device_of, models)), None))
        work = Stream(
            networks,
            attack.step(),
            attack.schedule(),
            slots,
            device,
            Runs(attack.restarts, attack.random_point),
            check=check,
            assign=assign,
            callback=None if callback is None else report,
        )
        with (
            held(models, device),
            contextlib.closing(Prefetcher(samples, slots, device)) as prefetcher,
        ):
            originals = Originals(rules, models)
            for outcome in work.run(prefetcher):
                originals.look(outcome)
                yield gather([outcome], attack.bounds, joint=joint, key=outcome.tag)
            originals.warn()

    return results()

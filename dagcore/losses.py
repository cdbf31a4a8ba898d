"""Dense losses by name, and the objectives of attacks, which count targets and seed gradients.

`PGD` and `APGD` take a `Loss`. It is also a function that can train networks:
`dagcore.losses.jensen_shannon(scores, labels)`. The formulas are in `dagcore.ops.loss_seed`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from . import checks, ops
from .engine.loop import Seed, State
from .errors import ArgumentError, ArgumentTypeError
from .labels import assign

UNTARGETED = "untargeted"
"""Stands for adversarial labels where a loss has none."""
REDUCTIONS = ("mean", "sum", "none")


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A dense loss, computed together with its gradient in one pass over the scores.

    Args:
        name: one of the names of `dagcore.ops.loss_seed`.
        blend: weight of the wrong targets in "blended-cross-entropy", from 0 to 1; 0.5 counts all
            alike.
        q: parameter of "tsallis", at most 1.
        kappa: parameter of "margin" and "dag", in the units of the scores, at least 0.
        class_weights: (C,) floating point; a target's loss is multiplied by the weight of its
            label.

    Raises:
        TypeError, ValueError: an unknown name, or a number out of its range.
    """

    name: str
    blend: float = 0.5
    q: float = 0.5
    kappa: float = 0.0
    class_weights: Tensor | None = None

    def __post_init__(self) -> None:
        checks.choice("name", self.name, checks.LOSSES)
        checks.blend_weight(self.blend)
        checks.loss_numbers(self.q, self.kappa)
        if self.class_weights is not None:
            checks.tensor("class_weights", self.class_weights, checks.FLOAT_DTYPES)
            if self.class_weights.dim() != 1:
                raise ArgumentError(
                    f"class_weights must have shape (C,), got {tuple(self.class_weights.shape)}"
                )

    def __call__(
        self,
        scores: Tensor,  # (N, C, *T)
        labels: Tensor,  # (N, *T)
        adversarial_labels: Tensor | str | None = None,  # (N, *T)
        *,
        ignore_index: int = 255,
        align_corners: bool = False,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the loss, which attacks maximise and which supports a backward pass to the scores.

        Args:
            scores: (N, C, *T) before softmax, or maps (N, C, h, w) of another size than the labels,
                which are interpolated bilinearly.
            labels: (N, *T) uint8, int32 or int64: class indices, or `ignore_index`.
            adversarial_labels: (N, *T) likewise, for a targeted loss; see `dagcore.ops.loss_seed`.
            ignore_index: the label of targets that never count.
            align_corners: as for `torch.nn.functional.interpolate`.
            reduction: "sum" over all targets, "none" for the sum of each image, or "mean", the sum
                divided by the number of targets whose label is not `ignore_index` (NaN if there are
                none). Class weights do not change the divisor, unlike torch's cross_entropy.

        Returns:
            float32, or float64 for float64 scores: a scalar, or (N,) for "none".

        Raises:
            TypeError, ValueError: as for `dagcore.ops.loss_seed`.
            RuntimeError: on a second derivative.
        """
        checks.choice("reduction", reduction, REDUCTIONS)
        checks.tensor("scores", scores, checks.FLOAT_DTYPES)
        checks.tensor("labels", labels, checks.LABEL_DTYPES)
        sums = cast(
            Tensor,
            _Fused.apply(scores, labels, adversarial_labels, self, ignore_index, align_corners),
        )
        if reduction == "none":
            return sums
        if reduction == "sum":
            return sums.sum()
        return sums.sum() / (labels.long() != ignore_index).sum()

    def seed(
        self,
        scores: Tensor,  # (N, C, *T), or maps (N, C, h, w) of another size than the labels
        labels: Tensor,  # (N, *T)
        adversarial_labels: Tensor | str | None,  # (N, *T)
        *,
        ignore_index: int,
        align_corners: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `dagcore.ops.loss_seed` returns: seed, sums of the losses, and hits."""
        settings: dict[str, Any] = {
            "loss": self.name,
            "blend": self.blend,
            "q": self.q,
            "kappa": self.kappa,
            "class_weights": self.class_weights,
            "ignore_index": ignore_index,
        }
        if scores.dim() != 4 or scores.shape[2:] == labels.shape[1:]:
            return ops.loss_seed(scores, labels, adversarial_labels, **settings)
        return ops.loss_seed_bilinear(
            scores, labels, adversarial_labels, **settings, align_corners=align_corners
        )


cross_entropy = Loss("cross-entropy")
masked_cross_entropy = Loss("masked-cross-entropy")
blended_cross_entropy = Loss("blended-cross-entropy")
cosine = Loss("cosine")
jensen_shannon = Loss("jensen-shannon")
tsallis = Loss("tsallis")
margin = Loss("margin")
dag = Loss("dag")
masked_spherical = Loss("masked-spherical")
dlr = Loss("dlr")

UserLoss = Callable[..., Tensor]
"""A user-defined loss in plain PyTorch, to be maximised: it maps scores (N, C, *T) and labels
(N, *T), and adversarial labels (N, *T) if they are given, to values (N,) or (N, *T)."""


class _Fused(torch.autograd.Function):
    """Sums of a loss (N,), whose gradient was computed with them."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        labels: Tensor,
        adversarial_labels: Tensor | str | None,
        loss: Loss,
        ignore_index: int,
        align_corners: bool,
    ) -> Tensor:
        seed, sums, _ = loss.seed(
            scores,
            labels,
            adversarial_labels,
            ignore_index=ignore_index,
            align_corners=align_corners,
        )
        ctx.save_for_backward(seed)
        return sums.to(torch.promote_types(scores.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (seed,) = ctx.saved_tensors
        # If a graph is asked for, build one, whose backward pass raises a clear error.
        seed = seed.detach().requires_grad_(torch.is_grad_enabled())
        scaled = _Once.apply(seed, gradients[0])
        return scaled, None, None, None, None, None


class _Once(torch.autograd.Function):
    """A seed times the gradient of each image's loss, without a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, gradient: Tensor) -> Tensor:
        return (seed * gradient.view(-1, *[1] * (seed.dim() - 1))).to(seed.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a loss of dagcore.losses can be differentiated only once: its gradient comes with it, "
            "without a graph"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class LossObjective:
    """A dense loss, summed over the targets, to be maximised.

    A target is active while its argmax is its label, or for a targeted loss until its argmax is its
    adversarial label.

    Args:
        loss: a `Loss` or a user-defined loss; see `named` for names.
        ignore_index: label of the targets that never count.
        blend_steps: number of updates in which the blend of "blended-cross-entropy" rises from 0 to
            1/2, as in SegPGD; None: the blend is constant.
        track: the loss to report instead of `loss`; None: `loss` itself.
    """

    loss: Loss | UserLoss
    ignore_index: int = 255
    blend_steps: int | None = None
    track: Loss | UserLoss | None = None
    tells_loss = True

    @property
    def default(self) -> str:
        """How adversarial labels are chosen by default."""
        return "permutation" if self.is_dag else UNTARGETED

    @property
    def is_dag(self) -> bool:
        """Whether the loss is "dag", which has adversarial labels but counts as if untargeted."""
        return isinstance(self.loss, Loss) and self.loss.name == "dag"

    def check_kind(self, wanted: str) -> None:
        """Raise unless adversarial labels can be chosen in this way."""
        kinds = ("permutation", "random", "runner-up" if self.is_dag else UNTARGETED)
        checks.choice("adversarial_labels", wanted, kinds)

    def assign(
        self,
        wanted: Tensor | str | None,  # (N, *T)
        labels: Tensor,  # (N, *T)
        num_classes: int,
        generator: torch.Generator | None,
    ) -> Tensor | str:
        """Return adversarial labels, given or drawn; "untargeted" if there are none."""
        weights = self.loss.class_weights if isinstance(self.loss, Loss) else None
        if weights is not None:
            checks.shape("class_weights", weights, (num_classes,), f"{num_classes} classes")
            checks.device("class_weights", weights, "images", labels)
        wanted = self.default if wanted is None else wanted
        if not isinstance(wanted, Tensor) and wanted == UNTARGETED:
            targeted = False
        else:
            targeted = True
            wanted = assign(
                wanted,
                labels,
                num_classes,
                self.ignore_index,
                generator,
                look=checks.at_hand(labels),
            )
        if isinstance(self.loss, Loss):
            checks.loss_classes(self.loss.name, num_classes, targeted=targeted)
        elif not checks.accepts(self.loss, 2 + targeted):
            takes = ", adversarial_labels) in a targeted attack" if targeted else ")"
            raise ArgumentTypeError(
                f"loss must take (scores, labels{takes}, got a function of "
                f"{inspect.signature(getattr(self.loss, 'forward', self.loss))}"
            )
        return wanted

    def count(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> Tensor:
        """Count the targets that are not ignored, (N,) int64."""
        counted = self._counted(num_classes, labels, adversarial)
        return counted.flatten(1).sum(1) if counted.dim() > 1 else counted.long()

    def begin(self, labels: Tensor) -> State:
        """Return no state."""
        return {}

    def _counted(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> Tensor:
        counted = labels.long() != self.ignore_index  # a uint8 would be compared modulo 256
        if isinstance(adversarial, Tensor) and not 0 <= self.ignore_index < num_classes:
            counted = counted & (adversarial.long() != self.ignore_index)
        return counted

    def seed(
        self,
        scores: Tensor,  # (N, C, *T), or maps (N, C, h, w) below the labels' size
        labels: Tensor,  # (N, *T)
        adversarial: Tensor | str,  # (N, *T)
        *,
        align_corners: bool,
        state: State,
    ) -> Seed:
        """Return the gradient of the loss at the scores, the active targets, and the loss."""
        scores = scores.detach()
        if self.track is not None:
            settings: Any = {"align_corners": align_corners, "state": state}
            other = dataclasses.replace(self, loss=self.track, track=None)
            told = other.seed(scores, labels, adversarial, **settings).loss
            own = dataclasses.replace(self, track=None)
            return own.seed(scores, labels, adversarial, **settings)._replace(loss=told)
        given = adversarial if isinstance(adversarial, Tensor) else None
        if not isinstance(self.loss, Loss):
            return self._users(scores, labels, given, align_corners)
        loss, real = self.loss, torch.promote_types(scores.dtype, torch.float32)
        weights = loss.class_weights
        blend = None
        if loss.name == "blended-cross-entropy":
            blend = scores.new_full((len(scores),), loss.blend, dtype=torch.float64)
            if self.blend_steps is not None and "updates" in state:
                blend.copy_(state["updates"]).div_(2 * self.blend_steps)
        rule = (
            given,
            loss.name,
            blend,
            float(loss.q),
            float(loss.kappa),
            None if weights is None else weights.detach().to(real).contiguous(),
            self.ignore_index,
        )
        # Bypass the checks of the wrappers: arguments were checked on arrival.
        if scores.shape[2:] == labels.shape[1:]:
            seed, sums, active = torch.ops.dagcore.loss_seed(scores, labels, *rule)
        else:
            seed, sums, active = torch.ops.dagcore.loss_seed_bilinear(
                scores, labels, *rule, align_corners
            )
        if given is not None and not self.is_dag:
            if scores.shape[2:] == labels.shape[1:]:
                winner = scores.argmax(1)
            else:
                height, width = labels.shape[1:]
                winner = torch.ops.dagcore.argmax_bilinear(scores, height, width, align_corners)
            away = self.active(scores.shape[1], labels, given, winner)
            away = torch.where(sums.isnan(), away.clamp(min=1), away)  # a NaN is not a success
            active = torch.where(active < 0, active, away)  # below 0: a label out of range
        return Seed(seed, active, sums)

    def active(
        self,
        num_classes: int,
        labels: Tensor,  # (N, *T)
        adversarial: Tensor | str | None,  # (N, *T)
        winner: Tensor,  # (N, *T)
    ) -> Tensor:
        """Count the active targets, (N,) int32, given the winning classes."""
        if isinstance(adversarial, Tensor) and not self.is_dag:
            active = self._counted(num_classes, labels, adversarial)
            active = active & (winner != adversarial.long())
        else:
            active = self._counted(num_classes, labels, UNTARGETED) & (winner == labels.long())
        return active.reshape(len(active), active.shape[1:].numel()).sum(1, dtype=torch.int32)

    def _users(
        self, scores: Tensor, labels: Tensor, aims: Tensor | None, align_corners: bool
    ) -> Seed:
        """Return the gradient of a user-defined loss, by autograd."""
        with torch.enable_grad():
            leaf = scores.requires_grad_()
            high = leaf
            if scores.shape[2:] != labels.shape[1:]:
                high = functional.interpolate(
                    leaf.to(torch.promote_types(leaf.dtype, torch.float32)),
                    labels.shape[1:],
                    mode="bilinear",
                    align_corners=align_corners,
                )
            losses = self.loss(high, labels, *(() if aims is None else (aims,)))
            checks.tensor("the value of loss", losses, checks.FLOAT_DTYPES)
            if losses.shape not in (labels.shape[:1], labels.shape):
                raise ArgumentError(
                    "loss must return one value for each image or target, of shape "
                    f"{tuple(labels.shape[:1])} or {tuple(labels.shape)}, "
                    f"got {tuple(losses.shape)}"
                    + " (torch.nn losses need reduction='none')"
                    * (losses.dim() == 0)
                )
            sums = losses.reshape(len(losses), losses.shape[1:].numel()).sum(1, dtype=torch.float64)
            seed = None
            if sums.requires_grad:
                (seed,) = torch.autograd.grad(sums.sum(), leaf, allow_unused=True)
            if seed is None:
                raise ArgumentError(
                    "loss must be differentiable in the scores, but its values have no gradient "
                    "(was detach or argmax used?)"
                )
        best, winner = high.detach().max(1)
        active = self.active(scores.shape[1], labels, aims, winner)
        broken = best.isnan().reshape(len(best), best.shape[1:].numel()).any(1)
        active = torch.where(broken, active.clamp(min=1), active)  # a NaN is not a success
        return Seed(seed, active, sums.detach())

    def refuse(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> None:
        """Raise an error that names the label that is out of range."""
        given = adversarial if isinstance(adversarial, Tensor) else None
        checks.target_labels(num_classes, labels, given, self.ignore_index)


def named(loss: str | Loss | UserLoss, name: str = "loss") -> Loss | UserLoss:
    """Return the loss of this name, or a loss unchanged.

    Raises:
        TypeError, ValueError: not a loss.
    """
    if isinstance(loss, str):
        checks.choice(name, loss, checks.LOSSES)
        return Loss(loss)
    if not callable(loss):
        raise ArgumentTypeError(
            f"{name} must be a name, a dagcore.losses.Loss or a function of (scores, labels), "
            f"got {type(loss).__name__}"
        )
    return loss


@dataclasses.dataclass(frozen=True)
class DAGObjective:
    """The objective of Dense Adversary Generation: f_l' - f_l, summed over the active targets.

    Args:
        goal: "leave": a target is active while its label wins; "reach": until its adversarial label
            wins.
        ignore_index: label of the targets that never count.
        margin: lead by which a target must be won to be no longer active, in the units of the
            scores.
    """

    goal: str = "leave"
    ignore_index: int = 255
    margin: float = 0.0
    tells_loss = False
    default = "permutation"

    def assign(
        self,
        wanted: Tensor | str | None,  # (N, *T)
        labels: Tensor,  # (N, *T)
        num_classes: int,
        generator: torch.Generator | None,
    ) -> Tensor | str:
        """Return adversarial labels, given or drawn; see `dagcore.labels.assign`.

        Labels out of range are looked for only if that does not wait for a device; `seed` reports
        them too.
        """
        return assign(
            self.default if wanted is None else wanted,
            labels,
            num_classes,
            self.ignore_index,
            generator,
            look=checks.at_hand(labels),
        )

    def count(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> Tensor:
        """Count the targets that count, (N,) int64.

        They are not ignored and, for "leave", their adversarial label is not their label.
        """
        labels, ignored = labels.long(), self.ignore_index  # a uint8 would be compared modulo 256
        counted = labels != ignored
        if not isinstance(adversarial, Tensor):
            counted = counted & (num_classes > 1)
        else:
            adversarial = adversarial.long()
            if not 0 <= ignored < num_classes:
                counted = counted & (adversarial != ignored)
            if self.goal == "leave":
                counted = counted & (adversarial != labels)
        return counted.flatten(1).sum(1) if counted.dim() > 1 else counted.long()

    def begin(self, labels: Tensor) -> State:
        """Return no state."""
        return {}

    def seed(
        self,
        scores: Tensor,  # (N, C, *T), or maps (N, C, h, w) below the labels' size
        labels: Tensor,  # (N, *T)
        adversarial: Tensor | str,  # (N, *T)
        *,
        align_corners: bool,
        state: State | None = None,
    ) -> Seed:
        """Return the seed, +1 at adversarial labels and -1 at labels, and the active targets.

        A negative number of active targets reports a label out of range.
        """
        given = adversarial if isinstance(adversarial, Tensor) else None
        rule = self.goal, self.ignore_index, float(self.margin)
        scores = scores.detach()
        # Bypass the checks of the wrappers: arguments were checked on arrival.
        if scores.shape[2:] == labels.shape[1:]:
            seed, active = torch.ops.dagcore.dag_seed(scores, labels, given, *rule)
        else:
            seed, active = torch.ops.dagcore.dag_seed_bilinear(
                scores, labels, given, *rule, align_corners
            )
        return Seed(seed, active)

    def refuse(self, num_classes: int, labels: Tensor, adversarial: Tensor | str) -> None:
        """Raise an error that names the label that is out of range."""
        given = adversarial if isinstance(adversarial, Tensor) else None
        checks.target_labels(num_classes, labels, given, self.ignore_index)

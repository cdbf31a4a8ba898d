"""The fused ops: schemas, public wrappers and what torch needs to know about them.

The native module registers CPU and CUDA kernels. `fallback` has the default kernel of every op, so
that everything also runs without a native kernel, after a single warning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import checks
from . import fallback
from .fallback import step_scale

__all__ = [
    "argmax_bilinear",
    "dag_seed",
    "dag_seed_bilinear",
    "linf_prox_",
    "linf_step_",
    "loss_seed",
    "loss_seed_bilinear",
    "pgd_step_",
    "step_scale",
]

OPS = (
    "argmax_bilinear",
    "dag_seed",
    "dag_seed_bilinear",
    "linf_prox_",
    "linf_step_",
    "loss_seed",
    "loss_seed_bilinear",
    "pgd_step_",
    "settle_",
)

_library: Any = torch.library.Library("dagcore", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "dag_seed(Tensor scores, Tensor labels, Tensor? adversarial_labels, str objective, "
    "int ignore_index, float margin) -> (Tensor seed, Tensor active)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "dag_seed_bilinear(Tensor scores, Tensor labels, Tensor? adversarial_labels, str objective, "
    "int ignore_index, float margin, bool align_corners) -> (Tensor seed, Tensor active)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "loss_seed(Tensor scores, Tensor labels, Tensor? adversarial_labels, str loss, Tensor? blend, "
    "float q, float kappa, Tensor? class_weights, int ignore_index) "
    "-> (Tensor seed, Tensor loss, Tensor hits)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "loss_seed_bilinear(Tensor scores, Tensor labels, Tensor? adversarial_labels, str loss, "
    "Tensor? blend, float q, float kappa, Tensor? class_weights, int ignore_index, "
    "bool align_corners) -> (Tensor seed, Tensor loss, Tensor hits)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "argmax_bilinear(Tensor scores, SymInt height, SymInt width, bool align_corners) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linf_step_(Tensor(a!) images, Tensor origin, Tensor gradient, Tensor active, float gamma, "
    "float lower, float upper, float epsilon, Tensor(b!)? grid, int levels) "
    "-> (Tensor norms, Tensor moved)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "pgd_step_(Tensor(a!) images, Tensor origin, Tensor gradient, Tensor active, str norm, "
    "Tensor alpha, Tensor epsilon, float lower, float upper, Tensor(b!)? momentum, float decay, "
    "Tensor(c!)? previous, Tensor? share, Tensor(d!)? grid, int levels) -> Tensor moved",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linf_prox_(Tensor(a!) images, Tensor origin, Tensor gradient, Tensor metric, Tensor active, "
    "Tensor alpha, Tensor epsilon, float weight, float lower, float upper) -> Tensor moved",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "settle_(Tensor(a!) running, Tensor(b!) may_move, Tensor(c!) updates, Tensor(d!) stuck, "
    "Tensor(e!) status, Tensor(f!) history, Tensor active, Tensor wanted, Tensor moved, "
    "Tensor? done, int max_iter, int patience) -> Tensor counts",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


_fakes: dict[str, Callable[..., Any]] = {}  # return the shapes and dtypes of an op's results


def _fake(op: str) -> Callable[[_Kernel], _Kernel]:
    """Register a fake kernel, which returns the shapes and dtypes of an op, for torch.compile."""

    def register(kernel: _Kernel) -> _Kernel:
        _fakes[op] = kernel
        registered: _Kernel = torch.library.register_fake(f"dagcore::{op}", kernel, lib=_library)
        return registered

    return register


for _op in OPS:
    _library.impl(_op, fallback.warned(getattr(fallback, _op)), "CompositeExplicitAutograd")


def _check_one_device(*tensors: Tensor) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise RuntimeError(f"tensors must be on one device, got {' and '.join(sorted(devices))}")


def _is_negative(active: Tensor) -> bool:  # (N,)
    """Return whether a count reports a label out of range; not on a GPU, which would stall."""
    if torch.compiler.is_compiling() or active.device.type != "cpu":
        return False
    return any(count < 0 for count in active.tolist())  # three times as fast as a tensor op


@_fake("dag_seed")
def _seed_fake(
    scores: Tensor,
    labels: Tensor,
    adversarial: Tensor | None,
    objective: str,
    ignore_index: int,
    margin: float,
) -> tuple[Tensor, Tensor]:
    _check_one_device(scores, labels, *(() if adversarial is None else (adversarial,)))
    return torch.empty_like(scores), scores.new_empty(scores.shape[:1], dtype=torch.int32)


@_fake("dag_seed_bilinear")
def _seed_bilinear_fake(
    scores: Tensor,
    labels: Tensor,
    adversarial: Tensor | None,
    objective: str,
    ignore_index: int,
    margin: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    return _seed_fake(scores, labels, adversarial, objective, ignore_index, margin)


@_fake("loss_seed")
def _loss_fake(
    scores: Tensor,
    labels: Tensor,
    adversarial: Tensor | None,
    loss: str,
    blend: Tensor | None,
    q: float,
    kappa: float,
    class_weights: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (scores, labels, adversarial, blend, class_weights)
    _check_one_device(*(t for t in given if t is not None))
    sums = scores.new_empty(scores.shape[:1], dtype=torch.float64)
    return torch.empty_like(scores), sums, torch.empty_like(sums, dtype=torch.int32)


@_fake("loss_seed_bilinear")
def _loss_bilinear_fake(
    scores: Tensor,
    labels: Tensor,
    adversarial: Tensor | None,
    loss: str,
    blend: Tensor | None,
    q: float,
    kappa: float,
    class_weights: Tensor | None,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _loss_fake(
        scores, labels, adversarial, loss, blend, q, kappa, class_weights, ignore_index
    )


@_fake("argmax_bilinear")
def _argmax_fake(scores: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return scores.new_empty((scores.shape[0], height, width), dtype=torch.int64)


@_fake("linf_step_")
def _step_fake(
    images: Tensor,
    origin: Tensor,
    gradient: Tensor,
    active: Tensor,
    gamma: float,
    lower: float,
    upper: float,
    epsilon: float,
    grid: Tensor | None,
    levels: int,
) -> tuple[Tensor, Tensor]:
    _check_one_device(images, origin, gradient, active, *(() if grid is None else (grid,)))
    norms = images.new_empty(images.shape[:1], dtype=fallback.real(images))
    return norms, torch.empty_like(norms, dtype=torch.bool)


@_fake("pgd_step_")
def _pgd_fake(
    images: Tensor,
    origin: Tensor,
    gradient: Tensor,
    active: Tensor,
    norm: str,
    alpha: Tensor,
    epsilon: Tensor,
    lower: float,
    upper: float,
    momentum: Tensor | None,
    decay: float,
    previous: Tensor | None,
    share: Tensor | None,
    grid: Tensor | None,
    levels: int,
) -> Tensor:
    given = (t for t in (momentum, previous, share, grid) if t is not None)
    _check_one_device(images, origin, gradient, active, alpha, epsilon, *given)
    return images.new_empty(images.shape[:1], dtype=torch.bool)


@_fake("linf_prox_")
def _prox_fake(
    images: Tensor,
    origin: Tensor,
    gradient: Tensor,
    metric: Tensor,
    active: Tensor,
    alpha: Tensor,
    epsilon: Tensor,
    weight: float,
    lower: float,
    upper: float,
) -> Tensor:
    _check_one_device(images, origin, gradient, metric, active, alpha, epsilon)
    return torch.empty_like(active, dtype=torch.bool)


@_fake("settle_")
def _settle_fake(
    running: Tensor,
    may_move: Tensor,
    updates: Tensor,
    stuck: Tensor,
    status: Tensor,
    history: Tensor,
    active: Tensor,
    wanted: Tensor,
    moved: Tensor,
    done: Tensor | None,
    max_iter: int,
    patience: int,
) -> Tensor:
    return torch.empty_like(active)


def dag_seed(
    scores: Tensor,  # (N, C, *T)
    labels: Tensor,  # (N, *T)
    adversarial_labels: Tensor | str,  # (N, *T)
    *,
    goal: str = "leave",
    ignore_index: int = 255,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the seed of the backward pass and the active targets: lines 3 and 4 of Algorithm 1.

    With the goal "leave", a target is active while its argmax over the classes is its label; with
    "reach", until its argmax is its adversarial label. Ties go to the lowest class. The seed is the
    gradient of f_l'(t) - f_l(t), summed over the active targets t, with respect to the scores: +1
    at the adversarial label of each active target, -1 at its label ("leave") or at its argmax
    ("reach"), and 0 elsewhere.

    With a margin kappa above 0, a target that is won stays active while it is won by less than
    kappa: with "leave" while its label is less than kappa behind the winner; with "reach" while the
    strongest other class, which then gets the -1, is less than kappa behind the adversarial label.
    Differences are computed in float32 (float64 for float64 scores).

    Targets labelled `ignore_index` never count; with "leave", neither do those whose adversarial
    label is their label. A target with a NaN among its scores is active whatever its argmax, so
    that a broken network is never taken for a successful attack.

    Args:
        scores: (N, C, *T), any number of target dimensions and any strides; float16, bfloat16,
            float32 or float64, before softmax.
        labels: (N, *T) uint8, int32 or int64: class indices, or `ignore_index`.
        adversarial_labels: (N, *T) likewise, or "runner-up" for the strongest other class (goal
            "leave" only). Not read where `labels` is `ignore_index`. An adversarial label of
            `ignore_index` that is not a class excludes the target too.
        goal: "leave" or "reach".
        ignore_index: the label of targets that never count.
        margin: kappa, in the units of the scores, at least 0.

    Returns:
        seed, with the dtype, shape and layout of `scores`; active, (N,) int32.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or choice, or a label out of range. On CUDA and inside
            torch.compile, labels are not read, as that would synchronise. An image with a label out
            of range then returns a negative number of active targets, and the bad target is left
            out of the seed.
    """
    adversarial = checks.seed_arguments(
        scores, labels, adversarial_labels, goal, ignore_index, margin
    )
    seed, active = torch.ops.dagcore.dag_seed(
        scores.detach(), labels, adversarial, goal, ignore_index, float(margin)
    )
    if _is_negative(active):
        checks.target_labels(scores.shape[1], labels, adversarial, ignore_index)  # names the label
    return seed, active


def dag_seed_bilinear(
    scores: Tensor,  # (N, C, h, w)
    labels: Tensor,  # (N, H, W)
    adversarial_labels: Tensor | str,  # (N, H, W)
    *,
    goal: str = "leave",
    ignore_index: int = 255,
    margin: float = 0.0,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return `dag_seed` of bilinearly enlarged scores, without enlarging them in memory.

    Targets are the pixels of the labels. Their scores are those of
    `torch.nn.functional.interpolate(scores, (H, W), mode="bilinear")`; the seed is the gradient
    with respect to the low-resolution scores. Scores are interpolated in float32 (float64 for
    float64 scores), so where two classes are closer than rounding, the winner may differ from
    interpolate's.

    Args:
        scores: (N, C, h, w) float16, bfloat16, float32 or float64, any strides.
        labels: (N, H, W) uint8, int32 or int64, at any size.
        adversarial_labels: (N, H, W) likewise, or "runner-up"; see `dag_seed`.
        goal: "leave" or "reach".
        ignore_index: the label of targets that never count.
        margin: kappa, in the units of the scores, at least 0.
        align_corners: as for `interpolate`.

    Returns:
        seed, with the dtype, shape and layout of `scores`; active, (N,) int32.

    Raises:
        TypeError, ValueError: as for `dag_seed`.
    """
    adversarial = checks.seed_arguments(
        scores, labels, adversarial_labels, goal, ignore_index, margin, bilinear=True
    )
    checks.boolean("align_corners", align_corners)
    seed, active = torch.ops.dagcore.dag_seed_bilinear(
        scores.detach(), labels, adversarial, goal, ignore_index, float(margin), align_corners
    )
    if _is_negative(active):
        checks.target_labels(scores.shape[1], labels, adversarial, ignore_index)  # names the label
    return seed, active


def loss_seed(
    scores: Tensor,  # (N, C, *T)
    labels: Tensor,  # (N, *T)
    adversarial_labels: Tensor | str | None = None,  # (N, *T)
    *,
    loss: str,
    blend: float | Tensor = 0.0,  # (N,)
    q: float = 0.5,
    kappa: float = 0.0,
    class_weights: Tensor | None = None,  # (C,)
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a loss's gradient at the scores, its sum over the targets, and the number of hits.

    z are the scores of a target, y its label, p = softmax z, e_y one-hot, c = 1 if the argmax is y,
    else 0. Attacks maximise

    ======================= =============================================================
    "cross-entropy"         -ln p_y
    "masked-cross-entropy"  c (-ln p_y)
    "blended-cross-entropy" w (-ln p_y), w = (1 - blend) c + blend (1 - c), as in SegPGD
    "cosine"                w (-ln p_y), w = p_y / |p| held constant, as in CosPGD
    "jensen-shannon"        ln 2 + (p_y ln p_y - (1 + p_y) ln(1 + p_y)) / 2
    "tsallis"               (1 - p_y^(1 - q)) / (1 - q), for q = 1 -ln p_y
    "margin"                -max(z_y - max_{k != y} z_k, -kappa)
    "dag"                   z_l' - z_y while z_y - max_{k != y} z_k > -kappa, as `dag_seed`
    "masked-spherical"      -c z_y / |z|
    "dlr"                   -(z_y - max_{k != y} z_k) / (z_(1) - z_(3) + 1e-12)
    ======================= =============================================================

    where z_(1) is the largest score and |.| the Euclidean norm. Ties go to the lowest class. With
    kappa 0, "margin" and "dag" count a target while its argmax is its label.

    With adversarial labels l' a loss is targeted: it is the negative of the loss of l', in which a
    target counts until l' is reached. So, with c and w those of l',

    - "masked-cross-entropy" has 1 - c instead of c,
    - "blended-cross-entropy" swaps its two weights,
    - "cosine" has 1 - w instead of w,
    - "margin" is -max(max_{k != l'} z_k - z_l', -kappa),
    - "masked-spherical" is (1 - c) z_l' / |z|,
    - "dlr" is -(z_y - z_l') / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12),
    - "dag" always has adversarial labels.

    Losses are computed in float32 (float64 for float64 scores). A class at -inf has probability 0.
    A target whose scores have no finite maximum (a NaN, +inf, or only -inf) makes the loss of its
    image NaN and adds 0 to the seed. A target with a NaN is a hit whatever its argmax, so that a
    broken network is never taken for a successful attack. If |z| of "masked-spherical" is 0 or
    infinite, or a difference of "dlr" is infinite, seed and loss are 0. Seeds that overflow the
    dtype become its largest finite number.

    Args:
        scores: (N, C, *T), any number of target dimensions and any strides; float16, bfloat16,
            float32 or float64, before softmax.
        labels: (N, *T) uint8, int32 or int64: class indices, or `ignore_index`.
        adversarial_labels: (N, *T) likewise for a targeted loss; "runner-up", the strongest other
            class, is for "dag" only. Not read where `labels` is `ignore_index`. An adversarial
            label of `ignore_index` that is not a class excludes the target too.
        loss: a name from the table.
        blend: weight of "blended-cross-entropy", from 0 (the default) to 1; SegPGD's lambda. A
            number, or (N,) float64 for images at different updates; the values of a tensor are
            checked only on the CPU.
        q: parameter of "tsallis", at most 1.
        kappa: parameter of "margin" and "dag", in the units of the scores, at least 0; may be
            infinite.
        class_weights: (C,) of any floating dtype; a target's loss is multiplied by the weight of
            its label.
        ignore_index: the label of targets that never count.

    Returns:
        seed, the gradient of the sum of the losses, with the dtype, shape and layout of `scores`;
        loss, (N,) float64, its sums, added in an order that does not depend on the number of
        threads; hits, (N,) int32, the number of targets that count and whose argmax is their label.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device, choice or number, or a label out of range. On CUDA and
            inside torch.compile, an image with a label out of range returns negative hits, and the
            bad target is left out of seed and loss, as in `dag_seed`.
    """
    adversarial = checks.loss_arguments(
        scores, labels, adversarial_labels, loss, blend, q, kappa, class_weights, ignore_index
    )
    blends, weights = _loss_vectors(scores, loss, blend, class_weights)
    seed, sums, hits = torch.ops.dagcore.loss_seed(
        scores.detach(),
        labels,
        adversarial,
        loss,
        blends,
        float(q),
        float(kappa),
        weights,
        ignore_index,
    )
    if _is_negative(hits):
        checks.target_labels(scores.shape[1], labels, adversarial, ignore_index)  # names the label
    return seed, sums, hits


def loss_seed_bilinear(
    scores: Tensor,  # (N, C, h, w)
    labels: Tensor,  # (N, H, W)
    adversarial_labels: Tensor | str | None = None,  # (N, H, W)
    *,
    loss: str,
    blend: float | Tensor = 0.0,  # (N,)
    q: float = 0.5,
    kappa: float = 0.0,
    class_weights: Tensor | None = None,  # (C,)
    ignore_index: int = 255,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `loss_seed` of bilinearly enlarged scores, without enlarging them in memory.

    Targets are the pixels of the labels. Their scores are those of
    `torch.nn.functional.interpolate(scores, (H, W), mode="bilinear")`; the seed is the gradient
    with respect to the low-resolution scores. Scores are interpolated as in `dag_seed_bilinear` and
    `argmax_bilinear`, to the same bits. The gradients of the pixels are summed in an order that
    does not depend on the number of threads. Nothing is allocated at the enlarged size: the CPU
    needs at most twice the memory of the scores, CUDA eight bytes per score. If the labels have the
    size of the scores, this is `loss_seed`.

    Args:
        scores: (N, C, h, w) float16, bfloat16, float32 or float64, any strides.
        labels: (N, H, W) uint8, int32 or int64, at any size.
        adversarial_labels: (N, H, W) likewise; see `loss_seed`.
        loss, blend, q, kappa, class_weights, ignore_index: as for `loss_seed`.
        align_corners: as for `interpolate`.

    Returns:
        seed, with the dtype, shape and layout of `scores`; loss, (N,) float64; hits, (N,) int32.

    Raises:
        TypeError, ValueError: as for `loss_seed`.
    """
    adversarial = checks.loss_arguments(
        scores,
        labels,
        adversarial_labels,
        loss,
        blend,
        q,
        kappa,
        class_weights,
        ignore_index,
        bilinear=True,
    )
    checks.boolean("align_corners", align_corners)
    if labels.shape[1:] == scores.shape[2:]:
        return loss_seed(
            scores,
            labels,
            adversarial_labels,
            loss=loss,
            blend=blend,
            q=q,
            kappa=kappa,
            class_weights=class_weights,
            ignore_index=ignore_index,
        )
    blends, weights = _loss_vectors(scores, loss, blend, class_weights)
    seed, sums, hits = torch.ops.dagcore.loss_seed_bilinear(
        scores.detach(),
        labels,
        adversarial,
        loss,
        blends,
        float(q),
        float(kappa),
        weights,
        ignore_index,
        align_corners,
    )
    if _is_negative(hits):
        checks.target_labels(scores.shape[1], labels, adversarial, ignore_index)  # names the label
    return seed, sums, hits


def _loss_vectors(
    scores: Tensor, loss: str, blend: float | Tensor, class_weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return blend (N,) and class weights (C,) in the form that the loss ops take."""
    if class_weights is not None:
        class_weights = class_weights.detach().to(fallback.real(scores)).contiguous()
    if loss != "blended-cross-entropy":
        return None, class_weights
    if not isinstance(blend, Tensor):
        return scores.new_full(scores.shape[:1], blend, dtype=torch.float64), class_weights
    return blend.detach().contiguous(), class_weights


def argmax_bilinear(
    scores: Tensor,  # (N, C, h, w)
    size: tuple[int, int],
    *,
    align_corners: bool = False,
) -> Tensor:
    """Return the predicted labels at a larger size, without enlarging the scores in memory.

    Args:
        scores: (N, C, h, w) float16, bfloat16, float32 or float64, any strides.
        size: (H, W).
        align_corners: as for `torch.nn.functional.interpolate`.

    Returns:
        (N, H, W) int64: the class with the largest score at each pixel, the lowest of equals.

    Raises:
        TypeError, ValueError: a wrong type, shape or size.
    """
    checks.score_maps(scores)
    height, width = checks.map_size(size)
    checks.boolean("align_corners", align_corners)
    labels: Tensor = torch.ops.dagcore.argmax_bilinear(
        scores.detach(), height, width, align_corners
    )
    return labels


def linf_step_(
    images: Tensor,  # (N, *)
    origin: Tensor,  # (N, *)
    gradient: Tensor,  # (N, *)
    active: Tensor,  # (N,)
    *,
    gamma: float,
    lower: float | None,
    upper: float | None,
    epsilon: float | None,
    grid: Tensor | None = None,  # (N, *)
    levels: int | None = None,
) -> Tensor:
    """Take one step in place: X <- clip(X + gamma / ||r||_inf * r), lines 5 to 7 of Algorithm 1.

    The norm is taken per image. The result is clipped to [origin - epsilon, origin + epsilon], then
    to [lower, upper]. Images with `active` <= 0 are not touched, nor are images whose norm is 0 or
    not finite (or so small that gamma / norm overflows). 16-bit images are stepped in float32 and
    rounded once.

    With `levels`, `images` is the shadow copy in which steps accumulate, and `grid` receives its
    image on the levels: each pixel at the nearest of `levels` values evenly spaced from `lower` to
    `upper`, among those within `epsilon`, rounded inward, of the level of the origin.

    Args:
        images: (N, *) float16, bfloat16, float32 or float64, any strides; written in place.
        origin: like `images`: the clean images.
        gradient: like `images`: r, the gradient summed over the active targets.
        active: (N,) int32, number of active targets of each image.
        gamma: step length, in the units of `images`.
        lower, upper: the valid range, None for no bound.
        epsilon: radius of the ball around `origin`, None for no ball.
        grid: like `images`; written in place if an image is stepped. With `levels` only.
        levels: number of levels, 256 for 8-bit images; None for no grid.

    Returns:
        norms: (N,) ||gradient||_inf of each image in float32 (float64 for float64 images), NaN if
        the gradient has a NaN; 0 for images that are not active.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
    """
    low, high, ball = checks.step_arguments(
        images, origin, gradient, active, gamma, lower, upper, epsilon, grid, levels
    )
    norms: Tensor
    norms, _ = torch.ops.dagcore.linf_step_(
        images.detach(),
        origin.detach(),
        gradient.detach(),
        active,
        float(gamma),
        low,
        high,
        ball,
        None if grid is None else grid.detach(),
        levels or 0,
    )
    _mark_written(images, grid)
    return norms


def pgd_step_(
    images: Tensor,  # (N, *)
    origin: Tensor,  # (N, *)
    gradient: Tensor,  # (N, *)
    active: Tensor,  # (N,)
    *,
    norm: str,
    alpha: float | Tensor,  # (N,)
    epsilon: float | Tensor | None,  # (N,)
    lower: float | None,
    upper: float | None,
    momentum: Tensor | None = None,  # (N, *)
    decay: float = 0.0,
    previous: Tensor | None = None,  # (N, *)
    share: float | Tensor | None = None,  # (N,)
    grid: Tensor | None = None,  # (N, *)
    levels: int | None = None,
) -> Tensor:
    """Take one step of PGD, momentum PGD or APGD in place, each image of a batch on its own.

    The direction d is the gradient g or, with momentum m, the new m <- decay m + g / ||g||_1
    (MI-FGSM; Dong et al., CVPR 2018). The image x then moves to

    - v = x + alpha sign(d) for the norm "linf", v = x + alpha d / ||d||_2 for "l2";
    - z = P(v), where P projects onto the ball of radius epsilon around the origin o, then clips to
      [lower, upper]. In L2, o + r with ||r||_2 > epsilon becomes o + r epsilon / ||r||_2;
    - with `previous`, P(x + share (z - x) + (1 - share) (x - previous)) instead of z, and previous
      <- x (APGD; Croce and Hein, ICML 2020: share is 0.75, and 1 in the first step).

    An image is not stepped if `active` <= 0, if its gradient has a NaN or an infinity, if its
    direction is zero everywhere, or if the norm that a direction is divided by has no finite
    inverse. None of its tensors is then written to. 16-bit images are stepped in float32 and
    rounded once. Norms are summed in float64, in an order that does not depend on the number of
    threads.

    With `levels`, `images` is the shadow copy in which steps accumulate, and `grid` receives its
    image on the levels, evenly spaced from `lower` to `upper` and within `epsilon` of the level of
    the origin. In L-infinity, each pixel takes the nearest level within `epsilon`. In L2 it takes
    one of the two levels around it, the nearer one unless the image would then leave the ball. See
    `dagcore.levels.shown`.

    Args:
        images: (N, *) float16, bfloat16, float32 or float64, any strides; written in place.
        origin: like `images`: the clean images.
        gradient: like `images`: the gradient of the loss to maximise.
        active: (N,) int32, above 0 for the images to step.
        norm: "linf" or "l2".
        alpha: step length above 0, in the units of `images`: a number, or (N,) float64 for one
            length per image.
        epsilon: radius of the ball around `origin`, likewise; None or infinity for no ball.
        lower, upper: the valid range, None for no bound.
        momentum: like `images`, but float32 for 16-bit images; written in place, zero at first.
            None for no momentum.
        decay: factor of the old momentum, at least 0.
        previous: like `images`: the images one step ago; written in place. At first the images
            themselves.
        share: weight of the new step, from 0 to 1, a number or (N,) float64; with `previous` only.
        grid: like `images`; written in place if an image is stepped. With `levels` only.
        levels: number of levels, 256 for 8-bit images; None for no grid.

    Returns:
        moved: (N,) bool, which images were stepped.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value. On CUDA and inside torch.compile the values of
            alpha, epsilon and share are not read; an image with a wrong value is then not stepped.
    """
    lengths, balls, parts, low, high = checks.pgd_arguments(
        images,
        origin,
        gradient,
        active,
        norm,
        alpha,
        epsilon,
        lower,
        upper,
        momentum,
        decay,
        previous,
        share,
        grid,
        levels,
    )
    moved: Tensor = torch.ops.dagcore.pgd_step_(
        images.detach(),
        origin.detach(),
        gradient.detach(),
        active,
        norm,
        lengths,
        balls,
        low,
        high,
        None if momentum is None else momentum.detach(),
        float(decay),
        None if previous is None else previous.detach(),
        parts,
        None if grid is None else grid.detach(),
        levels or 0,
    )
    _mark_written(images, momentum, previous, grid)
    return moved


def _mark_written(*tensors: Tensor | None) -> None:
    """Tell autograd about writes that bypassed it."""
    for written in tensors:
        if written is not None and not (torch.compiler.is_compiling() or written.is_inference()):
            torch.autograd.graph.increment_version(written)


def linf_prox_(
    images: Tensor,  # (N, *)
    origin: Tensor,  # (N, *)
    gradient: Tensor,  # (N, *)
    metric: Tensor,  # (N, *)
    active: Tensor,  # (N,)
    *,
    alpha: float | Tensor,  # (N,)
    epsilon: float | Tensor | None = None,  # (N,)
    weight: float = 1.0,
    lower: float | None,
    upper: float | None,
) -> Tensor:
    """Take one proximal step in place: X <- X_0 + p, with a smaller norm of the perturbation p.

    With d = X - X_0 + alpha g / H, p minimises alpha weight ||p||_inf + sum_i H_i (p_i - d_i)^2 / 2
    subject to lower <= X_0 + p <= upper and ||p||_inf <= epsilon. It is d clipped to the bounds,
    then to [-t, t] and [-epsilon, epsilon], for a t >= 0 with

        sum H_i (|d_i| - t) over the i whose |d_i| within the bounds is above t  =  alpha weight,

    or at which that sum falls past alpha weight; t is 0 if the sum never reaches it. t is accurate
    to 2^-24 (float64: 2^-48) of the largest |d_i|, with sums in float64. 16-bit images are stepped
    in float32 and rounded once.

    Images with `active` <= 0 are not touched, nor are images whose d is 0 or not finite.

    Args:
        images: (N, *) float16, bfloat16, float32 or float64, any strides, within the bounds;
            written in place.
        origin: like `images`: the clean images, within the bounds.
        gradient: like `images`: g, along which the images move.
        metric: (N, *) float32, or float64 for float64 images: H, above 0.
        active: (N,) int32, number of active targets of each image.
        alpha: step length above 0: a number, or (N,) float64 for one length per image.
        epsilon: radius of the ball around `origin`, likewise; None or infinity for no ball.
        weight: factor of the norm, at least 0.
        lower, upper: the valid range, None for no bound.

    Returns:
        (N,) bool, which images took the step.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value. On CUDA and inside torch.compile the values of
            alpha and epsilon are not read; an image with a wrong value is then not stepped.
    """
    lengths, balls, low, high = checks.prox_arguments(
        images, origin, gradient, metric, active, alpha, epsilon, weight, lower, upper
    )
    moved: Tensor = torch.ops.dagcore.linf_prox_(
        images.detach(),
        origin.detach(),
        gradient.detach(),
        metric.detach(),
        active,
        lengths,
        balls,
        float(weight),
        low,
        high,
    )
    _mark_written(images)
    return moved


def settle_(
    running: Tensor,  # (N,) bool
    may_move: Tensor,  # (N,) bool
    updates: Tensor,  # (N,) int64
    stuck: Tensor,  # (N,) int64
    status: Tensor,  # (N,) int8
    history: Tensor,  # (N, max_iter + 1, K) int32
    active: Tensor,  # (N, K) int32
    wanted: Tensor,  # (N,) bool
    moved: Tensor,  # (N,) bool
    done: Tensor | None,  # (N,) bool
    max_iter: int,
    patience: int,
) -> Tensor:
    """Update the rows of images under attack after an evaluation and a step, in place.

    This is an internal op of the loop (`dagcore.engine.loop`), in a single launch; all tensors are
    contiguous. The active targets of a running image are added to its history. It stops when it is
    `done` (or, if that is None, when no step is `wanted`), after `max_iter` updates, or when
    `patience` wanted steps in a row have not `moved` it.

    Returns:
        (N, K) int32, the active targets, -1 for an image that had stopped.
    """
    counts: Tensor = torch.ops.dagcore.settle_(
        running,
        may_move,
        updates,
        stuck,
        status,
        history,
        active,
        wanted,
        moved,
        done,
        max_iter,
        patience,
    )
    return counts

"""Argument checks: every message names the argument, what was required and what came."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, ArgumentTypeError

GOALS = ("leave", "reach")
NORMS = ("linf", "l2")
LOSSES = (
    "cross-entropy",
    "masked-cross-entropy",
    "blended-cross-entropy",
    "cosine",
    "jensen-shannon",
    "tsallis",
    "margin",
    "dag",
    "masked-spherical",
    "dlr",
)
LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = sys.float_info.max
INT64 = torch.iinfo(torch.int64)
MOST_LEVELS = 2**17  # per step: a perturbation has twice as many levels as its images
MOST_PIXELS = 2**31 - 1  # per side
MOST_DIMS = 16  # dimensions of targets or pixels that the native loops support


def names(items: Iterable[object]) -> str:
    """Format items as a readable list: "a, b or c"."""
    *first, last = (str(item).removeprefix("torch.") for item in items)
    return f"{', '.join(first)} or {last}" if first else last


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless `value` is a dense tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested one" if value.is_nested else names([value.layout])
        raise ArgumentTypeError(f"{name} must be a dense tensor, got {kind}")
    if value.dtype not in dtypes:
        raise ArgumentTypeError(f"{name} must be {names(dtypes)}, got {names([value.dtype])}")


def device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors share a device."""
    if value.device != other.device:
        raise ArgumentError(
            f"{name} must be on the device of {other_name} ({other.device}), got {value.device}"
        )


def shape(name: str, value: Tensor, required: tuple[int, ...], why: str) -> None:
    """Raise unless a tensor has the required shape."""
    if tuple(value.shape) != tuple(required):
        raise ArgumentError(
            f"{name} must have shape {tuple(required)} to match {why}, got {tuple(value.shape)}"
        )


def most_dims(name: str, what: str, count: int) -> None:
    """Raise if there are more dimensions than the native loops support."""
    if count > MOST_DIMS:
        raise ArgumentError(f"{name} must have at most {MOST_DIMS} {what}, got {count}")


def at_hand(value: Tensor) -> bool:
    """Return whether a tensor's values can be read without waiting for a device."""
    return value.device.type == "cpu"


def choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise unless a string is one of the choices."""
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise ArgumentError(f"{name} must be {names(map(repr, allowed))}, got {value!r}")


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    infinite: bool = False,
) -> None:
    """Raise unless `value` is a real number within its limits, and finite unless allowed."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ArgumentError(f"{name} must be a number that a float can hold, got {shown(value)}")
    fits = (above is None or value > above) and (at_least is None or value >= at_least)
    is_number = value == value if infinite else abs(value) <= LARGEST  # false for NaN
    if not (fits and is_number):
        kind = "a number" if infinite else "a finite number"
        bound = "" if above is None else f" above {above:g}"
        bound = bound if at_least is None else f" of at least {at_least:g}"
        raise ArgumentError(f"{name} must be {kind}{bound}, got {value}")


def fraction(name: str, value: object) -> float:
    """Return a number, which may be written as a fraction like 0.5/255; raise for anything else."""
    if isinstance(value, str):
        top, slash, bottom = value.partition("/")
        try:
            return float(top) / float(bottom) if slash else float(top)
        except (ValueError, ZeroDivisionError) as error:
            raise ArgumentError(
                f"{name} must be a number or a fraction like 0.5/255, got {value!r}"
            ) from error
    number(name, value)
    assert isinstance(value, (int, float))
    return float(value)


def integer(
    name: str, value: object, *, at_least: int = INT64.min, at_most: int = INT64.max
) -> None:
    """Raise unless `value` is an integer from `at_least` to `at_most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be an integer, got {value!r}")
    if value < at_least:
        raise ArgumentError(f"{name} must be at least {at_least}, got {shown(value)}")
    if value > at_most:
        raise ArgumentError(f"{name} must be at most {at_most}, got {shown(value)}")


def boolean(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be True or False, got {value!r}")


def generator(value: object) -> None:
    """Raise unless `value` is a torch.Generator or None."""
    if value is not None and not isinstance(value, torch.Generator):
        raise ArgumentTypeError(f"generator must be a torch.Generator, got {type(value).__name__}")


def bounds(value: object) -> None:
    """Raise unless `value` is a pair (lower, upper) of finite numbers a finite distance apart."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ArgumentError(f"bounds must be (lower, upper) or None, got {value!r}")
    for name, bound in zip(("bounds[0]", "bounds[1]"), value, strict=True):
        number(name, bound)
    if not value[0] < value[1] or not math.isfinite(float(value[1]) - float(value[0])):
        raise ArgumentError(
            "bounds must be (lower, upper) with lower below upper, a finite distance apart, or "
            f"None, got {value!r}"
        )


def shown(value: int) -> str:
    """Format an integer of any length for a message: Python refuses to print the longest."""
    bits = value.bit_length()
    return str(value) if bits < 1000 else f"an integer of {bits} bits"


def seed_arguments(
    scores: Tensor,
    labels: Tensor,
    adversarial_labels: Tensor | str,
    goal: str,
    ignore_index: int,
    margin: float,
    *,
    bilinear: bool = False,
) -> Tensor | None:
    """Check the arguments of a seed op; return the adversarial labels, or None for the runner-up.

    With `bilinear`, labels (N, H, W) may have any size. Their values are not read here: see
    `label_range`.
    """
    _class_scores(scores)
    choice("goal", goal, GOALS)
    integer("ignore_index", ignore_index)
    number("margin", margin, at_least=0)
    expected, why = _target_shape(scores, labels, bilinear)
    maps = [("labels", labels)]
    if isinstance(adversarial_labels, str):
        if adversarial_labels != "runner-up":
            raise ArgumentError(
                f"adversarial_labels must be a tensor or 'runner-up', got {adversarial_labels!r}"
            )
        if goal == "reach":
            raise ArgumentError(
                "adversarial_labels must be a tensor for goal='reach', got 'runner-up'"
            )
    else:
        maps.append(("adversarial_labels", adversarial_labels))
    for name, value in maps:
        _label_map(name, value, expected, why, scores)
    return None if isinstance(adversarial_labels, str) else adversarial_labels


def loss_arguments(
    scores: Tensor,
    labels: Tensor,
    adversarial_labels: Tensor | str | None,
    loss: str,
    blend: float | Tensor,
    q: float,
    kappa: float,
    class_weights: Tensor | None,
    ignore_index: int,
    *,
    bilinear: bool = False,
) -> Tensor | None:
    """Check the arguments of a loss op; return the adversarial labels.

    None stands for the runner-up if the loss is "dag", and for an untargeted loss otherwise. With
    `bilinear`, labels (N, H, W) may have any size.
    """
    _class_scores(scores)
    choice("loss", loss, LOSSES)
    integer("ignore_index", ignore_index)
    _blend(blend, scores)
    loss_numbers(q, kappa)
    if isinstance(adversarial_labels, str | None):
        allowed = "'runner-up'" if loss == "dag" else "None"
        if adversarial_labels != ("runner-up" if loss == "dag" else None):
            raise ArgumentError(
                f"adversarial_labels must be a tensor or {allowed} for {loss!r}, "
                f"got {adversarial_labels!r}"
            )
    targeted = isinstance(adversarial_labels, Tensor)
    loss_classes(loss, scores.shape[1], targeted=targeted)
    expected, why = _target_shape(scores, labels, bilinear)
    _label_map("labels", labels, expected, why, scores)
    if class_weights is not None:
        tensor("class_weights", class_weights, FLOAT_DTYPES)
        shape("class_weights", class_weights, (scores.shape[1],), f"scores {tuple(scores.shape)}")
        device("class_weights", class_weights, "scores", scores)
    if adversarial_labels is None or isinstance(adversarial_labels, str):
        return None
    _label_map("adversarial_labels", adversarial_labels, expected, why, scores)
    return adversarial_labels


def _blend(blend: float | Tensor, scores: Tensor) -> None:
    """Raise unless blend lies between 0 and 1; the values of a tensor are read only on the CPU."""
    if not isinstance(blend, Tensor):
        blend_weight(blend)
        return
    tensor("blend", blend, (torch.float64,))
    shape("blend", blend, (scores.shape[0],), f"scores {tuple(scores.shape)}")
    device("blend", blend, "scores", scores)
    if not torch.compiler.is_compiling() and at_hand(blend):
        for value in blend.tolist():
            _within_one(value)


def blend_weight(value: object) -> None:
    """Raise unless `value` is a number from 0 to 1."""
    number("blend", value)
    _within_one(value)  # type: ignore[arg-type]


def _within_one(blend: float) -> None:
    if not 0 <= blend <= 1:
        raise ArgumentError(f"blend must be between 0 and 1, got {blend}")


def tolerance(value: object) -> None:
    """Raise unless `value` is a fraction of the targets, from 0 to below 1."""
    number("tolerance", value)
    if not 0 <= value < 1:  # type: ignore[operator]
        raise ArgumentError(f"tolerance must be a fraction in [0, 1), got {value}")


def loss_numbers(q: float, kappa: float) -> None:
    """Raise unless the parameters of a loss are within their limits."""
    number("q", q)
    if not q <= 1:
        raise ArgumentError(f"q must be at most 1, got {q}")
    number("kappa", kappa, at_least=0, infinite=True)


def loss_classes(loss: str, num_classes: int, *, targeted: bool) -> None:
    """Raise unless the scores have as many classes as the loss needs."""
    least = (4 if targeted else 3) if loss == "dlr" else 1
    if num_classes < least:
        kind = "targeted 'dlr'" if targeted else "'dlr'"
        raise ArgumentError(
            f"scores must have at least {least} classes for {kind}, got {num_classes}"
        )


def _class_scores(scores: Tensor) -> None:
    """Raise unless scores have a shape (N, C, *T) that the native loops support."""
    tensor("scores", scores, FLOAT_DTYPES)
    if scores.dim() < 2 or scores.shape[1] < 1:
        raise ArgumentError(
            "scores must have shape (N, C, *targets) with at least one class, "
            f"got {tuple(scores.shape)}"
        )
    most_dims("scores", "target dimensions", scores.dim() - 2)


def _target_shape(scores: Tensor, labels: Tensor, bilinear: bool) -> tuple[tuple[int, ...], str]:
    """Return the shape required of label maps, and what it has to match; check bilinear labels."""
    if not bilinear:
        return (scores.shape[0], *scores.shape[2:]), f"scores {tuple(scores.shape)}"
    score_maps(scores)
    tensor("labels", labels, LABEL_DTYPES)
    if labels.dim() != 3 or len(labels) != len(scores):
        raise ArgumentError(
            f"labels must have shape ({len(scores)}, H, W) to match scores "
            f"{tuple(scores.shape)}, got {tuple(labels.shape)}"
        )
    return tuple(labels.shape), "labels"


def _label_map(
    name: str, labels: Tensor, expected: tuple[int, ...], why: str, scores: Tensor
) -> None:
    """Raise unless labels have a supported dtype, the expected shape, and the scores' device."""
    tensor(name, labels, LABEL_DTYPES)
    shape(name, labels, expected, why)
    device(name, labels, "scores", scores)


def overlaps(value: Tensor) -> bool:
    """Return whether two elements of a tensor may share memory."""
    span = 0  # extent of the dimensions so far, from the smallest stride up
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += stride * (size - 1)
    return False


def score_maps(scores: Tensor) -> None:
    """Raise unless scores are maps (N, C, h, w) that can be interpolated."""
    tensor("scores", scores, FLOAT_DTYPES)
    if scores.dim() != 4 or min(scores.shape[1:]) < 1:
        raise ArgumentError(
            "scores must have shape (N, C, h, w) with at least one class and pixel, "
            f"got {tuple(scores.shape)}"
        )


def map_size(size: object) -> tuple[int, int]:
    """Return (height, width) of an enlarged map; raise for anything else."""
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
        raise ArgumentError(f"size must be (height, width), got {size!r}")
    for name, extent in zip(("size[0]", "size[1]"), size, strict=True):
        integer(name, extent, at_least=0, at_most=MOST_PIXELS)
    return int(size[0]), int(size[1])


def label_range(name: str, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise if a label is neither a class nor the ignore label. Reads values: synchronises."""
    labels = labels.long()  # a uint8 would be compared modulo 256
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise ArgumentError(
            f"{name} must lie in [0, {num_classes}) or equal ignore_index={ignore_index}, "
            f"got {int(labels[where])} at {where}"
        )


def target_labels(
    num_classes: int, labels: Tensor, adversarial_labels: Tensor | None, ignore_index: int
) -> None:
    """Raise if a label of a target that counts is out of range. Reads values: synchronises."""
    label_range("labels", labels, num_classes, ignore_index)
    if adversarial_labels is None:
        return
    read = labels.long() != ignore_index  # a uint8 would be compared modulo 256
    aims = adversarial_labels.long()
    aims = torch.where(read & (aims != ignore_index), aims, 0)
    label_range("adversarial_labels", aims, num_classes, ignore_index)


def callback(value: object) -> None:
    """Raise unless `value` is callable or None."""
    if value is not None and not callable(value):
        raise ArgumentTypeError(f"callback must be callable, got {type(value).__name__}")


def step_arguments(
    images: Tensor,
    origin: Tensor,
    gradient: Tensor,
    active: Tensor,
    gamma: float,
    lower: float | None,
    upper: float | None,
    epsilon: float | None,
    grid: Tensor | None,
    levels: int | None,
) -> tuple[float, float, float]:
    """Check the arguments of `linf_step_`; return (lower, upper, epsilon), infinite for None."""
    _step_tensors(images, origin, gradient, active, grid, levels)
    number("gamma", gamma, above=0)
    low, high = _step_bounds(lower, upper)
    ball = math.inf if epsilon is None else epsilon
    number("epsilon", ball, above=0, infinite=True)
    if grid is not None:
        _check_grid(grid, levels, low, high)
        _apart("grid", grid, {"images": images, "origin": origin, "gradient": gradient})
    return low, high, float(ball)


def pgd_arguments(
    images: Tensor,
    origin: Tensor,
    gradient: Tensor,
    active: Tensor,
    norm: str,
    alpha: float | Tensor,
    epsilon: float | Tensor | None,
    lower: float | None,
    upper: float | None,
    momentum: Tensor | None,
    decay: float,
    previous: Tensor | None,
    share: float | Tensor | None,
    grid: Tensor | None,
    levels: int | None,
) -> tuple[Tensor, Tensor, Tensor | None, float, float]:
    """Check the arguments of `pgd_step_`; return (alpha, epsilon, share, lower, upper).

    The first three are float64 tensors (N,); bounds that are None become infinite.
    """
    _step_tensors(images, origin, gradient, active, grid, levels)
    choice("norm", norm, NORMS)
    lengths = _of_each_image("alpha", alpha, images, above=0)
    ball = math.inf if epsilon is None else epsilon
    balls = _of_each_image("epsilon", ball, images, above=0, infinite=True)
    low, high = _step_bounds(lower, upper)
    number("decay", decay, at_least=0)
    if momentum is None and decay != 0:
        raise ArgumentError(f"momentum must be given with decay, got None and {decay}")
    if (previous is None) != (share is None):
        raise ArgumentError(
            f"previous and share must be given together, got previous={type(previous).__name__} "
            f"and share={type(share).__name__}"
        )
    real = torch.float64 if images.dtype == torch.float64 else torch.float32
    read = {"images": images, "origin": origin, "gradient": gradient}
    for name, value, dtype in (("momentum", momentum, real), ("previous", previous, images.dtype)):
        if value is not None:
            _like_images(name, value, images, dtype)
            _written(name, value)
            _apart(name, value, read)
            read[name] = value
    parts = None if share is None else _of_each_image("share", share, images, at_least=0, at_most=1)
    if grid is not None:
        _check_grid(grid, levels, low, high)
        _apart("grid", grid, read)
    return lengths, balls, parts, low, high


def _step_tensors(
    images: Tensor,
    origin: Tensor,
    gradient: Tensor,
    active: Tensor,
    grid: Tensor | None,
    levels: int | None,
) -> None:
    """Raise unless the tensors of a step match."""
    tensor("images", images, FLOAT_DTYPES)
    if images.dim() < 1:
        raise ArgumentError("images must have a batch dimension, got a scalar")
    most_dims("images", "pixel dimensions", images.dim() - 1)
    _written("images", images)
    if (grid is None) != (levels is None):
        raise ArgumentError(
            f"grid and levels must be given together, got grid={type(grid).__name__} and "
            f"levels={levels!r}"
        )
    for name, value in (("origin", origin), ("gradient", gradient), ("grid", grid)):
        if value is not None or name != "grid":
            _like_images(name, value, images, images.dtype)
    tensor("active", active, (torch.int32,))
    shape("active", active, (images.shape[0],), "images")
    device("active", active, "images", images)


def _like_images(name: str, value: object, images: Tensor, dtype: torch.dtype) -> None:
    """Raise unless `value` is a tensor of this dtype with the shape and device of the images."""
    tensor(name, value, (dtype,))
    assert isinstance(value, Tensor)
    shape(name, value, tuple(images.shape), "images")
    device(name, value, "images", images)


def _of_each_image(
    name: str,
    value: float | Tensor,
    images: Tensor,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    infinite: bool = False,
) -> Tensor:
    """Return one number per image, (N,) float64; raise unless each is within its limits.

    Values on a GPU are not read, as that would wait for it.
    """
    given = [value]
    if isinstance(value, Tensor):
        tensor(name, value, (torch.float64,))
        shape(name, value, (images.shape[0],), "images")
        device(name, value, "images", images)
        given = value.tolist() if at_hand(value) and not torch.compiler.is_compiling() else []
    for one in given:
        number(name, one, above=above, at_least=at_least, infinite=infinite)
        if at_most is not None and one > at_most:
            raise ArgumentError(f"{name} must be at most {at_most:g}, got {one}")
    if isinstance(value, Tensor):
        return value.detach().contiguous()
    return torch.full((len(images),), value, dtype=torch.float64, device=images.device)


def _step_bounds(lower: float | None, upper: float | None) -> tuple[float, float]:
    """Return the valid range, infinite for None; raise unless lower is below upper."""
    low = -math.inf if lower is None else lower
    high = math.inf if upper is None else upper
    number("lower", low, infinite=True)
    number("upper", high, infinite=True)
    if not low < high:
        raise ArgumentError(f"lower must be below upper, got {low} and {high}")
    return float(low), float(high)


def _check_grid(grid: Tensor, levels: object, low: float, high: float) -> None:
    """Raise unless the grid can be written, with this number of levels between the bounds."""
    _written("grid", grid)
    level_count("levels", levels, MOST_LEVELS)
    if not math.isfinite(high - low):
        raise ArgumentError(f"lower and upper must be finite with levels, got {low} and {high}")


def _apart(name: str, value: Tensor, others: dict[str, Tensor]) -> None:
    """Raise if a tensor that is written is known to share memory with another."""
    for other_name, other in others.items():
        if not torch.compiler.is_compiling() and value.numel() and share(value, other):
            raise ArgumentError(f"{name} must not share memory with {other_name}")


def prox_arguments(
    images: Tensor,
    origin: Tensor,
    gradient: Tensor,
    metric: Tensor,
    active: Tensor,
    alpha: float | Tensor,
    epsilon: float | Tensor | None,
    weight: float,
    lower: float | None,
    upper: float | None,
) -> tuple[Tensor, Tensor, float, float]:
    """Check the arguments of `linf_prox_`; return (alpha, epsilon, lower, upper).

    The first two are float64 tensors (N,); bounds that are None become infinite.
    """
    _step_tensors(images, origin, gradient, active, None, None)
    _like_images("metric", metric, images, torch.promote_types(images.dtype, torch.float32))
    lengths = _of_each_image("alpha", alpha, images, above=0)
    ball = math.inf if epsilon is None else epsilon
    balls = _of_each_image("epsilon", ball, images, above=0, infinite=True)
    number("weight", weight, at_least=0)
    return lengths, balls, *_step_bounds(lower, upper)


def _written(name: str, value: Tensor) -> None:
    """Raise unless a tensor can be written in place."""
    if value.numel() and overlaps(value):
        raise ArgumentError(f"{name} must not be an expanded tensor: it is written in place")
    # For example the imaginary part of a conjugate: torch cannot write to it through an op.
    if not torch.compiler.is_compiling() and value.is_neg():
        raise ArgumentError(f"{name} must not be a negated view: it is written in place")


def share(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are known to share memory."""
    if one.device != other.device or not one.data_ptr():
        return False  # a tensor without memory, as in tracing
    if not (one.is_contiguous() and other.is_contiguous()):
        return one.data_ptr() == other.data_ptr()
    first, second = sorted((one, other), key=lambda tensor: tensor.data_ptr())
    return second.data_ptr() < first.data_ptr() + first.numel() * first.element_size()


def level_count(name: str, levels: object, at_most: int = 2**16) -> None:
    """Raise unless images can have this number of levels."""
    integer(name, levels, at_least=2, at_most=at_most)


def accepts(function: Any, count: int) -> bool:
    """Return whether a callable takes this many positional arguments, as far as can be known."""
    if isinstance(function, nn.Module):
        if function._forward_pre_hooks or type(function).__call__ is not nn.Module.__call__:
            return True
        function = function.forward
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # it has none, for example if it is a builtin
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True

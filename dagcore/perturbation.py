"""Adding, permuting, measuring and rounding perturbations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .errors import ArgumentError, ArgumentTypeError
from .levels import nearest, value


def combine(*perturbations: Tensor) -> Tensor:
    """Return the sum of perturbations of one shape, such as the paper's ensemble r_5 + r_7.

    Raises:
        TypeError: a perturbation that is not a floating-point tensor.
        ValueError: no perturbations, or different shapes or devices.
    """
    if not perturbations:
        raise ArgumentError("perturbations must have at least one member, got none")
    for k, r in enumerate(perturbations):
        checks.tensor(f"perturbations[{k}]", r, checks.FLOAT_DTYPES)
    total = perturbations[0]
    for k, other in enumerate(perturbations[1:], start=1):
        checks.shape(f"perturbations[{k}]", other, tuple(total.shape), "perturbations[0]")
        checks.device(f"perturbations[{k}]", other, "perturbations[0]", total)
        total = total + other
    return total


def permute(perturbation: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Shuffle the rows and columns of each image's perturbation (N, C, H, W) at random.

    This is the paper's control: the same values without their spatial structure.
    """
    _check_maps(perturbation)
    checks.generator(generator)
    device = generator.device if generator is not None else torch.device("cpu")
    height, width = perturbation.shape[2:]
    shuffled = torch.empty_like(perturbation)
    for n, r in enumerate(perturbation):
        rows = torch.randperm(height, generator=generator, device=device).to(r.device)
        columns = torch.randperm(width, generator=generator, device=device).to(r.device)
        shuffled[n] = r[:, rows[:, None], columns]
    return shuffled


def fit(perturbation: Tensor, size: Sequence[int]) -> Tensor:
    """Return the upper left part of a perturbation (N, C, H, W), padded with zeros: (N, C, *size).

    This fits a universal perturbation to an image of another size.
    """
    height, width = checks.map_size(size)
    _check_maps(perturbation)
    fitted = perturbation.new_zeros((*perturbation.shape[:2], height, width))
    part = perturbation[:, :, :height, :width]
    fitted[:, :, : part.shape[2], : part.shape[3]] = part
    return fitted


def _check_maps(perturbation: Tensor) -> None:
    checks.tensor("perturbation", perturbation, checks.FLOAT_DTYPES)
    if perturbation.dim() != 4:
        raise ArgumentError(
            f"perturbation must have shape (N, C, H, W), got {tuple(perturbation.shape)}"
        )


def value_range(images: Tensor, bounds: tuple[float, float] | None = None) -> Tensor:
    """Return the width of the valid range of each clean image, (N,) float64.

    If there are bounds, it is their width. Without bounds, it is inferred from the values of each
    image: 1 if they lie in [0, 1], 2 if they lie in [-1, 1], and 255 if they span more than 8, as
    in 8-bit images with or without a subtracted mean. Otherwise it is their span, as for images in
    units of a standard deviation.

    Args:
        images: (N, *) clean images.
        bounds: (lower, upper), None if there are none.

    Raises:
        TypeError, ValueError: images that are no tensor, or bounds that are no pair of numbers.
    """
    if not isinstance(images, Tensor):
        raise ArgumentTypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if bounds is not None:
        checks.bounds(bounds)
    width = images.new_ones(len(images), dtype=torch.float64)
    if bounds is not None:
        return width * (float(bounds[1]) - float(bounds[0]))
    if not images.numel():
        return width
    low, high = images.detach().double().reshape(len(images), -1).aminmax(dim=1)
    spread = torch.where(high - low > 8, 255.0, high - low)
    spread = torch.where((low >= -1) & (high <= 1), 2.0, spread)
    return torch.where((low >= 0) & (high <= 1), 1.0, spread)


def perceptibility(perturbation: Tensor, value_range: float | Tensor = 1.0) -> Tensor:
    """Return the paper's p = sqrt(1/K sum_k ||r_k||_2^2) over the K pixels of each image, (N,).

    Args:
        perturbation: (N, C, *pixels).
        value_range: width of the range of the images (255 for 0..255), or one for each image, (N,);
            p is a fraction of it.
    """
    checks.tensor("perturbation", perturbation, checks.FLOAT_DTYPES)
    if perturbation.dim() < 2:
        raise ArgumentError(
            f"perturbation must have shape (N, C, *pixels), got {tuple(perturbation.shape)}"
        )
    if isinstance(value_range, Tensor):
        checks.shape("value_range", value_range, perturbation.shape[:1], "perturbation")
        value_range = value_range.view(-1, *[1] * (perturbation.dim() - 1))
    else:
        checks.number("value_range", value_range, above=0)
    if not perturbation.numel():
        return perturbation.new_zeros(len(perturbation))
    squares = (perturbation.double() / value_range).square().sum(1)
    mean = squares.reshape(len(squares), -1).mean(1)
    return mean.sqrt().to(torch.promote_types(perturbation.dtype, torch.float32))


def round_to_8_bits(images: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Return images as they are read back from an 8-bit file: `round_to_levels` with 256 levels.

    `DAG.count_active` then counts the targets that are still active.
    """
    return round_to_levels(images, 256, bounds)


def round_to_levels(
    images: Tensor, levels: int, bounds: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Round each value to the nearest of `levels` evenly spaced values between the bounds.

    With 256 levels and bounds (0, 1) or (0, 255), the values are those read from an 8-bit file:
    `x / 255` or `x`.

    Args:
        images: (N, *) floating point.
        levels: from 2 to 65,536.
        bounds: (lower, upper).

    Raises:
        TypeError, ValueError: a wrong argument.
    """
    checks.tensor("images", images, checks.FLOAT_DTYPES)
    checks.level_count("levels", levels)
    checks.bounds(bounds)
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    level = nearest(exact, bounds, levels).clamp(0, levels - 1)
    return value(level, bounds, levels).to(images.dtype)

"""Working with perturbations: adding, permuting, measuring and rounding them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .errors import ArgumentError
from .levels import nearest, value


def combine(*perturbations: Tensor) -> Tensor:
    """The sum of perturbations of one shape: the paper's ensembles, such as r_5 + r_7.

    Raises:
        TypeError: a member that is no floating-point tensor.
        ValueError: none given, or of different shapes or devices.
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
    """Rows and columns in a random order, (N, C, H, W), another order for each image.

    The paper's control: the same values, without their spatial structure.
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
    """The upper left part of a perturbation (N, C, H, W), zero beyond its edge: (N, C, *size).

    A universal perturbation, for an image of another size.
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
    """The width of the valid range of each clean image, (N,) float64.

    It is that of the bounds. Without bounds it is told from each image's own values: 1 where they
    lie in [0, 1], 2 in [-1, 1], 255 where they are spread over more than 8, as of 8-bit images
    with or without a mean subtracted; else, as of images in units of a deviation, their spread.

    Args:
        images: (N, *) clean images.
        bounds: (lower, upper), None where there are none.
    """
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
    """The paper's p = sqrt(1/K sum_k ||r_k||_2^2) over the K pixels, (N, C, H, W) -> (N,).

    Args:
        perturbation: (N, C, *pixels).
        value_range: width of the images' range (255 for 0..255), also of each image, (N,): p is a
            fraction of it.
    """
    checks.tensor("perturbation", perturbation, checks.FLOAT_DTYPES)
    if perturbation.dim() < 2:
        raise ArgumentError(
            f"perturbation must have shape (N, C, H, W), got {tuple(perturbation.shape)}"
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
    """Images as they come back from an 8-bit file: `round_to_levels` with 256 levels.

    `DAG.count_active` tells how many targets still hold for them.
    """
    return round_to_levels(images, 256, bounds)


def round_to_levels(
    images: Tensor, levels: int, bounds: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Each value at the nearest of `levels` evenly from one bound to the other.

    With bounds (0, 1) and (0, 255) and 256 levels, the values are those that an 8-bit file is read
    as: `x / 255` and `x`.

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

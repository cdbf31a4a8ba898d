"""Transforms that defences apply to images (N, 3, H, W) in [0, 1] before the network."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from ..errors import ArgumentError
from ..optional import optional_import
from . import draws

EXACT = "exact"
STRAIGHT_THROUGH = "straight-through (BPDA)"


class Transform(abc.ABC):
    """Base class of a transform of images.

    Attributes:
        gradient: how gradients pass the transform: "exact", or through a stand-in (BPDA; Athalye,
            Carlini and Wagner, ICML 2018), such as "straight-through (BPDA)" for the identity.
        random: whether the transform is random, drawing from the keys that it is given.
    """

    gradient = EXACT
    random = False

    @abc.abstractmethod
    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return transformed images of the same shape; keys (N,) int64 seed the random draws."""

    @abc.abstractmethod
    def __str__(self) -> str: ...


class Through(torch.autograd.Function):
    """Replace images by transformed ones, and pass the gradient on to the former unchanged."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, made: Tensor) -> Tensor:
        """Return a copy of the transformed images `made`."""
        return made.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient unchanged, for `images` alone."""
        return gradient, None


class StraightThrough(Transform):
    """Base class of a transform without a useful gradient, which passes it straight through."""

    gradient = STRAIGHT_THROUGH

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return transformed images, whose gradient goes to `images` unchanged."""
        with torch.no_grad():
            made = self.transformed(images.detach())
        through: Tensor = Through.apply(images, made)
        return through

    @abc.abstractmethod
    def transformed(self, images: Tensor) -> Tensor:
        """Return the images transformed, without a gradient."""


class BitDepth(StraightThrough):
    """Rounding of each value to `bits` bits (Xu, Evans and Qi, Feature Squeezing, NDSS 2018)."""

    def __init__(self, bits: int) -> None:
        checks.integer("bits", bits, at_least=1, at_most=8)
        self.bits = bits

    def __str__(self) -> str:
        return f"{self.bits} bits"

    def transformed(self, images: Tensor) -> Tensor:
        """Return images rounded to the nearest of 2^bits levels."""
        top = 2**self.bits - 1
        rounded: Tensor = (images * top).round() / top
        return rounded


class Median(Transform):
    """Median filter of `size` x `size` pixels, with reflected borders."""

    def __init__(self, size: int) -> None:
        _odd("size", size)
        self.size = size

    def __str__(self) -> str:
        return f"median of {self.size} x {self.size}"

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return filtered images; the gradient goes to the pixel that is the median."""
        padded = F.pad(images, (self.size // 2,) * 4, mode="reflect")
        around = padded.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)
        middle: Tensor = around.median(4).values
        return middle


class Gaussian(Transform):
    """Gaussian blur, with reflected borders."""

    def __init__(self, sigma: float) -> None:
        checks.number("sigma", sigma, above=0)
        self.sigma = float(sigma)
        functional = optional_import("torchvision.transforms.v2.functional", "vision")
        self.blur: Callable[..., Tensor] = functional.gaussian_blur

    def __str__(self) -> str:
        return f"Gaussian blur of {self.sigma:g} pixels"

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return blurred images."""
        size = 2 * round(3 * self.sigma) + 1
        return self.blur(images, [size, size], [self.sigma, self.sigma])


class Noise(Transform):
    """Normal noise on each value, clipped to [0, 1] (Cohen et al., ICML 2019)."""

    random = True

    def __init__(self, std: float) -> None:
        checks.number("std", std, above=0)
        self.std = float(std)

    def __str__(self) -> str:
        return f"noise of {self.std:g}"

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return noisy images."""
        drawn = draws.normal(keys, images.shape[1:].numel()).view(images.shape)
        return (images + self.std * drawn.to(images)).clamp(0, 1)


class Move(Transform):
    """Base class of a transform that scales, shifts and perhaps mirrors whole images on black.

    It also maps boxes to the moved image and back, and score maps back. A place p in [-1, 1] of the
    image moves to scale * p + shift.

    Attributes:
        random: whether scale and shift are drawn.
    """

    @abc.abstractmethod
    def places(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift (N, 2) of each image along x and y; a negative scale mirrors."""

    def __call__(self, images: Tensor, keys: Tensor, align_corners: bool = False) -> Tensor:
        """Return the moved images."""
        scale, shift = self.places(images, keys)
        return sampled(images, 1 / scale, -shift / scale, align_corners)

    def back(
        self, scores: Tensor, images: Tensor, keys: Tensor, align_corners: bool = False
    ) -> Tensor:
        """Map score maps (N, C, h, w) of moved images back to the original images."""
        if scores.dim() != 4:
            raise ArgumentError(
                f"model must return score maps (N, C, h, w) for images that are {self}, "
                f"got {tuple(scores.shape)}"
            )
        return sampled(scores, *self.places(images, keys), align_corners)

    def boxes(self, boxes: Tensor, images: Tensor, keys: Tensor, *, back: bool = False) -> Tensor:
        """Map boxes (N, P, 4), in pixels, to the moved images; with `back` to the original ones."""
        scale, shift = (part.repeat(1, 2)[:, None] for part in self.places(images, keys))
        half = boxes.new_tensor([images.shape[3], images.shape[2]] * 2) / 2
        places = boxes / half - 1
        places = (places - shift) / scale if back else places * scale + shift
        ends = ((places + 1) * half).view(*boxes.shape[:2], 2, 2)
        return torch.cat([ends.amin(2), ends.amax(2)], 2)


class ResizePad(Move):
    """Random shrinking and random padding (Xie et al., ICLR 2018)."""

    random = True

    def __init__(self, least: float) -> None:
        checks.number("least", least, above=0)
        if least > 1:
            raise ArgumentError(f"least must be at most 1, got {least}")
        self.least = float(least)

    def __str__(self) -> str:
        return f"resized at random to {self.least:g} to 1 and padded"

    def places(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one scale for both sides, and a uniform shift that cuts nothing off."""
        drawn = draws.uniform(keys, 3).to(images)
        scale = (self.least + (1 - self.least) * drawn[:, :1]).expand(-1, 2)
        return scale, (2 * drawn[:, 1:] - 1) * (1 - scale)


class Fixed(Move):
    """Shrinking by a fixed factor around the centre, and mirroring."""

    def __init__(self, scale: float, mirror: bool) -> None:
        self.scale, self.mirror = scale, mirror

    def __str__(self) -> str:
        return f"resized to {self.scale:g}" + ", mirrored" * self.mirror

    def places(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fixed scale and a shift of 0, the same for all images."""
        scale = images.new_tensor([-self.scale if self.mirror else self.scale, self.scale])
        return scale.expand(len(images), 2), images.new_zeros(len(images), 2)


def sampled(maps: Tensor, scale: Tensor, shift: Tensor, align_corners: bool) -> Tensor:
    """Sample maps (N, C, h, w) at places scale * p + shift, bilinearly; 0 outside the maps."""
    theta = torch.cat([torch.diag_embed(scale), shift[:, :, None]], 2).to(maps.dtype)
    grid = F.affine_grid(theta, list(maps.shape), align_corners=align_corners)
    return F.grid_sample(maps, grid, align_corners=align_corners)


def _odd(name: str, value: int) -> None:
    checks.integer(name, value, at_least=1)
    if value % 2 == 0:
        raise ArgumentError(f"{name} must be odd, got {value}")

"""What defences do to images (N, 3, H, W) in [0, 1] before the network sees them."""

from __future__ import annotations

import abc
import io
from collections.abc import Callable
from typing import Any

import numpy as np
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
    """One transform of images.

    Attributes:
        gradient: how a gradient passes it: "exact", or "straight-through (BPDA)", as if the images
            came out as they went in (Athalye, Carlini and Wagner, ICML 2018).
        random: whether it draws, from the keys that it is given.
    """

    gradient = EXACT
    random = False

    @abc.abstractmethod
    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Transformed images, of the same shape; keys (N,) int64 seed what is drawn."""

    @abc.abstractmethod
    def __str__(self) -> str: ...


class Through(torch.autograd.Function):
    """What was made of images, with the gradient of the images themselves."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, made: Tensor) -> Tensor:
        """What was made."""
        return made.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient as it comes."""
        return gradient, None


class StraightThrough(Transform):
    """A transform without a useful gradient of its own."""

    gradient = STRAIGHT_THROUGH

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Transformed images, whose gradient goes to the images as it comes."""
        with torch.no_grad():
            made = self.transformed(images.detach())
        through: Tensor = Through.apply(images, made)
        return through

    @abc.abstractmethod
    def transformed(self, images: Tensor) -> Tensor:
        """The images transformed, without a gradient."""


class Jpeg(StraightThrough):
    """Each image as it comes back from a JPEG file, written by Pillow (chroma at half the size)."""

    def __init__(self, quality: int) -> None:
        checks.integer("quality", quality, at_least=1, at_most=100)
        self.quality = quality
        self.image = optional_import("PIL.Image", "cli")

    def __str__(self) -> str:
        return f"JPEG of quality {self.quality}"

    def transformed(self, images: Tensor) -> Tensor:
        """Written and read on the CPU."""
        levels = (images * 255).round().clamp(0, 255).byte().cpu()
        read = torch.stack([self.written(one) for one in levels]) if len(levels) else levels
        return read.to(images) / 255

    def written(self, levels: Tensor) -> Tensor:
        """Levels (3, H, W) uint8 as they come back."""
        file = io.BytesIO()
        pixels = levels.permute(1, 2, 0).contiguous().numpy()
        self.image.fromarray(pixels).save(file, "JPEG", quality=self.quality)
        with self.image.open(file) as read:
            return torch.from_numpy(np.array(read)).permute(2, 0, 1)


class BitDepth(StraightThrough):
    """Each value rounded to so many bits (Xu, Evans and Qi, Feature Squeezing, NDSS 2018)."""

    def __init__(self, bits: int) -> None:
        checks.integer("bits", bits, at_least=1, at_most=8)
        self.bits = bits

    def __str__(self) -> str:
        return f"{self.bits} bits"

    def transformed(self, images: Tensor) -> Tensor:
        """Rounded to the nearest of 2^bits levels."""
        top = 2**self.bits - 1
        rounded: Tensor = (images * top).round() / top
        return rounded


class Median(Transform):
    """The median of the pixels around each, borders reflected."""

    def __init__(self, size: int) -> None:
        _odd("size", size)
        self.size = size

    def __str__(self) -> str:
        return f"median of {self.size} x {self.size}"

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Filtered images; the gradient goes to the pixel that is the median."""
        padded = F.pad(images, (self.size // 2,) * 4, mode="reflect")
        around = padded.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)
        middle: Tensor = around.median(4).values
        return middle


class Gaussian(Transform):
    """A Gaussian blur, borders reflected."""

    def __init__(self, sigma: float) -> None:
        checks.number("sigma", sigma, above=0)
        self.sigma = float(sigma)
        functional = optional_import("torchvision.transforms.v2.functional", "vision")
        self.blur: Callable[..., Tensor] = functional.gaussian_blur

    def __str__(self) -> str:
        return f"Gaussian blur of {self.sigma:g} pixels"

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Blurred images."""
        size = 2 * round(3 * self.sigma) + 1
        return self.blur(images, [size, size], [self.sigma, self.sigma])


class Noise(Transform):
    """Normal noise added to each value, cut off at 0 and 1 (Cohen et al., ICML 2019)."""

    random = True

    def __init__(self, std: float) -> None:
        checks.number("std", std, above=0)
        self.std = float(std)

    def __str__(self) -> str:
        return f"noise of {self.std:g}"

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Noisy images."""
        drawn = draws.normal(keys, images.shape[1:].numel()).view(images.shape)
        return (images + self.std * drawn.to(images)).clamp(0, 1)


class Move(Transform):
    """Images moved as a whole: each made smaller, shifted and perhaps mirrored, black around it.

    What belongs to places of the image, boxes and scores, is moved along and back. A place p in
    [-1, 1] of the image comes to lie at scale * p + shift.

    Attributes:
        random: whether scale and shift are drawn.
    """

    @abc.abstractmethod
    def places(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (N, 2) of each image, along x and y; a negative scale mirrors."""

    def __call__(self, images: Tensor, keys: Tensor, align_corners: bool = False) -> Tensor:
        """The moved images."""
        scale, shift = self.places(images, keys)
        return sampled(images, 1 / scale, -shift / scale, align_corners)

    def back(
        self, scores: Tensor, images: Tensor, keys: Tensor, align_corners: bool = False
    ) -> Tensor:
        """Score maps (N, C, h, w) of moved images, as maps of the images as they were."""
        if scores.dim() != 4:
            raise ArgumentError(
                f"model must return score maps (N, C, h, w) for images that are {self}, "
                f"got {tuple(scores.shape)}"
            )
        return sampled(scores, *self.places(images, keys), align_corners)

    def boxes(self, boxes: Tensor, images: Tensor, keys: Tensor, *, back: bool = False) -> Tensor:
        """Where boxes (N, P, 4) come to lie, in pixels; or came from."""
        scale, shift = (part.repeat(1, 2)[:, None] for part in self.places(images, keys))
        half = boxes.new_tensor([images.shape[3], images.shape[2]] * 2) / 2
        places = boxes / half - 1
        places = (places - shift) / scale if back else places * scale + shift
        ends = ((places + 1) * half).view(*boxes.shape[:2], 2, 2)
        return torch.cat([ends.amin(2), ends.amax(2)], 2)


class ResizePad(Move):
    """Images made smaller at random and put somewhere at random (Xie et al., ICLR 2018)."""

    random = True

    def __init__(self, least: float) -> None:
        checks.number("least", least, above=0)
        if least > 1:
            raise ArgumentError(f"least must be at most 1, got {least}")
        self.least = float(least)

    def __str__(self) -> str:
        return f"resized at random to {self.least:g} to 1 and padded"

    def places(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """One scale for both sides; the shift is uniform among those that cut nothing off."""
        drawn = draws.uniform(keys, 3).to(images)
        scale = (self.least + (1 - self.least) * drawn[:, :1]).expand(-1, 2)
        return scale, (2 * drawn[:, 1:] - 1) * (1 - scale)


class Fixed(Move):
    """Images made smaller or mirrored in one way, around their middle."""

    def __init__(self, scale: float, mirror: bool) -> None:
        self.scale, self.mirror = scale, mirror

    def __str__(self) -> str:
        return f"resized to {self.scale:g}" + ", mirrored" * self.mirror

    def places(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The same for all images."""
        scale = images.new_tensor([-self.scale if self.mirror else self.scale, self.scale])
        return scale.expand(len(images), 2), images.new_zeros(len(images), 2)


def sampled(maps: Tensor, scale: Tensor, shift: Tensor, align_corners: bool) -> Tensor:
    """Maps (N, C, h, w) at places scale * p + shift, bilinear, 0 beyond them."""
    theta = torch.cat([torch.diag_embed(scale), shift[:, :, None]], 2).to(maps.dtype)
    grid = F.affine_grid(theta, list(maps.shape), align_corners=align_corners)
    return F.grid_sample(maps, grid, align_corners=align_corners)


def _odd(name: str, value: int) -> None:
    checks.integer(name, value, at_least=1)
    if value % 2 == 0:
        raise ArgumentError(f"{name} must be odd, got {value}")

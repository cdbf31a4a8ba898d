"""JPEG files as a transform: the file itself forward, a differentiable model of it backward."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from ..optional import optional_import
from .transforms import Through, Transform

SIDE = 8  # of a block, in samples
CENTRE = 128  # is subtracted from the luma
# Rows Y, Cb and Cr of JFIF, for red, green and blue.
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
STRAIGHT = 0.03  # of the gradient passes rounding as if it were the identity


class Jpeg(Transform):
    """JPEG compression by Pillow, with chroma at half the resolution.

    Rounding hides the gradient of a file. The backward pass goes through a model of the file: its
    colours, chroma subsampling and tables. The derivative of rounding is replaced by that of
    round(x) + (x - round(x))^3 (Shin and Song, JPEG-resistant Adversarial Images, 2017; Reich et
    al., Differentiable JPEG: The Devil is in the Details, WACV 2024), mixed with that of the
    identity: the former alone is 0 wherever an image already lies on the file's levels. So an
    attack does not spend its radius on what the file does not keep.
    """

    gradient = "through a model of the file (BPDA)"

    def __init__(self, quality: int) -> None:
        checks.integer("quality", quality, at_least=1, at_most=100)
        self.quality = quality
        self.image = optional_import("PIL.Image", "cli")
        with self.image.open(self.file(np.zeros((SIDE, SIDE, 3), np.uint8))) as read:
            found = [torch.tensor(read.quantization[k]).view(SIDE, SIDE) for k in (0, 1)]
        self.luma_steps, self.chroma_steps = found
        self.colours = torch.tensor(YCBCR, dtype=torch.float64)
        self.back = torch.linalg.inv(self.colours)

    def __str__(self) -> str:
        return f"JPEG of quality {self.quality}"

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return images that were encoded and decoded on the CPU."""
        with torch.no_grad():
            made = self.transformed(images.detach())
        if not (torch.is_grad_enabled() and images.requires_grad):
            return made
        with torch.autocast(images.device.type, enabled=False):
            exact = images.to(torch.promote_types(images.dtype, torch.float32))
            modelled = self.model(exact).to(images.dtype)
        through: Tensor = Through.apply(modelled, made)
        return through

    def transformed(self, images: Tensor) -> Tensor:
        """Return the images as their files hold them."""
        levels = (images * 255).round().clamp(0, 255).byte().cpu()
        read = torch.stack([self.written(one) for one in levels]) if len(levels) else levels
        return read.to(images) / 255

    def written(self, levels: Tensor) -> Tensor:
        """Encode and decode one image of levels (3, H, W) uint8."""
        with self.image.open(self.file(levels.permute(1, 2, 0).contiguous().numpy())) as read:
            return torch.from_numpy(np.array(read)).permute(2, 0, 1)

    def file(self, pixels: np.ndarray) -> io.BytesIO:
        """Encode pixels (H, W, 3) uint8."""
        file = io.BytesIO()
        self.image.fromarray(pixels).save(file, "JPEG", quality=self.quality)
        return file

    def model(self, images: Tensor) -> Tensor:
        """Return what the file holds, differentiably; colours and samples are not rounded."""
        height, width = images.shape[-2:]
        whole = (0, -width % (2 * SIDE), 0, -height % (2 * SIDE))
        x = F.pad(255 * images, whole, mode="replicate")
        y, *chroma = torch.einsum("ij,njhw->inhw", self.colours.to(x), x)
        y = _coded(y - CENTRE, self.luma_steps.to(x)) + CENTRE
        small = F.avg_pool2d(torch.stack(chroma, 1), 2)
        small = torch.stack([_coded(one, self.chroma_steps.to(x)) for one in small.unbind(1)], 1)
        large = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
        x = torch.einsum("ij,njhw->nihw", self.back.to(x), torch.cat([y[:, None], large], 1))
        return (x[..., :height, :width] / 255).clamp(0, 1)


def _coded(values: Tensor, steps: Tensor) -> Tensor:
    """Quantise a channel (N, H, W) in the frequencies of its blocks, by steps (8, 8)."""
    k = torch.arange(SIDE, dtype=values.dtype, device=values.device)
    waves = torch.cos(math.pi / SIDE * k[:, None] * (k + 0.5)) * math.sqrt(2 / SIDE)
    waves[0] /= math.sqrt(2)
    blocks = values.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE)
    kept: Tensor = steps * _SoftRound.apply(waves @ blocks @ waves.T / steps)
    return (waves.T @ kept @ waves).transpose(2, 3).reshape(values.shape)


class _SoftRound(torch.autograd.Function):
    """Rounding, with the derivative that `Jpeg` describes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return rounded values."""
        rounded = values.round()
        ctx.save_for_backward(values - rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient times the derivative."""
        (off,) = ctx.saved_tensors
        product: Tensor = gradient * (STRAIGHT + (1 - STRAIGHT) * 3 * off.square())
        return product

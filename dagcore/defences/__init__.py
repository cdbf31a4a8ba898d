"""Defences: victims behind a transform of their images, which attacks take as they take any other.

Each function takes a segmentation network or a `Detector` and gives one back; they compose, the
outermost first. A defence says how gradients pass it (`gradient`); `adaptive` is what an attacker
who knows it attacks, `undefended` what one attacks who does not:

    defended = dagcore.defences.jpeg(victim, quality=75)
    defended.gradient  # "JPEG of quality 75: straight-through (BPDA)"
    result = attack(defended.adaptive(), images, labels)
    defended(result.adversarial)

Images lie in [0, 1]. A random defence draws from its seed and from the image itself, so that
results depend neither on batches nor on order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import checks
from ..errors import ArgumentError, ArgumentTypeError
from ..victims.detection import Detector, is_detector
from .defended import Defence, Defended, DefendedDetector
from .transforms import (
    BitDepth,
    Fixed,
    Gaussian,
    Jpeg,
    Median,
    Noise,
    ResizePad,
    Transform,
)

__all__ = [
    "Defence",
    "augmented",
    "bit_depth",
    "gaussian",
    "jpeg",
    "median",
    "noise",
    "resize_pad",
]

Victim = Callable[..., Any]


def jpeg(model: Victim, quality: int = 75) -> Any:
    """Images pass through a JPEG file, 1 to 100; gradients straight through (BPDA).

    Args:
        model: a segmentation network, images (N, 3, H, W) -> scores, or a `Detector`.
        quality: of libjpeg.

    Returns:
        The same kind of victim, a `Defence`.

    Raises:
        TypeError, ValueError: the argument, what was required and what came.
        ImportError: torchvision is missing.
    """
    return _defended(model, [Jpeg(quality)])


def bit_depth(model: Victim, bits: int = 4) -> Any:
    """Values are rounded to so many bits, 1 to 8; gradients straight through. See `jpeg`.

    Xu, Evans and Qi, Feature Squeezing, NDSS 2018.
    """
    return _defended(model, [BitDepth(bits)])


def median(model: Victim, size: int = 3) -> Any:
    """The median of size x size pixels, an odd number; exact gradients. See `jpeg`."""
    return _defended(model, [Median(size)])


def gaussian(model: Victim, sigma: float = 1.0) -> Any:
    """A Gaussian blur of `sigma` pixels; exact gradients. See `jpeg`."""
    return _defended(model, [Gaussian(sigma)])


def noise(model: Victim, std: float = 0.03, *, seed: int = 0) -> Any:
    """Normal noise of a standard deviation, of the range of 1; exact gradients. See `jpeg`."""
    return _defended(model, [Noise(std)], seed)


def resize_pad(model: Victim, least: float = 0.8, *, seed: int = 0) -> Any:
    """Images are made smaller, to `least` or more, and put at a random place on black.

    Boxes and score maps follow; gradients pass exactly, through the inverse map. A detector must
    read its scores at boxes. Xie et al., Mitigating Adversarial Effects Through Randomization, ICLR
    2018. See `jpeg`.
    """
    return _defended(model, [ResizePad(least)], seed)


def augmented(model: Victim, scales: Sequence[float] = (1.0, 0.8), mirror: bool = True) -> Any:
    """Test-time augmentation: images at several scales, and mirrored, give one answer.

    Probabilities are averaged; detections of all views are put together, and of those of a class
    that overlap by half the best stays. Exact gradients. A detector must read its scores at boxes.
    See `jpeg`.

    Args:
        model: see `jpeg`.
        scales: above 0, at most 1.
        mirror: whether each is seen mirrored too.
    """
    if not len(scales):
        raise ArgumentError("scales must have at least one member, got none")
    for k, scale in enumerate(scales):
        checks.number(f"scales[{k}]", scale, above=0)
        if scale > 1:
            raise ArgumentError(f"scales[{k}] must be at most 1, got {scale}")
    sides = (False, True) if mirror else (False,)
    return _defended(model, [Fixed(float(s), m) for s in scales for m in sides])


def _defended(model: Any, views: Sequence[Transform], seed: int = 0) -> Any:
    checks.integer("seed", seed, at_least=0)
    if not callable(model):
        raise ArgumentTypeError(f"model must be callable, got {type(model).__name__}")
    if is_detector(model):
        raise ArgumentTypeError(
            "model must be a Detector where it is a detector: victims.detector(model), "
            f"got a plain {type(model).__name__}"
        )
    kind = DefendedDetector if isinstance(model, Detector) else Defended
    return kind(model, views, seed=seed)

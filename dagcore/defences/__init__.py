"""Defences: transforms of the images in front of a network or detector.

Each function takes a segmentation network or a `Detector` and returns a victim of the same kind,
which attacks take like any other. Defences compose, and images pass the outermost one first.
`gradient` says how gradients pass a defence. An attacker who knows the defence attacks
`adaptive()`, one who does not attacks `undefended`:

    defended = dagcore.defences.jpeg(victim, quality=75)
    defended.gradient  # "JPEG of quality 75: through a model of the file (BPDA)"
    result = attack(defended.adaptive(), images, labels)
    defended(result.adversarial)

Images are in [0, 1]. What a random defence draws depends on its seed and on the image itself only,
so results depend neither on the batches nor on the order of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import checks
from ..errors import ArgumentError, ArgumentTypeError
from ..victims.detection import Detector, is_detector
from .codec import Jpeg
from .defended import Defence, Defended, DefendedDetector
from .transforms import (
    BitDepth,
    Fixed,
    Gaussian,
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
    """Compress images to JPEG and decode them again. Gradients pass a model of the file (BPDA).

    The model has the file's colours, chroma subsampling and tables, and a differentiable stand-in
    for rounding (Shin and Song, JPEG-resistant Adversarial Images, 2017).

    Args:
        model: a segmentation network, images (N, 3, H, W) -> scores, or a `Detector`.
        quality: libjpeg's quality, 1 to 100.

    Returns:
        A `Defence`, a victim of the same kind as `model`.

    Raises:
        TypeError, ValueError: if an argument is invalid. The message names the argument, what was
            required and what was given.
        ImportError: if Pillow is missing.
    """
    return _defended(model, [Jpeg(quality)])


def bit_depth(model: Victim, bits: int = 4) -> Any:
    """Round values to `bits` bits, 1 to 8. Gradients pass straight through (BPDA).

    Xu, Evans and Qi, Feature Squeezing, NDSS 2018. See `jpeg` for the rest.
    """
    return _defended(model, [BitDepth(bits)])


def median(model: Victim, size: int = 3) -> Any:
    """Apply a median filter of `size` x `size` pixels, `size` odd. Gradients are exact.

    Xu, Evans and Qi, Feature Squeezing, NDSS 2018. See `jpeg` for the rest.
    """
    return _defended(model, [Median(size)])


def gaussian(model: Victim, sigma: float = 1.0) -> Any:
    """Blur images with a Gaussian of `sigma` pixels, above 0. Gradients are exact.

    See `jpeg` for the rest. Needs torchvision instead of Pillow.
    """
    return _defended(model, [Gaussian(sigma)])


def noise(model: Victim, std: float = 0.03, *, seed: int = 0) -> Any:
    """Add normal noise of standard deviation `std` and clip to [0, 1]. Gradients are exact.

    `std` is above 0, for images in [0, 1]. The noise is drawn from `seed` and from the image
    itself. Cohen et al., Certified Adversarial Robustness via Randomized Smoothing, ICML 2019. See
    `jpeg` for the rest.
    """
    return _defended(model, [Noise(std)], seed)


def resize_pad(model: Victim, least: float = 0.8, *, seed: int = 0) -> Any:
    """Shrink images by a random factor from `least` (above 0) to 1, at a random place on black.

    Boxes and score maps are mapped along with the images. Gradients are exact: they pass through
    the inverse map. A detector must read its scores at boxes. Xie et al., Mitigating Adversarial
    Effects Through Randomization, ICLR 2018. See `jpeg` for the rest.
    """
    return _defended(model, [ResizePad(least)], seed)


def augmented(model: Victim, scales: Sequence[float] = (1.0, 0.8), mirror: bool = True) -> Any:
    """Combine predictions at several scales, also mirrored: test-time augmentation.

    Probabilities are averaged. Detections of all views are pooled, and non-maximum suppression at
    an IoU of 0.5 keeps the best of each class. Gradients are exact. A detector must read its scores
    at boxes. See `jpeg` for the rest.

    Args:
        model: see `jpeg`.
        scales: factors above 0 and at most 1.
        mirror: whether to use each scale mirrored too.
    """
    try:
        scales = tuple(scales)
    except TypeError as error:
        raise ArgumentTypeError(f"scales must be a sequence of numbers, got {scales!r}") from error
    if not scales:
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
            "model must be a Detector, not a bare detector: use victims.detector(model), "
            f"got a plain {type(model).__name__}"
        )
    kind = DefendedDetector if isinstance(model, Detector) else Defended
    return kind(model, views, seed=seed)

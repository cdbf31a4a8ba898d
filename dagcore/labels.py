"""Adversarial labels: drawn at random, or painted as a pattern."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from . import checks
from .errors import ArgumentError, ArgumentTypeError

KINDS = ("permutation", "random", "runner-up")
PATTERNS = ("circle", "square", "stripes")


def assign(
    adversarial_labels: Tensor | str,  # (N, *T)
    labels: Tensor,  # (N, *T)
    num_classes: int,
    ignore_index: int = 255,
    generator: torch.Generator | None = None,
    *,
    look: bool = True,
) -> Tensor | str:
    """Return the adversarial labels of an attack: given ones unchanged, others drawn.

    Args:
        adversarial_labels: (N, *T) integers, returned unchanged, or one of "permutation" (the
            classes of each image permuted at random, none to itself), "random" (a random class for
            each target, never its label) or "runner-up" (returned unchanged: it is resolved from
            the scores).
        labels: (N, *T) uint8, int32 or int64.
        num_classes: C.
        ignore_index: targets with this label keep it.
        generator: source of randomness; the global one of torch if None.
        look: whether to look for labels out of range, which waits for a GPU. If not, such labels
            get an arbitrary class.

    Returns:
        (N, *T), with the dtype of `labels` if it can hold C classes, else int32; or "runner-up".

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: an unknown kind, a label out of range, or fewer than two classes to choose from.
    """
    if isinstance(adversarial_labels, Tensor):
        return adversarial_labels
    checks.choice("adversarial_labels", adversarial_labels, KINDS)
    if adversarial_labels == "runner-up":
        return adversarial_labels
    checks.tensor("labels", labels, checks.LABEL_DTYPES)
    if labels.dim() < 1:
        raise ArgumentError("labels must have shape (N, *T), got a scalar")
    checks.integer("num_classes", num_classes, at_least=1, at_most=checks.MOST_PIXELS)
    checks.integer("ignore_index", ignore_index)
    checks.generator(generator)
    if look:
        checks.label_range("labels", labels, num_classes, ignore_index)
    true = labels.long()  # a uint8 would be compared modulo 256
    counted = true != ignore_index
    if num_classes < 2:
        if bool(counted.any()):
            raise ArgumentError(
                f"adversarial_labels={adversarial_labels!r} needs at least 2 classes, "
                f"the scores have {num_classes}"
            )
        return labels.clone()
    true = torch.where(counted & (true >= 0) & (true < num_classes), true, 0)
    drawn = draw(adversarial_labels, true, num_classes, generator)
    dtype = labels.dtype if num_classes <= 256 or labels.dtype != torch.uint8 else torch.int32
    return torch.where(counted, drawn.to(dtype), labels.to(dtype))


def draw(
    kind: str,
    true: Tensor,  # (N, *T)
    num_classes: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw another class for each of `true`, int64 in 0..C-1, by "permutation" or "random"."""
    if kind == "permutation":
        tables = [derangement(num_classes, generator) for _ in range(len(true))]
        if not tables:
            return true
        rows = true.reshape(len(true), true.shape[1:].numel())
        return _beside(torch.stack(tables), true).gather(1, rows).reshape(true.shape)
    device = "cpu" if generator is None else generator.device
    shift = torch.randint(1, num_classes, true.shape, generator=generator, device=device)
    return (true + _beside(shift, true)) % num_classes


def _beside(drawn: Tensor, other: Tensor) -> Tensor:
    """Move numbers to the device of another tensor, without waiting for it."""
    if checks.at_hand(drawn) and other.device.type == "cuda":
        return drawn.pin_memory().to(other.device, non_blocking=True)
    return drawn.to(other.device)


def derangement(num_classes: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw uniformly a permutation of the classes without fixed points: (C,) int64.

    Raises:
        TypeError, ValueError: a wrong generator, or fewer than two classes.
    """
    checks.integer("num_classes", num_classes, at_least=2, at_most=checks.MOST_PIXELS)
    checks.generator(generator)
    device = "cpu" if generator is None else generator.device
    identity = torch.arange(num_classes, device=device)
    while True:  # succeeds with probability about 1/e
        drawn = torch.randperm(num_classes, generator=generator, device=device)
        if bool((drawn != identity).all()):
            return drawn


def pattern(name: str, height: int, width: int) -> Tensor:
    """Return a pattern to paint, as in the geometric examples of the paper: (height, width) bool.

    Args:
        name: "circle", "square", "stripes", "text:WORDS" or "mask:FILE". The non-zero pixels of the
            image file are the pattern; it is resized with nearest-neighbour interpolation.
        height: number of rows of targets.
        width: number of columns of targets.

    Raises:
        TypeError: a name or a size of a wrong type.
        ValueError: an unknown name, a text without visible characters, a size below 1, or a mask
            file that cannot be read as an image.
        FileNotFoundError: the mask file does not exist.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(f"pattern must be a string, got {type(name).__name__}")
    checks.integer("height", height, at_least=1)
    checks.integer("width", width, at_least=1)
    kind, _, argument = name.partition(":")
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width)[None, :] - (width - 1) / 2
    reach = 0.35 * min(height, width)
    if kind == "circle" and not argument:
        return x**2 + y**2 <= reach**2
    if kind == "square" and not argument:
        return (x.abs() <= reach) & (y.abs() <= reach)
    if kind == "stripes" and not argument:
        period = max(2, round(min(height, width) / 4))
        return (torch.arange(width) % period < period / 2).expand(height, width).clone()
    if kind == "text" and argument:
        return _text(argument, height, width)
    if kind == "mask" and argument:
        return _mask_file(Path(argument), height, width)
    raise ArgumentError(
        f"pattern must be {checks.names(map(repr, PATTERNS))}, 'text:WORDS' or 'mask:FILE', "
        f"got {name!r}"
    )


def paint(mask: Tensor, foreground: int, background: int | Tensor) -> Tensor:
    """Return labels that are `foreground` inside a mask and `background` outside.

    Args:
        mask: (*T) bool.
        foreground: class inside.
        background: class outside, or (*T) integer labels to keep there.

    Returns:
        (*T) int64.
    """
    checks.tensor("mask", mask, (torch.bool,))
    checks.integer("foreground", foreground, at_least=0)
    if isinstance(background, Tensor):
        checks.tensor("background", background, checks.LABEL_DTYPES)
        checks.shape("background", background, tuple(mask.shape), "mask")
        return torch.where(mask, foreground, background.long())
    checks.integer("background", background, at_least=0)
    return torch.where(mask, foreground, background)


def _text(words: str, height: int, width: int) -> Tensor:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=100)
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox(
        (0, 0), words, font=font
    )
    if right <= left or bottom <= top or not words.strip():
        raise ArgumentError(f"pattern 'text:WORDS' must have visible characters, got {words!r}")
    ink = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(ink).text((-left, -top), words, fill=255, font=font)
    scale = 0.9 * min(width / ink.width, height / ink.height)
    fitted = ink.resize((max(1, round(scale * ink.width)), max(1, round(scale * ink.height))))
    canvas = Image.new("L", (width, height))
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    return _pixels(canvas) > 127


def _mask_file(path: Path, height: int, width: int) -> Tensor:
    from PIL import Image

    from .files import decode

    image = decode(path)
    grey = image if image.mode in ("L", "P", "1", "I") else image.convert("L")
    return _pixels(grey.resize((width, height), Image.Resampling.NEAREST)) > 0


def _pixels(image: object) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image).astype(np.int64))

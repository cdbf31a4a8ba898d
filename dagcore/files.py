"""Image files in, finished files out: what is written is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import ArgumentError

IGNORE = -1  # in label maps once read, so that 255 can be a class of a large network

# Of Pillow's formats none that starts another program (EPS), or does not tell its depth (AVIF).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LOSSY = ("JPEG", "MPO")  # a photograph's JPEG with a second picture in it is an MPO
MAX_PIXELS = 2**26  # of an image: a small file can claim to be of any size


def read_image(path: Path) -> Tensor:
    """An 8-bit image as (3, H, W) float32 in [0, 1]; grey ones become RGB, alpha is dropped.

    It is upright, as the camera has noted in the file. Of an animation it is the first frame.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no such image, or one of more than MAX_PIXELS.
    """
    image = decode(path)
    if image.mode.startswith(("I", "F")):
        raise ArgumentError(f"{path} must have 8 bits per channel, got mode {image.mode}")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # from a palette to RGB at once Pillow would warn
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def probe_image(path: Path) -> None:
    """Raise where the file of an image is missing or none, from its first bytes; see `read_image`.

    What is broken further on shows when it is decoded.
    """
    _open(path, load=False)


def read_label_map(path: Path) -> Tensor:
    """A palette or grey image as (H, W) int32 class indices.

    Values are those in the file, of 1, 2, 4, 8 or 16 bits. 255 of 8 bits and 65535 of 16 are the
    ignore label, and come back as IGNORE. (255 of 16 bits may be a class: see `void_as_ignored`.)

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no such image, one of more than MAX_PIXELS, or a JPEG.
    """
    image, largest = _open(path, load=True)
    if image.format in LOSSY:
        raise ArgumentError(
            f"label map {path} must be of a lossless format such as PNG, got JPEG, which changes "
            "the values"
        )
    if image.mode not in ("1", "P", "L", "I", "I;16", "I;16B"):
        raise ArgumentError(
            f"label map {path} must be a palette or grey image whose values are classes, "
            f"got mode {image.mode}"
        )
    values = np.array(image).astype(np.int32)
    if image.mode == "1":
        return torch.from_numpy(values)
    scale = 255 if image.mode in ("P", "L") else 65535
    if largest != scale:  # Pillow spreads the values over the whole range
        values = np.rint(values * (largest / scale)).astype(np.int32)
    ignored = largest if largest == scale else IGNORE
    return torch.from_numpy(np.where(values == ignored, IGNORE, values).astype(np.int32))


def void_as_ignored(labels: Tensor, num_classes: int) -> Tensor:
    """Labels with 255 as IGNORE, unless it is a class: void in a file of 16 bits may be either."""
    return labels if num_classes > 255 else torch.where(labels == 255, IGNORE, labels)


def frame_count(path: Path) -> int:
    """The number of frames of an image file that can be read, of which the first is."""
    with _opened(path) as image:
        try:
            return int(getattr(image, "n_frames", 1))
        except Exception:  # what is behind the first frame is not read, and may be broken
            return 1


def composed(name: str) -> str:
    """A name whose accents are one with their letters (NFC), however a file system has them."""
    return unicodedata.normalize("NFC", name)


def decode(path: Path) -> Image.Image:
    """An image file as Pillow reads it, upright; errors as for `read_image`."""
    return _open(path, load=True)[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """An image file, not decoded yet; what Pillow thinks of the camera's notes is not told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with Image.open(path, formats=FORMATS) as image:
            yield image


def _open(path: Path, *, load: bool) -> tuple[Image.Image, int]:
    """An image, and the largest value that its file has room for."""
    try:
        with _opened(path) as image:
            pixels, largest = image.width * image.height, _largest(image)
            # Of 16 bits a colour Pillow reads the upper 8 only.
            cut = not image.mode.startswith(("I", "F")) and largest > 255
            if pixels <= MAX_PIXELS and not cut:
                if load:
                    image.load()
                    with contextlib.suppress(Exception):  # broken notes cost no image
                        ImageOps.exif_transpose(image, in_place=True)
                return image, largest
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except UnidentifiedImageError as error:
        raise ArgumentError(
            f"{path} cannot be read as an image: it is of none of the formats {', '.join(FORMATS)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        claimed = re.search(r"\((\d+) pixels\)", str(error))  # Pillow has a limit of its own
        pixels = int(claimed.group(1)) if claimed else 0
    except Exception as error:  # bytes that are no image fail in any way at all
        raise ArgumentError(f"{path} cannot be read as an image: {error}") from error
    if pixels <= MAX_PIXELS and pixels:
        raise ArgumentError(f"{path} must have 8 bits per channel, got more")
    raise ArgumentError(
        f"{path} must have at most {MAX_PIXELS} pixels, got {pixels or 'more than Pillow allows'}"
    )


def _largest(image: ImageFile.ImageFile) -> int:
    """The largest value that the file of an image, not decoded yet, has room for."""
    for _, _, _, how in image.tile:
        if image.format == "PPM" and isinstance(how, tuple) and isinstance(how[-1], int):
            return how[-1]
        if ";16" in str(how):
            return 65535
        if few := re.search(r"\bL;([24])", str(how)):  # bits
            return int(2 ** int(few.group(1)) - 1)
    return 65535 if image.mode.startswith("I") else 255


def write_image(path: Path, image: Tensor) -> None:
    """Write an image (3, H, W) in [0, 1] as an 8-bit PNG, rounded to the nearest level."""
    levels = (image.detach().cpu() * 255).round().clamp(0, 255).byte()
    with atomic_write(path) as temporary:
        Image.fromarray(levels.permute(1, 2, 0).numpy()).save(temporary, format="PNG")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place once the block has ended well.

    It is on the disk before it takes it: not even a power cut leaves half a file.
    """
    # As long as a name may be, the temporary one is no longer.
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    temporary = path.with_name(f".{os.getpid()}-{digest}.part")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(out: Path) -> None:
    """Make the folder for the output; raise where nothing can be written to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out} must be a folder that can be written to")

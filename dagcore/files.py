"""Reading image files, and writing files that are complete or absent, never partial."""

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

IGNORE = -1  # the ignore label after reading, so that 255 can be a class

# Pillow's formats without those that start another program (EPS) or hide their depth (AVIF).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LOSSY = ("JPEG", "MPO")  # a JPEG photograph with a second picture inside is an MPO
MAX_PIXELS = 2**26  # per image: a small file can claim any size


def read_image(path: Path) -> Tensor:
    """Read an 8-bit image as (3, H, W) float32 in [0, 1]; grey becomes RGB, alpha is dropped.

    The image is rotated upright according to its EXIF data. Of an animation, the first frame is
    read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not such an image, or has more than MAX_PIXELS.
    """
    image = decode(path)
    if image.mode.startswith(("I", "F")):
        raise ArgumentError(f"{path} must have 8 bits per channel, got mode {image.mode}")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if a palette becomes RGB directly
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def probe_image(path: Path) -> None:
    """Raise if an image file is missing or is not an image, by its first bytes; see `read_image`.

    Damage further on only shows when it is decoded.
    """
    _open(path, load=False)


def read_label_map(path: Path) -> Tensor:
    """Read a palette or grey image as (H, W) int32 class indices.

    The values are those in the file, of 1, 2, 4, 8 or 16 bits. The ignore label, 255 in 8 bits and
    65535 in 16, becomes IGNORE. (255 in 16 bits may be a class: see `void_as_ignored`.)

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not such an image, has more than MAX_PIXELS, or is a JPEG.
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
    """Replace 255 by IGNORE unless it is a class: in 16-bit files, void may be either."""
    return labels if num_classes > 255 else torch.where(labels == 255, IGNORE, labels)


def frame_count(path: Path) -> int:
    """Return the number of frames of an image file; 1 if they cannot be counted."""
    with _opened(path) as image:
        try:
            return int(getattr(image, "n_frames", 1))
        except Exception:  # later frames are not read, and may be broken
            return 1


def composed(name: str) -> str:
    """Return a name with accents composed (NFC), whatever form the file system stores."""
    return unicodedata.normalize("NFC", name)


def decode(path: Path) -> Image.Image:
    """Decode an image file with Pillow, upright; raises as `read_image` does."""
    return _open(path, load=True)[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image file without decoding it; Pillow's warnings about its EXIF data are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with Image.open(path, formats=FORMATS) as image:
            yield image


def _open(path: Path, *, load: bool) -> tuple[Image.Image, int]:
    """Return an image, and the largest value that its file can hold."""
    try:
        with _opened(path) as image:
            pixels, largest = image.width * image.height, _largest(image)
            # Of 16 bits per colour, Pillow reads only the upper 8.
            cut = not image.mode.startswith(("I", "F")) and largest > 255
            if pixels <= MAX_PIXELS and not cut:
                if load:
                    image.load()
                    with contextlib.suppress(Exception):  # broken EXIF data does not cost the image
                        ImageOps.exif_transpose(image, in_place=True)
                return image, largest
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except UnidentifiedImageError as error:
        raise ArgumentError(
            f"{path} cannot be read as an image: its format is none of {', '.join(FORMATS)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        claimed = re.search(r"\((\d+) pixels\)", str(error))  # Pillow has its own limit
        pixels = int(claimed.group(1)) if claimed else 0
    except Exception as error:  # arbitrary bytes may raise anything
        raise ArgumentError(f"{path} cannot be read as an image: {error}") from error
    if pixels <= MAX_PIXELS and pixels:
        raise ArgumentError(f"{path} must have 8 bits per channel, got more")
    raise ArgumentError(
        f"{path} must have at most {MAX_PIXELS} pixels, got {pixels or 'more than Pillow allows'}"
    )


def _largest(image: ImageFile.ImageFile) -> int:
    """Return the largest value that an image file, not decoded yet, can hold."""
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
    """Yield a temporary file beside `path` that replaces it when the block ends without an error.

    The file is flushed to disk before it replaces `path`, so even a power cut leaves no partial
    file.
    """
    # Hashed, so that the temporary name is never longer than a file name may be.
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
    """Create the output folder; raise if it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out {out} cannot be created as a folder: {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out} must be a writable folder")

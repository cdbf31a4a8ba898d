"""Files that are more than they look: images of enormous sizes, weights with code in them."""

from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dagcore import files, victims, zoo
from dagcore.__main__ import main
from dagcore.labels import pattern


def png(width: int, height: int) -> bytes:
    """A few bytes whose header claims a grey image of any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def as_mask(path: Path) -> Tensor:
    return pattern(f"mask:{path}", 4, 4)


READERS = pytest.mark.parametrize("read", [files.read_image, files.read_label_map, as_mask])


@READERS
@pytest.mark.filterwarnings("error", "ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "size",
    [
        (2**13, 2**13 + 1),  # just above
        (9000, 10000),  # Pillow would warn
        (20000, 20000),  # Pillow would refuse
        (2**31 - 1, 2**31 - 1),
    ],
)
def test_an_image_too_large_is_refused_before_it_is_decoded(
    read: object, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    message = rf"bomb\.png must have at most 67108864 pixels, got {size[0] * size[1]}$"
    with pytest.raises(ValueError, match=message):
        read(path)  # type: ignore[operator]


@READERS
def test_a_warning_of_pillows_that_is_an_error_is_no_other_one(
    read: object, tmp_path: Path
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(9000, 10000))
    with pytest.raises(ValueError, match=r"at most 67108864 pixels, got 90000000$"):
        read(path)  # type: ignore[operator]


def test_the_largest_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_PIXELS", 12)
    Image.new("RGB", (4, 3)).save(tmp_path / "image.png")
    assert files.read_image(tmp_path / "image.png").shape == (3, 3, 4)
    Image.new("RGB", (13, 1)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="at most 12 pixels, got 13"):
        files.read_image(tmp_path / "image.png")


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "image.png", transparency=b"\x00\x80")
    assert files.read_image(tmp_path / "image.png").tolist() == [[[1, 0]], [[0, 0]], [[0, 1]]]


# --- weights


class Mischief:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture(params=["zip", "old zip", "plain pickle"])
def loaded_weights(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A weights file with code in it, and the file that it makes when it runs."""
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    content = {"weight": torch.zeros(2), "more": Mischief(made)}
    if request.param == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=request.param == "zip")
    return path, made


def test_the_code_would_run(loaded_weights: tuple[Path, Path]) -> None:
    path, made = loaded_weights
    try:
        torch.load(path, weights_only=False)
    except RuntimeError:  # no file of torch's
        pickle.loads(path.read_bytes())
    assert made.exists()


@pytest.mark.parametrize("name", ["FCN-Alex", "FR-ZF-07", "fcn_resnet50", "ssd300_vgg16"])
def test_code_in_weights_is_not_run(name: str, loaded_weights: tuple[Path, Path]) -> None:
    path, made = loaded_weights
    loaders = [victims.load, *([zoo.load] if "-" in name else [])]
    for load in loaders:
        with pytest.raises(ValueError, match=r"weights\.pth cannot be read as a state dict"):
            load(name, path)
    assert not made.exists()


def test_the_command_does_not_run_code_in_weights(
    loaded_weights: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, made = loaded_weights
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    options = ["--model", "FCN-Alex", "--weights", str(path), "--out", str(tmp_path / "out")]
    assert main(["attack", str(tmp_path / "image.png"), *options]) != 0
    assert "weights.pth cannot be read as a state dict" in capsys.readouterr().err
    assert not made.exists()


def png_of_16_bits(path, colour=2):
    """A PNG of 3 x 2 pixels, RGB by default, 16 bits a channel, which Pillow cannot write."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    rows = b"".join(b"\0" + bytes(range(6 * channels)) for _ in range(2))

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 3, 2, 16, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_images_of_16_bits_are_refused_not_cut_to_8(tmp_path, colour):
    png_of_16_bits(tmp_path / "deep.png", colour)
    with pytest.raises(ValueError, match=r"deep\.png must have 8 bits per channel, got"):
        files.read_image(tmp_path / "deep.png")
    if colour == 0:
        assert files.read_label_map(tmp_path / "deep.png").shape == (2, 3)


def test_formats_that_start_other_programs_are_not_read(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(ValueError, match=r"page\.png cannot be read as an image"):
        files.read_image(path)


# --- photographs and label maps as cameras and tools write them


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_read_upright(tmp_path, ending, orientation):
    upright = np.zeros((16, 24, 3), np.uint8)  # each corner in a grey of its own
    upright[:8, 12:], upright[8:, :12], upright[8:, 12:] = 60, 120, 180
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),  # to be turned clockwise, as a phone held upright has it
        7: np.rot90(upright.swapaxes(0, 1), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{ending}"
    settings = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **settings)
    image = files.read_image(path)
    assert image.shape == (3, 16, 24)
    assert (image * 255)[0, 4::8, 4::16].round().tolist() == [[0, 60], [120, 180]]
    files.write_image(tmp_path / "out.png", image)
    with Image.open(tmp_path / "out.png") as written:
        assert (written.size, 0x0112 in written.getexif()) == ((24, 16), False)


@pytest.mark.parametrize("cut", [10, 16, 20, 24])
def test_broken_notes_of_a_camera_cost_no_image(tmp_path, cut):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker with a long name"
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (32, 24)).save(path, exif=exif.tobytes()[:cut])
    assert sorted(files.read_image(path).shape) == [3, 24, 32]


def png_of_few_bits(path, bits, values):
    """A grey PNG of one row of values of less than 8 bits each."""
    row = sum(value << bits * k for k, value in enumerate(reversed(values)))
    length = len(values) * bits // 8

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" + row.to_bytes(length, "big"))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(
    ("bits", "values"),
    [(1, [0, 1, 1, 0, 0, 0, 0, 1]), (2, [0, 1, 2, 3]), (4, list(range(16)))],
)
def test_label_maps_of_few_bits_hold_their_values(tmp_path, bits, values):
    png_of_few_bits(tmp_path / "map.png", bits, values)
    assert files.read_label_map(tmp_path / "map.png").tolist() == [values]
    # As an image the largest value is white.
    image = files.read_image(tmp_path / "map.png")
    assert image[0, 0].tolist() == pytest.approx([v / (2**bits - 1) for v in values])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"P5 3 1 20\n" + bytes([0, 7, 20]), [0, 7, 20]),
        (b"P2 3 1 255\n0 7 255\n", [0, 7, files.IGNORE]),
        (b"P5 3 1 300\n" + struct.pack(">3H", 7, 255, 300), [7, 255, 300]),
        (b"P5 3 1 65535\n" + struct.pack(">3H", 7, 255, 65535), [7, 255, files.IGNORE]),
    ],
)
def test_label_maps_as_pgm(tmp_path, content, expected):
    (tmp_path / "map.pgm").write_bytes(content)
    assert files.read_label_map(tmp_path / "map.pgm").tolist() == [expected]


def test_void_is_void_in_any_depth(tmp_path):
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "map.png")
    labels = files.read_label_map(tmp_path / "map.png")
    assert files.void_as_ignored(labels, 5).tolist() == [[0, files.IGNORE, 256, files.IGNORE]]
    assert files.void_as_ignored(labels, 300).tolist() == [[0, 255, 256, files.IGNORE]]


def test_a_label_map_that_was_a_jpeg_is_refused(tmp_path):
    Image.new("L", (16, 16), 3).save(tmp_path / "map.png", format="JPEG")
    with pytest.raises(ValueError, match=r"map\.png must be of a lossless format such as PNG, got"):
        files.read_label_map(tmp_path / "map.png")


def test_portable_pixmaps_of_16_bits_are_refused(tmp_path):
    (tmp_path / "deep.ppm").write_bytes(b"P6 1 1 1023\n" + bytes(6))
    with pytest.raises(ValueError, match=r"deep\.ppm must have 8 bits per channel, got more"):
        files.read_image(tmp_path / "deep.ppm")
    (tmp_path / "flat.ppm").write_bytes(b"P3 1 1 100\n0 50 100\n")
    assert (files.read_image(tmp_path / "flat.ppm") * 255).flatten().tolist() == [0, 128, 255]


def test_frames_are_counted(tmp_path):
    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    for name in ("a.gif", "b.tif", "c.webp", "d.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert files.frame_count(tmp_path / name) == 2
        assert float(files.read_image(tmp_path / name).mean() * 255) == pytest.approx(10, abs=2)
    frames[0].save(tmp_path / "e.png")
    assert files.frame_count(tmp_path / "e.png") == 1


def test_what_formats_are_read_is_said(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png", format="JPEG2000")
    with pytest.raises(ValueError, match=r"its format is none of BMP, GIF, JPEG, PNG, PPM"):
        files.read_image(tmp_path / "photo.png")

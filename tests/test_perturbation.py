from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import DTYPES, generator
from torch import Tensor

from dagcore.perturbation import combine, perceptibility, permute, round_to_8_bits

NAN, INF = math.nan, math.inf


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


# --- combine


def test_combine_adds() -> None:
    a, b, c = (noise((2, 3, 4, 5), seed) for seed in range(3))
    before = a.clone()
    assert torch.equal(combine(a), a)
    assert torch.equal(combine(a, b), a + b)
    assert torch.equal(combine(a, b, c), a + b + c)
    assert torch.equal(a, before)


def test_combine_refuses() -> None:
    with pytest.raises(ValueError, match="perturbations must have at least one member, got none"):
        combine()
    with pytest.raises(
        ValueError,
        match=r"^perturbations\[2\] must have shape \(2, 3\) to match perturbations\[0\], got",
    ):
        combine(noise((2, 3)), noise((2, 3)), noise((3,)))


# --- permute


@settings(max_examples=50)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
def test_permute_moves_whole_rows_and_columns(count: int, height: int, width: int, seed: int):
    # Each value tells where it was: channel, row, column.
    grid = torch.arange(3 * height * width).reshape(3, height, width)
    perturbation = grid.expand(count, 3, height, width).double()
    shuffled = permute(perturbation, generator(seed))
    assert shuffled.shape == perturbation.shape
    for image in shuffled.long():
        for c in range(3):
            assert torch.equal(image[c].flatten().sort().values, grid[c].flatten())
            rows, columns = image[c] % (height * width) // width, image[c] % width
            assert torch.equal(rows, rows[:, :1].expand_as(rows))
            assert torch.equal(columns, columns[:1].expand_as(columns))
        # All channels of an image move together.
        assert torch.equal(image[0], image[1] - height * width)
        assert torch.equal(image[0], image[2] - 2 * height * width)


def test_permute_is_random_per_image_and_reproducible() -> None:
    perturbation = noise((1, 3, 24, 32)).expand(4, -1, -1, -1)
    before = perturbation.clone()
    shuffled = permute(perturbation, generator(1))
    assert torch.equal(perturbation, before)
    assert torch.equal(shuffled, permute(perturbation, generator(1)))
    assert not torch.equal(shuffled, permute(perturbation, generator(2)))
    for n in range(4):
        assert not torch.equal(shuffled[n], perturbation[n])
        for other in range(n):
            assert not torch.equal(shuffled[n], shuffled[other])
    moved_rows = [sorted(row) for row in shuffled[0, 0].tolist()]
    assert sorted(moved_rows) == sorted(sorted(row) for row in perturbation[0, 0].tolist())


def test_permute_keeps_the_perceptibility() -> None:
    perturbation = noise((2, 3, 24, 32))
    torch.testing.assert_close(
        perceptibility(permute(perturbation, generator(1))), perceptibility(perturbation)
    )


def test_permute_uses_the_global_generator_by_default() -> None:
    perturbation = noise((2, 3, 8, 8))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = permute(perturbation)
        torch.manual_seed(3)
        assert torch.equal(permute(perturbation), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permute_on_the_device(device: torch.device, dtype: torch.dtype) -> None:
    perturbation = noise((2, 3, 8, 8)).to(dtype)
    shuffled = permute(perturbation.to(device), generator(0))
    assert shuffled.device.type == device.type
    assert shuffled.dtype == dtype
    assert torch.equal(shuffled.cpu(), permute(perturbation, generator(0)))


def test_permute_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"perturbation must have shape \(N, C, H, W\), got \(3,"):
        permute(noise((3, 8, 8)))


# --- perceptibility


def test_perceptibility_by_hand() -> None:
    # Pixels (3, 4, 0) and (0, 0, 0): sqrt((25 + 0) / 2).
    perturbation = torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0]]).reshape(1, 3, 1, 2)
    assert perceptibility(perturbation).tolist() == [pytest.approx(math.sqrt(12.5))]
    assert perceptibility(perturbation, 255).tolist() == [pytest.approx(math.sqrt(12.5) / 255)]
    assert perceptibility(perturbation * 255, 255).tolist() == [pytest.approx(math.sqrt(12.5))]


def test_perceptibility_is_per_image_and_ignores_the_size() -> None:
    perturbation = torch.stack([torch.full((3, 5, 7), v) for v in (0.0, 0.01, -0.02)])
    expected = torch.tensor([0.0, 0.01, 0.02]) * math.sqrt(3)
    torch.testing.assert_close(perceptibility(perturbation), expected)
    torch.testing.assert_close(perceptibility(perturbation.repeat(1, 1, 3, 2)), expected)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_perceptibility_dtypes(
    device: torch.device, dtype: torch.dtype, expected: torch.dtype
) -> None:
    # 2^-13 squared is lost in float16; so is the sum of many.
    perturbation = torch.full((1, 3, 100, 100), 2.0**-13, dtype=dtype, device=device)
    p = perceptibility(perturbation)
    assert p.dtype == expected
    assert p.device.type == device.type
    assert p.tolist() == [pytest.approx(2.0**-13 * math.sqrt(3), rel=1e-6)]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_perceptibility_of_nothing(shape: tuple[int, ...]) -> None:
    assert perceptibility(torch.zeros(shape)).tolist() == [0.0] * shape[0]


def test_perceptibility_refuses() -> None:
    with pytest.raises(ValueError, match=r"perturbation must have shape .* got \(3,\)"):
        perceptibility(noise((3,)))
    for value, error in ((0, ValueError), (-1.0, ValueError), (NAN, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="value_range must be a"):
            perceptibility(noise((1, 3, 2, 2)), value)


# --- rounding


def through_png(image: Tensor) -> Tensor:
    """(3, H, W) in [0, 1] to an 8-bit file and back."""
    levels = np.rint(image.permute(1, 2, 0).double().numpy() * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, format="PNG")
    read = np.array(Image.open(file))
    return torch.from_numpy(read).permute(2, 0, 1).float() / 255


def test_rounding_equals_a_round_trip_through_a_file() -> None:
    images = torch.rand(2, 3, 40, 50, generator=generator(0))
    images[0, 0, 0, :3] = torch.tensor([0.0, 1.0, 0.5])
    rounded = round_to_8_bits(images)
    for image, expected in zip(rounded, images, strict=True):
        assert torch.equal(image, through_png(expected))


def test_rounding_keeps_every_level() -> None:
    levels = torch.arange(256)
    assert torch.equal(round_to_8_bits(levels / 255), levels / 255)
    assert torch.equal(round_to_8_bits(levels.float(), (0, 255)), levels.float())
    wide = round_to_8_bits(levels / 255 * 3 - 1, (-1.0, 2.0))
    torch.testing.assert_close(wide, levels / 255 * 3 - 1)


@settings(max_examples=100)
@given(
    st.lists(st.floats(-0.5, 1.5, width=32), min_size=1, max_size=20),
    st.sampled_from([(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)]),
)
def test_rounding_is_to_the_nearest_level(values: list[float], bounds: tuple[float, float]) -> None:
    lower, upper = bounds
    images = lower + (upper - lower) * torch.tensor(values)
    rounded = round_to_8_bits(images, bounds)
    level = (rounded.double() - lower) / (upper - lower) * 255
    torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-3)
    assert float(rounded.min()) >= lower
    assert float(rounded.max()) <= upper
    clipped = images.clamp(lower, upper)
    assert float((rounded - clipped).abs().max()) <= 0.501 * (upper - lower) / 255
    assert torch.equal(round_to_8_bits(rounded, bounds), rounded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_keeps_the_dtype_and_the_nearest_level(
    device: torch.device, dtype: torch.dtype
) -> None:
    images = torch.rand(500, generator=generator(1)).to(device, dtype)
    rounded = round_to_8_bits(images)
    assert rounded.dtype == dtype
    assert rounded.device.type == device.type
    expected = ((images.double() * 255).round() / 255).to(dtype)
    torch.testing.assert_close(rounded, expected, rtol=torch.finfo(dtype).eps, atol=0)

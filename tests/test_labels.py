from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import LABEL_DTYPES, generator
from torch import Tensor

from dagcore.labels import assign, derangement, paint, pattern

RANDOM_KINDS = pytest.mark.parametrize("kind", ["permutation", "random"])


def some_labels(num_classes: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    """(3, 20, 30) labels of all classes, with some ignored."""
    rng = generator(seed)
    labels = torch.randint(0, num_classes, (3, 20, 30), generator=rng)
    labels[torch.rand(labels.shape, generator=rng) < 0.1] = 255
    return labels.to(dtype)


# --- derangements


@settings(max_examples=100)
@given(st.integers(2, 300), st.integers(0, 2**31))
def test_derangement_moves_every_class(num_classes: int, seed: int) -> None:
    drawn = derangement(num_classes, generator(seed))
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn.sort().values, torch.arange(num_classes))
    assert not bool((drawn == torch.arange(num_classes)).any())
    assert torch.equal(drawn, derangement(num_classes, generator(seed)))


def test_derangements_are_uniform() -> None:
    rng, seen = generator(0), {}
    for _ in range(1800):
        key = tuple(derangement(4, rng).tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 9  # all there are
    assert all(130 < count < 280 for count in seen.values())  # 200, and 5 standard deviations


# --- assign


@RANDOM_KINDS
@settings(max_examples=50)
@given(st.integers(2, 254), st.integers(0, 2**31), st.sampled_from(LABEL_DTYPES))
def test_drawn_labels_are_other_classes(
    kind: str, num_classes: int, seed: int, dtype: torch.dtype
) -> None:
    labels = some_labels(num_classes, seed, dtype)
    drawn = assign(kind, labels, num_classes, 255, generator(seed))
    counted = labels != 255
    assert drawn.shape == labels.shape
    assert drawn.dtype == dtype
    assert not bool((drawn == labels)[counted].any())
    assert bool((drawn[counted] < num_classes).all())
    assert bool((drawn.long()[counted] >= 0).all())
    assert bool((drawn == 255)[~counted].all())
    assert torch.equal(drawn, assign(kind, labels, num_classes, 255, generator(seed)))


def test_permutation_is_one_map_per_image() -> None:
    labels = some_labels(19)
    drawn = assign("permutation", labels, 19, 255, generator(1))
    maps = []
    for image, permuted in zip(labels, drawn, strict=True):
        table = {c: permuted[image == c].unique().tolist() for c in range(19)}
        assert all(len(targets) == 1 for targets in table.values())
        maps.append(tuple(table[c][0] for c in range(19)))
        assert sorted(maps[-1]) == list(range(19))
    assert len(set(maps)) == 3


def test_random_uses_every_other_class_evenly() -> None:
    labels = torch.full((1, 6000), 2)
    drawn = assign("random", labels, 4, 255, generator(1))
    counts = drawn.flatten().bincount(minlength=4).tolist()
    assert counts[2] == 0
    assert all(1800 < counts[c] < 2200 for c in (0, 1, 3))  # 2000, and 5 standard deviations


@RANDOM_KINDS
@pytest.mark.parametrize("ignore_index", [-1, -100, 2, 0, 300])
def test_any_ignore_index(kind: str, ignore_index: int) -> None:
    labels = torch.randint(0, 5, (2, 400), generator=generator(0))
    labels[:, ::7] = ignore_index
    drawn = assign(kind, labels, 5, ignore_index, generator(0))
    ignored = labels == ignore_index
    assert bool((drawn == ignore_index)[ignored].all())
    assert not bool((drawn == labels)[~ignored].any())
    assert set(drawn[~ignored].tolist()) == set(range(5))  # an ignored class can be aimed at


@RANDOM_KINDS
@pytest.mark.parametrize("ignore_index", [-1, 511])
def test_uint8_labels_are_not_taken_for_an_ignore_index_they_cannot_hold(
    kind: str, ignore_index: int
) -> None:
    labels = torch.full((1, 50), 255, dtype=torch.uint8)
    drawn = assign(kind, labels, 256, ignore_index, generator(0))
    assert not bool((drawn == 255).any())


@RANDOM_KINDS
@pytest.mark.parametrize(
    ("given_dtype", "num_classes", "expected"),
    [
        (torch.uint8, 21, torch.uint8),
        (torch.uint8, 256, torch.uint8),
        (torch.uint8, 257, torch.int32),
        (torch.uint8, 1000, torch.int32),
        (torch.int32, 1000, torch.int32),
        (torch.int64, 1000, torch.int64),
        (torch.int32, 21, torch.int32),
    ],
)
def test_dtype_holds_the_classes(
    kind: str, given_dtype: torch.dtype, num_classes: int, expected: torch.dtype
) -> None:
    labels = torch.arange(min(num_classes, 200)).to(given_dtype)[None]
    drawn = assign(kind, labels, num_classes, -1 if given_dtype != torch.uint8 else 255)
    assert drawn.dtype == expected
    assert int(drawn.max()) < num_classes
    if num_classes == 1000 and kind == "random":
        assert int(drawn.max()) > 255


def test_given_labels_and_runner_up_pass_through() -> None:
    labels = some_labels(5)
    other = labels.clone()
    assert assign(other, labels, 5) is other
    assert assign("runner-up", labels, 5) == "runner-up"


@RANDOM_KINDS
def test_labels_are_left_alone_and_the_global_generator_is_the_default(kind: str) -> None:
    labels = some_labels(21)
    before = labels.clone()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = assign(kind, labels, 21)
        second = assign(kind, labels, 21)
        torch.manual_seed(5)
        again = assign(kind, labels, 21)
    assert torch.equal(labels, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@RANDOM_KINDS
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (3,), (2, 3, 4, 5)])
def test_shapes(kind: str, shape: tuple[int, ...]) -> None:
    drawn = assign(kind, torch.ones(shape, dtype=torch.int64), 3, 255, generator(0))
    assert drawn.shape == shape
    assert not bool((drawn == 1).any())


@RANDOM_KINDS
def test_assign_on_the_device(device: torch.device, kind: str) -> None:
    labels = some_labels(21)
    on_device = assign(kind, labels.to(device), 21, 255, generator(3))
    assert on_device.device.type == device.type
    assert torch.equal(on_device.cpu(), assign(kind, labels, 21, 255, generator(3)))


@RANDOM_KINDS
def test_one_class(kind: str) -> None:
    with pytest.raises(ValueError, match=f"adversarial_labels='{kind}' needs at least 2 classes"):
        assign(kind, torch.zeros(1, 4, dtype=torch.int64), 1)
    ignored = torch.full((1, 4), 255)
    assert torch.equal(assign(kind, ignored, 1), ignored)


@pytest.mark.parametrize("wrong", [5, 300, -1])
@RANDOM_KINDS
def test_label_out_of_range(kind: str, wrong: int) -> None:
    labels = torch.tensor([[0, 1, wrong]])
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 5\).* got {wrong} at \(0, 2\)"):
        assign(kind, labels, 5)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="adversarial_labels must be 'permutation', 'random' or"):
        assign("strongest", some_labels(5), 5)


# --- patterns


@pytest.mark.parametrize("size", [(64, 64), (65, 65), (40, 100), (101, 37)])
def test_circle_and_square(size: tuple[int, int]) -> None:
    circle, square = pattern("circle", *size), pattern("square", *size)
    side = 0.7 * min(size)
    for mask, area in ((circle, math.pi / 4 * side**2), (square, side**2)):
        assert mask.shape == size
        assert mask.dtype == torch.bool
        assert float(mask.sum()) == pytest.approx(area, rel=0.08)
        assert torch.equal(mask, mask.flip(0))
        assert torch.equal(mask, mask.flip(1))
        assert bool(mask[size[0] // 2, size[1] // 2])
        assert not bool(mask[0, 0])
    assert bool((square | ~circle).all())  # the circle lies inside the square
    rows, columns = square.any(1), square.any(0)
    assert torch.equal(square, rows[:, None] & columns[None, :])
    assert int(rows.sum()) == int(columns.sum())
    assert not torch.equal(circle, square)


@pytest.mark.parametrize("size", [(64, 64), (30, 90), (8, 8), (5, 3)])
def test_stripes(size: tuple[int, int]) -> None:
    mask = pattern("stripes", *size)
    assert mask.shape == size
    assert torch.equal(mask, mask[:1].expand(size))  # upright
    assert 0.3 < float(mask.float().mean()) < 0.7
    edges = int((mask[0, 1:] != mask[0, :-1]).sum())
    assert edges >= 2 if size[1] > 3 else edges >= 1
    mask[0, 0] = not mask[0, 0]  # memory of its own
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("name", ["circle", "square"])
def test_one_target_is_inside(name: str) -> None:
    assert pattern(name, 1, 1).tolist() == [[True]]


@pytest.mark.parametrize("words", ["ICCV", "I", "two words", "ÄÖ", "."])
def test_text_is_rendered(words: str) -> None:
    mask = pattern(f"text:{words}", 60, 160)
    assert mask.shape == (60, 160)
    assert mask.dtype == torch.bool
    assert 0 < int(mask.sum()) < 60 * 160 / 2
    assert not bool(mask[0].any())  # nothing is cut off at the border
    assert not bool(mask[:, 0].any())


def test_texts_differ_and_fill_the_width() -> None:
    first, second = pattern("text:DAG", 60, 160), pattern("text:GAD", 60, 160)
    assert not torch.equal(first, second)
    columns = first.any(0).nonzero().flatten()
    rows = first.any(1).nonzero().flatten()
    fills = int(columns[-1] - columns[0]) / 160, int(rows[-1] - rows[0]) / 60
    assert max(fills) > 0.75


@pytest.mark.parametrize("words", ["", " ", "\n"])
def test_text_without_words(words: str) -> None:
    with pytest.raises(ValueError, match=r"pattern must be|words|text"):
        pattern(f"text:{words}", 20, 20)


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("L", [[0, 255, 0], [255, 0, 0]]),
        ("L", [[0, 1, 0], [7, 0, 0]]),
        ("L", [[0, 100, 0], [255, 0, 0]]),
        ("1", [[0, 255, 0], [255, 0, 0]]),
        ("P", [[0, 1, 0], [9, 0, 0]]),
        ("I;16", [[0, 1000, 0], [65535, 0, 0]]),
    ],
)
def test_mask_file_is_true_where_it_is_not_zero(
    tmp_path: Path, mode: str, values: list[list[int]]
) -> None:
    path = tmp_path / "mask.png"
    image = Image.new(mode, (3, 2))
    if mode == "P":
        image.putpalette([k for k in range(256) for _ in range(3)])
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            image.putpixel((x, y), value)
    image.save(path)
    expected = torch.tensor(values) != 0
    assert torch.equal(pattern(f"mask:{path}", 2, 3), expected)
    larger = pattern(f"mask:{path}", 6, 9)
    assert torch.equal(larger, expected.repeat_interleave(3, 0).repeat_interleave(3, 1))


def test_mask_file_in_colour(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    image = Image.new("RGB", (3, 1))
    image.putpixel((1, 0), (255, 255, 255))
    image.save(path)
    assert pattern(f"mask:{path}", 1, 3).tolist() == [[False, True, False]]


def test_mask_file_that_is_not_there_or_no_image(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none\.png"):
        pattern(f"mask:{tmp_path / 'none.png'}", 4, 4)
    (tmp_path / "words.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"words\.png cannot be read as an image"):
        pattern(f"mask:{tmp_path / 'words.png'}", 4, 4)


@pytest.mark.parametrize(
    "name", ["hexagon", "", "text", "text:", "mask", "mask:", "circle:3", "Circle"]
)
def test_unknown_pattern(name: str) -> None:
    with pytest.raises(ValueError, match=r"pattern must be 'circle', 'square' or 'stripes'.*got"):
        pattern(name, 8, 8)


@pytest.mark.parametrize("size", [(0, 4), (4, -1), (4, 0)])
def test_pattern_size_below_1(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"(height|width) must be at least 1"):
        pattern("circle", *size)
    with pytest.raises(TypeError, match="height must be an integer"):
        pattern("circle", 4.5, 4)


# --- paint


def test_paint_with_a_class_and_with_a_map() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    painted = paint(mask, 7, 2)
    assert painted.dtype == torch.int64
    assert painted.tolist() == [[7, 2], [2, 7]]
    for dtype in LABEL_DTYPES:
        background = torch.tensor([[1, 255], [3, 4]], dtype=dtype)
        painted = paint(mask, 7, background)
        assert painted.dtype == torch.int64
        assert painted.tolist() == [[7, 255], [3, 7]]
        assert background.tolist() == [[1, 255], [3, 4]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 2), 1, 0), TypeError, "mask must be bool, got float32"),
        (([[True]], 1, 0), TypeError, "mask must be a torch.Tensor, got list"),
        ((torch.ones(2, 2) > 0, -1, 0), ValueError, "foreground must be at least 0, got -1"),
        ((torch.ones(2, 2) > 0, 1.0, 0), TypeError, "foreground must be an integer, got 1.0"),
        ((torch.ones(2, 2) > 0, 1, -2), ValueError, "background must be at least 0, got -2"),
        ((torch.ones(2, 2) > 0, 1, torch.ones(2, 2)), TypeError, "background must be uint8, int32"),
        (
            (torch.ones(2, 2) > 0, 1, torch.ones(2, 3).long()),
            ValueError,
            r"background must have shape \(2, 2\) to match mask, got \(2, 3\)",
        ),
    ],
)
def test_paint_refuses(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        paint(*arguments)

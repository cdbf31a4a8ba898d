from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dagcore.data import SCENE_CLASSES, SCENES_VERSION, Example, Scenes

FAMILIES = ("07", "12")
VOID = 255


def levels(example: Example) -> Tensor:
    return (example.image * 255).round().byte()


def same(a: Example, b: Example) -> bool:
    assert a.mask is not None
    assert b.mask is not None
    pairs = (
        (a.image, b.image),
        (a.mask, b.mask),
        (a.boxes, b.boxes),
        (a.labels, b.labels),
        (a.difficult, b.difficult),
    )
    return a.key == b.key and all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module", params=FAMILIES)
def examples(request: pytest.FixtureRequest) -> list[Example]:
    return list(Scenes(request.param, "train", count=120))


def test_shapes_types_and_ranges(examples: list[Example]) -> None:
    for example in examples:
        assert example.image.shape == (3, 128, 160)
        assert example.image.dtype == torch.float32
        assert example.image.min() >= 0
        assert example.image.max() <= 1
        assert torch.equal(example.image, levels(example).float() / 255)  # as from an 8-bit file
        assert example.mask is not None
        assert example.mask.shape == (128, 160)
        assert example.mask.dtype == torch.uint8
        count = len(example.labels)
        assert 1 <= count <= 5
        assert example.boxes.shape == (count, 4)
        assert example.boxes.dtype == torch.float32
        assert example.labels.dtype == torch.int64
        assert example.difficult.shape == (count,)
        assert example.difficult.dtype == torch.bool
    assert len({example.key for example in examples}) == len(examples)


def test_masks_and_boxes_tell_the_same(examples: list[Example]) -> None:
    for example in examples:
        mask = example.mask
        assert mask is not None
        left, top, right, bottom = example.boxes.long().unbind(1)
        assert bool(((left >= 0) & (left < right) & (right <= 160)).all())
        assert bool(((top >= 0) & (top < bottom) & (bottom <= 128)).all())
        rest = mask.clone()
        for x0, y0, x1, y1, label in torch.stack(
            (left, top, right, bottom, example.labels), 1
        ).tolist():
            part = mask[y0:y1, x0:x1]
            # A sliver can lie in the band wholly; whatever is larger shows its class.
            if (x1 - x0) * (y1 - y0) > 200:
                assert bool((part == label).any())
            # Tight: on each side the outline, or the frame, is right there.
            for edge in (part[0], part[-1], part[:, 0], part[:, -1]):
                assert bool(((edge == VOID) | (edge == label)).any())
            inside = rest[y0:y1, x0:x1]
            inside[inside == label] = 0
        # No pixel of a class lies outside the boxes of that class, slivers without a box apart.
        assert int(((rest != 0) & (rest != VOID)).sum()) < 16


def test_void_bands_part_objects(examples: list[Example]) -> None:
    shares = []
    for example in examples:
        mask = example.mask
        assert mask is not None
        for a, b in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1])):
            # Neighbours of different classes have void between them, always.
            assert not bool(((a != b) & (a != VOID) & (b != VOID)).any())
        shares.append(float((mask == VOID).float().mean()))
    assert 0.01 < sum(shares) / len(shares) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_materials_are_fine_faint_and_on_most_objects(family: str) -> None:
    """Taken away, they leave the same scene, and no more than a few levels change."""
    count, objects, made = 60, 0, 0
    seen: set[int] = set()
    with_them, without, strong = (
        Scenes(family, "train", count=count, **options)
        for options in ({}, {"material": 0}, {"material": 0.05})
    )
    for one, plain, clear in zip(with_them, without, strong, strict=True):
        assert one.mask is not None
        for other, material in ((plain, "0"), (clear, "0.05")):
            assert other.mask is not None
            assert torch.equal(one.mask, other.mask)
            assert torch.equal(one.boxes, other.boxes)
            assert other.key == f"{one.key}-material={material}"
        assert (levels(one).int() - levels(plain).int()).abs().max() <= 6
        weave = clear.image - plain.image
        # Neither grounds nor clutter have any, soft edges of objects apart.
        assert (weave[:, one.mask == 0] != 0).float().mean() < 0.005
        for label in one.labels.unique().tolist():
            inside = weave[:, one.mask == label]
            objects += 1
            shows = bool((inside != 0).any(0).float().mean() > 0.3)
            made += shows
            if inside.shape[1] < 400 or not shows:
                continue
            # A weave around 0, as strong as told, where nothing is cut off at black or white.
            assert inside.mean(1).abs().max() < 0.02
            assert 0.01 < float(inside.square().mean().sqrt()) < 0.08  # in more or less light
            # Brightness, which the sensor's noise of family "07" is in, hardly changes.
            assert inside.mean(0).abs().mean() < 0.5 * inside.abs().mean()
            seen.add(label)
    assert 0.75 < made / objects < 0.95
    assert len(seen) == 12


def test_grounds_and_objects_share_their_colours() -> None:
    """A pixel's colour says little of whether it is an object's: what it is by colour alone."""
    pixels, objects = [], []
    for scene in Scenes("07", "train", count=150):
        assert scene.mask is not None
        kept = scene.mask != VOID
        pixels.append((scene.image[:, kept] * 7.99).long())
        objects.append(scene.mask[kept] > 0)
    color = torch.cat(pixels, 1)
    bins = color[0] * 64 + color[1] * 8 + color[2]
    inside = torch.cat(objects)
    with_objects = torch.bincount(bins[inside], minlength=512).double()
    without = torch.bincount(bins[~inside], minlength=512).double()
    with_objects, without = with_objects / with_objects.sum(), without / without.sum()
    best_guess = torch.maximum(with_objects, without).sum() / 2  # of pixels half of which are
    assert best_guess < 0.72


@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_occurs_about_equally_often(family: str) -> None:
    scenes = Scenes(family, "val", count=300)
    counts = torch.bincount(torch.cat([scene.labels for scene in scenes]), minlength=13)
    assert len(SCENE_CLASSES) == len(counts) == 13
    assert counts[0] == 0
    assert counts[1:].min() > 0.6 * counts.sum() / 12


def test_hidden_objects_are_difficult() -> None:
    scenes = list(Scenes("12", "train", count=300))
    difficult = torch.cat([scene.difficult for scene in scenes])
    assert 0.002 < float(difficult.float().mean()) < 0.1


def test_color_does_not_tell_the_class() -> None:
    """The mean colour of a class is far less spread than the colours of its objects."""
    colors: dict[int, list[Tensor]] = {}
    for scene in Scenes("07", "train", count=300):
        assert scene.mask is not None
        for label in set(scene.labels.tolist()):
            colors.setdefault(label, []).append(scene.image[:, scene.mask == label].mean(1))
    means = torch.stack([torch.stack(c).mean(0) for c in colors.values()])
    within = torch.stack([torch.stack(c).std(0) for c in colors.values()]).mean()
    assert means.std(0).mean() < 0.5 * within


def test_a_scene_depends_on_seed_family_split_and_index_alone() -> None:
    base = Scenes("07", "train", count=3)
    assert same(base[1], base[1])
    assert same(base[2], base[-1])
    assert same(base[2], Scenes("07", "train", count=1, first=2)[0])
    others = (
        base[2],
        Scenes("12", "train", count=3)[1],
        Scenes("07", "val", count=3)[1],
        Scenes("07", "test", count=3)[1],
        Scenes("07", "train", count=3, seed=1)[1],
    )
    keys = {base[1].key}
    assert base[1].key == f"v{SCENES_VERSION}-07-train-0-000001"
    for other in others:
        assert not torch.equal(other.image, base[1].image)
        keys.add(other.key)
    assert len(keys) == 6
    with pytest.raises(IndexError, match=r"index must lie in \[-3, 3\), got 3"):
        base[3]


def test_families_look_different() -> None:
    brightness, grain = [], []
    for family in FAMILIES:
        images = torch.stack([scene.image for scene in Scenes(family, count=60)])
        brightness.append(images.mean((0, 2, 3)))
        colors = images[:, 0] - images[:, 1]  # noise of all channels alike cancels
        grain.append(float((colors[..., 1:] - colors[..., :-1]).abs().median()))
    warm, cool = (float(mean[0] - mean[2]) for mean in brightness)
    assert warm > 0.05 > cool
    assert grain[1] > 2 * grain[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
def test_workers_see_the_same_scenes() -> None:
    scenes = Scenes("12", "val", count=6, seed=3)
    assert same(pickle.loads(pickle.dumps(scenes))[4], scenes[4])
    loader = DataLoader(scenes, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for mine, theirs in zip(scenes, loader, strict=True):
        assert same(mine, theirs)


def test_another_size() -> None:
    scene = Scenes("07", count=1, size=(97, 203))[0]
    assert scene.image.shape == (3, 97, 203)
    assert scene.mask is not None
    assert scene.mask.shape == (97, 203)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "2007"}, "family must be '07' or '12', got '2007'"),
        ({"split": "trainval"}, "split must be 'train', 'val' or 'test', got 'trainval'"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"first": -1}, "first must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"material": -0.1}, "material must be a finite number of at least 0, got -0.1"),
        ({"size": (128, 63)}, r"size\[1\] must be at least 64, got 63"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenes(**{"count": 1, **arguments})  # type: ignore[arg-type]


def test_scenes_are_the_same_on_every_machine() -> None:
    """Weights and scores that were published hold for these pixels."""
    digest = hashlib.sha256()
    for family in FAMILIES:
        for split in ("train", "val", "test"):
            for scene in Scenes(family, split, count=4, first=7, seed=1):
                assert scene.mask is not None
                digest.update(levels(scene).numpy().tobytes())
                digest.update(scene.mask.numpy().tobytes())
                digest.update(scene.boxes.numpy().astype("<i4").tobytes())
                digest.update(scene.labels.numpy().astype(np.uint8).tobytes())
                digest.update(scene.difficult.numpy().tobytes())
    assert digest.hexdigest() == "1def2b548e8fc0a3a808bb7b8282f4c299a196d1e45e2bc0dc803bd632f46da1"

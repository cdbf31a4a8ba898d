"""Scenes: pictures of overlapping objects with masks and boxes, made from a seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from .. import checks
from .example import Example, boxes_of
from .painting import FAMILIES, OBJECTS, Scene, draw

SCENE_CLASSES = ("background", *OBJECTS)
SPLITS = ("train", "val", "test")
VOID = 255


class Scenes(Dataset[Example]):
    """Pictures of 1 to 5 overlapping objects of 12 classes on cluttered backgrounds.

    Scene i is a function of (seed, family, split, i) alone, and the same on every machine; the
    splits draw from random streams of their own. A mask is void (255) in a band of two pixels
    along each object's visible outline. A box is tight around an object's visible pixels; where
    less than a quarter of its pixels in the frame is visible it is marked difficult, and where
    fewer than 16 pixels are, it has no box.

    Args:
        family: "07" or "12": other backgrounds, colours, light, noise and sizes of objects.
        split: "train", "val" or "test".
        count: number of scenes.
        first: index of the first one.
        seed: another one gives other scenes.
        size: (height, width) in pixels, at least 64 each. Objects do not grow with it.

    Raises:
        ValueError: an unknown family or split, or a number out of range.
    """

    def __init__(
        self,
        family: str = "07",
        split: str = "train",
        *,
        count: int,
        first: int = 0,
        seed: int = 0,
        size: tuple[int, int] = (128, 160),
    ) -> None:
        checks.choice("family", family, FAMILIES)
        checks.choice("split", split, SPLITS)
        checks.integer("count", count, at_least=1)
        checks.integer("first", first, at_least=0)
        checks.integer("seed", seed, at_least=0)
        self.size = checks.map_size(size)
        checks.integer("size[0]", self.size[0], at_least=64)
        checks.integer("size[1]", self.size[1], at_least=64)
        self.family, self.split = family, split
        self.count, self.first, self.seed = count, first, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(self.count))

    def __getitem__(self, index: int) -> Example:
        """Scene number first + index.

        Raises:
            IndexError: an index outside -count..count - 1.
        """
        if not -self.count <= index < self.count:
            raise IndexError(f"index must lie in [0, {self.count}), got {index}")
        number = self.first + index % self.count
        stream = (list(FAMILIES).index(self.family), SPLITS.index(self.split), number)
        rng = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=stream))
        )
        scene = draw(FAMILIES[self.family], self.size, rng)
        return _annotate(f"{self.family}-{self.split}-{self.seed}-{number:06d}", scene)


def _annotate(key: str, scene: Scene) -> Example:
    """A scene with its mask and boxes."""
    instances = scene.instances
    void = np.zeros(instances.shape, dtype=bool)
    for before, after in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        edge = instances[before] != instances[after]
        void[before] |= edge
        void[after] |= edge
    mask = np.array([0, *scene.labels], dtype=np.uint8)[instances]
    mask[void] = VOID
    objects = []
    visible = np.bincount(instances.ravel(), minlength=len(scene.labels) + 1)[1:].tolist()
    for k, label in enumerate(scene.labels, start=1):
        area, seen = scene.areas[k - 1], visible[k - 1]
        if seen < 16:
            continue
        place = instances == k
        (rows,), (columns,) = place.any(1).nonzero(), place.any(0).nonzero()
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        objects.append((box, label, 4 * seen < area))
    image = torch.from_numpy(scene.image.astype(np.float32) / np.float32(255))
    return Example(key, image, torch.from_numpy(mask), *boxes_of(objects))

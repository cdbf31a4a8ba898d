"""Scenes: pictures of overlapping objects with masks and boxes, made from a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import checks
from .example import Example, boxes_of, position
from .painting import FAMILIES, OBJECTS, Scene, draw

SCENE_CLASSES = ("background", *OBJECTS)
SPLITS = ("train", "val", "test")
SCENES_VERSION = 2  # of the look of scenes: results on different versions are not comparable
MATERIAL = 0.0075
VOID = 255


class Scenes(Dataset[Example]):
    """Pictures of 1 to 5 overlapping objects of 12 classes on cluttered backgrounds.

    Scene i depends only on (seed, family, split, i), and is the same on every machine. The splits
    use separate random streams. Backgrounds, clutter and objects share their colours. Classes
    differ in shape and, in 85 % of the objects, in a fine material of low contrast. The materials
    are there on purpose, because networks trained on photographs rely on texture (Geirhos et al.,
    ImageNet-trained CNNs are biased towards texture, ICLR 2019).

    A mask is void (255) in a band of two pixels along each object's visible outline. A box is tight
    around an object's visible pixels. It is marked difficult if less than a quarter of the object's
    pixels in the frame is visible. An object with fewer than 16 visible pixels has no box.

    Args:
        family: "07" or "12". They differ in backgrounds, colours, light, noise and object sizes.
        split: "train", "val" or "test".
        count: number of scenes.
        first: index of the first scene.
        seed: seed of the scenes.
        size: (height, width) in pixels, at least 64 each. Objects do not grow with it.
        material: root mean square of the materials, for images in [0, 1]. 0 gives the same scenes
            without materials. The keys contain it if it is not the default.

    Raises:
        ValueError: if the family or the split is unknown, or a number is out of range.
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
        material: float = MATERIAL,
    ) -> None:
        checks.choice("family", family, FAMILIES)
        checks.choice("split", split, SPLITS)
        checks.integer("count", count, at_least=1)
        checks.integer("first", first, at_least=0)
        checks.integer("seed", seed, at_least=0)
        checks.number("material", material, at_least=0)
        self.size = checks.map_size(size)
        checks.integer("size[0]", self.size[0], at_least=64)
        checks.integer("size[1]", self.size[1], at_least=64)
        self.family, self.split = family, split
        self.count, self.first, self.seed = count, first, seed
        self.material = material

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(self.count))

    def _number(self, index: int) -> int:
        index = position(index)
        if not -self.count <= index < self.count:
            raise IndexError(f"index must lie in [-{self.count}, {self.count}), got {index}")
        return self.first + index % self.count

    def key(self, index: int) -> str:
        """Return the key of scene number `first` + `index`, without drawing it.

        Raises:
            IndexError: if the index lies outside -count..count - 1.
        """
        number = self._number(index)
        key = f"v{SCENES_VERSION}-{self.family}-{self.split}-{self.seed}-{number:06d}"
        return key if self.material == MATERIAL else f"{key}-material={self.material:g}"

    def __getitem__(self, index: int) -> Example:
        """Return scene number `first` + `index`.

        Raises:
            IndexError: if the index lies outside -count..count - 1.
        """
        number = self._number(index)
        stream = (list(FAMILIES).index(self.family), SPLITS.index(self.split), number)
        rng = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=stream))
        )
        scene = draw(FAMILIES[self.family], self.size, rng, self.material)
        return _annotate(self.key(index), scene)


def crop(family: str, number: int, material: float, side: int = 64) -> tuple[Tensor, int]:
    """Return a picture (3, side, side) with one object and its class, or with none and 0.

    Backbones are trained on these pictures before scenes. They form a separate set.
    """
    stream = (list(FAMILIES).index(family), len(SPLITS), number)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(0, spawn_key=stream)))
    objects = 1 if number % len(SCENE_CLASSES) else 0
    look = dataclasses.replace(FAMILIES[family], objects=(objects, objects))
    scene = draw(look, (side, side), rng, material)
    return torch.from_numpy(scene.image), sum(scene.labels)


def _annotate(key: str, scene: Scene) -> Example:
    """Return a scene with its mask and boxes."""
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

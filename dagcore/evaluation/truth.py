"""Read the ground truth of images from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .. import files
from ..data.coco import CocoBoxes
from ..data.voc import read_voc_boxes, unknown_voc_names
from ..errors import ArgumentError
from ..victims import Detector, Victim

Truth = Tensor | Mapping[str, Tensor] | None
"""A label map (h, w) int32, or "boxes", "labels" and flags; None for the network's prediction."""


class TruthFiles:
    """Ground truth from files: label maps, or for detectors VOC's XML or COCO's JSON.

    Args:
        given: a folder with NAME.png (NAME.xml) for each image NAME, a file for one image, or a
            COCO file for many images.
        victim: network that the truth is for.
        names: names of the images.
        option: name of `given` in messages.
    """

    def __init__(
        self,
        given: Path,
        victim: Victim | Detector,
        names: Sequence[str],
        option: str = "--labels",
    ) -> None:
        self.given, self.option = given, option
        self.classes = victim.object_classes() if isinstance(victim, Detector) else None
        self.ending = "xml" if isinstance(victim, Detector) else "png"
        self.coco: CocoBoxes | None = None
        if isinstance(victim, Detector) and given.suffix == ".json":
            self.coco = CocoBoxes(given, self.classes)
            self.coco.check_paths(names)

    @property
    def of_many(self) -> bool:
        """Whether the ground truth is for more than one image."""
        return self.coco is not None or self.given.is_dir()

    def find(self, name: str) -> Path:
        """Return the file with the truth of the image NAME.ending, or sub/folder/NAME.ending."""
        if not self.given.is_dir():
            return self.given
        path = (self.given / name).with_suffix(f".{self.ending}")
        if not path.is_file() and path.parent.is_dir():
            alike = files.composed(path.name)  # whatever the form of accents
            path = next((p for p in path.parent.iterdir() if files.composed(p.name) == alike), path)
        if not path.is_file():
            raise FileNotFoundError(f"{self.option}: {path} does not exist, but {name} needs it")
        return path

    def uses(self, path: Path) -> bool:
        """Whether a file belongs to the ground truth."""
        if not self.given.is_dir():
            return path.samefile(self.given)
        return path.suffix == f".{self.ending}" and path.resolve().is_relative_to(
            self.given.resolve()
        )

    def notes(self, name: str) -> list[str]:
        """Return notes for the user on the truth of an image that can be read."""
        if self.ending == "png" or self.coco is not None or self.classes is None:
            return []
        return notes_on_names(unknown_voc_names(self.find(name), self.classes))

    def read(self, name: str, size: tuple[int, int]) -> Truth:
        """Read the truth of an image. `size` is its (height, width).

        Raises:
            FileNotFoundError, ValueError: if a file is missing or invalid. The message names it.
        """
        if self.ending == "png":
            return files.read_label_map(self.find(name))
        if self.coco is not None:
            boxes, labels, crowd = self.coco(name, size)
            return {"boxes": boxes, "labels": labels, "iscrowd": crowd}
        path = self.find(name)
        if self.classes is None:
            raise ArgumentError(f"the model must have class names for {path}, it has none")
        boxes, labels, difficult = read_voc_boxes(path, size, self.classes)
        return {"boxes": boxes, "labels": labels, "difficult": difficult}


def notes_on_names(unknown: Sequence[str]) -> list[str]:
    """Return a note on objects of unknown classes, which were left out."""
    return [f"without objects of unknown classes ({', '.join(unknown)})"] if unknown else []


def size_of(image: Tensor) -> tuple[int, int]:
    """Return (height, width) of an image (3, H, W)."""
    return image.shape[1], image.shape[2]

"""Boxes from an annotation file in COCO's format."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from ..files import composed
from .example import boxes_of, cut

FLAGS = {0: False, 1: True}


class CocoBoxes:
    """The objects of the images of a COCO annotation file ("instances_val2017.json").

    Numbers may be written as text. Names of files are compared with their accents composed (NFC).

    Args:
        path: the file.
        classes: the class of each kind of object, by name, where categories are looked up; if
            None a category's id is its class.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no COCO annotation, that names an image twice, or whose
            objects are of no image, no category or no class.
    """

    def __init__(self, path: Path, classes: Mapping[str, int] | None = None) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = {_id(one["id"]): str(one["name"]) for one in content["categories"]}
            self.images: dict[str, dict[str, Any]] = {}
            self.objects: dict[int | str, list[dict[str, Any]]] = {}
            self._below: defaultdict[str, list[str]] = defaultdict(list)  # names by their last part
            for one in content["images"]:
                self._add_image(one)
            used = {_id(one["category_id"]) for one in content["annotations"]}
            for one in content["annotations"]:
                if (image := _id(one["image_id"])) not in self.objects:
                    raise ArgumentError(f"image_id {one['image_id']!r} is of none of its images")
                self.objects[image].append(one)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            told = "" if isinstance(error, ArgumentError) else f"{type(error).__name__}: "
            raise ArgumentError(
                f"annotation {path} cannot be read as COCO's: {told}{error}"
            ) from error
        unknown = used - set(names)
        if unknown:
            raise ArgumentError(
                f"annotation {path} must name its categories, got {sorted(unknown, key=str)}"
            )
        if classes is None:
            wrong = [k for k in used if not isinstance(k, int) or not 0 <= k < 2**31]
            if wrong:
                raise ArgumentError(
                    f"annotation {path} must have categories whose ids are classes, got {wrong}"
                )
        elif absent := sorted(names[k] for k in used if names[k] not in classes):
            raise ArgumentError(
                f"annotation {path} must have categories of the model's classes "
                f"({', '.join(classes)}), got {', '.join(absent)}"
            )
        self.labels = {k: int(k) if classes is None else classes[names[k]] for k in used}

    def _add_image(self, one: dict[str, Any]) -> None:
        """Take up an image; raise for a name or an id that another one has."""
        name, number = _plain(str(one["file_name"])), _id(one["id"])
        for known in (self.images.get(name), number in self.objects and {"file_name": number}):
            if known:
                raise ArgumentError(
                    "each image must have a file_name and an id of its own, got "
                    f"{known['file_name']!a} and {one['file_name']!a} (id {one['id']})"
                )
        self.images[name] = one
        self._below[name.rpartition("/")[2]].append(name)
        self.objects[number] = []

    def find(self, path: str) -> str:
        """The file_name that an image's path ends in, or that ends in the path: the longest one.

        Raises:
            ValueError: an image that the file does not know, or that several names fit.
        """
        path = _plain(path)
        parts = path.split("/")
        for k in range(len(parts)):
            if (name := "/".join(parts[k:])) in self.images:
                return name
        outer = [name for name in self._below[parts[-1]] if name.endswith(f"/{path}")]
        if len(outer) > 1:
            raise ArgumentError(
                f"annotation {self.path} must have one image {path!r}, got {', '.join(outer)}"
            )
        if not outer:
            raise ArgumentError(f"annotation {self.path} has no image {path!r}")
        return outer[0]

    def check_paths(self, paths: Sequence[str]) -> None:
        """Raise where two images would get the objects of the same one."""
        taken: dict[str, str] = {}
        for path in paths:
            try:
                name = self.find(path)
            except ArgumentError:  # that image's own
                continue
            if name in taken:
                raise ArgumentError(
                    f"annotation {self.path} must tell {taken[name]} and {path} apart, both would "
                    f"get the boxes of {name}"
                )
            taken[name] = path

    def __call__(self, path: str, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (K, 4), labels (K,) and crowd flags (K,) of an image of `size` (height, width).

        Boxes are cut at the border; those that are nothing but border are left out.

        Raises:
            ValueError: an image that the file does not know, or a box that is none.
        """
        name = self.find(path)
        image = self.images[name]
        height, width = size
        known = [image.get(key) for key in ("width", "height")]
        if any(
            given is not None and _id(given) != side
            for given, side in zip(known, (width, height), strict=True)
        ):
            raise ArgumentError(
                f"annotation {self.path} must be of the image {name} ({width} x {height} "
                f"pixels), it has {known[0]} x {known[1]}"
            )
        found = []
        for one in self.objects[_id(image["id"])]:
            try:
                left, top, across, down = (float(value) for value in one["bbox"])
                if not (math.isfinite(left + top + across + down) and min(across, down) >= 0):
                    raise ValueError
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ArgumentError(
                    f"annotation {self.path}: a bbox of {name} must be four numbers of a box, "
                    f"got {one.get('bbox')!r}"
                ) from error
            crowd = _id(one.get("iscrowd") or 0)
            if crowd not in FLAGS:
                raise ArgumentError(
                    f"annotation {self.path}: iscrowd of an object of {name} must be 0 or 1, "
                    f"got {one['iscrowd']!r}"
                )
            box = cut((left, top, left + across, top + down), size)
            if box is not None:
                found.append((box, self.labels[_id(one["category_id"])], FLAGS[crowd]))
        return boxes_of(found)


def _plain(path: str) -> str:
    """A path as they are compared."""
    return PurePosixPath(composed(path)).as_posix()


def _id(value: Any) -> int | str:
    """An id, or another whole number, which some tools write as text or with a point."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (int, float)):
        return value  # type: ignore[return-value]  # a fraction is an id like any other
    text = str(value).strip()
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 20 else text

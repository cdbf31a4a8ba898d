"""Read boxes from an annotation file in COCO's format."""

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
    """The objects in the images of a COCO annotation file ("instances_val2017.json").

    Numbers may be written as text. File names are compared with their accents composed (NFC).

    Args:
        path: path of the file.
        classes: class of each category, by the category's name. If None, a category's id is its
            class.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not a COCO annotation, names an image twice, or has an object
            without a known image, category or class.
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
                    raise ArgumentError(f"image_id {one['image_id']!r} is not the id of an image")
                self.objects[image].append(one)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            told = f"{type(error).__name__}: {error}"
            if isinstance(error, ArgumentError):
                told = str(error)
            elif isinstance(error, KeyError):
                told = f"{error} is missing"
            raise ArgumentError(f"annotation {path} cannot be read as COCO's: {told}") from error
        unknown = used - set(names)
        if unknown:
            raise ArgumentError(
                f"annotation {path} must list every category_id of its annotations in "
                f"'categories', which lacks {sorted(unknown, key=str)}"
            )
        if classes is None:
            wrong = [k for k in used if not isinstance(k, int) or not 0 <= k < 2**31]
            if wrong:
                raise ArgumentError(
                    f"annotation {path} must have class numbers (integers from 0) as category ids "
                    f"for a model without class names, got {wrong}"
                )
        elif absent := sorted(names[k] for k in used if names[k] not in classes):
            raise ArgumentError(
                f"annotation {path} must have categories of the model's classes "
                f"({', '.join(classes)}), got {', '.join(absent)}"
            )
        self.labels = {k: int(k) if classes is None else classes[names[k]] for k in used}

    def _add_image(self, one: dict[str, Any]) -> None:
        """Add an image. Raise if another image has its name or id."""
        name, number = _plain(str(one["file_name"])), _id(one["id"])
        for known in (self.images.get(name), number in self.objects and {"file_name": number}):
            if known:
                raise ArgumentError(
                    "each image must have a unique file_name and id, got "
                    f"{known['file_name']!a} and {one['file_name']!a} (id {one['id']})"
                )
        self.images[name] = one
        self._below[name.rpartition("/")[2]].append(name)
        self.objects[number] = []

    def find(self, path: str) -> str:
        """Return the longest file_name that an image's path ends in, or that ends in the path.

        Raises:
            ValueError: if no file_name matches, or several do.
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
        """Raise if two paths match the same image of the file."""
        taken: dict[str, str] = {}
        for path in paths:
            try:
                name = self.find(path)
            except ArgumentError:  # raised again when the image is read
                continue
            if name in taken:
                raise ArgumentError(
                    f"annotation {self.path} must tell {taken[name]} and {path} apart, both would "
                    f"get the boxes of {name}"
                )
            taken[name] = path

    def __call__(self, path: str, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (K, 4), labels (K,) and crowd flags (K,) of an image.

        Boxes are clipped to the image's `size` (height, width). Boxes without area are left out.

        Raises:
            ValueError: if the file does not have the image, or a box is invalid.
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
                f"annotation {self.path} must match the image {name} ({width} x {height} "
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
                    f"annotation {self.path}: a bbox of {name} must be [left, top, width >= 0, "
                    f"height >= 0], got {one.get('bbox')!r}"
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
    """Normalise a path for comparisons."""
    return PurePosixPath(composed(path)).as_posix()


def _id(value: Any) -> int | str:
    """Normalise an id or another whole number, which some tools write as text or as a float."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (int, float)):
        return value  # type: ignore[return-value]  # a fraction is an id like any other
    text = str(value).strip()
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 20 else text

"""Boxes from an annotation file in COCO's format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from .example import boxes_of


class CocoBoxes:
    """The objects of the images of a COCO annotation file ("instances_val2017.json").

    Args:
        path: the file.
        classes: the class of each kind of object, by name, where categories are looked up; if
            None a category's id is its class.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no COCO annotation, or a category that is no class.
    """

    def __init__(self, path: Path, classes: Mapping[str, int] | None = None) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.images = {str(one["file_name"]): one for one in content["images"]}
            self.ids = {name: one["id"] for name, one in self.images.items()}
            hash(tuple(self.ids.values()))  # or TypeError
            self.objects: dict[Any, list[dict[str, Any]]] = {}
            for one in content["annotations"]:
                self.objects.setdefault(one["image_id"], []).append(one)
            names = {one["id"]: str(one["name"]) for one in content["categories"]}
            used: set[Any] = {
                one.get("category_id") for own in self.objects.values() for one in own
            }
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArgumentError(
                f"annotation {path} cannot be read as COCO's: {type(error).__name__}: {error}"
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

    def __call__(self, file_name: str, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (K, 4), labels (K,) and crowd flags (K,) of an image of `size` (height, width).

        Boxes are cut at the border; those that are nothing but border are left out.

        Raises:
            ValueError: an image that the file does not know, or a box that is none.
        """
        if file_name not in self.images:
            raise ArgumentError(f"annotation {self.path} has no image {file_name!r}")
        height, width = size
        one = self.images[file_name]
        known = one.get("height", height), one.get("width", width)
        if known != (height, width):
            raise ArgumentError(
                f"annotation {self.path} must be of the image {file_name} ({width} x {height} "
                f"pixels), it has {known[1]} x {known[0]}"
            )
        found = []
        for one in self.objects.get(self.ids[file_name], []):
            try:
                left, top, across, down = (float(value) for value in one["bbox"])
                if not (math.isfinite(left + top + across + down) and min(across, down) >= 0):
                    raise ValueError
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise ArgumentError(
                    f"annotation {self.path}: a bbox of {file_name} must be four numbers of a box, "
                    f"got {one.get('bbox')!r}"
                ) from error
            right, bottom = min(left + across, width), min(top + down, height)
            left, top = max(left, 0.0), max(top, 0.0)
            if left < right and top < bottom:
                label, crowd = self.labels[one["category_id"]], bool(one.get("iscrowd", 0))
                found.append(((left, top, right, bottom), label, crowd))
        return boxes_of(found)

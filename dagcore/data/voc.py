"""PASCAL VOC from a VOCdevkit folder, with the extra masks of SBD if they are there."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import checks
from ..errors import ArgumentError
from ..optional import optional_import
from .example import Example, boxes_of, cut, position

# fmt: off
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)
# fmt: on
OBJECTS = {name: k for k, name in enumerate(VOC_CLASSES) if k}
VOID = 255
FLAGS = {"": False, "unspecified": False, "false": False, "no": False, "true": True, "yes": True}
# For each task the folder of its lists, the folder of its ground truth, and that truth's suffix.
TASKS = {
    "segmentation": ("Segmentation", "SegmentationClass", ".png"),
    "detection": ("Main", "Annotations", ".xml"),
}


@dataclasses.dataclass(frozen=True)
class _Item:
    key: str
    image: Path
    truth: Path


class VOC(Dataset[Example]):
    """Images of PASCAL VOC with their masks or their boxes.

    Reads root/VOC2007/{JPEGImages,Annotations,ImageSets,SegmentationClass}, and the same for
    VOC2012 and other years. The key of an example is its image id. An image that is in several
    sets appears once.

    Segmentation examples have a mask and no boxes. Detection examples have boxes, and None as
    mask. Box coordinates are 1-based and inclusive in the files. Here they are 0-based, and
    exclusive at the right and the bottom.

    SBD's extra masks are read from root/benchmark_RELEASE/dataset (img and cls/*.mat, which need
    scipy), or else from PNG files in the folder SegmentationClassAug of a year. Images that are in
    a Segmentation/val.txt under root are never taken from SBD, so that a network trained with SBD
    can be evaluated on VOC's val.

    Args:
        root: VOCdevkit folder.
        task: "segmentation" or "detection".
        sets: pairs (year, name of a list), such as ("2012", "train").
        sbd: "auto" adds SBD's masks if they are there (see `extra`). None does not.

    Attributes:
        extra: number of examples that come from SBD.
        keys: image ids, in order.

    Raises:
        FileNotFoundError: if a folder or a list is missing, or later the file of an example.
        ValueError: if the task is unknown or an id is not a plain name, or later if a file cannot
            be read or does not match its image.
        ImportError: if an optional package is missing.
    """

    def __init__(
        self,
        root: str | Path,
        task: str = "segmentation",
        *,
        sets: Iterable[tuple[str, str]] = (("2007", "trainval"),),
        sbd: str | None = None,
    ) -> None:
        checks.choice("task", task, TASKS)
        if sbd not in (None, "auto"):
            raise ArgumentError(f"sbd must be None or 'auto', got {sbd!r}")
        if sbd and task != "segmentation":
            raise ArgumentError(f"sbd must be None for task {task!r}: SBD has masks only")
        optional_import("PIL.Image", "data")
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"root must be a VOCdevkit folder, {root} does not exist")
        self.task = task
        lists, truths, ending = TASKS[task]
        items: dict[str, _Item] = {}
        for year, name in map(_pair, sets):
            folder = _member(root, f"VOC{year}", "the folder of a set")
            path = _member(folder / "ImageSets" / lists, name, "the name of a set")
            for key in _ids(path.with_name(f"{name}.txt")):
                image = folder / "JPEGImages" / f"{key}.jpg"
                items.setdefault(key, _Item(key, image, folder / truths / f"{key}{ending}"))
        if not items:
            raise ArgumentError("sets must name at least one image, their lists are empty")
        own = len(items)
        if sbd:
            held_out = {
                key
                for path in root.glob("VOC*/ImageSets/Segmentation/val.txt")
                for key in _ids(path)
            }
            for item in _sbd_items(root):
                if item.key not in held_out:
                    items.setdefault(item.key, item)
        self.extra = len(items) - own
        self._items = tuple(items.values())
        self.keys = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def files(self, index: int) -> tuple[Path, Path]:
        """Return the files of an example: its image, and its mask or its boxes."""
        item = self._items[position(index)]
        return item.image, item.truth

    def __getitem__(self, index: int) -> Example:
        """Read an example from its files."""
        from ..files import read_image

        item = self._items[position(index)]
        image = read_image(item.image)
        height, width = image.shape[1:]
        if self.task == "detection":
            return Example(item.key, image, None, *read_voc_boxes(item.truth, (height, width)))
        mask = _read_mask(item.truth)
        if mask.shape != (height, width):
            raise ArgumentError(
                f"mask {item.truth} must have the size of {item.image}, {(height, width)}, "
                f"got {tuple(mask.shape)}"
            )
        return Example(item.key, image, mask, *boxes_of([]))


def _pair(entry: object) -> tuple[str, str]:
    match entry:
        case [str(year), str(name)]:
            return year, name
    raise ArgumentError(f"sets must hold pairs such as ('2007', 'trainval'), got {entry!r}")


def _member(folder: Path, name: str, what: str) -> Path:
    """Return the path of a plain name inside a folder. Raise if the name leads elsewhere."""
    if name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
        raise ArgumentError(f"{what} must be a plain name, got {name!r}")
    return folder / name


def _ids(path: Path) -> list[str]:
    """Read the image ids of a list."""
    if not path.is_file():
        raise FileNotFoundError(f"image list {path} does not exist")
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    for key in filter(None, keys):
        if len(key.split()) > 1:
            raise ArgumentError(f"image list {path} must have one image id in a line, got {key!r}")
        _member(path, key, f"an image id in {path}")
    return [key for key in keys if key]


def _sbd_items(root: Path) -> Iterator[_Item]:
    """Yield the items of SBD, as its authors released it or as PNG files."""
    release = root / "benchmark_RELEASE" / "dataset"
    if release.is_dir():
        optional_import("scipy.io", "data")
        for name in ("train.txt", "val.txt"):
            for key in _ids(release / name):
                yield _Item(key, release / "img" / f"{key}.jpg", release / "cls" / f"{key}.mat")
        return
    for path in sorted(root.glob("VOC*/SegmentationClassAug/*.png")):
        yield _Item(path.stem, path.parents[1] / "JPEGImages" / f"{path.stem}.jpg", path)


def _read_mask(path: Path) -> Tensor:
    """Read class indices (H, W) uint8 from a palette PNG or one of SBD's .mat files."""
    from ..files import IGNORE, read_label_map

    if path.suffix == ".mat":
        mask = _read_mat(path)
    else:
        mask = read_label_map(path)
        mask[mask == IGNORE] = VOID
    wrong = mask[(mask >= len(VOC_CLASSES)) & (mask != VOID)]
    if len(wrong):
        raise ArgumentError(
            f"mask {path} must have classes below {len(VOC_CLASSES)} or {VOID}, got {int(wrong[0])}"
        )
    return mask.byte()


def _read_mat(path: Path) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    loadmat = optional_import("scipy.io", "data").loadmat
    try:
        content = loadmat(path, squeeze_me=True, struct_as_record=False)
        mask = np.asarray(content["GTcls"].Segmentation)
    except Exception as error:  # other files than .mat can raise anything
        raise ArgumentError(f"{path} cannot be read as a mask of SBD: {error!r}") from error
    if mask.ndim != 2 or mask.dtype.kind not in "ui":
        raise ArgumentError(f"{path} must hold integers (H, W), got {mask.dtype} {mask.shape}")
    return torch.from_numpy(mask.astype(np.int32))


class _NoDoctype(ElementTree.TreeBuilder):
    """A tree builder that refuses DOCTYPE declarations, which could define entities."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ArgumentError("a DOCTYPE is not allowed")


def read_voc_boxes(
    path: Path, size: tuple[int, int], classes: Mapping[str, int] = OBJECTS
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the objects of an annotation in VOC's XML.

    Boxes are clipped to the image. Boxes without area and objects of unknown classes are left out.

    Args:
        path: path of the file.
        size: (height, width) of the image.
        classes: class of each kind of object, by name.

    Returns:
        Boxes (K, 4), labels (K,) and difficult flags (K,), as in an `Example`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not a valid annotation, gives another size, or only has objects
            of unknown classes.
    """
    with _parsed(path) as root:
        _check_size(root, size)
        things = root.findall("object")
        known = [one for one in things if _name(one) in classes]
        if things and not known:
            raise ArgumentError(
                f"an object's name must be one of {', '.join(classes)}, got {_name(things[0])!r}"
            )
        found = []
        for thing in known:
            corners = [thing.findtext(f"bndbox/{c}", "") for c in ("xmin", "ymin", "xmax", "ymax")]
            left, top, right, bottom = map(float, corners)
            if not (math.isfinite(left + top + right + bottom) and left <= right and top <= bottom):
                raise ArgumentError(f"a box must have xmin <= xmax and ymin <= ymax, got {corners}")
            box = cut((left - 1, top - 1, right, bottom), size)
            if box is not None:
                found.append((box, classes[_name(thing)], _difficult(thing)))
    return boxes_of(found)


def unknown_voc_names(path: Path, classes: Mapping[str, int] = OBJECTS) -> list[str]:
    """Return the names in an annotation that are not in `classes`. Raises as `read_voc_boxes`."""
    with _parsed(path) as root:
        return sorted({_name(one) for one in root.iterfind("object")} - set(classes))


@contextlib.contextmanager
def _parsed(path: Path) -> Iterator[ElementTree.Element]:
    """Parse an annotation and yield its root. Errors inside the block name the annotation."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        yield ElementTree.parse(path, ElementTree.XMLParser(target=_NoDoctype())).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # an unknown encoding
        raise ArgumentError(f"annotation {path} cannot be read: {error}") from error


def _name(thing: ElementTree.Element) -> str:
    return thing.findtext("name", "").strip()


def _check_size(root: ElementTree.Element, size: tuple[int, int]) -> None:
    """Raise if an annotation gives another image size. 0, which some tools write, is accepted."""
    given = [root.findtext(f"size/{side}", "").strip() or "0" for side in ("height", "width")]
    if any(float(one) not in (0, side) for one, side in zip(given, size, strict=True)):
        raise ArgumentError(
            f"its image must have {given[1]} x {given[0]} pixels, it has {size[1]} x {size[0]}"
        )


def _difficult(thing: ElementTree.Element) -> bool:
    """Whether an object is marked difficult, in any common notation."""
    text = thing.findtext("difficult", "").strip().lower()
    if text in FLAGS:
        return FLAGS[text]
    return bool(int(text))

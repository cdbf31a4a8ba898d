"""The images of a run, each with its name and, if there is one, its ground truth."""

from __future__ import annotations

import abc
import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from .. import checks, files
from ..data import SCENE_CLASSES, VOC, VOC_CLASSES, Example, Scenes
from ..data.painting import FAMILIES
from ..data.scenes import SPLITS
from ..data.voc import unknown_voc_names
from ..errors import ArgumentError, ArgumentTypeError
from ..victims import Detector, Victim
from .settings import DataSettings
from .truth import Truth, TruthFiles, notes_on_names, size_of

SUFFIXES = frozenset(
    {".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png"}
    | {".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
NAMED = 5  # how many of the files that are passed over
SCENES = 200  # if the settings give no number


class Source(abc.ABC):
    """A source of images, which are numbered from 0."""

    names: Sequence[str]
    """Names of the images in results: plain names, or paths below a folder."""
    note = ""
    """Note on the whole source for the user."""

    @abc.abstractmethod
    def read(self, index: int) -> tuple[Tensor, Truth]:
        """Return an image (3, H, W) and its truth.

        Raises:
            OSError, ValueError: if the image or its truth is broken.
        """

    def notes(self, index: int) -> list[str]:
        """Return notes for the user on an image that can be read."""
        return []

    def digest(self) -> str:
        """Return a hash of the names and the fingerprints of all images."""
        lines = [f"{name} {self.fingerprint(k)}" for k, name in enumerate(self.names)]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def fingerprint(self, index: int) -> str:
        """Return a text that is likely to change when the image or its truth changes."""
        return ""


def source_of(settings: DataSettings, victim: Victim | Detector) -> Source:
    """Return the source of the images that the settings ask for.

    Raises:
        FileNotFoundError, ValueError: if the data are missing, or the settings do not fit them.
    """
    kind = settings.data
    root = Path(kind)
    is_voc = root.is_dir() and any(path.is_dir() for path in root.glob("VOC[0-9]*"))
    if kind != "scenes" and settings.out.resolve().is_relative_to(root.resolve()):
        raise ArgumentError(
            f"--out must not lie in the folder of --data {kind}, got {settings.out}"
        )
    if kind != "scenes" and not root.is_dir():
        raise FileNotFoundError(f"--data must be scenes or a folder, got {kind}")
    if settings.labels is not None and (kind == "scenes" or is_voc):
        raise ArgumentError(f"--labels requires a folder of images, {kind} has its own labels")
    if settings.set is not None and kind != "scenes" and not is_voc:
        raise ArgumentError(f"--set requires scenes or VOC, {kind} is a folder of images")
    source: Source
    if kind == "scenes":
        family, split = _pair(settings.set or "07/test", "FAMILY/SPLIT, such as 07/test")
        if family not in FAMILIES or split not in SPLITS:
            raise ArgumentError(
                f"--set must be one of {', '.join(FAMILIES)} / one of {', '.join(SPLITS)}, "
                f"got {settings.set}"
            )
        source = Examples.of(Scenes(family, split, count=settings.images or SCENES), victim)
    elif is_voc:
        task = "detection" if isinstance(victim, Detector) else "segmentation"
        year, name = _pair(settings.set or "2007/test", "YEAR/LIST, such as 2007/test")
        voc = VOC(root, task, sets=[(year, name)])
        source = Examples.of(voc, victim)
    else:
        source = ImageFolder(root, settings.labels, victim)
    if settings.images is not None:
        source.names = source.names[: settings.images]
    return source


def _pair(text: str, form: str) -> tuple[str, str]:
    first, slash, second = text.partition("/")
    if not (first and slash and second):
        raise ArgumentError(f"--set must be {form}, got {text}")
    return first, second


def plain(name: str) -> str:
    """Normalise the name of a class for comparisons: torchvision's background is __background__."""
    return name.lower().strip("_")


class Examples(Source):
    """A data set of `dagcore.data` or of the user, for a network with the same classes.

    Args:
        examples: sequence of `dagcore.data.Example`, or of pairs (image, truth); see `Truth`.
        names: names of the images in results.
        classes: class names of the data set; None if they are unknown.
        victim: network that the examples are for.
    """

    def __init__(
        self,
        examples: Any,
        names: Sequence[str],
        classes: Sequence[str] | None,
        victim: Victim | Detector,
    ) -> None:
        own, classes = victim.classes or (), classes or ()
        differ = [plain(name) for name in own] != [plain(name) for name in classes]
        if own and classes and differ:
            raise ArgumentError(
                f"--model must have the classes of --data ({', '.join(classes[1:4])}, ...), it has "
                f"{', '.join(own[1:4])}, ...: attack the images as a folder, without their labels"
            )
        self.examples, self.names = examples, list(names)
        self.boxes = isinstance(victim, Detector)

    @classmethod
    def of(cls, dataset: Any, victim: Victim | Detector, most: int | None = None) -> Examples:
        """Wrap at most `most` examples of a data set. Finding their names reads no example."""
        numbers = range(len(dataset))[:most]
        if isinstance(dataset, Scenes):
            return cls(dataset, [dataset.key(k) for k in numbers], SCENE_CLASSES, victim)
        if isinstance(dataset, VOC):
            return cls(dataset, dataset.keys[:most], VOC_CLASSES, victim)
        return cls(dataset, [f"{k:06d}" for k in numbers], None, victim)

    def fingerprint(self, index: int) -> str:
        """Return file sizes for VOC, the image size for scenes, and else a hash of the example."""
        if isinstance(self.examples, Scenes):
            return " ".join(map(str, self.examples.size))
        if not isinstance(self.examples, VOC):
            return self._hash(index)
        paths = self.examples.files(index)
        return " ".join(str(path.stat().st_size) for path in paths if path.is_file())

    def notes(self, index: int) -> list[str]:
        """Return a note on objects of unknown classes."""
        if not (self.boxes and isinstance(self.examples, VOC)):
            return []
        return notes_on_names(unknown_voc_names(self.examples.files(index)[1]))

    def read(self, index: int) -> tuple[Tensor, Truth]:
        """Return an example's image, with its mask or its boxes."""
        example = self.examples[index]
        if not isinstance(example, Example):
            return self._pair(index, example)
        if self.boxes:
            truth = {name: getattr(example, name) for name in ("boxes", "labels", "difficult")}
            return example.image, truth
        if example.mask is None:
            raise ArgumentError(f"{self.names[index]} must have a mask, it has none")
        return example.image, torch.where(example.mask == 255, files.IGNORE, example.mask.int())

    def _hash(self, index: int) -> str:
        """Return a hash of an example's pixels and truth."""
        try:
            image, truth = self.read(index)
        except (OSError, ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        total = hashlib.sha256()
        values = truth.items() if isinstance(truth, Mapping) else [("labels", truth)]
        for name, value in [("image", image), *values]:
            total.update(name.encode())
            if isinstance(value, Tensor):
                total.update(f"{value.dtype} {tuple(value.shape)}".encode())
                raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                total.update(raw.numpy().tobytes())
        return total.hexdigest()

    def _boxes(self, name: str, truth: Any) -> Truth:
        """Check and return the user's true boxes."""
        if not isinstance(truth, Mapping) or not {"boxes", "labels"} <= set(truth):
            raise ArgumentError(
                f"the truth of {name} must have 'boxes' and 'labels', got {type(truth).__name__}"
                + (f" of {sorted(truth)}" if isinstance(truth, Mapping) else "")
            )
        kinds = {"boxes": checks.FLOAT_DTYPES, "labels": checks.LABEL_DTYPES}
        flags = (torch.bool, *checks.LABEL_DTYPES)
        found = {}
        for key in ("boxes", "labels", "difficult", "iscrowd"):
            if key in truth:
                checks.tensor(f"{key!r} of {name}", truth[key], kinds.get(key, flags))
                found[key] = truth[key] if key in kinds else truth[key].bool()
        return found

    def _pair(self, index: int, example: Any) -> tuple[Tensor, Truth]:
        """Check and return the user's pair (image, truth)."""
        name = f"dataset[{index}]"
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise ArgumentTypeError(
                f"{name} must be a dagcore.data.Example or a pair (image, truth), "
                f"got {type(example).__name__}"
            )
        image, truth = example
        checks.tensor(f"the image of {name}", image, checks.FLOAT_DTYPES)
        if image.dim() != 3 or len(image) != 3:
            raise ArgumentError(
                f"the image of {name} must have shape (3, H, W), got {tuple(image.shape)}"
            )
        if truth is None:
            return image, None
        if self.boxes:
            return image, self._boxes(name, truth)
        checks.tensor(f"the label map of {name}", truth, checks.LABEL_DTYPES)
        if truth.numel() and int(truth.min()) < 0:
            raise ArgumentError(
                f"the label map of {name} must not hold classes below 0 (255 is ignored), "
                f"got {int(truth.min())}"
            )
        return image, torch.where(truth == 255, files.IGNORE, truth.int())


class ImageFiles(Source):
    """Image files, all with labels or all without.

    Args:
        paths: paths of the files.
        names: names of the images in results.
        keys: names or paths by which labels are found.
        labels: folder or file with the labels; see `TruthFiles`.
        victim: network that the images are for.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        names: Sequence[str],
        keys: Sequence[str],
        labels: Path | None,
        victim: Victim | Detector,
    ) -> None:
        self.paths, self.names, self.keys = paths, names, keys
        if labels is not None and not labels.exists():
            raise FileNotFoundError(f"--labels {labels} does not exist")
        self.truths = None if labels is None else TruthFiles(labels, victim, keys)
        if self.truths is not None and not self.truths.of_many and len(paths) > 1:
            raise ArgumentError(
                f"--labels must be a folder with NAME.{self.truths.ending} for each of "
                f"{len(paths)} images, got the file {labels}"
            )

    def truth_file(self, index: int) -> Path | None:
        """Return the file with an image's labels; None without labels."""
        return None if self.truths is None else self.truths.find(self.keys[index])

    def fingerprint(self, index: int) -> str:
        """Return the file sizes of an image and its labels."""
        sizes = [self.paths[index].stat().st_size]
        with contextlib.suppress(FileNotFoundError):
            labels = self.truth_file(index)
            if labels is not None:
                sizes.append(labels.stat().st_size)
        return " ".join(map(str, sizes))

    def notes(self, index: int) -> list[str]:
        """Return notes on frames and objects that are left out."""
        frames = files.frame_count(self.paths[index])
        first = [f"the first of its {frames} frames"] if frames > 1 else []
        return first + ([] if self.truths is None else self.truths.notes(self.keys[index]))

    def read(self, index: int) -> tuple[Tensor, Truth]:
        """Read an image file and its labels."""
        image = files.read_image(self.paths[index])
        if self.truths is None:
            return image, None
        return image, self.truths.read(self.keys[index], size_of(image))


class ImageFolder(ImageFiles):
    """The image files in a folder and its subfolders, sorted by path.

    Hidden files and linked folders are left out. `note` lists files of other formats.
    """

    def __init__(self, root: Path, labels: Path | None, victim: Victim | Detector) -> None:
        found = sorted(
            path
            for path in root.rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(root).parts)
            and path.is_file()
        )
        paths = [path for path in found if path.suffix.lower() in SUFFIXES]
        if not paths:
            raise ArgumentError(
                f"--data {root} must hold images ({', '.join(sorted(SUFFIXES))}), there are none"
            )
        relative = [path.relative_to(root) for path in paths]
        names = [path.with_suffix("").as_posix() for path in relative]
        taken: dict[str, Path] = {}
        for name, path in zip(names, relative, strict=True):
            if name in taken:
                raise ArgumentError(
                    f"--data {root}: {taken[name]} and {path} would both be written to {name}.png"
                )
            taken[name] = path
        for name, path in taken.items():
            for above in PurePosixPath(name).parents:
                other = taken.get(str(above).removesuffix(".png"))
                if other is not None and above.suffix == ".png":
                    raise ArgumentError(
                        f"--data {root}: {other} would be written to {above}, where {path} needs a "
                        "folder"
                    )
        super().__init__(paths, names, [path.as_posix() for path in relative], labels, victim)
        others = [
            path.relative_to(root).as_posix()
            for path in found
            if path.suffix.lower() not in SUFFIXES
            and not (self.truths is not None and self.truths.uses(path))
        ]
        if others:
            more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
            self.note = (
                f"--data {root}: passed over {len(others)} files of other formats than "
                f"{', '.join(files.FORMATS)}: {', '.join(others[:NAMED])}{more}"
            )

"""What an attack on an image aims at: from the user's rules, the network and the ground truth."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..attacks.dag import DAG
from ..data.coco import CocoBoxes
from ..data.voc import read_voc_boxes
from ..engine import frozen
from ..errors import ArgumentError
from ..victims import Detector, Targets, Victim
from ..victims.detection import ADVERSARIAL_KINDS as BOX_KINDS
from .adversary import Adversary, find_class, is_pattern
from .outcome import predict, see

CONFIDENT = 0.5  # score of the detections that stand for the truth where none is given

Truth = Tensor | Mapping[str, Tensor] | None
"""A label map (h, w) int32; "boxes", "labels" and "difficult"; None: what the network sees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """How images are to be attacked, as users say it."""

    model: str
    weights: Path | None = None
    adversarial: str = "permutation"
    foreground: str | None = None
    background: str | None = None
    gamma: float = 0.5 / 255
    max_iter: int = 200
    goal: str | None = None
    epsilon: float | None = None
    tolerance: float = 0.0
    device: str | None = None
    seed: int = 0

    def attack(self) -> DAG:
        """The attack's settings; ValueError where the rules contradict each other."""
        paints = is_pattern(self.adversarial)
        if paints and self.goal == "leave":
            raise ArgumentError("--goal must be reach for a pattern, got leave")
        goal = self.goal or ("reach" if paints else "leave")
        if goal == "reach" and self.adversarial == "runner-up":
            raise ArgumentError("--adversarial runner-up goes with --goal leave only")
        return DAG(
            gamma=self.gamma,
            max_iter=self.max_iter,
            goal=goal,
            epsilon=self.epsilon,
            tolerance=self.tolerance,
            ignore_index=files.IGNORE,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTarget:
    """What an attack on one image aims at; see `dagcore.Sample`."""

    labels: Tensor
    adversarial: Tensor | str
    record: dict[str, Any]
    """What the image's record says of it."""
    at: Tensor | None = None
    boxes: Mapping[str, Tensor] | None = None
    """A detector's truth, its own detections where none was given."""


class Unfit(ArgumentError):
    """An image that a network cannot take."""


class Aims(abc.ABC):
    """Aims at the images of one network, made by `aims_of`.

    What can only be known by running the network is learned from its images, once for each size.
    """

    num_classes: int

    def __init__(self, rules: AttackOptions, victim: Any) -> None:
        self.rules, self.victim = rules, victim

    @abc.abstractmethod
    def settle(self, name: str, image: Tensor) -> None:
        """Learn what the network makes of images (3, H, W) of this size.

        Raises:
            Unfit: an image that it cannot take.
            ValueError: a network that cannot be attacked, or rules that do not go with it.
        """

    @abc.abstractmethod
    def check(self, name: str, image: Tensor, truth: Truth) -> None:
        """Raise ValueError unless an image that was settled can be attacked with a truth."""

    @abc.abstractmethod
    def aim(
        self, name: str, image: Tensor, truth: Truth, generator: torch.Generator
    ) -> ImageTarget:
        """The targets of an image (3, H, W) that was settled."""

    def _refused(self, name: str, image: Tensor, error: RuntimeError) -> RuntimeError | Unfit:
        """What to raise: the error itself where it is not the image's."""
        machine = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", ()))
        if isinstance(error, machine) or "DefaultCPUAllocator" in str(error):
            return error
        reason = str(error).partition("\n")[0]
        return Unfit(
            f"model {self.rules.model!r} cannot take {name} "
            f"({image.shape[2]} x {image.shape[1]} pixels): {reason}"
        )


def aims_of(rules: AttackOptions, victim: Victim | Detector) -> Aims:
    """The aims at a network's images."""
    return BoxAims(rules, victim) if isinstance(victim, Detector) else MapAims(rules, victim)


class MapAims(Aims):
    """A segmentation network, whose targets are pixels or cells."""

    def __init__(self, rules: AttackOptions, victim: Victim) -> None:
        super().__init__(rules, victim)
        self.maps: dict[tuple[int, int], tuple[int, int]] = {}  # (H, W) -> (h, w)
        self.adversary: Adversary | None = None

    def settle(self, name: str, image: Tensor) -> None:
        """Learn the size of the score map, and read the rules once the classes are known."""
        size = size_of(image)
        if size in self.maps:
            return
        try:
            scores = predict(self.victim, image[None])
        except RuntimeError as error:
            raise self._refused(name, image, error) from error
        shape = tuple(scores.shape[1:])
        if not bool(scores.isfinite().all()):
            raise Unfit(
                f"model {self.rules.model!r} must return finite scores, for {name} it does not"
            )
        if len(shape) != 3:
            raise ArgumentError(
                f"model {self.rules.model!r} must return scores of shape (N, C, h, w), "
                f"got {(1, *shape)}"
            )
        if self.adversary is None:
            self.num_classes = shape[0]
            self.adversary = Adversary.parse(
                self.rules.adversarial,
                self.rules.foreground,
                self.rules.background,
                self.num_classes,
                self.victim.classes,
            )
        self.maps[size] = (shape[1], shape[2])

    def check(self, name: str, image: Tensor, truth: Truth) -> None:
        """Raise unless a label map fits, and a pattern can be painted."""
        assert self.adversary is not None
        shape = self._targets(size_of(image))
        if truth is not None:
            assert isinstance(truth, Tensor)
            sizes = self._label_sizes(size_of(image))
            shape = size_of(truth[None])
            if shape not in sizes:
                allowed = [f"{w} x {h} pixels, the size of {of}" for (h, w), of in sizes.items()]
                raise ArgumentError(
                    f"label map of {name} must have {' or '.join(allowed)}, "
                    f"got {shape[1]} x {shape[0]}"
                )
            counted = truth[truth != files.IGNORE]
            if counted.numel() and int(counted.max()) >= self.num_classes:
                raise ArgumentError(
                    f"label map of {name} must hold classes below {self.num_classes} "
                    f"(255 is ignored), got {int(counted.max())}"
                )
        self.adversary.check(*shape)

    def aim(
        self, name: str, image: Tensor, truth: Truth, generator: torch.Generator
    ) -> ImageTarget:
        """Given labels, or those that the network sees."""
        if truth is None:
            labels = see(self.victim, image[None], self._targets(size_of(image)))[0].int()
        else:
            assert isinstance(truth, Tensor)
            labels = truth.to(image.device)
        assert self.adversary is not None
        adversarial, chosen = self.adversary.choose(labels, self.num_classes, generator)
        shape = {"num_classes": self.num_classes, "label_map": list(labels.shape)}
        return ImageTarget(labels, adversarial, shape | chosen)

    def _targets(self, size: tuple[int, int]) -> tuple[int, int]:
        """How many rows and columns of targets an image of a size (H, W) has, without labels."""
        return list(self._label_sizes(size))[-1 if self.victim.cells else 0]

    def _label_sizes(self, size: tuple[int, int]) -> dict[tuple[int, int], str]:
        """The sizes that a label map for an image of a size (H, W) may have, and whose they are."""
        height, width = self.maps[size]
        of_scores = {(height, width): "the model's score map"}
        fits = height <= size[0] and width <= size[1]  # scores are enlarged only
        return {size: "the image"} | of_scores if fits else of_scores


class BoxAims(Aims):
    """A detector, whose targets are proposals, anchors or queries near objects."""

    def __init__(self, rules: AttackOptions, victim: Detector) -> None:
        super().__init__(rules, victim)
        if is_pattern(rules.adversarial):
            raise ArgumentError(f"--adversarial {rules.adversarial} goes with segmentation only")
        for option, value in (
            ("--foreground", rules.foreground),
            ("--background", rules.background),
        ):
            if value is not None:
                raise ArgumentError(f"{option} goes with a pattern only")
        self.sizes: set[tuple[int, int]] = set()
        self.goal: int | None = None

    def settle(self, name: str, image: Tensor) -> None:
        """See whether the detector takes the size, and read the rules once classes are known."""
        size = size_of(image)
        if size in self.sizes:
            return
        kind = self.rules.adversarial
        drawn = kind if kind in BOX_KINDS else "vanish"
        self.num_classes = self._targets(name, image, None, drawn, None).num_classes
        if kind not in (*BOX_KINDS, "runner-up"):
            try:
                self.goal = find_class(kind, self.num_classes, self.victim.classes)
            except ValueError as error:
                raise ArgumentError(
                    f"--adversarial must be {', '.join(BOX_KINDS)}, runner-up or a class for a "
                    f"detector: {error}"
                ) from error
        self.sizes.add(size)

    def check(self, name: str, image: Tensor, truth: Truth) -> None:
        """Raise unless the true boxes are the detector's."""
        if truth is not None:
            try:
                self.victim.check_truth(0, truth, image[None], self.num_classes)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error

    def aim(
        self, name: str, image: Tensor, truth: Truth, generator: torch.Generator
    ) -> ImageTarget:
        """Proposals near true objects, or near those that the detector finds."""
        kind = self.rules.adversarial
        drawn = kind if kind in BOX_KINDS else "vanish"
        if truth is None:
            with frozen(self.victim), torch.no_grad():
                (found,) = self.victim.detect(image[None])
            truth = self.victim.confident(found, CONFIDENT, image[None])
        assert isinstance(truth, Mapping)
        targets = self._targets(name, image, truth, drawn, generator)
        labels = targets.labels[0]
        adversarial: Tensor | str = targets.adversarial_labels[0]
        record: dict[str, Any] = {
            "num_classes": self.num_classes,
            "proposals": int(targets.proposals[0]),
        }
        if self.goal is not None:
            adversarial = torch.where(labels == files.IGNORE, files.IGNORE, self.goal)
            record["class"] = self.goal
        elif kind == "runner-up":
            adversarial = kind
        at = targets.boxes[0] if targets.boxes_needed else None
        return ImageTarget(labels, adversarial, record, at, truth)

    def _targets(
        self,
        name: str,
        image: Tensor,
        truth: Truth,
        kind: str,
        generator: torch.Generator | None,
    ) -> Targets:
        try:
            found: Targets = self.victim.dense_targets(
                image[None],
                None if truth is None else [truth],
                adversarial=kind,
                generator=generator,
                ignore_index=files.IGNORE,
            )
        except RuntimeError as error:
            raise self._refused(name, image, error) from error
        return found


class TruthFiles:
    """Ground truth from files: label maps, for detectors VOC's XML or COCO's JSON.

    Args:
        given: a folder with NAME.png (NAME.xml) for each image NAME, or one file: of one image, or
            COCO's, of many.
        victim: the network that it is for.
        option: what messages call `given`.
    """

    def __init__(self, given: Path, victim: Victim | Detector, option: str = "--labels") -> None:
        self.given, self.option = given, option
        self.classes = victim.object_classes() if isinstance(victim, Detector) else None
        self.ending = "xml" if isinstance(victim, Detector) else "png"
        self.coco: CocoBoxes | None = None
        if isinstance(victim, Detector) and given.suffix == ".json":
            self.coco = CocoBoxes(given, self.classes)

    @property
    def of_many(self) -> bool:
        """Whether there is ground truth of more than one image."""
        return self.coco is not None or self.given.is_dir()

    def find(self, name: str) -> Path:
        """The file with the truth of the image NAME.ending, or sub/folder/NAME.ending."""
        if not self.given.is_dir():
            return self.given
        path = (self.given / name).with_suffix(f".{self.ending}")
        if not path.is_file():
            raise FileNotFoundError(f"{self.option}: {path} does not exist, but {name} needs it")
        return path

    def read(self, name: str, size: tuple[int, int]) -> Truth:
        """The truth of an image of a size (height, width).

        Raises:
            FileNotFoundError, ValueError: what is missing or wrong, and in which file.
        """
        if self.ending == "png":
            return files.read_label_map(self.find(name))
        if self.coco is not None:
            known = name if name in self.coco.images else Path(name).name
            boxes, labels, crowd = self.coco(known, size)
            return {"boxes": boxes, "labels": labels, "difficult": crowd}
        path = self.find(name)
        if self.classes is None:
            raise ArgumentError(f"the model names no classes, which {path} needs")
        boxes, labels, difficult = read_voc_boxes(path, size, self.classes)
        return {"boxes": boxes, "labels": labels, "difficult": difficult}


def size_of(image: Tensor) -> tuple[int, int]:
    """Height and width of an image (3, H, W)."""
    return image.shape[1], image.shape[2]


def find_device(name: str | None) -> torch.device:
    """The device to run on: a GPU where there is one, unless told otherwise."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ArgumentError(
            f"--device {name} is not there: torch sees {count} CUDA devices, try cpu"
        )
    return device


def seed_of(seed: int, index: int) -> int:
    """The seed of one image's generator: no two images of any two runs share theirs."""
    (word,) = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return int(word >> np.uint64(1))

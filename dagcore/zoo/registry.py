"""Networks by name: the paper's twelve, a one-stage detector, and some trained against attacks.

Parameters in millions at width 1 with VOC's 21 classes, without the batch norms used in training,
and the published numbers (~: usually quoted for the authors' models):

    architecture    built    published
    fcn-alex         57.0           57
    fcn-vgg         134.4          134
    dl-vgg           20.5         20.5
    dl-rn101         44.0          ~44
    fr-zf            59.3          ~59
    fr-vgg          137.1         ~137
    r-fcn-rn50       31.6          ~32
    r-fcn-rn101      50.6          ~51

fcos-vgg, which is not in the paper, has 33.7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checks
from ..errors import ArgumentError
from ..victims.load import find_name, register
from ..victims.segmentation import Victim
from ..victims.weights import load_state, read_state
from . import detection, segmentation
from .backbones import resnet, vgg16, zf
from .checkpoint import inside, read_metadata

NUM_CLASSES = 21  # VOC's, the background included
WEIGHTS = Path(__file__).with_name("weights")


@dataclass(frozen=True)
class Adversary:
    """The attack that a network is trained against, on half of each batch."""

    attack: str
    """One of `dagcore.defences.training.INNER`."""
    epsilon: float
    """Radius of its L-infinity ball, for images in [0, 1]."""
    steps: int
    """Number of updates."""


@dataclass(frozen=True)
class Entry:
    """A network of the zoo."""

    name: str
    """Name of the network, as in the paper's tables."""
    task: str
    """Either "segmentation" or "detection"."""
    architecture: str
    """Key in `ARCHITECTURES`."""
    training_set: str
    """Families of scenes, "07" or "07+12": this project's sets under the paper's names."""
    width: float
    """Width of the shipped network; 1 is the paper's size."""
    adversary: Adversary | None = None
    """Attack that the network is trained against; None for training on clean images."""

    def against(self, adversary: Adversary) -> Entry:
        """Return the entry of the same network trained against an attack, as NAME-ATTACK.

        Raises:
            ValueError: if this network is itself trained against an attack.
        """
        if self.adversary is not None:
            raise ArgumentError(
                f"name must be that of a network trained on clean images, got {self.name}"
            )
        name = f"{self.name}-{adversary.attack.upper()}"
        return replace(self, name=name, adversary=adversary)

    @property
    def two_stage(self) -> bool:
        """Whether the network is a detector with a region network."""
        return self.architecture.startswith(("fr-", "r-fcn-"))

    @property
    def backbone(self) -> str:
        """Name of the network's backbone in `BACKBONES`."""
        return next(name for name in BACKBONES if self.architecture in BACKBONES[name].inside)

    @property
    def slug(self) -> str:
        """Name of the network in file names."""
        return self.name.lower().replace("*", "-star")

    @property
    def path(self) -> Path:
        """Path of the shipped weights."""
        return WEIGHTS / f"{self.slug}.safetensors"

    def shipped(self) -> Path:
        """Return `path`.

        Raises:
            FileNotFoundError: if the weights are not there.
        """
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.name} has no weights in {self.path.parent}: "
                f"make them with `dagcore zoo train '{self.name}' --install`"
            )
        return self.path


ENTRIES = (
    Entry("FCN-Alex", "segmentation", "fcn-alex", "07", 5 / 32),
    Entry("FCN-Alex*", "segmentation", "fcn-alex", "07+12", 5 / 32),
    Entry("FCN-VGG", "segmentation", "fcn-vgg", "07", 3 / 32),
    Entry("FCN-VGG*", "segmentation", "fcn-vgg", "07+12", 3 / 32),
    Entry("DL-VGG", "segmentation", "dl-vgg", "07+12", 3 / 16),
    Entry("DL-RN101", "segmentation", "dl-rn101", "07+12", 5 / 32),
    Entry("FR-ZF-07", "detection", "fr-zf", "07", 5 / 32),
    Entry("FR-ZF-0712", "detection", "fr-zf", "07+12", 5 / 32),
    Entry("FR-VGG-07", "detection", "fr-vgg", "07", 3 / 32),
    Entry("FR-VGG-0712", "detection", "fr-vgg", "07+12", 3 / 32),
    Entry("R-FCN-RN50", "detection", "r-fcn-rn50", "07+12", 5 / 32),
    Entry("R-FCN-RN101", "detection", "r-fcn-rn101", "07+12", 5 / 32),
    Entry("FCOS-VGG", "detection", "fcos-vgg", "07+12", 3 / 32),
)


# Trained against attacks. They are not among the networks of the paper's tables.
ROBUST = tuple(
    next(entry for entry in ENTRIES if entry.name == name).against(adversary)
    for name, adversary in (
        ("FCN-VGG", Adversary("pgd", 2 / 255, 3)),
        ("DL-VGG", Adversary("pgd", 2 / 255, 3)),
        ("FR-ZF-07", Adversary("dag", 2 / 255, 3)),
    )
)
EVERY = (*ENTRIES, *ROBUST)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "fcn-alex": segmentation.fcn_alex,
    "fcn-vgg": segmentation.FCN8s,
    "dl-vgg": segmentation.deeplab_large_fov,
    "dl-rn101": segmentation.DeepLabV2,
    "fr-zf": detection.faster_rcnn_zf,
    "fr-vgg": detection.faster_rcnn_vgg,
    "fcos-vgg": detection.fcos_vgg,
    "r-fcn-rn50": partial(detection.r_fcn, depth=50),
    "r-fcn-rn101": partial(detection.r_fcn, depth=101),
}
RESIDUAL = ("dl-rn101", "r-fcn-rn50", "r-fcn-rn101")


@dataclass(frozen=True)
class Backbone:
    """A feature extractor, and the architectures built on it."""

    build: Callable[..., Any]
    """Function of `width` that builds it with batch norms, for normalised images."""
    inside: tuple[str, ...]
    """Architectures built on it."""


BACKBONES = {
    "AlexNet": Backbone(partial(segmentation.whole_alexnet, norm=True, dropout=0.0), ("fcn-alex",)),
    "ZF": Backbone(partial(zf, norm=True), ("fr-zf",)),
    "VGG-16": Backbone(partial(vgg16, norm=True), ("fcn-vgg", "dl-vgg", "fr-vgg", "fcos-vgg")),
    "ResNet-50": Backbone(partial(resnet, 50), ("r-fcn-rn50",)),
    "ResNet-101": Backbone(partial(resnet, 101), ("dl-rn101", "r-fcn-rn101")),
}


def find(name: str | Entry) -> Entry:
    """Return the entry of this name. Case, hyphens and underscores do not matter; "-star" is "*".

    An entry is returned unchanged.

    Raises:
        ValueError: if there is no such name. The message lists the known names.
    """
    if isinstance(name, Entry):
        return name
    found = find_name(name, [entry.name for entry in EVERY])
    return next(entry for entry in EVERY if entry.name == found)


def build(
    name: str | Entry,
    *,
    num_classes: int = NUM_CLASSES,
    width: float | None = None,
    norm: bool = False,
    **options: Any,
) -> nn.Module:
    """Build an untrained network in training mode, with weights from torch's global generator.

    Args:
        name: name as in the paper's tables, such as "FCN-VGG*"; see `find`.
        num_classes: number of classes, with the background as class 0.
        width: factor on the channels, where 1 is the paper's size; the shipped network's if None.
        norm: whether a batch norm follows each convolution of AlexNet, ZF and VGG-16, as training
            from scratch needs; see `fold`. ResNets always have batch norms.
        options: `dropout`, for networks with fc6 and fc7. `rates`, the dilations of DL-RN101's
            pyramid. `enlarge`, the integer factor by which FCN-Alex enlarges images (default: 2; 1
            at width 1). For detectors `min_size` and `max_size` of the image's sides,
            `anchor_sizes` in pixels of the resized image, `aspect_ratios`, and torchvision's other
            FasterRCNN options. By default detectors are set up for scenes of 128x160 pixels, at
            width 1 for the papers' shorter side of 600 and anchors.

    Returns:
        For segmentation a `dagcore.victims.Victim`, images (N, 3, H, W) in [0, 1] -> scores
        (N, C, h, w) at the network's own resolution. For detection torchvision's FasterRCNN or
        FCOS.

    Raises:
        ValueError: if the name is unknown or an argument is out of range.
        ImportError: if torchvision is missing, for detectors and ResNets.
    """
    entry = find(name)
    width = entry.width if width is None else width
    checks.number("width", width, above=0)
    checks.integer("num_classes", num_classes, at_least=2)
    if entry.architecture not in RESIDUAL:
        options["norm"] = norm
    if entry.task == "detection" and width == 1:
        scale = dict(detection.PAPER_SCALE)
        if not entry.two_stage:
            del scale["anchor_sizes"]
        options = {**scale, **options}
    if entry.architecture == "fcn-alex" and width != 1:
        options = {"enlarge": segmentation.SCENE_ENLARGEMENT, **options}
    network = ARCHITECTURES[entry.architecture](num_classes, width=width, **options)
    if entry.task == "detection":
        return network
    return Victim(network, mean=detection.MEAN, std=detection.STD)


def load(
    name: str | Entry,
    weights: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    width: float | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> nn.Module:
    """Load a trained network, in eval mode and float32.

    Args:
        name: name as in the paper's tables, such as "FCN-VGG*"; see `find`.
        weights: a file, .safetensors or a state dict made by torch.save, for the network that
            `build` makes with norm=False; the shipped weights if None.
        device: where the network runs.
        width: factor on the channels; if None that in the file, or 1, the paper's size.
        num_classes: number of classes; if None that in the file, or VOC's 21.
        options: as for `build`.

    Returns:
        A network as `build` makes it. Its attribute `classes` has the names of the classes, or None
        if the file does not name them.

    Raises:
        ValueError: if the name is unknown or the weights do not fit.
        FileNotFoundError: if there is no such file, or the weights are not shipped yet.
    """
    entry = find(name)
    path = entry.shipped() if weights is None else Path(weights)
    state = read_state(path)
    known = read_metadata(path) if path.suffix == ".safetensors" else {}
    classes = known.get("classes")
    classes = tuple(classes) if isinstance(classes, list) else None
    width = known.get("width", 1) if width is None else width
    if num_classes is None:
        num_classes = len(classes) if classes else NUM_CLASSES
    network = build(entry, num_classes=num_classes, width=width, **options)
    what = f"{path} and {entry.name} of width {width:g} with {num_classes} classes"
    load_state(inside(network), state, what)
    network.classes = classes  # type: ignore[assignment]
    return network.eval().to(device)


for _entry in EVERY:
    register(_entry.name, partial(load, _entry.name))

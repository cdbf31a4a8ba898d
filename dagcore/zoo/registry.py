"""Thirteen networks by name: the paper's twelve, and a one-stage detector beside them.

Parameters in millions at width 1 with VOC's 21 classes, without the batch norms that serve
training, beside the numbers published (~: usually quoted for the authors' models):

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checks
from ..victims.load import find_name, register
from ..victims.segmentation import Victim
from ..victims.weights import load_state, read_state
from . import detection, segmentation
from .checkpoint import inside, read_metadata

NUM_CLASSES = 21  # VOC's, the background included
WEIGHTS = Path(__file__).with_name("weights")


@dataclass(frozen=True)
class Entry:
    """One network."""

    name: str
    task: str
    """Either "segmentation" or "detection"."""
    architecture: str
    training_set: str
    """Scenes of family 07, or 07+12: this project's sets under the paper's names."""
    width: float
    """Of the shipped network; 1 is the paper's size."""

    @property
    def two_stage(self) -> bool:
        """Whether it is a detector with a region network."""
        return self.architecture.startswith(("fr-", "r-fcn-"))

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return self.name.lower().replace("*", "-star")

    @property
    def path(self) -> Path:
        """Where the shipped weights lie."""
        return WEIGHTS / f"{self.slug}.safetensors"


ENTRIES = (
    Entry("FCN-Alex", "segmentation", "fcn-alex", "07", 1 / 8),
    Entry("FCN-Alex*", "segmentation", "fcn-alex", "07+12", 1 / 8),
    Entry("FCN-VGG", "segmentation", "fcn-vgg", "07", 3 / 32),
    Entry("FCN-VGG*", "segmentation", "fcn-vgg", "07+12", 3 / 32),
    Entry("DL-VGG", "segmentation", "dl-vgg", "07+12", 3 / 16),
    Entry("DL-RN101", "segmentation", "dl-rn101", "07+12", 5 / 32),
    Entry("FR-ZF-07", "detection", "fr-zf", "07", 3 / 32),
    Entry("FR-ZF-0712", "detection", "fr-zf", "07+12", 3 / 32),
    Entry("FR-VGG-07", "detection", "fr-vgg", "07", 3 / 32),
    Entry("FR-VGG-0712", "detection", "fr-vgg", "07+12", 3 / 32),
    Entry("R-FCN-RN50", "detection", "r-fcn-rn50", "07+12", 5 / 32),
    Entry("R-FCN-RN101", "detection", "r-fcn-rn101", "07+12", 5 / 32),
    Entry("FCOS-VGG", "detection", "fcos-vgg", "07+12", 3 / 32),
)


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


def find(name: str) -> Entry:
    """The entry of a name, in any case and spelling of hyphens; "-star" is the "*".

    Raises:
        ValueError: no such name; the message has those that there are.
    """
    found = find_name(name, [entry.name for entry in ENTRIES])
    return next(entry for entry in ENTRIES if entry.name == found)


def build(
    name: str,
    *,
    num_classes: int = NUM_CLASSES,
    width: float | None = None,
    norm: bool = False,
    **options: Any,
) -> nn.Module:
    """An untrained network, in training mode, its weights drawn from torch's global generator.

    Args:
        name: as in the paper's tables, such as "FCN-VGG*"; see `find`.
        num_classes: with the background, which is class 0.
        width: multiplies the channels: 1 is the paper's size; the shipped network's if None.
        norm: whether a batch norm follows each convolution of AlexNet, ZF and VGG-16, as training
            from scratch needs; see `fold`. ResNets always have theirs.
        options: `dropout` for networks with fc6 and fc7; `rates`, of DL-RN101's pyramid; `enlarge`,
            of FCN-Alex's images, a whole number (2, but 1 at width 1); for detectors `min_size`
            and `max_size` of the image's sides, `anchor_sizes` (of the resized image's pixels),
            `aspect_ratios`, and torchvision's other FasterRCNN options. Detectors take scenes of
            128x160 pixels by default; at width 1 they have the papers' short side of 600 and its
            anchors.

    Returns:
        For segmentation a `dagcore.victims.Victim`, images (N, 3, H, W) in [0, 1] -> scores
        (N, C, h, w) at the network's own resolution; for detection torchvision's FasterRCNN or
        FCOS.

    Raises:
        ValueError: an unknown name, or arguments out of range.
        ImportError: torchvision is missing, for detectors and ResNets.
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
    name: str,
    weights: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    width: float | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> nn.Module:
    """A trained network, in eval mode and float32.

    Args:
        name: as in the paper's tables, such as "FCN-VGG*"; see `find`.
        weights: the shipped ones if None; else a file, .safetensors or a state dict made by
            torch.save, of the network that `build` makes with norm=False.
        device: where it shall run.
        width: as the file says; 1, the paper's size, where it says nothing.
        num_classes: as the file says; VOC's 21 where it says nothing.
        options: as for `build`.

    Returns:
        As `build`. Its attribute `classes` has the names of the classes, where the file has.

    Raises:
        ValueError: an unknown name, or weights that do not fit.
        FileNotFoundError: no such file, or weights that are not shipped yet.
    """
    entry = find(name)
    path = entry.path if weights is None else Path(weights)
    if weights is None and not path.is_file():
        raise FileNotFoundError(
            f"{entry.name} has no weights in {path.parent}: "
            f"`dagcore zoo train '{entry.name}'` makes them"
        )
    state = read_state(path)
    known = read_metadata(path) if path.suffix == ".safetensors" else {}
    classes = known.get("classes")
    classes = tuple(classes) if isinstance(classes, list) else None
    width = known.get("width", 1) if width is None else width
    if num_classes is None:
        num_classes = len(classes) if classes else NUM_CLASSES
    network = build(entry.name, num_classes=num_classes, width=width, **options)
    what = f"{path} and {entry.name} of width {width:g} with {num_classes} classes"
    load_state(inside(network), state, what)
    network.classes = classes  # type: ignore[assignment]
    return network.eval().to(device)


for _entry in ENTRIES:
    register(_entry.name, partial(load, _entry.name))

"""How good a network of the zoo is, on scenes or on VOC."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import checks, ops
from ..data import Example, Scenes
from ..errors import ArgumentError
from ..metrics import PROTOCOLS, AveragePrecision, MeanIoU, Score
from ..victims import Victim
from .registry import NUM_CLASSES, Entry, load


def evaluate(
    network: str | Entry | nn.Module,
    examples: Iterable[Example] | None = None,
    *,
    count: int = 200,
    protocol: str = "voc2007",
    device: str | torch.device | None = None,
) -> Score:
    """Mean IoU of a segmentation network, mean average precision of a detector, in percent.

    Images are read one at a time, in whatever sizes they come. Scores of a segmentation network
    are enlarged bilinearly to the image's size (align_corners=False) and the best class counts.

    Args:
        network: a name or an entry, for the shipped weights; or a network as `load` returns it.
        examples: with masks for segmentation, boxes for detection, of the network's classes; the
            first `count` test scenes of family "07" if None.
        count: number of scenes.
        protocol: of average precision: "voc2007", "voc2010" or "coco".
        device: where the network shall run; where it is if None.

    Raises:
        ValueError: an unknown name or protocol, a count out of range, or an example without what
            the network is measured by.
        FileNotFoundError: weights that are not shipped yet.
    """
    checks.integer("count", count, at_least=1)
    checks.choice("protocol", protocol, PROTOCOLS)
    if not isinstance(network, nn.Module):
        network = load(network.name if isinstance(network, Entry) else network)
    if device is not None:
        network = network.to(device)
    if examples is None:
        examples = Scenes("07", "test", count=count)
    classes = getattr(network, "classes", None)
    measure = _segmentation if isinstance(network, Victim) else _detection
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            return measure(network, examples, len(classes) if classes else NUM_CLASSES, protocol)
    finally:
        network.train(training)


def _segmentation(
    network: nn.Module, examples: Iterable[Example], num_classes: int, protocol: str
) -> Score:
    measure = MeanIoU(num_classes)
    device = _device(network)
    for example in examples:
        if example.mask is None:
            raise ArgumentError(f"examples must have masks, {example.key} has none")
        scores = network(example.image[None].to(device))
        size = example.mask.shape
        measure.update(ops.argmax_bilinear(scores, (size[0], size[1]))[0], example.mask.to(device))
    return measure.compute()


def _detection(
    network: nn.Module, examples: Iterable[Example], num_classes: int, protocol: str
) -> Score:
    measure = AveragePrecision(num_classes, protocol=protocol)
    device = _device(network)
    for example in examples:
        found: dict[str, Tensor] = network([example.image.to(device)])[0]
        measure.update(found, example.boxes, example.labels, example.difficult)
    return measure.compute()


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device

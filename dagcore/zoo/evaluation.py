"""Scores of the zoo's networks, on scenes or on VOC."""

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
    """Measure a segmentation network's mean IoU or a detector's mean average precision.

    Images are read one at a time and may differ in size. Scores of a segmentation network are
    enlarged bilinearly to the mask's size (align_corners=False), and the best class counts.

    Args:
        network: a name or an entry, for the shipped weights; or a network as `load` returns it.
        examples: examples of the network's classes, with masks for segmentation and boxes for
            detection; the first `count` test scenes of family "07" if None.
        count: number of scenes.
        protocol: protocol of average precision: "voc2007", "voc2010" or "coco".
        device: where to run the network; its current device if None.

    Returns:
        The score, in percent.

    Raises:
        ValueError: if a name or protocol is unknown, the count is out of range, or an example lacks
            the ground truth that is needed.
        FileNotFoundError: if the weights are not shipped yet.
    """
    checks.integer("count", count, at_least=1)
    checks.choice("protocol", protocol, PROTOCOLS)
    if not isinstance(network, nn.Module):
        network = load(network)
    if device is not None:
        network = network.to(device)
    if examples is None:
        examples = Scenes("07", "test", count=count)
    classes = getattr(network, "classes", None)
    num_classes = len(classes) if classes else NUM_CLASSES
    where, training = next(network.parameters()).device, network.training
    network.eval()
    try:
        with torch.no_grad():
            if isinstance(network, Victim):
                return _segmentation(network, examples, MeanIoU(num_classes), where)
            precision = AveragePrecision(num_classes, protocol=protocol)
            for example in examples:
                found: dict[str, Tensor] = network([example.image.to(where)])[0]
                precision.update(found, example.boxes, example.labels, example.difficult)
            return precision.compute()
    finally:
        network.train(training)


def _segmentation(
    network: nn.Module, examples: Iterable[Example], measure: MeanIoU, device: torch.device
) -> Score:
    for example in examples:
        if example.mask is None:
            raise ArgumentError(f"examples must have masks, {example.key} has none")
        scores = network(example.image[None].to(device))
        size = example.mask.shape
        measure.update(ops.argmax_bilinear(scores, (size[0], size[1]))[0], example.mask.to(device))
    return measure.compute()

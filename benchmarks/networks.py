"""The networks of the benchmarks: real architectures; weights are random but for the demo's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import calibrate, photographs
from torch import nn

from dagcore import victims

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torchvision_network(name: str, classes: int = 21) -> nn.Module:
    from torchvision.models import segmentation

    torch.manual_seed(0)
    network = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=classes)
    return calibrate(victims.Victim(network, mean=MEAN, std=STD), photographs(4, 256, 256))


def segformer(classes: int = 150) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=classes))
    return calibrate(victims.Victim(network, mean=MEAN, std=STD), photographs(4, 256, 256))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "deeplabv3_mobilenet_v3_large": lambda: torchvision_network("deeplabv3_mobilenet_v3_large"),
    "fcn_resnet50": lambda: torchvision_network("fcn_resnet50"),
    "segformer_b0": segformer,
    "demo": lambda: victims.load("demo").eval(),
}

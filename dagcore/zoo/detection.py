"""The paper's detectors, as torchvision's FasterRCNN with other parts inside, and an FCOS.

They take a list of images (3, H, W) in [0, 1]. Training, proposals, losses and detections are
torchvision's own. Each detector has one feature map, "0", of stride 16; FCOS's has stride 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..optional import optional_import
from .backbones import EXPANSION, resnet, scaled, vgg16, zf

STRIDE = 16
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
# Image sides and anchors, for scenes of 128x160 with objects of 25 to 110 pixels and as in the
# papers.
SCENE_SCALE: dict[str, Any] = {"min_size": 128, "max_size": 213, "anchor_sizes": (16, 32, 64, 96)}
PAPER_SCALE: dict[str, Any] = {"min_size": 600, "max_size": 1000, "anchor_sizes": (128, 256, 512)}
# The papers' batch sizes and numbers of proposals, where torchvision's differ.
PAPER_OPTIONS = {
    "rpn_pre_nms_top_n_train": 12000,
    "rpn_pre_nms_top_n_test": 6000,
    "rpn_post_nms_top_n_test": 300,
    "box_batch_size_per_image": 128,
}


def faster_rcnn_zf(num_classes: int, *, width: float, norm: bool, **options: Any) -> nn.Module:
    """Build Faster R-CNN on ZF: 6x6 RoI pooling of conv5, two fully connected layers."""
    return _faster_rcnn(zf(width=width, norm=norm), 6, 256, num_classes, width, **options)


def faster_rcnn_vgg(num_classes: int, *, width: float, norm: bool, **options: Any) -> nn.Module:
    """Build Faster R-CNN on VGG-16: 7x7 RoI pooling of conv5_3, two fully connected layers."""
    features = vgg16(width=width, norm=norm, strides=(2, 2, 2, 2))
    return _faster_rcnn(features, 7, 512, num_classes, width, **options)


def r_fcn(num_classes: int, *, depth: int, width: float, **options: Any) -> nn.Module:
    """Build R-FCN on ResNet-50 or -101: proposals from conv4, position-sensitive maps on conv5.

    Box refinement is class-agnostic, as in the paper.
    """
    backbone: Any = resnet(depth, width=width, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))
    pool = PositionSensitive(backbone.layer4, num_classes, width=width)
    del backbone.layer4
    backbone.out_channels = EXPANSION * scaled(256, width)
    vote = Vote(num_classes)
    return _detector(backbone, scaled(512, width), pool, nn.Identity(), vote, options)


def fcos_vgg(num_classes: int, *, width: float, norm: bool, **options: Any) -> nn.Module:
    """Build FCOS on VGG-16 with a dilated conv5: one level of points, 8 pixels apart."""
    detection = optional_import("torchvision.models.detection", "vision")
    backbone = vgg16(width=width, norm=norm, pool_size=3, strides=(2, 2, 2, 1))
    sides = {key: SCENE_SCALE[key] for key in ("min_size", "max_size")}
    channels = backbone.out_channels
    head = detection.fcos.FCOSHead(32, 1, num_classes)  # takes no norm: its parts are made below
    # A number of groups that divides the channels; at width 1 it is FCOS's 32.
    normed = partial(nn.GroupNorm, math.gcd(32, channels))
    head.classification_head = detection.fcos.FCOSClassificationHead(
        channels, 1, num_classes, norm_layer=normed
    )
    head.regression_head = detection.fcos.FCOSRegressionHead(channels, 1, norm_layer=normed)
    network: nn.Module = detection.FCOS(
        backbone,
        num_classes,
        image_mean=MEAN,
        image_std=STD,
        anchor_generator=detection.rpn.AnchorGenerator(((8,),), ((1.0,),)),
        head=head,
        **{**sides, **options},
    )
    return network


Maps = Mapping[str, Tensor]
Sizes = list[tuple[int, int]]


class OnOneMap(nn.Module):
    """A pooling layer of torchvision.ops with the interface that torchvision's RoIHeads expect.

    Attributes:
        cell: side of the feature map's cells in pixels, to which boxes are rounded.
    """

    cell = STRIDE

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, features: Maps, proposals: list[Tensor], image_shapes: Sizes) -> Tensor:
        """Pool feature maps at the proposals (R_n, 4) of each image: (R, channels, k, k)."""
        pooled: Tensor = self.pool(features["0"], proposals)
        return pooled


def position_sensitive_pool(maps: Tensor, proposals: list[Tensor], bins: int) -> Tensor:
    """Pool each part of each box from its own maps, averaging over the cells that it touches.

    Args:
        maps: (N, channels * bins^2, h, w), ordered by channel, then by part.
        proposals: boxes (R_n, 4) of each image, in pixels of the images.
        bins: boxes have bins x bins parts.

    Returns:
        (R, channels, bins, bins) for all boxes; 0 where a part lies outside the maps.
    """
    ps_roi_pool = optional_import("torchvision.ops", "vision").ps_roi_pool
    # torchvision's forward leaves out the last row and column, but its backward sends gradients to
    # them. The padding makes them zeros that nothing reads.
    padded = nn.functional.pad(maps, (0, 1, 0, 1))
    pooled: Tensor = ps_roi_pool(padded, proposals, bins, 1 / STRIDE)
    return pooled


class PositionSensitive(nn.Module):
    """R-FCN after conv4: conv5, a 1x1 reduction, and position-sensitive pooling of score maps.

    conv4 is the detector's only feature map, so that the region network reads it. All convolutions
    run on the whole map before boxes are pooled.

    Args:
        layer4: conv5.
        num_classes: number of classes, with the background.
        width: factor on the channels.
        bins: boxes are pooled over bins x bins parts, each from its own score maps.

    Attributes:
        cell: side of the maps' cells in pixels, to which boxes are rounded.
    """

    cell = STRIDE

    def __init__(self, layer4: nn.Module, num_classes: int, *, width: float, bins: int = 7) -> None:
        super().__init__()
        self.bins = bins
        channels = scaled(1024, width)
        self.layer4 = layer4
        self.conv_new_1 = nn.Conv2d(EXPANSION * scaled(512, width), channels, 1)
        self.rfcn_cls = nn.Conv2d(channels, num_classes * bins**2, 1)
        self.rfcn_bbox = nn.Conv2d(channels, 4 * bins**2, 1)
        for layer in (self.rfcn_cls, self.rfcn_bbox):
            _small(layer)

    def score_maps(self, conv4: Tensor) -> Tensor:
        """Return score maps (N, C * bins^2, h, w) of conv4, ordered by class, then by bin."""
        scores: Tensor = self.rfcn_cls(self._reduced(conv4))
        return scores

    def pool_maps(self, maps: Maps, proposals: list[Tensor], image_shapes: Sizes) -> Tensor:
        """Pool score maps in each part of each proposal: (R, C, bins, bins)."""
        return position_sensitive_pool(maps["0"], proposals, self.bins)

    def _reduced(self, conv4: Tensor) -> Tensor:
        reduced: Tensor = self.conv_new_1(self.layer4(conv4)).relu_()
        return reduced

    def forward(self, features: Maps, proposals: list[Tensor], image_shapes: Sizes) -> Tensor:
        """Return scores and box offsets in each part of each proposal: (R, C + 4, bins, bins)."""
        reduced = self._reduced(features["0"])
        maps = torch.cat([self.rfcn_cls(reduced), self.rfcn_bbox(reduced)], 1)
        return self.pool_maps({"0": maps}, proposals, image_shapes)


class Vote(nn.Module):
    """The mean over the parts of a box: (R, C + 4, k, k) -> scores (R, C), offsets (R, 4 C)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores before softmax, and the class-agnostic offsets repeated for every class."""
        votes = pooled.mean((2, 3))
        scores, offsets = votes[:, : self.num_classes], votes[:, self.num_classes :]
        return scores, offsets.repeat(1, self.num_classes)


def _faster_rcnn(
    features: Any,
    bins: int,
    rpn_channels: int,
    num_classes: int,
    width: float,
    *,
    dropout: float = 0.5,
    **options: Any,
) -> nn.Module:
    pool = OnOneMap(optional_import("torchvision.ops", "vision").RoIPool(bins, 1 / STRIDE))
    hidden = scaled(4096, width)
    head = nn.Sequential()
    head.add_module("flatten", nn.Flatten())
    for name, inputs in (("fc6", features.out_channels * bins**2), ("fc7", hidden)):
        layer = nn.Linear(inputs, hidden)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        head.add_module(name, layer)
        head.add_module(f"{name}_relu", nn.ReLU(inplace=True))
        head.add_module(f"{name}_drop", nn.Dropout(dropout))
    models = optional_import("torchvision.models.detection.faster_rcnn", "vision")
    predictor = models.FastRCNNPredictor(hidden, num_classes)
    return _detector(features, scaled(rpn_channels, width), pool, head, predictor, options)


def _detector(
    backbone: Any,
    rpn_channels: int,
    pool: nn.Module,
    head: nn.Module,
    predictor: nn.Module,
    options: Mapping[str, Any],
) -> nn.Module:
    """Build torchvision's FasterRCNN from parts.

    `options` are its keyword arguments, and `anchor_sizes` and `aspect_ratios`.
    """
    detection = optional_import("torchvision.models.detection", "vision")
    settings = {"aspect_ratios": (0.5, 1.0, 2.0), **SCENE_SCALE, **PAPER_OPTIONS, **options}
    anchors = detection.rpn.AnchorGenerator(
        (tuple(settings.pop("anchor_sizes")),), (tuple(settings.pop("aspect_ratios")),)
    )
    # torchvision's region head, with a 3x3 convolution to another number of channels.
    region_head = detection.rpn.RPNHead(rpn_channels, anchors.num_anchors_per_location()[0])
    region_head.conv[0][0] = _small(nn.Conv2d(backbone.out_channels, rpn_channels, 3, padding=1))
    network: Any = detection.FasterRCNN(
        backbone,
        image_mean=MEAN,
        image_std=STD,
        rpn_anchor_generator=anchors,
        rpn_head=region_head,
        box_head=head,
        box_predictor=predictor,
        **settings,
    )
    network.roi_heads.box_roi_pool = pool  # the constructor accepts a MultiScaleRoIAlign only
    return network  # type: ignore[no-any-return]


def _small(convolution: nn.Conv2d) -> nn.Conv2d:
    """Initialise a convolution as the papers and torchvision do for layers on features."""
    nn.init.normal_(convolution.weight, std=0.01)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution

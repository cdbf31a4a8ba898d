"""AlexNet, ZF, VGG-16 and ResNet as feature extractors, at any width.

Every layer pads so that its output is its input's size over its stride, rounded up: feature maps
have ceil(H / stride) rows for images of any height H.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from ..optional import optional_import
from ..victims.prepare.fold import fold as fold_batch_norms

VGG_CHANNELS = (64, 128, 256, 512, 512)
VGG_DEPTHS = (2, 2, 3, 3, 3)
RESNET_PLANES = (64, 128, 256, 512)
EXPANSION = 4  # of a bottleneck's planes
RESNET_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def scaled(channels: int, width: float) -> int:
    """A layer's channels at a width: a multiple of 4 near width * channels, at least 8."""
    return max(8, 4 * round(width * channels / 4))


class Plain(nn.Sequential):
    """Convolutions with ReLU, pools and dropout in a row, under the names they have in Caffe.

    Args:
        in_channels: channels of the input, not scaled.
        width: multiplies the channels of every convolution.
        norm: whether a batch norm follows each convolution, in the place of its bias: what
            training from scratch needs. `fold` leads to the network without.
    """

    def __init__(self, in_channels: int = 3, *, width: float, norm: bool) -> None:
        super().__init__()
        self.in_channels = self.out_channels = in_channels
        self.width, self.norm = width, norm

    def convolve(self, name: str, channels: int, size: int, **options: Any) -> Plain:
        """Append a convolution and its ReLU; `channels` at width 1, options as of nn.Conv2d."""
        wide = scaled(channels, self.width)
        options.setdefault("padding", options.get("dilation", 1) * (size - 1) // 2)
        convolution = nn.Conv2d(self.out_channels, wide, size, bias=not self.norm, **options)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        self.add_module(name, convolution)
        if self.norm:
            self.add_module(f"{name}_norm", nn.BatchNorm2d(wide))
        self.add_module(f"{name}_relu", nn.ReLU(inplace=True))
        self.out_channels = wide
        return self

    def pool(self, name: str, size: int, stride: int) -> Plain:
        """Append a max pool."""
        layer = nn.MaxPool2d(size, stride, padding=(size - 1) // 2, ceil_mode=size % 2 == 0)
        self.add_module(name, layer)
        return self

    def then(self, name: str, layer: nn.Module) -> Plain:
        """Append a layer that keeps the number of channels."""
        self.add_module(name, layer)
        return self


def fold(network: nn.Module) -> nn.Module:
    """A copy in eval mode whose plain layers have their batch norms in the convolutions.

    What is trained with norm=True becomes what is built with norm=False: its state dict has the
    same names, and its scores are the same within rounding. ResNets keep their batch norms, as in
    the papers.
    """
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, Plain):
            zeros = next(module.parameters()).new_zeros(1, module.in_channels, 32, 32)
            fold_batch_norms(module, partial(module, zeros))
    return network


def alexnet(*, width: float, norm: bool, enlarge: int = 1) -> Plain:
    """The five convolutions of AlexNet with their overlapping pools, stride 32.

    Without the local response normalisation. Images are first enlarged bilinearly.
    """
    net = Plain(width=width, norm=norm)
    if enlarge > 1:
        net.then("enlarge", nn.Upsample(scale_factor=enlarge, mode="bilinear"))
    net.convolve("conv1", 96, 11, stride=4).pool("pool1", 3, 2)
    net.convolve("conv2", 256, 5, groups=2).pool("pool2", 3, 2)
    net.convolve("conv3", 384, 3)
    net.convolve("conv4", 384, 3, groups=2)
    return net.convolve("conv5", 256, 3, groups=2).pool("pool5", 3, 2)


def zf(*, width: float, norm: bool) -> Plain:
    """The five convolutions of Zeiler and Fergus's network, stride 16, without the last pool."""
    net = Plain(width=width, norm=norm)
    net.convolve("conv1", 96, 7, stride=2).pool("pool1", 3, 2)
    net.convolve("conv2", 256, 5, stride=2).pool("pool2", 3, 2)
    return net.convolve("conv3", 384, 3).convolve("conv4", 384, 3).convolve("conv5", 256, 3)


def vgg16(
    *, width: float, norm: bool, pool_size: int = 2, strides: Sequence[int] = (2, 2, 2, 2, 2)
) -> Plain:
    """The thirteen convolutions of VGG-16 in five stages.

    Args:
        width: multiplies the channels.
        norm: whether a batch norm follows each convolution.
        pool_size: side of the pools' windows.
        strides: of the pool after each stage; stages beyond the last have none. From a pool of
            stride 1 on, convolutions are dilated by the stride it would have had.
    """
    net = Plain(width=width, norm=norm)
    dilation = 1
    for stage, (channels, depth) in enumerate(zip(VGG_CHANNELS, VGG_DEPTHS, strict=True), start=1):
        for k in range(1, depth + 1):
            net.convolve(f"conv{stage}_{k}", channels, 3, dilation=dilation)
        if stage <= len(strides):
            net.pool(f"pool{stage}", pool_size, strides[stage - 1])
            dilation *= 2 // strides[stage - 1]
    return net


def resnet(
    depth: int,
    *,
    width: float,
    strides: Sequence[int] = (1, 2, 2, 2),
    dilations: Sequence[int] = (1, 1, 1, 1),
) -> nn.Sequential:
    """The convolutions of ResNet-50 or ResNet-101, under torchvision's names.

    torchvision's bottleneck: a stage's stride lies in its first 3x3 convolution. All 3x3
    convolutions of a dilated stage are dilated.

    Args:
        depth: 50 or 101.
        width: multiplies the channels.
        strides: of the four stages; the stem has stride 4.
        dilations: of the four stages.
    """
    channels = scaled(64, width)
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False))
    net.add_module("bn1", nn.BatchNorm2d(channels))
    net.add_module("relu", nn.ReLU(inplace=True))
    net.add_module("maxpool", nn.MaxPool2d(3, 2, padding=1))
    stages = zip(RESNET_PLANES, RESNET_DEPTHS[depth], strides, dilations, strict=True)
    for number, (planes, blocks, stride, dilation) in enumerate(stages, start=1):
        stage = _resnet_stage(channels, scaled(planes, width), blocks, stride, dilation)
        net.add_module(f"layer{number}", stage)
        channels = scaled(planes, width) * EXPANSION
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _resnet_stage(
    in_channels: int, planes: int, blocks: int, stride: int, dilation: int
) -> nn.Sequential:
    bottleneck = optional_import("torchvision.models.resnet", "vision").Bottleneck
    channels = planes * EXPANSION
    shortcut = nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
    )
    stage = [
        bottleneck(in_channels, planes, stride, shortcut, dilation=dilation),
        *(bottleneck(channels, planes, dilation=dilation) for _ in range(blocks - 1)),
    ]
    for block in stage:  # at first, each block is its shortcut: a hundred layers train so
        nn.init.zeros_(block.bn3.weight)
    return nn.Sequential(*stage)

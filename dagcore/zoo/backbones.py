"""AlexNet, ZF, VGG-16 and ResNet as feature extractors, at any width.

Every layer is padded so that its output size is its input size divided by its stride, rounded up.
Feature maps therefore have ceil(H / stride) rows for images of any height H.
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
    """Return a layer's channels at a width: the multiple of 4 near width * channels, at least 8."""
    return max(8, 4 * round(width * channels / 4))


class Plain(nn.Sequential):
    """A sequence of convolutions with ReLU, pools and dropout, named as in Caffe.

    Args:
        in_channels: number of input channels, not scaled.
        width: factor on the channels of every convolution.
        norm: whether each convolution has a batch norm instead of a bias, as training from scratch
            needs. `fold` turns the network into one without.
    """

    def __init__(self, in_channels: int = 3, *, width: float, norm: bool) -> None:
        super().__init__()
        self.in_channels = self.out_channels = in_channels
        self.width, self.norm = width, norm

    def convolve(self, name: str, channels: int, size: int, **options: Any) -> Plain:
        """Append a convolution of `channels` at width 1 and a ReLU; options are nn.Conv2d's."""
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
        """Append a layer that does not change the number of channels."""
        self.add_module(name, layer)
        return self


def fold(network: nn.Module) -> nn.Module:
    """Return a copy in eval mode with the batch norms of `Plain` layers folded.

    A network trained with norm=True becomes one as built with norm=False: the state dict has the
    names of the latter, and the scores stay the same within rounding. ResNets keep their batch
    norms, as in the papers.
    """
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, Plain):
            zeros = next(module.parameters()).new_zeros(1, module.in_channels, 32, 32)
            fold_batch_norms(module, partial(module, zeros))
    return network


def alexnet(*, width: float, norm: bool, enlarge: int = 1) -> Plain:
    """Build the five convolutions of AlexNet with their overlapping pools, stride 32.

    It has no local response normalisation. Images are first enlarged `enlarge` times, bilinearly.
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
    """Build the five convolutions of ZF (Zeiler and Fergus), stride 16, without the last pool."""
    net = Plain(width=width, norm=norm)
    net.convolve("conv1", 96, 7, stride=2).pool("pool1", 3, 2)
    net.convolve("conv2", 256, 5, stride=2).pool("pool2", 3, 2)
    return net.convolve("conv3", 384, 3).convolve("conv4", 384, 3).convolve("conv5", 256, 3)


def vgg16(
    *, width: float, norm: bool, pool_size: int = 2, strides: Sequence[int] = (2, 2, 2, 2, 2)
) -> Plain:
    """Build the thirteen convolutions of VGG-16 in five stages.

    Args:
        width: factor on the channels.
        norm: whether a batch norm follows each convolution.
        pool_size: side of the pooling windows.
        strides: stride of the pool after each stage; further stages have no pool. Each pool of
            stride 1 doubles the dilation of the convolutions after it.
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
    """Build the convolutions of ResNet-50 or ResNet-101, under torchvision's names.

    The bottleneck is torchvision's, with the stride of a stage in its first 3x3 convolution. All
    3x3 convolutions of a dilated stage are dilated.

    Args:
        depth: 50 or 101.
        width: factor on the channels.
        strides: strides of the four stages; the stem has stride 4.
        dilations: dilations of the four stages.
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
    for block in stage:  # each block begins as its shortcut, so that a hundred layers can train
        nn.init.zeros_(block.bn3.weight)
    return nn.Sequential(*stage)

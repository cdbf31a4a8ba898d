"""The paper's segmentation networks: normalised images (N, 3, H, W) -> scores (N, C, h, w).

The scores have the resolution that the networks compute, ceil(H / stride). The fixed bilinear
enlargement of FCN and DeepLab (align_corners=False) is left to the reader of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import EXPANSION, Plain, alexnet, resnet, scaled, vgg16

# At stride 32 a scene of 128x160 has 4x5 scores, which are too coarse for its mask: the best
# possible score map reaches a mean IoU of 73 %. With 8x10 scores it is 94 %.
SCENE_ENLARGEMENT = 2


def whole_alexnet(
    *, width: float, norm: bool, dropout: float = 0.5, enlarge: int = SCENE_ENLARGEMENT
) -> Plain:
    """Build AlexNet with fc6 and fc7 as convolutions."""
    net = alexnet(width=width, norm=norm, enlarge=enlarge)
    net.then("pad6", nn.ZeroPad2d((2, 3, 2, 3)))  # an even window has no centre
    _fully_connected(net, 4096, 6, padding=0, dropout=dropout)
    return net


def fcn_alex(
    num_classes: int, *, width: float, norm: bool, dropout: float = 0.5, enlarge: int = 1
) -> Plain:
    """Build FCN-32s on AlexNet: stride 32, on images that are first enlarged `enlarge` times."""
    net = whole_alexnet(width=width, norm=norm, dropout=dropout, enlarge=enlarge)
    return net.then("score_fr", nn.Conv2d(net.out_channels, num_classes, 1))


class FCN8s(nn.Module):
    """FCN-8s on VGG-16, with the skips from pool4 and pool3: stride 8.

    The scores of a coarser map are enlarged by 2, bilinearly, and added to those of the finer one.
    """

    def __init__(self, num_classes: int, *, width: float, norm: bool, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = vgg16(width=width, norm=norm)
        _fully_connected(self.features, 4096, 7, padding=3, dropout=dropout)
        self.score_fr = nn.Conv2d(self.features.out_channels, num_classes, 1)
        self.score_pool4 = nn.Conv2d(scaled(512, width), num_classes, 1)
        self.score_pool3 = nn.Conv2d(scaled(256, width), num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, C, ceil(H / 8), ceil(W / 8)) of images (N, 3, H, W)."""
        features, pools = images, {}
        for name, layer in self.features.named_children():
            features = layer(features)
            if name in ("pool3", "pool4"):
                pools[name] = features
        scores: Tensor = self.score_fr(features)
        scores = _add_enlarged(self.score_pool4(pools["pool4"]), scores)
        return _add_enlarged(self.score_pool3(pools["pool3"]), scores)


def _add_enlarged(fine: Tensor, coarse: Tensor) -> Tensor:
    enlarged = F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)
    # If the finer size is odd, the enlarged map is one row or column too long.
    return fine + enlarged[..., : fine.shape[-2], : fine.shape[-1]]


def deeplab_large_fov(num_classes: int, *, width: float, norm: bool, dropout: float = 0.5) -> Plain:
    """Build DeepLab-LargeFOV on VGG-16: stride 8, stage 5 dilated by 2, fc6 by 12."""
    net = vgg16(width=width, norm=norm, pool_size=3, strides=(2, 2, 2, 1, 1))
    net.then("pool5a", nn.AvgPool2d(3, 1, padding=1))
    _fully_connected(net, 1024, 3, padding=12, dilation=12, dropout=dropout)
    return net.then("fc8", nn.Conv2d(net.out_channels, num_classes, 1))


class DeepLabV2(nn.Module):
    """DeepLab-v2 on ResNet-101: stride 8, the last stages dilated by 2 and 4.

    The scores are the sum of 3x3 convolutions at several dilations (atrous spatial pyramid).
    """

    def __init__(
        self, num_classes: int, *, width: float, rates: Sequence[int] = (6, 12, 18, 24)
    ) -> None:
        super().__init__()
        self.backbone = resnet(101, width=width, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
        channels = EXPANSION * scaled(512, width)
        self.aspp = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate) for rate in rates
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, C, ceil(H / 8), ceil(W / 8)) of images (N, 3, H, W)."""
        features = self.backbone(images)
        first, *others = (branch(features) for branch in self.aspp)
        scores: Tensor = sum(others, start=first)
        return scores


def _fully_connected(
    net: Plain, channels: int, size: int, *, padding: int, dropout: float, dilation: int = 1
) -> None:
    """Append fc6 and fc7 of a classifier as convolutions."""
    net.convolve("fc6", channels, size, padding=padding, dilation=dilation)
    net.then("drop6", nn.Dropout(dropout))
    net.convolve("fc7", channels, 1).then("drop7", nn.Dropout(dropout))

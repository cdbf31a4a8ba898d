"""Segmentation networks without their last enlargement: the scores at the resolution they have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...errors import ArgumentError, ArgumentTypeError
from ..segmentation import Victim

UNDERSTOOD = (
    "torchvision's segmentation networks, transformers' ...ForSemanticSegmentation, "
    "segmentation_models_pytorch, and these inside a dagcore.victims.Victim or at the end of an "
    "nn.Sequential"
)


class LowResolution(nn.Module):
    """A network whose scores come out before they are enlarged to the size of the image.

    Each kind of network has its own `forward`, (N, 3, H, W) -> (N, C, h, w). `align_corners` says
    how the network itself would enlarge the scores, bilinearly: read them that way.
    """

    network: Any
    align_corners = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training


def low_resolution(model: nn.Module) -> nn.Module:
    """The same network, stopped before its last bilinear enlargement.

    The attack reads scores (N, C, h, w) through that enlargement without making it
    (`dagcore.ops.dag_seed_bilinear`), which saves its time and memory both ways. The result
    shares the parameters of `model` and leaves it as it is; auxiliary heads, which serve training,
    are not computed where the network allows it. Where a network hands out scores below the
    images' resolution by itself, as most of transformers' do, those are the scores.

    Args:
        model: a segmentation network of torchvision, transformers or
            segmentation_models_pytorch (0.4 or later); or a `Victim` around one, or an
            nn.Sequential that ends in one.

    Returns:
        A module: images (N, 3, H, W) -> scores (N, C, h, w) before softmax. Its attribute
        `align_corners` is how they must be enlarged to become the network's own: True for
        segmentation_models_pytorch, else False.

    Raises:
        TypeError: a network that is not understood, or with hooks that would be bypassed.
        ValueError: a network that ends in an activation, so that no scores before softmax exist.
    """
    found = find(model)
    if found is None:
        raise ArgumentTypeError(
            f"model must be one of {UNDERSTOOD}, got {type(model).__module__}."
            f"{type(model).__qualname__} (where it wraps such a network, call low_resolution on "
            "the network inside)"
        )
    return found


def find(model: nn.Module) -> nn.Module | None:
    """As `low_resolution`, but None for a network that is not understood."""
    if isinstance(model, LowResolution):
        return model
    found: nn.Module | None = None
    if type(model) is Victim and isinstance(model.network, nn.Module):
        inside = find(model.network)
        found = None if inside is None else model.around(inside)
    elif type(model) is nn.Sequential and len(model) > 0:
        *first, last = model
        inside = find(last)
        found = None if inside is None else Chain(*first, inside)
    else:
        package, name = _origin(model)
        if (package, name) in HEADS:
            found = HEADS[package, name](model)
        elif package == "transformers" and name.endswith("ForSemanticSegmentation"):
            return OwnLogits(model)
    if found is not None and (
        "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks
    ):
        raise ArgumentTypeError(
            "model must have its class's own forward and no forward hooks, which low_resolution "
            f"goes past, got a {type(model).__name__} with others"
        )
    return found


def _origin(model: nn.Module) -> tuple[str, str]:
    """Package and name of the class that a network's forward comes from.

    A subclass with a forward of its own may do anything, so the subclass is what counts then. The
    packages need not be importable.
    """
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    return owner.__module__.partition(".")[0], owner.__name__


class Chain(nn.Sequential):
    """Modules in a row, the last one a `LowResolution`."""

    @property
    def align_corners(self) -> bool:
        """How the last module's scores are to be enlarged."""
        return bool(getattr(self[-1], "align_corners", False))


class BackboneAndHead(LowResolution):
    """torchvision's FCN and DeepLabV3."""

    def forward(self, images: Tensor) -> Tensor:
        """Scores at the backbone's resolution."""
        scores: Tensor = self.network.classifier(self.network.backbone(images)["out"])
        return scores


class TwoLevelHead(LowResolution):
    """torchvision's LR-ASPP, whose head takes both feature maps."""

    def forward(self, images: Tensor) -> Tensor:
        """Scores at the resolution of the finer feature map."""
        scores: Tensor = self.network.classifier(self.network.backbone(images))
        return scores


class OwnLogits(LowResolution):
    """transformers' networks, whose logits come as the head makes them.

    Some heads enlarge inside before transformers' own enlargement (DPT: by 2, with
    align_corners=True): two different interpolations in a row are not one, so that step stays.
    """

    def forward(self, images: Tensor) -> Tensor:
        """The network's logits."""
        logits: Tensor = self.network(images, return_dict=True).logits
        return logits


class UperNet(LowResolution):
    """transformers' UperNet, which enlarges its logits to the size of the image."""

    def forward(self, images: Tensor) -> Tensor:
        """Scores at the resolution of the finest feature map."""
        features = self.network.backbone.forward_with_filtered_kwargs(images).feature_maps
        scores: Tensor = self.network.decode_head(features)
        return scores


class EncoderDecoder(LowResolution):
    """segmentation_models_pytorch: encoder, decoder, head."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        parameters = inspect.signature(self.network.decoder.forward).parameters.values()
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            raise ArgumentTypeError(
                "model must be of segmentation_models_pytorch 0.4 or later, got one of an older "
                "release, whose decoder takes each feature map as an argument"
            )
        self.align_corners = self._enlargement()

    def forward(self, images: Tensor) -> Tensor:
        """Scores at the decoder's resolution."""
        self.network.check_input_shape(images)
        scores: Tensor = self.network.segmentation_head[0](
            self.network.decoder(self.network.encoder(images))
        )
        return scores

    def _enlargement(self) -> bool:
        """The align_corners of the head's enlargement; raise where it is something else."""
        head = self.network.segmentation_head
        if not isinstance(head, nn.Sequential) or len(head) != 3:
            raise ArgumentTypeError(
                "model's segmentation_head must be convolution, upsampling and activation, "
                f"got {type(head).__name__}"
            )
        _check_activation(head[2])
        enlarge = head[1]
        if isinstance(enlarge, nn.Identity):
            return False
        if not isinstance(enlarge, nn.Upsample) or enlarge.mode != "bilinear":
            raise ArgumentTypeError(
                f"model's segmentation_head must enlarge bilinearly or not at all, got {enlarge}"
            )
        return bool(enlarge.align_corners)


class EncoderDecoderDPT(EncoderDecoder):
    """segmentation_models_pytorch's DPT, whose decoder takes the prefix tokens as well."""

    def forward(self, images: Tensor) -> Tensor:
        """Scores at the decoder's resolution."""
        self.network.check_input_shape(images)
        scores: Tensor = self.network.segmentation_head.head(
            self.network.decoder(*self.network.encoder(images))
        )
        return scores

    def _enlargement(self) -> bool:
        _check_activation(self.network.segmentation_head.activation)
        return True  # a literal in its forward


def _check_activation(module: nn.Module) -> None:
    activation = getattr(module, "activation", module)
    if not isinstance(activation, nn.Identity):
        raise ArgumentError(
            "model must end in scores before softmax (activation=None), "
            f"got activation {type(activation).__name__}"
        )


# By package and name of the class that has the forward.
HEADS: dict[tuple[str, str], Callable[[nn.Module], LowResolution]] = {
    ("torchvision", "_SimpleSegmentationModel"): BackboneAndHead,
    ("torchvision", "LRASPP"): TwoLevelHead,
    ("transformers", "UperNetForSemanticSegmentation"): UperNet,
    ("segmentation_models_pytorch", "SegmentationModel"): EncoderDecoder,
    ("segmentation_models_pytorch", "DPT"): EncoderDecoderDPT,
}

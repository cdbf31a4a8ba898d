"""Segmentation networks without their last enlargement: scores at their native resolution."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...engine.scores import aligned
from ...errors import ArgumentError, ArgumentTypeError
from ..binary import Binary
from ..segmentation import Victim

Read = Callable[[Any, Tensor], Any]
UNDERSTOOD = (
    "a segmentation network of torchvision, transformers (...ForSemanticSegmentation) or "
    "segmentation_models_pytorch, alone, inside a dagcore.victims.Victim or binary, or at the end "
    "of an nn.Sequential"
)


class LowResolution(nn.Module):
    """A network that returns its scores before they are enlarged to the image size.

    Args:
        network: the wrapped network.
        kind: package and name of the class that defines the network's forward.
        align_corners: the align_corners of the network's own bilinear enlargement, with which the
            scores are to be read.
    """

    def __init__(self, network: nn.Module, kind: tuple[str, str], align_corners: bool) -> None:
        super().__init__()
        self.network, self.kind, self.align_corners = network, kind, align_corners
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, C, h, w) of images (N, 3, H, W)."""
        read: Read = SCORES.get(self.kind, own_logits)
        scores: Tensor = read(self.network, images)
        return aligned(scores) if self.align_corners else scores


def low_resolution(model: nn.Module) -> nn.Module:
    """Stop a network before its last bilinear enlargement.

    The attack reads the scores (N, C, h, w) through that enlargement without computing it
    (`dagcore.ops.dag_seed_bilinear`). This saves time and memory in both passes. The result shares
    the parameters of `model` and does not change it. Auxiliary heads, which only training uses, are
    skipped if the network allows it. If a network returns scores of lower resolution than the
    images by itself, as most of transformers' do, those are the scores.

    Args:
        model: a segmentation network of torchvision, transformers or
            segmentation_models_pytorch (0.4 or later); or a `Victim` or `binary` around one, or an
            nn.Sequential that ends in one.

    Returns:
        A module: images (N, 3, H, W) -> scores (N, C, h, w) before softmax. Enlarging them with its
        attribute `align_corners` gives the network's own scores: True for
        segmentation_models_pytorch, else False. Scores to be enlarged with align_corners are marked
        themselves, and the mark passes through modules wrapped around this one.

    Raises:
        TypeError: if the network is not supported, or has hooks that would be bypassed.
        ValueError: if the network ends in an activation, so that it has no scores before softmax.
    """
    found = find(model) if isinstance(model, nn.Module) else None
    if found is None:
        raise ArgumentTypeError(
            f"model must be {UNDERSTOOD}, got {type(model).__module__}."
            f"{type(model).__qualname__} (if it wraps such a network, call low_resolution on "
            "the network inside)"
        )
    return found


def find(model: nn.Module) -> nn.Module | None:
    """Return what `low_resolution` does, or None for a network that is not supported."""
    if isinstance(model, LowResolution):
        return model
    found: nn.Module | None = None
    if isinstance(model, (Victim, Binary)) and isinstance(model.network, nn.Module):
        inside = find(model.network)
        found = None if inside is None else model.around(inside)
    elif type(model) is nn.Sequential and len(model) > 0:
        *first, last = model
        inside = find(last)
        found = None if inside is None else Chain(*first, inside)
    else:
        kind = package, name = _origin(model)
        if kind in SCORES:
            align_corners = package == SMP and _check_smp(model, name)
            found = LowResolution(model, kind, align_corners)
        elif package == "transformers" and name.endswith("ForSemanticSegmentation"):
            return LowResolution(model, kind, False)
    if found is not None and (
        "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks
    ):
        raise ArgumentTypeError(
            "model must have its class's own forward and no forward hooks, since low_resolution "
            f"bypasses them, got a {type(model).__name__} that has others"
        )
    return found


def _origin(model: nn.Module) -> tuple[str, str]:
    """Return package and name of the class that defines a network's forward.

    For a subclass with its own forward it is the subclass, since that may do anything. The packages
    need not be importable.
    """
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    return owner.__module__.partition(".")[0], owner.__name__


class Chain(nn.Sequential):
    """A sequence of modules, the last one made by `find`."""

    @property
    def align_corners(self) -> bool:
        """Whether the last module's scores are enlarged with align_corners."""
        return bool(getattr(self[-1], "align_corners", False))


def own_logits(network: Any, images: Tensor) -> Tensor:
    """Return the logits of a network of transformers, as its head makes them.

    Some heads enlarge the logits before transformers' own enlargement (DPT: by 2, with
    align_corners=True). That step stays, since two different interpolations are not one.
    """
    logits: Tensor = network(images, return_dict=True).logits
    return logits


def _upernet(network: Any, images: Tensor) -> Any:
    """Read UperNet, which enlarges its logits to the image size, at its finest feature map."""
    features = network.backbone.forward_with_filtered_kwargs(images).feature_maps
    return network.decode_head(features)


def _encoder_decoder(network: Any, images: Tensor) -> Any:
    """Read an encoder, decoder and head at the decoder's resolution."""
    network.check_input_shape(images)
    return network.segmentation_head[0](network.decoder(network.encoder(images)))


def _dpt(network: Any, images: Tensor) -> Any:
    """Read DPT, whose decoder takes the prefix tokens too, at the decoder's resolution."""
    network.check_input_shape(images)
    return network.segmentation_head.head(network.decoder(*network.encoder(images)))


def _check_smp(network: Any, name: str) -> bool:
    """Return the align_corners of a head's enlargement; raise if it is not bilinear."""
    parameters = inspect.signature(network.decoder.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        raise ArgumentTypeError(
            "model must be of segmentation_models_pytorch 0.4 or later, got one of an older "
            "release, whose decoder takes each feature map as an argument"
        )
    head = network.segmentation_head
    if name == "DPT":
        _check_activation(head.activation)
        return True  # hard-coded in its forward
    if not isinstance(head, nn.Sequential) or len(head) != 3:
        raise ArgumentTypeError(
            "model's segmentation_head must be convolution, upsampling and activation, "
            f"got {type(head).__name__}"
        )
    _, enlarge, activation = head
    _check_activation(activation)
    if isinstance(enlarge, nn.Identity):
        return False
    if not isinstance(enlarge, nn.Upsample) or enlarge.mode != "bilinear":
        raise ArgumentTypeError(
            f"model's segmentation_head must enlarge bilinearly or not at all, got {enlarge}"
        )
    return bool(enlarge.align_corners)


def _check_activation(module: nn.Module) -> None:
    activation = getattr(module, "activation", module)
    if not isinstance(activation, nn.Identity):
        raise ArgumentError(
            "model must end in scores before softmax (activation=None), "
            f"got activation {type(activation).__name__}"
        )


SMP = "segmentation_models_pytorch"
# How the scores are computed, by package and name of the class that defines the forward.
SCORES: dict[tuple[str, str], Read] = {
    # FCN and DeepLabV3: at the backbone's resolution.
    ("torchvision", "_SimpleSegmentationModel"): lambda network, images: network.classifier(
        network.backbone(images)["out"]
    ),
    # LR-ASPP, whose head takes both feature maps: at the resolution of the finer one.
    ("torchvision", "LRASPP"): lambda network, images: network.classifier(network.backbone(images)),
    ("transformers", "UperNetForSemanticSegmentation"): _upernet,
    (SMP, "SegmentationModel"): _encoder_decoder,
    (SMP, "DPT"): _dpt,
}

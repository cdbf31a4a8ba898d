"""Prepare a faster copy of a network, to be attacked in its place."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...engine import read_scores
from ...engine.freeze import to_eval
from ...errors import ArgumentError, ArgumentTypeError
from ..detection import Detector, is_detector
from . import fold
from .follow import Follower
from .low_resolution import find
from .low_resolution import low_resolution as stop_early
from .merge import is_mergeable, merge
from .prepared import Preparation, Prepared

CASTABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
EXAMPLE_SIDE = 224


def prepare(
    model: nn.Module,
    *,
    low_resolution: bool | None = None,
    fold_batch_norm: bool = True,
    merge_linear: bool = True,
    channels_last: bool | None = None,
    bf16: bool = False,
    compile: bool = False,
    example: Tensor | None = None,
) -> Prepared | Detector:
    """Make a faster copy of a network or detector, to be attacked in its place.

    With the defaults the copy's scores, gradients and detections are those of the network within
    float32 rounding. The network itself is never changed. Later changes to it reach the copy only
    by `refresh`. The result's `preparation` says what was done. While the original network exists,
    attacks run it once on each image that converged on the copy, and issue a RuntimeWarning if
    targets are still active there.

    Args:
        model: any nn.Module that an attack takes, images (N, 3, H, W) -> scores; or a `Detector`.
        low_resolution: return the scores before the last enlargement, as
            `victims.low_resolution` does. The result's scores then have another size than the
            network's. None: if the network is supported; True: raise if it is not; False: never.
        fold_batch_norm: fold each batch norm into the convolution before it, where a run on
            `example` shows that this changes nothing. The network runs three times for this.
        merge_linear: multiply out the linear layers of SegFormer's decode head, so that they run
            at the size of each level. Other networks stay as they are.
        channels_last: store weights and images with the channels last in memory. None: if
            convolutions hold at least half of the weights (other networks get slower), for a merged
            SegFormer, and for detectors, where it applies to the weights only.
        bf16: run under autocast to bfloat16, and keep convolution and linear weights in it. The
            scores are returned, interpolated and compared in the images' dtype, but have only
            bfloat16's 8 bits, so near-ties may change. Slower than float32 on a processor without
            AVX512-BF16 or AMX.
        compile: use torch.compile. It compiles once per image size, during the first run.
        example: images (N, 3, H, W) that the network takes, used to fold and merge; by default one
            square image of noise, of the size in the network's transformers config, else 224.

    Returns:
        A module: images (N, 3, H, W) -> scores (N, C, *T) as a tensor. Its `align_corners` says how
        scores of lower resolution than the labels are to be enlarged. For a detector, a `Detector`.

    Raises:
        TypeError: if `model` is not an nn.Module, `example` is not a floating-point tensor, or
            low_resolution=True and the network is not supported.
        ValueError: if the network does not run on the example or ends in an activation, or if
            `low_resolution`, `bf16` or `compile` is set for a detector.
        RuntimeError: if folding or merging changed the scores (a layer that is not what it seems).
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if is_detector(model):
        raise ArgumentTypeError(
            "model must be a Detector, not a bare detector: use prepare(victims.detector(model)), "
            f"got a plain {type(model).__name__}"
        )
    if example is not None:
        checks.tensor("example", example, checks.FLOAT_DTYPES)
    if isinstance(model, Detector):
        refused = {"low_resolution": low_resolution, "bf16": bf16, "compile": compile}
        for name, wanted in refused.items():
            if wanted:
                raise ArgumentError(f"{name} must not be set for a detector, got {wanted}")
    network = _copied(model)
    if fold_batch_norm:
        fold.thaw(network)
    follower = Follower(network, model)
    shallow = None
    if low_resolution is not False and not isinstance(network, Detector):
        shallow = stop_early(network) if low_resolution else find(network)
    network = network if shallow is None else shallow
    folded, left, merged = _rewrite(network, example, fold_batch_norm, merge_linear)
    follower.take(folded, merged)
    if channels_last is None:
        channels_last = isinstance(network, Detector) or merged > 0 or _mostly_convolutions(network)
    if channels_last:
        network.to(memory_format=torch.channels_last)
        if not isinstance(network, Detector):
            network.register_forward_pre_hook(_channels_last)
    if bf16:
        _hold_weights(network, torch.bfloat16)
    if compile:
        network.compile()
    done = Preparation(shallow is not None, len(folded), left, merged, channels_last, bf16, compile)
    if isinstance(network, Detector):
        network.preparation, network.original = done, weakref.ref(model)
        network.follower = follower
        return network
    return Prepared(network, done, follower, model)


def refresh(prepared: nn.Module) -> None:
    """Update a prepared copy with the original network's current weights and statistics.

    Afterwards the copy is what `prepare` would make of the network now, in a fraction of the time.
    `dagcore.defences.training.attacked` calls this before each attack.

    Args:
        prepared: a result of `prepare`, whose original network still exists.

    Raises:
        TypeError: if `prepared` is not a result of `prepare`.
        ValueError: if the original network no longer exists or has other modules than before, or if
            linear layers were merged.
    """
    follower = getattr(prepared, "follower", None)
    if not isinstance(follower, Follower):
        raise ArgumentTypeError(
            f"prepared must be a result of dagcore.victims.prepare, got {type(prepared).__name__}"
        )
    follower.follow()


def _copied(model: nn.Module) -> Any:
    """Copy a network, in eval mode and without gradients of its parameters."""
    # Hooks like weight_norm's store computed tensors, which cannot be copied with their graph.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    with torch.no_grad():  # otherwise copies of a scripted module's weights would have a graph
        network = copy.deepcopy(model, computed)
    to_eval(network)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def _channels_last(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Convert a network's input images to channels-last memory format (a forward pre-hook)."""
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _rewrite(
    network: nn.Module, example: Tensor | None, fold_batch_norm: bool, merge_linear: bool
) -> tuple[Sequence[tuple[nn.Module, nn.Module]], dict[str, str], int]:
    """Apply `fold.fold` and `merge`, and check that the scores stay the same.

    Returns:
        The folded pairs, the batch norms left with the reasons, and the number of merged heads.
    """
    if fold_batch_norm:
        fold_batch_norm = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()
        )
    merge_linear = merge_linear and any(is_mergeable(m) for m in network.modules())
    if not (fold_batch_norm or merge_linear):
        return [], {}, 0
    images = _example(network) if example is None else example
    try:
        output = _output(network, images)
    except Exception as error:
        raise ArgumentError(
            f"example must be images that the network takes, {tuple(images.shape)} fails: "
            f"{type(error).__name__}: {error} (give example=images, or fold_batch_norm=False and "
            "merge_linear=False)"
        ) from error
    before = read_scores(output, images, least=1).nan_to_num()
    # A detector's scores at given boxes do not use the parts that propose boxes.
    whole = network.detect if isinstance(network, Detector) else network
    folded, left = (
        fold.fold(network, lambda: whole(images.clone())) if fold_batch_norm else ([], {})
    )
    merged = merge(network) if merge_linear else 0
    after = read_scores(_output(network, images), images, least=1).nan_to_num()
    difference = float((after - before).norm() / before.norm().clamp_min(1e-30))
    allowed = 1e4 * torch.finfo(before.dtype).eps
    if difference > allowed:
        raise RuntimeError(
            f"folding and merging must not change the scores, they differ by {difference:.1e} of "
            f"their norm (allowed: {allowed:.1e}): use fold_batch_norm=False, merge_linear=False"
        )
    return folded, left, merged


def _output(network: nn.Module, images: Tensor) -> Any:
    """Run a network on images; a detector is read at the box around the whole image."""
    height, width = images.shape[-2:]
    whole = images.new_tensor([0, 0, width, height]).expand(len(images), 1, 4)
    with torch.no_grad():
        given = images.clone()  # the network may write into it
        return network(given, whole) if isinstance(network, Detector) else network(given)


def _example(network: nn.Module) -> Tensor:
    """Return one image of noise, with the device and dtype of the network's parameters."""
    sizes = [
        getattr(getattr(module, "config", None), "image_size", None) for module in network.modules()
    ]
    side = next((size for size in sizes if size is not None), EXAMPLE_SIDE)
    height, width = (side, side) if isinstance(side, int) else side
    like = next(itertools.chain(network.parameters(), network.buffers()))
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return noise.to(like)


def _mostly_convolutions(network: nn.Module) -> bool:
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    convolutions, linear = (
        sum(m.weight.numel() for m in network.modules() if isinstance(m, kind)) for kind in kinds
    )
    return convolutions >= max(linear, 1)


def _hold_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights that autocast would otherwise convert in every run.

    Subclasses with their own forward are left out, since they may compute with the weights first.
    """
    for module in network.modules():
        if any(type(module).forward is kind.forward for kind in CASTABLE):
            module.to(dtype)

"""A faster victim in a network's place."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...engine import read_scores
from ...engine.freeze import to_eval
from ...errors import ArgumentError, ArgumentTypeError
from ..detection import Detector, is_detector
from . import fold
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
    """A faster copy of a network or detector, to be attacked in its place.

    With the defaults the scores and their gradients stay within float32 rounding of the network's
    own, and so do a detector's detections. The network itself is never changed, and later changes
    to it do not reach the copy. What was done stands in the result's `preparation`. Where the
    network itself is still there, attacks run it once on each image that converged on the copy, and
    warn (RuntimeWarning) of targets that are active at it.

    Args:
        model: any nn.Module that an attack takes: images (N, 3, H, W) -> scores; or a `Detector`.
        low_resolution: hand out the scores before the last enlargement, as
            `victims.low_resolution` does, so that the result's scores have another size than the
            network's; None: where the network is understood, True: or raise, False: never.
        fold_batch_norm: fold each batch norm into the convolution before it, where a run on
            `example` shows that this changes nothing; the network is run three times for it.
        merge_linear: multiply out the linear layers of SegFormer's decode head, so that they work
            at the size of each level; other networks are left as they are.
        channels_last: lay out weights and images with the channels last in memory; None: where
            convolutions hold at least half of the weights (it slows other networks), for a merged
            SegFormer, and for detectors, of which it is the weights alone.
        bf16: run under autocast to bfloat16, convolution and linear weights kept in it. The
            scores come back in the images' dtype, so that they are interpolated and compared in
            that, but carry bfloat16's 8 bits: near-ties may fall the other way. Slower than float32
            on a processor without AVX512-BF16 or AMX.
        compile: through torch.compile, once for each image size; the first run takes its time.
        example: images (N, 3, H, W) that the network takes, to fold and merge by; one square
            image of noise by default, at the size in the network's transformers config, else 224.

    Returns:
        A module: images (N, 3, H, W) -> scores (N, C, *T) as a tensor, whose `align_corners` is
        how scores below the labels' resolution are to be enlarged. For a detector, a `Detector`.

    Raises:
        TypeError: `model` is no nn.Module, `example` no floating tensor, or low_resolution=True
            and the network is not understood.
        ValueError: the network does not run on the example, or ends in an activation; or
            `low_resolution`, `bf16` or `compile` for a detector.
        RuntimeError: folding or merging changed the scores (a layer that is not what it seems).
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if is_detector(model):
        raise ArgumentTypeError(
            "model must be a Detector where it is a detector: prepare(victims.detector(model)), "
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
    shallow = None
    if low_resolution is not False and not isinstance(network, Detector):
        shallow = stop_early(network) if low_resolution else find(network)
    network = network if shallow is None else shallow
    folded, left, merged = _rewrite(network, example, fold_batch_norm, merge_linear)
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
    done = Preparation(shallow is not None, folded, left, merged, channels_last, bf16, compile)
    if isinstance(network, Detector):
        network.preparation, network.original = done, weakref.ref(model)
        return network
    return Prepared(network, done, model)


def _copied(model: nn.Module) -> Any:
    """A copy in eval mode, its parameters without gradients."""
    # Hooks like weight_norm's keep what they have computed, which cannot be copied with its graph.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    with torch.no_grad():  # of a scripted module's weights the copy would have a graph
        network = copy.deepcopy(model, computed)
    to_eval(network)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def _channels_last(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Hand a network its images with the channels last in memory."""
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _rewrite(
    network: nn.Module, example: Tensor | None, fold_batch_norm: bool, merge_linear: bool
) -> tuple[int, dict[str, str], int]:
    """`fold.fold` and `merge`, checked by the scores before and after."""
    if fold_batch_norm:
        fold.thaw(network)
        fold_batch_norm = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()
        )
    merge_linear = merge_linear and any(is_mergeable(m) for m in network.modules())
    if not (fold_batch_norm or merge_linear):
        return 0, {}, 0
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
    # A detector's scores at given boxes leave out the parts that propose them.
    whole = network.detect if isinstance(network, Detector) else network
    folded, left = fold.fold(network, lambda: whole(images.clone())) if fold_batch_norm else (0, {})
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
    """What comes of images; of a detector at the box around the whole image, if it needs boxes."""
    height, width = images.shape[-2:]
    whole = images.new_tensor([0, 0, width, height]).expand(len(images), 1, 4)
    with torch.no_grad():
        given = images.clone()  # the network's to write into
        return network(given, whole) if isinstance(network, Detector) else network(given)


def _example(network: nn.Module) -> Tensor:
    """One image of noise, where and as the network's parameters are."""
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
    """Convert the weights that autocast would convert anew in each run.

    Not those of subclasses with a forward of their own, which may compute with them first.
    """
    for module in network.modules():
        if any(type(module).forward is kind.forward for kind in CASTABLE):
            module.to(dtype)

"""What the tests share: devices, dtypes, memory layouts, exact comparison, and networks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dagcore import ops, reference
from dagcore.ops import native

NAN, INF = math.nan, math.inf
GOALS = ("leave", "reach")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
LAYOUTS = ("contiguous", "class-last", "transposed", "gaps", "expanded")
MODES = ("leave", "reach", "runner-up")  # "runner-up" is for the goal "leave"
MARGINS = (0.0, 0.5, 0.7)  # random_case has scores that are just 0.5 apart
SIMD_LEVELS = ("baseline", "avx2", "avx512")
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BOTH = pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])


def arguments(mode: str, adversarial: Tensor) -> tuple[Tensor | str, str]:
    """Adversarial labels and goal of a mode."""
    return ("runner-up", "leave") if mode == "runner-up" else (adversarial, mode)


def on(device: torch.device, *values: Tensor | str) -> list[Tensor | str]:
    """The values, of which the tensors are moved to a device."""
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


def no_cuda() -> str | None:
    """Why CUDA cases cannot run here, None where they can."""
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no GPU, or a CPU build of torch"
    if not native.module.cuda_architectures:
        return "dagcore's native module was built without CUDA"
    return None


def opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    """What `torch.library.opcheck` finds; of CUDA kernels on the host, whatever comes of running
    them."""
    op = getattr(torch.ops.dagcore, name).default
    on_host = op.namespace == "dagcore_on_host"
    which = {"test_utils": ("test_schema", "test_faketensor")} if on_host else {}
    results = torch.library.opcheck(op, arguments, **which)
    assert set(results.values()) == {"SUCCESS"}


def lay_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape in another memory layout: the same values, unless expanded."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "class-last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        order = (0, 1, *reversed(range(2, values.dim())))
        return values.permute(order).contiguous().permute(order)
    if layout == "gaps":
        return crop(values)
    assert layout == "expanded"
    return values[:1].contiguous().expand(values.shape)


def lay_out_labels(labels: Tensor, layout: str) -> Tensor:
    """Like `lay_out`, for a tensor without a class dimension."""
    if layout in ("transposed", "class-last"):
        order = tuple(reversed(range(labels.dim())))
        return labels.permute(order).contiguous().permute(order)
    if layout == "gaps":
        return crop(labels)
    if layout == "expanded":
        return labels[:1].contiguous().expand(labels.shape)
    return labels.contiguous()


def crop(values: Tensor) -> Tensor:
    """The same values inside a larger tensor of garbage, every second one in the last dimension."""
    larger = [size + 3 for size in values.shape[:-1]] + [2 * values.shape[-1] + 3]
    fill = float("nan") if values.is_floating_point() else 77
    view = torch.full(larger, fill, dtype=values.dtype, device=values.device)
    for d, size in enumerate(values.shape[:-1]):
        view = view.narrow(d, 2, size)
    view = view[..., 1 : 1 + 2 * values.shape[-1] : 2]
    return view.copy_(values)


UNPACKED = ("first value", "images", "classes", "rows")


def unpacked(values: Tensor, where: str) -> Tensor:
    """The same (N, C, H, W), each row dense, but one value beyond what is read several at once.

    At the first value, between images, between classes, or at the end of rows (of 13, say) whose
    memory goes on to the next multiple of 16.
    """
    count, classes, height, width = values.shape
    if where == "first value":
        memory = values.new_empty(values.numel() + 1)[1:]
    elif where == "images":
        memory = values.new_empty(count, values[0].numel() + 1)[:, :-1]
    elif where == "classes":
        memory = values.new_empty(count, classes, height * width + 1)[..., :-1]
    else:
        memory = values.new_empty(count, classes, height, -(-width // 16) * 16)[..., :width]
    return memory.view(values.shape).copy_(values)


def bits(values: Tensor) -> Tensor:
    """A copy of a floating tensor's bits as integers, contiguous."""
    return (
        values.detach()
        .clone(memory_format=torch.contiguous_format)
        .view(BITS[values.element_size()])
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits, where any NaN equals any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(bits(a)[~nan], bits(b)[~nan])


def assert_same_seed(
    got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], scores: Tensor
) -> None:
    """A seed and its counts equal others to the bit, the seed laid out like its scores."""
    seed, active = got
    assert seed.dtype == scores.dtype
    assert seed.shape == scores.shape
    assert seed.stride() == torch.empty_like(scores).stride()
    assert active.dtype == torch.int32
    assert active.device == seed.device == scores.device
    assert torch.equal(active.cpu(), expected[1].cpu())
    assert torch.equal(bits(seed.cpu()), bits(expected[0].cpu()))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_case(
    shape: tuple[int, ...],  # (N, C, *T)
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    ignore_index: int = 255,
    ignored: float = 0.1,
    broken: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with many ties, labels that are mostly the argmax, adversarial labels; on the CPU.

    Some targets are ignored by either map, and a share `broken` of the scores is NaN or infinite.
    """
    rng = generator(seed)
    targets = (shape[0], *shape[2:])
    scores = torch.randint(-6, 7, shape, generator=rng).to(dtype) / 4
    if broken:
        for value in (float("nan"), float("inf"), -float("inf")):
            scores[torch.rand(shape, generator=rng) < broken] = value
    winners = scores.argmax(1) if scores.numel() else torch.zeros(targets, dtype=torch.int64)
    drawn = torch.randint(0, shape[1], targets, generator=rng)
    labels = torch.where(torch.rand(targets, generator=rng) < 0.6, winners, drawn)
    adversarial = torch.randint(0, shape[1], targets, generator=rng)
    adversarial = torch.where(torch.rand(targets, generator=rng) < 0.2, winners, adversarial)
    labels[torch.rand(targets, generator=rng) < ignored] = ignore_index
    adversarial[torch.rand(targets, generator=rng) < ignored / 2] = ignore_index
    return scores, labels, adversarial


# --- segmentation networks with random weights

SMP = {
    "Unet": {},
    "Unet with a classifier": {"aux_params": {"classes": 2}},
    "FPN": {},
    "PSPNet": {},
    "Linknet": {},
    "PAN": {},
    "DeepLabV3": {},
    "DeepLabV3Plus": {},
    "UPerNet": {},
    "Segformer": {},
    "DPT": {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True},
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 64,
    "patch_size": 16,
}


def shaken(network: nn.Module) -> nn.Module:
    """The network in eval mode, with batch norms and signals that are not a fresh network's."""
    for module in network.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return network.eval()


def torchvision_network(name: str, **settings: Any) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return shaken(
        models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **settings)
    )


def smp_network(name: str, **settings: Any) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    settings = {"encoder_name": "resnet18"} | SMP.get(name, {}) | settings
    model = getattr(smp, name.partition(" ")[0])
    return shaken(model(encoder_weights=None, classes=5, **settings))


def transformers_network(name: str) -> nn.Module:
    t = pytest.importorskip("transformers")
    out = {"out_indices": [1, 2, 3, 4]}
    configs = {
        "Segformer": lambda: t.SegformerConfig(
            depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=16, num_labels=5
        ),
        "UperNet": lambda: t.UperNetConfig(
            backbone_config=t.ConvNextConfig(
                hidden_sizes=[8, 16, 24, 32],
                depths=[1] * 4,
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            hidden_size=16,
            auxiliary_in_channels=24,
            auxiliary_channels=8,
            num_labels=5,
        ),
        "DPT": lambda: t.DPTConfig(
            **VISION,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
            num_labels=5,
        ),
        "Beit": lambda: t.BeitConfig(
            **VISION, **out, num_labels=5, use_relative_position_bias=True
        ),
        "Data2VecVision": lambda: t.Data2VecVisionConfig(**VISION, **out, num_labels=5),
        "MobileViT": lambda: t.MobileViTConfig(
            hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 32], num_labels=5
        ),
        "MobileViTV2": lambda: t.MobileViTV2Config(width_multiplier=0.25, num_labels=5),
        "MobileNetV2": lambda: t.MobileNetV2Config(depth_multiplier=0.25, num_labels=5),
    }
    return shaken(getattr(t, f"{name}ForSemanticSegmentation")(configs[name]()))


def wait_until(happened: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Return once something has happened; fail if it never does. The limit is no measurement."""
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up, f"waited {seconds} s for {what}"
        time.sleep(0.002)

"""What the tests share: devices, dtypes, memory layouts and exact comparison."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dagcore import ops, reference
from dagcore.ops import native

NAN, INF = math.nan, math.inf
GOALS = ("leave", "reach")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
LAYOUTS = ("contiguous", "class-last", "transposed", "gaps", "expanded")
MODES = ("leave", "reach", "runner-up")  # "runner-up" is for the goal "leave"
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


def wait_until(happened: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Return once something has happened; fail if it never does. The limit is no measurement."""
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up, f"waited {seconds} s for {what}"
        time.sleep(0.002)

"""Each op: native beside the reference and beside the floor, one copy of what must be moved.

    python -m pytest benchmarks/bench_ops.py [--device cuda] [--save ops-cpu]

The floor of dag_seed is `clone` of the scores (read once, write once); that of linf_step_ is
`clone` of the images. Ratios above 1 mean that the other side is slower than the native one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Sides
from pytest_benchmark.fixture import BenchmarkFixture

import dagcore

SHAPES = [(1, 21, 512, 512), (4, 21, 512, 512), (1, 150, 512, 512), (8, 19, 256, 512)]
DTYPES = [torch.float32, torch.bfloat16]


def compare(
    benchmark: BenchmarkFixture,
    sides: Sides,
    op: str,
    case: str,
    native: Callable[[], object],
    others: dict[str, Callable[[], object]],
    rounds: int = 15,
) -> None:
    """Benchmark the native side, the others once before each of its rounds."""
    seconds: dict[str, list[float]] = {"native": [], **{name: [] for name in others}}

    def alternate() -> None:
        for name, run in others.items():
            seconds[name].append(sides.seconds(run))

    def timed() -> None:
        seconds["native"].append(sides.seconds(native))

    benchmark.group = f"{op} {case}"
    benchmark.pedantic(timed, setup=alternate, rounds=rounds, warmup_rounds=2)
    kept = {name: values[-rounds:] for name, values in seconds.items()}
    benchmark.extra_info.update(sides.add(op, case, kept))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["class first", "class last"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_dag_seed(
    benchmark: BenchmarkFixture,
    sides: Sides,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
) -> None:
    """Random scores, four targets in five still right, labels as uint8."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator).to(dtype)
    right = torch.rand(shape[:1] + shape[2:], generator=generator) < 0.8
    labels = torch.where(right, scores.argmax(1), 0).to(torch.uint8).to(sides.device)
    adversarial = (labels + 1) % shape[1]
    scores = scores.to(sides.device)
    if layout == "class last":
        scores = scores.to(memory_format=torch.channels_last)
    compare(
        benchmark,
        sides,
        "dag_seed",
        f"{'x'.join(map(str, shape))} {name_of(dtype)} {layout}",
        lambda: dagcore.ops.dag_seed(scores, labels, adversarial),
        {
            "reference": lambda: dagcore.reference.dag_seed(scores, labels, adversarial),
            "floor": lambda: scores.clone(),
        },
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("epsilon", [None, 8 / 255], ids=["no ball", "ball"])
def test_linf_step(
    benchmark: BenchmarkFixture, sides: Sides, epsilon: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (8, 3, 512, 512)
    origin = torch.rand(shape, generator=generator).to(sides.device, dtype)
    gradient = torch.randn(shape, generator=generator).to(sides.device, dtype)
    images = origin.clone()
    active = torch.ones(8, dtype=torch.int32, device=sides.device)

    def step(backend: object) -> Callable[[], object]:
        return lambda: backend.linf_step_(  # type: ignore[attr-defined]
            images, origin, gradient, active, gamma=2 / 255, lower=0.0, upper=1.0, epsilon=epsilon
        )

    compare(
        benchmark,
        sides,
        "linf_step_",
        f"8x3x512x512 {name_of(dtype)} {'ball' if epsilon else 'no ball'}",
        step(dagcore.ops),
        {"reference": step(dagcore.reference), "floor": lambda: images.clone()},
    )

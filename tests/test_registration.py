"""What torch knows of the ops, and what happens where the native module is missing or broken."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DTYPES, LAYOUTS, lay_out, opcheck, random_case, same_bits
from torch import Tensor

import dagcore
from dagcore import ops, reference
from dagcore.ops import fallback, native

PACKAGE = Path(dagcore.__file__).parent
PUBLIC = tuple(op for op in ops.OPS if op != "settle_")  # which is the loop's own
STEP = {"gamma": 0.01, "lower": 0.0, "upper": 1.0, "epsilon": 0.05}


def step_case(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    origin = torch.rand(2, 3, 9, 11, generator=rng)
    gradient = torch.randn(2, 3, 9, 11, generator=rng)
    active = torch.tensor([3, 0], dtype=torch.int32, device=device)
    origin, gradient = origin.to(device, dtype), gradient.to(device, dtype)
    return origin.clone(), origin, gradient, active


# --- opcheck

# The layouts of images that are changed in place, each in another dtype.
STEPPED = pytest.mark.parametrize(
    ("layout", "dtype"),
    list(zip((layout for layout in LAYOUTS if layout != "expanded"), DTYPES, strict=True)),
    ids=str,
)

SEED_CHECKS = {
    "leave": ((2, 5, 7, 9), torch.float32, "contiguous", False, "leave"),
    "reach": ((2, 5, 7, 9), torch.float64, "class-last", False, "reach"),
    "runner-up": ((2, 5, 7, 9), torch.bfloat16, "transposed", True, "leave"),
    "no target dimensions": ((3, 4), torch.float16, "contiguous", False, "leave"),
    "gaps": ((2, 3, 4, 5, 6), torch.float32, "gaps", False, "reach"),
    "expanded": ((2, 3, 20), torch.float32, "expanded", True, "leave"),
    "no targets": ((2, 3, 0), torch.float32, "contiguous", False, "leave"),
    "no images": ((0, 3, 5), torch.float32, "contiguous", True, "leave"),
}


@pytest.mark.cuda_on_host
@pytest.mark.parametrize("name", SEED_CHECKS)
def test_opcheck_dag_seed(device: torch.device, name: str) -> None:
    shape, dtype, layout, runner_up, objective = SEED_CHECKS[name]
    scores, labels, adversarial = random_case(shape, 0, dtype=dtype)
    if scores.numel():
        scores = lay_out(scores, layout)
    scores = scores.to(device)
    other = None if runner_up else adversarial.to(device)
    arguments = (scores, labels.to(device), other, objective, 255, 0.5)
    opcheck("dag_seed", arguments)


BILINEAR_CHECKS = {
    "leave": ((2, 5, 4, 6), (9, 13), torch.float32, "contiguous", False, "leave"),
    "reach": ((2, 5, 4, 6), (9, 13), torch.float64, "class-last", False, "reach"),
    "runner-up": ((2, 5, 4, 6), (9, 13), torch.bfloat16, "transposed", True, "leave"),
    "whole factor": ((1, 3, 2, 2), (16, 16), torch.float16, "contiguous", False, "leave"),
    "smaller": ((2, 5, 9, 8), (4, 3), torch.float32, "gaps", False, "reach"),
    "expanded": ((2, 5, 4, 6), (9, 13), torch.float32, "expanded", True, "leave"),
    "no pixels": ((2, 3, 4, 5), (0, 7), torch.float32, "contiguous", False, "leave"),
    "no images": ((0, 3, 4, 5), (8, 9), torch.float32, "contiguous", True, "leave"),
}


@pytest.mark.cuda_on_host
@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
@pytest.mark.parametrize("name", BILINEAR_CHECKS)
def test_opcheck_bilinear(device: torch.device, name: str, align_corners: bool) -> None:
    shape, size, dtype, layout, runner_up, objective = BILINEAR_CHECKS[name]
    scores, *_ = random_case(shape, 0, dtype=dtype)
    if scores.numel():
        scores = lay_out(scores, layout)
    _, labels, adversarial = random_case((shape[0], shape[1], *size), 0)
    scores = scores.to(device)
    other = None if runner_up else adversarial.to(device)
    arguments = (scores, labels.to(device), other, objective, 255, 0.5, align_corners)
    opcheck("dag_seed_bilinear", arguments)
    arguments = (scores, *size, align_corners)
    opcheck("argmax_bilinear", arguments)


@pytest.mark.cuda_on_host
@STEPPED
def test_opcheck_linf_step(device: torch.device, layout: str, dtype: torch.dtype) -> None:
    images, origin, gradient, active = step_case(device, dtype)
    free = (-math.inf, math.inf, math.inf, None, 0)
    for rest in ((0.0, 1.0, 0.05, None, 0), free, (0.0, 1.0, 0.05, torch.zeros_like(images), 256)):
        arguments = (lay_out(images, layout), origin, gradient, active, 0.01, *rest)
        opcheck("linf_step_", arguments)


@pytest.mark.cuda_on_host
def test_opcheck_linf_step_of_nothing(device: torch.device) -> None:
    empty = torch.zeros(2, 3, 0, device=device)
    active = torch.ones(2, dtype=torch.int32, device=device)
    arguments = (empty, empty.clone(), empty.clone(), active, 0.01, 0.0, 1.0, 0.1, None, 0)
    opcheck("linf_step_", arguments)


@pytest.mark.cuda_on_host
@pytest.mark.parametrize("norm", ["linf", "l2"])
@STEPPED
def test_opcheck_pgd_step(device: torch.device, layout: str, dtype: torch.dtype, norm: str) -> None:
    images, origin, gradient, active = step_case(device, dtype)
    one = torch.ones(2, dtype=torch.float64, device=device)
    momentum = torch.zeros_like(images, dtype=fallback.real(images))
    previous, grid = images.clone(), images.clone()
    for rest in (
        (None, 0.0, None, None, None, 0),
        (momentum, 0.9, None, None, grid, 256),
        (None, 0.0, previous, one, None, 0),
        (momentum, 0.9, previous, one, grid, 256),
    ):
        step = lay_out(images, layout), origin, gradient, active, norm, one * 0.01, one * 0.05
        opcheck("pgd_step_", (*step, 0.0, 1.0, *rest))


def prox_case(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    images, origin, gradient, active = step_case(device, dtype)
    exact = torch.promote_types(dtype, torch.float32)
    metric = torch.ones_like(images, dtype=exact)
    alpha = torch.full((2,), 0.01, dtype=torch.float64, device=device)
    return images, origin, gradient, metric, active, alpha


@pytest.mark.cuda_on_host
@STEPPED
def test_opcheck_linf_prox(device: torch.device, layout: str, dtype: torch.dtype) -> None:
    images, *others = prox_case(device, dtype)
    for bounds in ((0.0, 1.0), (-math.inf, math.inf)):
        balls = torch.full_like(others[-1], 0.05)
        arguments = (lay_out(images, layout), *others, balls, 1.0, *bounds)
        opcheck("linf_prox_", arguments)


@pytest.mark.cuda_on_host
def test_opcheck_linf_prox_of_nothing(device: torch.device) -> None:
    _, _, _, _, active, alpha = prox_case(device)
    empty = [torch.zeros(2, 3, 0, device=device) for _ in range(4)]
    arguments = (*empty, active, alpha, alpha, 1.0, 0.0, 1.0)
    opcheck("linf_prox_", arguments)


# --- torch.compile and CUDA graphs


def one_iteration(
    images: Tensor, origin: Tensor, scores: Tensor, labels: Tensor, adversarial: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every mode of dag_seed, and a step whose gradient is made of their seeds."""
    seed, active = ops.dag_seed(scores * 2, labels, adversarial)
    reached, left = ops.dag_seed(scores, labels, adversarial, goal="reach", ignore_index=1)
    strongest, _ = ops.dag_seed(scores, labels, "runner-up")
    gradient = (seed + reached + strongest)[:, :3] + origin
    moved = images.clone()
    norms = ops.linf_step_(moved, origin, gradient, active, **STEP)
    return seed, active, left, moved, norms


def iteration_arguments(device: torch.device) -> tuple[Tensor, ...]:
    scores, labels, adversarial = random_case((2, 5, 9, 11), 0)
    labels, adversarial = labels.clamp(max=4), adversarial.clamp(max=4)
    images, origin, *_ = step_case(device)
    return images, origin, *(t.to(device) for t in (scores, labels, adversarial))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_equals_eager(device: torch.device, backend: str) -> None:
    arguments = iteration_arguments(device)
    expected = one_iteration(*arguments)
    assert int(expected[1].min()) > 0
    compiled = torch.compile(one_iteration, fullgraph=True, backend=backend)
    for got, wanted in zip(compiled(*arguments), expected, strict=True):
        assert same_bits(got, wanted) if wanted.is_floating_point() else torch.equal(got, wanted)


def through_the_interpolation(scores: Tensor, labels: Tensor, adversarial: Tensor) -> list[Tensor]:
    """Every mode of dag_seed_bilinear, and argmax_bilinear at a size that the seeds make."""
    seed, active = ops.dag_seed_bilinear(scores * 2, labels, adversarial)
    reached, left = ops.dag_seed_bilinear(
        scores, labels, adversarial, goal="reach", ignore_index=1, align_corners=True
    )
    strongest, _ = ops.dag_seed_bilinear(scores, labels, "runner-up")
    size = (labels.shape[1] + 1, 2 * labels.shape[2])
    winners = ops.argmax_bilinear(scores + seed + reached + strongest, size)
    return [seed, active, reached, left, strongest, winners]


def bilinear_arguments(
    device: torch.device, low: tuple[int, ...] = (2, 5, 4, 6), size: tuple[int, int] = (9, 13)
) -> list[Tensor]:
    scores, *_ = random_case(low, 0)
    _, labels, adversarial = random_case((*low[:2], *size), 0)
    most = low[1] - 1
    return [t.to(device) for t in (scores, labels.clamp(max=most), adversarial.clamp(max=most))]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_bilinear_compiled_in_one_graph_equals_eager(device: torch.device, backend: str) -> None:
    arguments = bilinear_arguments(device)
    expected = through_the_interpolation(*arguments)
    assert int(expected[1].min()) > 0
    compiled = torch.compile(through_the_interpolation, fullgraph=True, backend=backend)
    for got, wanted in zip(compiled(*arguments), expected, strict=True):
        assert same_bits(got, wanted) if wanted.is_floating_point() else torch.equal(got, wanted)


def test_bilinear_compiled_with_dynamic_shapes(device: torch.device) -> None:
    compiled = torch.compile(
        through_the_interpolation, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for low, size in (
        ((2, 5, 4, 6), (9, 13)),
        ((3, 4, 7, 3), (56, 24)),
        ((2, 6, 9, 8), (4, 3)),
    ):
        arguments = bilinear_arguments(device, low, size)
        expected = through_the_interpolation(*arguments)
        for got, wanted in zip(compiled(*arguments), expected, strict=True):
            assert torch.equal(got, wanted)


def test_bilinear_compiled_out_of_range_label_is_a_negative_count(device: torch.device) -> None:
    scores = torch.zeros(2, 4, 3, 3, device=device)
    labels = torch.zeros(2, 9, 9, dtype=torch.int64, device=device)
    labels[1, 3, 5] = 4

    def count(scores: Tensor, labels: Tensor) -> Tensor:
        return ops.dag_seed_bilinear(scores, labels, "runner-up")[1]

    active = torch.compile(count, fullgraph=True, backend="aot_eager")(scores, labels)
    assert int(active[0]) == 81
    assert int(active[1]) < 0


def test_compiled_step_writes_to_its_argument(device: torch.device) -> None:
    def step(images: Tensor, origin: Tensor, gradient: Tensor, active: Tensor) -> Tensor:
        return ops.linf_step_(images, origin, gradient, active, **STEP)

    images, origin, gradient, active = step_case(device)
    expected = images.clone()
    norms = step(expected, origin, gradient, active)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(images, origin, gradient, active)
    assert same_bits(got, norms)
    assert same_bits(images, expected)
    assert not same_bits(images, origin)


def pgd_steps(
    images: Tensor, origin: Tensor, gradient: Tensor, active: Tensor, alpha: Tensor
) -> list[Tensor]:
    """Two steps with all that a step can have, in either norm: what they return and write."""
    written = []
    for norm in ("linf", "l2"):
        moved, momentum, previous, grid = (images.clone() for _ in range(4))
        settings = {"norm": norm, "epsilon": 0.05, "lower": 0.0, "upper": 1.0, "levels": 256}
        settings |= {"momentum": momentum, "decay": 0.9, "previous": previous, "grid": grid}
        for share in (1.0, 0.75):
            written.append(
                ops.pgd_step_(
                    moved, origin, gradient, active, alpha=alpha * 2, share=share, **settings
                )
            )
        written += [moved, momentum, previous, grid]
    return written


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_pgd_step_compiled_in_one_graph_equals_eager(device: torch.device, backend: str) -> None:
    arguments = (*step_case(device), torch.tensor([0.01, 0.02], device=device).double())
    expected = pgd_steps(*arguments)
    assert expected[0].tolist() == [True, False]
    compiled = torch.compile(pgd_steps, fullgraph=True, backend=backend)
    for got, wanted in zip(compiled(*arguments), expected, strict=True):
        assert torch.equal(got, wanted)


def test_compiled_pgd_step_writes_to_its_arguments(device: torch.device) -> None:
    def step(images: Tensor, origin: Tensor, gradient: Tensor, active: Tensor, momentum: Tensor):
        settings = {"norm": "l2", "alpha": 0.1, "epsilon": None, "lower": 0.0, "upper": None}
        return ops.pgd_step_(
            images, origin, gradient, active, momentum=momentum, decay=1.0, **settings
        )

    images, *others = step_case(device)
    momentum, expected = torch.zeros_like(images), [images.clone(), torch.zeros_like(images)]
    moved = step(expected[0], *others, expected[1])
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(images, *others, momentum)
    assert torch.equal(got, moved)
    assert same_bits(images, expected[0])
    assert same_bits(momentum, expected[1])
    assert not same_bits(images, others[0])


def test_compiled_proximal_step_writes_to_its_argument(device: torch.device) -> None:
    def step(*tensors: Tensor) -> Tensor:
        *pixels, alpha = tensors
        return ops.linf_prox_(*pixels, alpha=alpha, lower=0.0, upper=1.0)

    images, *others = prox_case(device)
    expected, before = images.clone(), images.clone()
    moved = step(expected, *others)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(images, *others)
    assert torch.equal(got, moved)
    assert same_bits(images, expected)
    assert not same_bits(images, before)


def test_compiled_with_dynamic_shapes(device: torch.device) -> None:
    def seed(scores: Tensor, labels: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
        return ops.dag_seed(scores, labels, adversarial)

    compiled = torch.compile(seed, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 5, 9, 11), (3, 4, 7, 13), (2, 6, 5, 5)):
        arguments = [t.to(device) for t in random_case(shape, 0)]
        for got, wanted in zip(compiled(*arguments), seed(*arguments), strict=True):
            assert torch.equal(got, wanted)


def test_compiled_out_of_range_label_is_a_negative_count(device: torch.device) -> None:
    scores = torch.zeros(2, 4, 9, device=device)
    labels = torch.zeros(2, 9, dtype=torch.int64, device=device)
    labels[1, 3] = 4

    def count(scores: Tensor, labels: Tensor) -> Tensor:
        return ops.dag_seed(scores, labels, "runner-up")[1]

    active = torch.compile(count, fullgraph=True, backend="aot_eager")(scores, labels)
    assert int(active[0]) == 9
    assert int(active[1]) < 0


def fused_losses(scores: Tensor, labels: Tensor, adversarial: Tensor) -> list[Tensor]:
    """Losses of one class and of all, at the scores' size and enlarged, targeted and not."""
    found = []
    for loss in ("blended-cross-entropy", "cosine", "dlr"):
        for other in (None, adversarial):
            found += ops.loss_seed_bilinear(scores, labels, other, loss=loss)
            found += ops.loss_seed(scores[:, :, :4, :6], labels[:, :4, :6], loss=loss)
    return found


def prox_steps(
    images: Tensor, origin: Tensor, gradient: Tensor, active: Tensor, alpha: Tensor
) -> list[Tensor]:
    """Two proximal steps, the second in a ball."""
    moved, metric = images.clone(), torch.ones_like(images)
    written = []
    for epsilon in (None, alpha):
        settings = {"alpha": alpha, "epsilon": epsilon, "weight": 0.1, "lower": 0.0, "upper": 1.0}
        written.append(ops.linf_prox_(moved, origin, gradient, metric, active, **settings))
    return [*written, moved]


def step_arguments(device: torch.device) -> tuple[Tensor, ...]:
    return (*step_case(device), torch.tensor([0.01, 0.02], device=device).double())


CAPTURED = {
    "an iteration": (one_iteration, iteration_arguments, 2),
    "through the interpolation": (through_the_interpolation, bilinear_arguments, 0),
    "losses": (fused_losses, bilinear_arguments, 0),
    "steps": (pgd_steps, step_arguments, 2),
    "proximal steps": (prox_steps, step_arguments, 2),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_cuda_graph(cuda: torch.device, name: str) -> None:
    function, make, changed = CAPTURED[name]
    arguments = make(cuda)
    expected = [t.clone() for t in function(*arguments)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*arguments)
    for t in outputs:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(got, wanted)
    arguments[changed].neg_()  # other scores or another gradient in the same memory
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(outputs, function(*arguments), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", CAPTURED)
def test_what_is_captured_reacts_to_what_is_changed(name: str) -> None:
    """Or the test above would show nothing of replays."""
    function, make, changed = CAPTURED[name]
    arguments = make(torch.device("cpu"))
    before = [t.clone() for t in function(*arguments)]
    arguments[changed].neg_()
    after = function(*arguments)
    assert any(not torch.equal(*both) for both in zip(before, after, strict=True))


def test_current_cuda_stream_is_used(cuda: torch.device) -> None:
    """On a side stream that is busy, the op waits for its turn."""
    scores, labels, adversarial = (t.to(cuda) for t in random_case((2, 5, 64, 64), 0))
    expected = ops.dag_seed(-scores, labels, adversarial)
    late = scores.clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.neg_()
        got = ops.dag_seed(late, labels, adversarial)
    torch.cuda.synchronize()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


# --- registration


@pytest.mark.parametrize("name", PUBLIC)
def test_native_kernels_are_registered(device: torch.device, name: str) -> None:
    key = {"cpu": "CPU", "cuda": "CUDA"}[device.type]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dagcore::{name}", key)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    assert name in ops.OPS
    assert callable(getattr(ops, name))
    assert callable(getattr(reference, name))


def test_simd_level_by_name() -> None:
    before = native.module.simd_in_use()
    with pytest.raises(ValueError, match="must be baseline, avx2 or avx512, got sse"):
        native.module.use_simd("sse")
    assert native.module.simd_in_use() == before


# --- without the native module

MISSING = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dagcore
    assert dagcore.__file__.startswith({folder!r}), dagcore.__file__
    assert dagcore.ops.native.module is None
    scores = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]])
    labels = torch.tensor([[0, 0]])
    counts = []
    for _ in range(3):
        seed, active = dagcore.ops.dag_seed(scores, labels, 1 - labels)
        counts.append(active.tolist())
    images = torch.tensor([[0.5, 0.5]])
    norms = dagcore.ops.linf_step_(
        images, images.clone(), torch.tensor([[1.0, -2.0]]), active,
        gamma=0.25, lower=None, upper=None, epsilon=None,
    )
    torch.manual_seed(0)
    result = dagcore.DAG(gamma=0.01, max_iter=50)(
        torch.nn.Conv2d(3, 4, 3), torch.rand(2, 3, 6, 6), torch.ones(2, 4, 4, dtype=torch.int64)
    )
print(json.dumps({{
    "warnings": [[w.category.__name__, str(w.message)] for w in caught],
    "seed": seed.tolist(), "counts": counts, "images": images.tolist(), "norms": norms.tolist(),
    "converged": result.converged.tolist(),
}}))
"""


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the package in `folder` first."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
    )


def copy_package(folder: Path) -> Path:
    """The package without its native module."""
    copy = folder / "dagcore"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    return copy


def test_missing_module_gives_one_warning_and_the_reference(tmp_path: Path) -> None:
    copy_package(tmp_path)
    done = run_python(MISSING.format(folder=str(tmp_path)), tmp_path)
    assert done.returncode == 0, done.stderr
    got: dict[str, Any] = json.loads(done.stdout)
    assert len(got["warnings"]) == 1
    category, message = got["warnings"][0]
    assert category == "RuntimeWarning"
    assert "native module is not built" in message
    assert "PyTorch" in message
    assert got["seed"] == [[[-1, 0], [1, 0]]]
    assert got["counts"] == [[1]] * 3
    assert got["norms"] == [2]
    assert got["images"] == [[0.625, 0.25]]
    assert got["converged"] == [True, True]


def test_missing_module_under_compile(tmp_path: Path) -> None:
    copy_package(tmp_path)
    code = """
import warnings
import torch, dagcore
scores, labels = torch.randn(2, 4, 9), torch.randint(0, 4, (2, 9))
f = lambda s, l: dagcore.ops.dag_seed(s, l, "runner-up")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    expected = f(scores, labels)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(scores, labels)
assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


BILINEAR_MISSING = """
import itertools, warnings
import torch
from dagcore.ops import native
from dagcore import ops, reference
assert native.module is None
warnings.simplefilter("ignore", RuntimeWarning)
rng = torch.Generator().manual_seed(0)
labels, adversarial = torch.randint(0, 5, (2, 2, 31, 50), generator=rng)
labels[:, 3] = 255
for dtype, corners, last in itertools.product(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64), (False, True), (False, True)
):
    scores = torch.randn(2, 5, 4, 6, generator=rng).to(dtype)
    if last:
        scores = scores.contiguous(memory_format=torch.channels_last)
    winners = [m.argmax_bilinear(scores, (31, 50), align_corners=corners) for m in (ops, reference)]
    assert torch.equal(*winners)
    for goal, other in (("leave", adversarial), ("reach", adversarial), ("leave", "runner-up")):
        (seed, active), (expected, counts) = (
            module.dag_seed_bilinear(scores, labels, other, goal=goal, align_corners=corners)
            for module in (ops, reference)
        )
        assert seed.dtype == dtype and seed.stride() == scores.stride()
        assert int(active.min()) > 0 and torch.equal(active, counts)
        assert torch.equal(seed, expected)
f = lambda s, l: (*ops.dag_seed_bilinear(s, l, "runner-up"), ops.argmax_bilinear(s, (7, 9)))
compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
for got, wanted in zip(compiled(scores, labels), f(scores, labels)):
    assert torch.equal(got, wanted)
for wrong in (labels.fill_(7), "runner-up"), (labels, labels):
    try:
        ops.dag_seed_bilinear(scores, *wrong)
    except ValueError as error:
        assert "got 7 at (0, 0, 0)" in str(error), error
    else:
        raise AssertionError("a label out of range went by")
try:
    torch.ops.dagcore.dag_seed_bilinear(scores, labels, labels, "stay", 255, 0.0, False)
except ValueError as error:
    assert str(error) == "objective must be 'leave' or 'reach', got 'stay'", error
else:
    raise AssertionError("an unknown objective went by")
"""


def test_missing_module_gives_the_references_bilinear_results(tmp_path: Path) -> None:
    copy_package(tmp_path)
    done = run_python(BILINEAR_MISSING, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("with_record", [True, False])
def test_module_that_does_not_load(tmp_path: Path, with_record: bool) -> None:
    copy = copy_package(tmp_path)
    (copy / Path(native.module.__file__).name).write_bytes(b"not a shared library")
    record = copy / "_build.json"
    if with_record:
        record.write_text(json.dumps({"torch": "2.99.7", "cuda": "13.9"}))
    else:
        record.unlink(missing_ok=True)
    done = run_python("import dagcore", tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dagcore's native module was built for torch")
    assert ("built for torch 2.99.7 (CUDA 13.9)" in last) == with_record
    assert f"does not load with torch {torch.__version__}" in last
    assert "Rebuild it" in last


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_simd_level_from_the_environment(tmp_path: Path, level: str) -> None:
    code = "from dagcore.ops.native import module as m; print(m.simd_in_use(), m.simd_supported())"
    done = run_python(code, PACKAGE.parent, DAGCORE_SIMD=level)
    assert done.returncode == 0, done.stderr
    in_use, supported = done.stdout.split()
    order = ["baseline", "avx2", "avx512"]
    assert in_use == min(level, supported, key=order.index)


def test_unknown_simd_level_in_the_environment() -> None:
    done = run_python("import dagcore", PACKAGE.parent, DAGCORE_SIMD="sse9")
    assert done.returncode == 1
    assert "DAGCORE_SIMD must be baseline, avx2 or avx512, got sse9" in done.stderr
